"""Who is followed: boxes and looks are made up here; real faces are followed in test_draft.py"""
import numpy as np
import pytest

from wan_avatar.people import (
    CHOOSING_FRAMES,
    GAP,
    STRANGERS,
    Follower,
    PersonFilter,
    appearance,
    bust,
    face_distance,
    likeness,
    overlap,
    paint_over,
    prominence,
)

SIZE = (1280, 720)

@pytest.mark.parametrize('a, b, shared', [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1),
    ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
    ((0, 0, 2, 2), (2, 0, 4, 2), 0),
    ((0, 0, 2, 2), (5, 5, 5, 5), 0),
])
def test_overlap(a, b, shared): assert overlap(np.array(a, float), np.array([b], float))[0] == pytest.approx(shared)

# looks

def person(hair, skin, coat, light=1.) -> np.ndarray: # (90, 60, 3) uint8
    "Three bands of colour"
    rows = np.repeat([hair, skin, coat], 30, axis=0)[:, None].repeat(60, 1)
    return np.clip(rows * light, 0, 255).astype(np.uint8)

WHOLE = np.array([0, 0, 60, 90])
DARK = ((20, 15, 10), (200, 150, 120), (120, 20, 30))
FAIR = ((200, 150, 40), (220, 180, 160), (30, 90, 40))
def look_of(colours, light=1.) -> np.ndarray: return appearance(person(*colours, light), WHOLE)

@pytest.mark.parametrize('other, light, least, most', [
    (DARK, 1., 1, 1),
    (DARK, .5, .9, 1),
    (DARK, 1.2, .9, 1),
    (FAIR, 1., 0, .9),
    (FAIR, .5, 0, .9),
])
def test_looks(other, light, least, most):
    assert least - 1e-6 <= likeness(look_of(DARK), look_of(other, light)) <= most + 1e-6

@pytest.mark.parametrize('box', [
    (-50, -50, 20, 20),
    (50, 80, 900, 900),
    (500, 500, 600, 600),
    (30, 30, 30, 30),
    (59.6, 89.6, 60, 90),
])
def test_a_box_anywhere_has_a_look(box):
    made = appearance(person(*DARK), np.array(box, float))
    assert np.isfinite(made).all()
    assert made.sum() == pytest.approx(8, abs=1e-3)

def test_black_frames_are_alike():
    "Of the dark only noise is left, which must not look like a cut"
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 6, (72, 128, 3)).astype(np.uint8) for _ in range(5)]
    frames = [appearance(picture, np.array([0, 0, 128, 72])) for picture in pictures]
    assert min(likeness(frames[0], f) for f in frames) > .9

# who is followed: each story says who is in which frames, and whose path it must be

HE = look_of(DARK)
SHE = look_of(FAIR)
TWIN = look_of(DARK, .9)
ROOM = look_of(((90, 90, 90),) * 3)
STREET = look_of(((250, 250, 250), (10, 10, 200), (10, 200, 10)))
def at(x, y=200, w=200, h=400) -> np.ndarray: return np.array([x, y, x + w, y + h], float)
MID = at(540)
SIDE = at(1000)
def still(box): return lambda i: box
def moving(x, speed): return lambda i: at(x + speed * i)
SMALL = still(at(600, 300, 40, 80))

# (appearance, box of frame i, frames it is seen in)
Role = tuple[np.ndarray, object, range]
STORIES = {
    'alone': ([(HE, still(MID), range(60))], 0, range(60)),
    'a detector that errs once': (
        [(HE, still(MID), range(60)), (SHE, still(at(0, 0, 1280, 720)), range(3, 5))],
        0,
        range(60),
    ),
    'somebody passes close to the camera': (
        [(HE, still(MID), range(60)), (SHE, still(at(100, 0, 1100, 720)), range(30, 36))],
        0,
        range(60),
    ),
    'the larger one at first': ([(HE, SMALL, range(60)), (SHE, still(MID), range(60))], 1, range(60)),
    'the one in the middle at first': ([(HE, still(MID), range(60)), (SHE, still(at(1080)), range(60))], 0, range(60)),
    'somebody larger comes later': (
        [(HE, still(MID), range(80)), (SHE, still(at(100, 0, 500, 720)), range(20, 80))],
        0,
        range(80),
    ),
    'nobody at first': ([(HE, still(MID), range(20, 60))], 0, range(20, 60)),
    'two walk past each other, he in front': (
        [(HE, moving(100, 14), range(70)), (SHE, moving(1000, -14), [*range(28), *range(38, 70)])],
        0,
        range(70),
    ),
    'two walk past each other, he behind': (
        [(HE, moving(300, 14), [*range(14), *range(24, 60)]), (SHE, moving(800, -14), range(60))],
        0,
        [*range(14), *range(24, 60)],
    ),
    'behind somebody for a second': (
        [(HE, still(MID), [*range(20), *range(44, 80)]), (SHE, moving(300, 8), range(10, 80))],
        0,
        [*range(20), *range(44, 80)],
    ),
    'leaves and comes back elsewhere': (
        [(HE, still(MID), range(30)), (HE, still(SIDE), range(50, 80))],
        [0, 1],
        [*range(30), *range(50, 80)],
    ),
    'comes back in less light': (
        [(HE, still(MID), range(30)), (TWIN, still(SIDE), range(50, 80))],
        [0, 1],
        [*range(30), *range(50, 80)],
    ),
    'somebody else comes instead': ([(HE, still(MID), range(30)), (SHE, still(MID), range(50, 80))], 0, range(30)),
    'a bystander stays when the person leaves': (
        [(HE, still(MID), range(30)), (SHE, still(SIDE), range(80))],
        0,
        range(30),
    ),
    'a twin beside the person is not the person': (
        [(HE, still(MID), range(30)), (TWIN, still(SIDE), range(80))],
        0,
        range(30),
    ),
    'jumps farther than a box': ([(HE, still(MID), range(30)), (HE, still(SIDE), range(30, 60))], [0, 1], range(60)),
    'nobody': ([], 0, [])}

def tell(roles, cut_at=None) -> tuple[np.ndarray, list]:
    frames = 1 + max((max(when) for _, _, when in roles), default=4)
    follower = Follower(SIZE)
    said = []
    for i in range(frames):
        here = [(box(i), seen) for seen, box, when in roles if i in when]
        if i % 2: here = here[::-1] # detectors keep no order
        boxes = np.array([b for b, _ in here]).reshape(-1, 4)
        scene = STREET if cut_at is not None and i >= cut_at else ROOM
        k = follower.see(boxes, [s for _, s in here], scene)
        said.append(None if k is None else boxes[k])
    return follower.path(), said

@pytest.mark.parametrize('roles, who, present', STORIES.values(), ids=STORIES)
def test_one_person_from_the_first_frame_to_the_last(roles, who, present):
    path, _ = tell(roles)
    assert np.flatnonzero(~np.isnan(path[:, 0])).tolist() == list(present)
    ours = [roles[k] for k in ([who] if isinstance(who, int) else who)] if roles else []
    for i in present: assert any(i in when and np.allclose(path[i], box(i)) for _, box, when in ours), i

def test_what_is_said_at_once_is_what_the_path_says_but_for_the_first_half_second():
    roles, _, _ = STORIES['two walk past each other, he in front']
    path, said = tell(roles)
    assert all(np.allclose(path[i], said[i]) for i in range(CHOOSING_FRAMES, len(path)))

@pytest.mark.parametrize('second, followed', [(HE, True), (SHE, False)], ids=['the same person', 'somebody else'])
def test_after_a_cut_place_says_nothing(second, followed):
    path, _ = tell([(HE, still(MID), range(30)), (second, still(MID), range(30, 60))], cut_at=30)
    assert (~np.isnan(path[:, 0])).tolist() == [True] * 30 + [followed] * 30

def test_a_crowd_does_not_fill_the_memory():
    follower = Follower(SIZE)
    for i in range(400): # new people in every frame, beside the same one
        boxes = np.stack([MID, at(10 + 7 * (i % 5), 10, 20, 40), at(1200, 20 * (i % 30), 20, 40)])
        follower.see(boxes, [HE, SHE, SHE], ROOM)
    assert len(follower.strangers) <= STRANGERS
    assert len(follower.open) <= 3 * (GAP + 2)
    assert len(follower.ours) == 1

def test_prominence_prefers_the_middle():
    assert np.argsort(prominence(np.stack([at(0, 0), MID, at(900)]), SIZE)).tolist() == [0, 2, 1]

# everybody else out of sight

FACES = np.array([[40, 20, 60, 44], [120, 20, 140, 44]], float)

def test_others_are_painted_over_and_ours_is_not():
    rng = np.random.default_rng(0)
    view = rng.integers(0, 255, (90, 160, 3)).astype(np.uint8)
    seen = paint_over(view, FACES[1:], FACES[0])
    left, top, right, bottom = bust(FACES[1]).round().astype(int)
    assert np.ptp(seen[top:bottom, left:right].reshape(-1, 3), axis=0).max() == 0
    seen[top:bottom, left:right] = view[top:bottom, left:right]
    assert np.array_equal(seen, view)

def test_a_face_before_ours_is_painted_over():
    view = np.random.default_rng(0).integers(0, 255, (90, 160, 3)).astype(np.uint8)
    before = np.array([[50, 20, 70, 44]], float)
    seen = paint_over(view, before, FACES[0])
    assert np.ptp(seen[20:44, 50:70].reshape(-1, 3), axis=0).max() == 0
    assert np.array_equal(seen[20:44, 40:50], view[20:44, 40:50])

def test_a_view_of_one_person_is_left_as_it_is():
    people = PersonFilter((160, 90))
    view = np.zeros((90, 160, 3), np.uint8)
    assert people.hide_others(view, FACES[:1]) is view
    assert people.hide_others(view, FACES[:0]) is view
    assert people.hide_others(view, np.concatenate([FACES[:1], FACES[:1] + 3])) is view, 'one face that was found twice'

FOUND = {
    'our face': ([0, 1], (50, 32), True),
    'the other face': ([0, 1], (130, 32), False),
    'the other face, nobody else seen': ([1], (130, 32), False),
    'a nose beside our face': ([0], (60, 32), True),
    'turned away, where our person was': ([], (56, 32), True),
    'turned away, elsewhere': ([], (110, 40), False),
    'between both, nearer to ours': ([0, 1], (80, 32), True),
}
@pytest.mark.parametrize('seen, point, ours', FOUND.values(), ids=FOUND)
def test_whose_face_was_found(seen, point, ours):
    people = PersonFilter((160, 90))
    view = np.zeros((90, 160, 3), np.uint8)
    view[:, :90] = 200 # so that the two look different
    points = np.array([(50, 32)] * 20 + [point] * 5, float)
    for i in range(20): people.hide_others(view, FACES if i < 15 else FACES[:1])
    for _ in range(5): people.hide_others(view, FACES[seen])
    assert people.frames_of_ours(points, np.full(25, 30.))[-1] == ours

def test_how_far_a_point_is_from_a_face():
    assert face_distance(FACES, np.array([130, 32])) == 0
    assert np.isnan(face_distance(FACES[:0], np.array([1, 1])))
    assert np.isnan(face_distance(np.full((2, 4), np.nan), np.array([1, 1])))
