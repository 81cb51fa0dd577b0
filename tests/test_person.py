"Whom a job names, of several people: chosen among made-up boxes here, among real faces in test_draft.py"
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_guard import STAND, WALK, WHOLE, person
from test_people import DARK, FAIR, ROOM, look_of, moving, still
from test_people import at as box_at

from wan_avatar import wholebody
from wan_avatar.clocks import Stretch
from wan_avatar.frames import Rectangle
from wan_avatar.guard import guard_track
from wan_avatar.job import JobError, parse_job
from wan_avatar.people import (
    BACKGROUND,
    CHOOSING_FRAMES,
    TURNED_AWAY,
    Follower,
    PersonFilter,
    Wish,
    figure,
    own_pixels,
)
from wan_avatar.plan import stretches
from wan_avatar.track import track_key
from wan_avatar.wholebody import box_pixels

SIZE = (1280, 720)
HE, SHE = look_of(DARK), look_of(FAIR)

# the field

TAKEN = [('left', 'left'), ('right', 'right'), ('largest', 'largest'), ([0, 1], (0, 1)), ([0.25, 0.5], (0.25, 0.5)),
         ((0.1, 0.2), (0.1, 0.2)), ([1 / 3, 0.99999], (0.3333, 1))]

@pytest.mark.parametrize('named, kept', TAKEN, ids=str)
def test_whom_a_job_may_name(named, kept):
    assert parse_job({'input_image_minio_path': 'a.png', 'person': named}).person == kept

WRONG = ['middle', '', 'LEFT', '0.2,0.5', 5, True, {}, [], [0.5], [0.1, 0.2, 0.3], [0.1, 1.1], [-0.1, 0.5], [640, 360],
         [float('nan'), 0.5], [float('inf'), 0], [True, False], ['0.2', '0.5'], [None, 0], [[0.1, 0.2]], '?' * 10**6]

@pytest.mark.parametrize('named', WRONG, ids=lambda p: str(p)[:20])
def test_whom_it_may_not(named):
    with pytest.raises(JobError) as e: parse_job({'input_image_minio_path': 'a.png', 'person': named})
    said = e.value.message
    assert e.value.code == 'bad_input' and said.startswith('person ')
    assert '"left", "right", "largest" or [x, y]' in said
    assert len(said) < 200

# the track's key: everything that a track depends on and a job may choose

CHOICES = [ # beside the video: size, stretch, person
    (SIZE, Stretch(), None), ((720, 1280), Stretch(), None), (SIZE, Stretch(2), None), (SIZE, Stretch(0, 2), None),
    (SIZE, Stretch(), 'left'), (SIZE, Stretch(), 'right'), (SIZE, Stretch(), 'largest'), (SIZE, Stretch(), (0.25, 0.5)),
    (SIZE, Stretch(), (0.5, 0.25)), (SIZE, Stretch(), (0.0001, 1)), (SIZE, Stretch(2, 2), 'left')]

def test_a_track_of_each_choice_has_its_own_key():
    keys = [track_key('ab' * 32, size, 24, stretch=stretch, person=named) for size, stretch, named in CHOICES]
    assert len(set(keys)) == len(CHOICES) and all(key.endswith('.track') for key in keys)
    assert keys[-1].endswith('-from48-for48-left.track') and keys[9].endswith('-at0.0001x1.track')

# who it is: each story has roles (appearance, box of frame i, frames it is seen in), the person named and who it is

TINY = still(box_at(10, 300, 30, 60))
TWO = [(HE, still(box_at(200)), range(40)), (SHE, still(box_at(900)), range(40))]
ONE_LATER = [(HE, still(box_at(200)), range(2, 40)), (SHE, still(box_at(900)), range(40))]
CROSSING = [(HE, moving(100, 14), range(70)), (SHE, moving(1000, -14), [*range(28), *range(38, 70)])]
NAMED = {
    'left': (TWO, 'left', 0),
    'right': (TWO, 'right', 1),
    'the larger one, at the edge': ([(HE, still(box_at(0, 0, 400, 720)), range(40)), TWO[1]], 'largest', 0),
    'a point': (TWO, (0.75, 0.5), 1),
    'a point near the edge of a box': (TWO, (0.16, 0.3), 0),
    'somebody tiny is on no side': ([*TWO, (HE, TINY, range(40))], 'left', 0),
    'a point meets somebody tiny': ([*TWO, (SHE, TINY, range(40))], (0.02, 0.45), 2),
    'missed in the first two frames': (ONE_LATER, 'left', 0),
    'who comes after half a second is too late': ([(HE, still(box_at(200)), range(12, 40)), TWO[1]], 'left', 1),
    'who comes after four frames is too late': ([(HE, still(box_at(200)), range(4, 40)), TWO[1]], 'left', 1),
    'a detector that errs once': ([*TWO, (HE, still(box_at(0, 100)), range(1))], 'left', 0),
    'nobody at first': ([(who, box, range(20, 40)) for who, box, _ in TWO], 'right', 1),
    'they cross, the left one': (CROSSING, 'left', 0),
    'they cross, the right one': (CROSSING, 'right', 1),
    'one in front of the other': ([(HE, still(box_at(500)), range(40)), (SHE, still(box_at(560, 260)), range(40))],
                                  (0.55, 0.7), 1),
    'two frames of video': ([(HE, still(box_at(200)), range(2)), (SHE, still(box_at(900)), range(2))], 'right', 1),
}

def tell(roles, wish) -> Follower:
    follower = Follower(SIZE, wish)
    for i in range(1 + max(max(when) for _, _, when in roles)):
        here = [(box(i), seen) for seen, box, when in roles if i in when][::1 if i % 2 else -1] # in no order
        follower.see(np.array([b for b, _ in here]).reshape(-1, 4), [s for _, s in here], ROOM)
    return follower

@pytest.mark.parametrize('roles, named, who', NAMED.values(), ids=NAMED)
def test_who_is_named(roles, named, who):
    path = tell(roles, Wish(named)).path()
    _, box, when = roles[who]
    seen = np.flatnonzero(~np.isnan(path[:, 0])).tolist()
    assert seen == list(when) and all(np.allclose(path[i], box(i)) for i in seen)

@pytest.mark.parametrize('frames', [1, CHOOSING_FRAMES - 1, 40])
def test_a_point_on_nobody_says_where_people_are(frames):
    roles = [(who, box, range(frames)) for who, box, _ in TWO]
    with pytest.raises(JobError) as e: tell(roles, Wish((0.5, 0.05))).path()
    assert e.value.code == 'no_person'
    assert 'person [0.5, 0.05] is on nobody in frame 0' in e.value.message
    assert '[0.23, 0.56]' in e.value.message and '[0.78, 0.56]' in e.value.message

def test_it_is_said_as_soon_as_it_is_sure():
    follower = Follower(SIZE, Wish((0.5, 0.05)))
    with pytest.raises(JobError):
        for _ in range(CHOOSING_FRAMES): follower.see(box_at(200)[None], [HE], ROOM)

def test_a_crowd_is_named_in_part():
    many = np.stack([box_at(40 * k, 300, 30, 60) for k in range(20)])
    said = Wish((0.5, 0.99)).nobody(many, SIZE, 3).message
    assert said.count('[') == 6 and said.endswith('and more') and 'frame 3' in said

def test_nobody_at_all_is_left_to_the_check_of_the_track():
    follower = Follower(SIZE, Wish('left'))
    for _ in range(20): follower.see(np.empty((0, 4)), [], ROOM)
    assert np.isnan(follower.path()).all()

BARS = [ # content of a frame of 1280x720, a point of the picture, who is there
    (Rectangle(437, 0, 406, 720), (0.25, 0.5), 0), (Rectangle(437, 0, 406, 720), (0.75, 0.5), 1),
    (Rectangle(0, 0, 1280, 720), (0.25, 0.5), None), (Rectangle(0, 160, 1280, 400), (0.42, 0.9), 0)]

@pytest.mark.parametrize('content, point, who', BARS)
def test_a_point_counts_from_the_pictures_corner(content, point, who):
    boxes = np.array([[450, 100, 620, 700], [650, 100, 820, 700]], float)
    wish = Wish.parse(Wish.of(point, content, SIZE).text()) # as it travels to the node
    assert wish.choose(boxes, boxes, SIZE) == who

@pytest.mark.parametrize('share, chosen', [(BACKGROUND * 0.9, 0), (BACKGROUND * 1.1, 1)])
def test_how_small_a_background_is(share, chosen):
    boxes = np.stack([box_at(600), box_at(100, 300, 200 * share, 400 * share)])
    assert Wish('left').choose(boxes, boxes, SIZE) == chosen

@pytest.mark.parametrize('text', ['', 'left', '[]', '["left"]', '["middle", [0, 0, 1, 1]]'])
def test_a_node_takes_no_other_text(text):
    with pytest.raises(ValueError): Wish.parse(text)

# where the named person may be, between faces

OURS, BESIDE = np.array([100, 40, 130, 80.]), np.array([200, 40, 230, 80.])
BEHIND = np.array([135, 50, 150, 70.]) # half as large, over our shoulder
PLACES = [ # our face, others, pixel, is it ours
    (OURS, [BESIDE], (115, 60), True), (OURS, [BESIDE], (115, 170), True), (OURS, [BESIDE], (215, 60), False),
    (OURS, [BESIDE], (215, 170), False), (OURS, [BESIDE], (20, 20), True), (OURS, [BESIDE], (300, 170), False),
    (OURS, [BEHIND], (142, 60), False), (OURS, [BEHIND], (142, 120), True), (BEHIND, [OURS], (115, 120), False),
    (BEHIND, [OURS], (142, 60), True), (BEHIND, [OURS], (142, 120), False), (OURS, [], (0, 0), True),
    (np.full(4, np.nan), [BESIDE], (215, 170), False), (np.full(4, np.nan), [BESIDE], (20, 20), True)]

@pytest.mark.parametrize('ours, others, pixel, mine', PLACES)
def test_whose_a_pixel_is(ours, others, pixel, mine):
    own = own_pixels((320, 180), ours, np.array(others).reshape(-1, 4))
    assert own[pixel[1], pixel[0]] == mine

def test_a_figure_holds_body_and_arms():
    left, top, right, bottom = figure(OURS)
    assert left < 70 and right > 160 and top < 20 and bottom > 300

def test_who_turns_away_is_still_there():
    "Two faces, of which the other is lost for a second, then for good; after a cut nobody is remembered"
    view = np.random.default_rng(0).integers(90, 160, (180, 320, 3)).astype(np.uint8)
    faces = np.stack([OURS, BESIDE])
    people = PersonFilter((320, 180), Wish('left'))
    beside = []
    for i in range(130):
        people.hide_others(view, faces if i < 10 or 34 <= i < 40 else faces[:1])
        beside.append(not people.own[120, 215])
    assert all(beside[:40 + TURNED_AWAY]) and not any(beside[40 + TURNED_AWAY:])
    other = PersonFilter((320, 180), Wish('left'))
    for i in range(20):
        scene = view if i < 15 else np.full_like(view, (250, 20, 20))
        other.hide_others(scene, faces if i < 15 else faces[:1])
    assert other.own.all()

# the guard: what somebody who passes in front looks like is no failure of a named person

COVERED = [100.0] * 20 + [140.0] * 8 + [100.0] * 32 # where the mask is, of somebody who stays at 100
HALF = [100.0] * 20 + [140.0] * 30 + [100.0] * 10
ELSEWHERE = [100.0] * 30 + [240.0] * 30
PASSING = { # track, what fails of anybody, what fails of a person whom the job names
    'comes and goes': (person(STAND, missing=[*range(15, 22), *range(36, 44)]), {'broken'}, set()),
    'covered for a while': (person(STAND, masks_at=COVERED), {'mask', 'inside'}, set()),
    'covered for half of the time': (person(STAND, masks_at=HALF), {'mask', 'inside'}, {'inside'}),
    'the face is another one': (person(ELSEWHERE), {'face', 'mask'}, {'face'}),
    'the face jumps by half a width, and stays': (person([100.0] * 30 + [114.0] * 30), {'face'}, set()),
    'a picture': (person([100.0] * 110, still=True), {'still'}, {'still'}),
    'all is well': (person(WALK), set(), set())}

@pytest.mark.parametrize('track, anybody, named', PASSING.values(), ids=PASSING)
def test_what_the_guard_refuses_of_a_named_person(track, anybody, named):
    for wanted, said in ((anybody, False), (named, True)):
        found = guard_track(track, stretches(track.present), WHOLE, named=said)
        assert {f.what for f in found if f.grade == 'failed'} == wanted

# production's tracker, with networks that see two people of drawn boxes

BOXES = {'left': np.array([40, 60, 340, 700.]), 'right': np.array([840, 60, 1140, 700.])}

def body(box: np.ndarray) -> np.ndarray: # (133, 3)
    "Keypoints all over a box"
    across, down = np.meshgrid(np.linspace(0.1, 0.9, 12), np.linspace(0.05, 0.95, 12))
    at = box[:2] + np.stack([across, down], -1).reshape(-1, 2)[:133] * (box[2:] - box[:2])
    return np.column_stack([at, np.full(133, 0.9)]).astype(np.float32)

@contextmanager
def masks_of_boxes(path, gpu):
    def masks(frames, boxes, points, first):
        for i in np.flatnonzero(~np.isnan(boxes[:, 0])): yield int(i), box_pixels(boxes[i], SIZE)
    yield masks

@pytest.mark.parametrize('named, who', [('left', 'left'), ('right', 'right'), ((0.7, 0.5), 'right')], ids=str)
def test_productions_tracker_takes_the_person_who_is_named(monkeypatch, named, who):
    monkeypatch.setattr(wholebody, '_person_detector', lambda path, gpu: lambda frame: np.stack([*BOXES.values()]))
    monkeypatch.setattr(wholebody, '_keypoint_detector', lambda path, gpu: lambda frame, box: body(box))
    monkeypatch.setattr(wholebody, '_segmenter', masks_of_boxes)
    frames = [np.full((720, 1280, 3), 120, np.uint8)] * 6
    files = wholebody.Detectors(*[Path('none')] * 3)
    track = wholebody.track_wholebody(lambda: iter(frames), 6, SIZE, files, wish=Wish(named))
    assert track.present.all()
    for i in range(6): assert np.array_equal(track.mask(i), box_pixels(BOXES[who], SIZE))
