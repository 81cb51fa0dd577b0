"""Track files, smoothing, plate, camera and cut-out; the detectors themselves run in test_draft.py"""
import hashlib
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from wan_avatar.job import JobError
from wan_avatar.track import (
    GROUPS,
    LIGHTS,
    MAGIC,
    STILL,
    TRACKERS,
    Camera,
    Plate,
    Track,
    TrackDamaged,
    _plate_step,
    _TrackUnderWay,
    bridge_gaps,
    check_alone,
    check_person,
    count_faces,
    draw_debug,
    dump_track,
    face_light,
    fill_unseen,
    inside_bars,
    is_present,
    largest_piece,
    light_of_stretches,
    load_track,
    midway,
    pack_mask,
    pack_points,
    parse_track,
    refine_matte,
    save_track,
    scene_cells,
    scene_colours,
    scene_grain,
    skin_colour,
    smooth,
    steady_camera,
    steady_if_still,
    track_facts,
    track_key,
    unpack_mask,
    unpack_points,
)


def make_track(n=6, size=(320, 180), missing=(), **pictures) -> Track:
    w, h = size
    rng = np.random.default_rng(n)
    seen = ~np.isin(np.arange(n), missing)
    groups = [rng.uniform(-20, w + 20, (n, k, 3)) for k in (33, 21, 21, 478)]
    groups = [np.where(seen[:, None, None], points, np.nan).astype(np.float32) for points in groups]
    masks = tuple(pack_mask((rng.random((h // 2, w // 2)) > .5) & s) for s in seen)
    return Track(
        size=size,
        present=seen,
        points=dict(zip(GROUPS, groups, strict=True)),
        mask_size=(w // 2, h // 2),
        masks=masks,
        tracker=TRACKERS['mediapipe'],
        camera=np.tile(STILL.astype(np.float32), (n, 1, 1)),
        skin=np.array([1, 2, 3], np.float32),
        **pictures,
    )

# the file

@pytest.mark.parametrize('track', [
    make_track(),
    make_track(1),
    make_track(missing=[0, 5]),
    make_track(missing=range(6)),
    make_track(plate=np.full((180, 320, 3), 77, np.uint8)),
    make_track(1, matte=np.full((180, 320), 9, np.uint8)),
    make_track(3, size=(96, 250)),
    make_track(
        3,
        light=np.full((LIGHTS, 2, 3), 40, np.float32),
        grain=np.float32([1, 0, 2]),
        scene=np.full((3, *scene_cells((320, 180)), 3), 90, np.uint8),
    ),
    make_track(3, light=np.full((LIGHTS, 2, 3), np.nan, np.float32)),
])
def test_round_trip(track, tmp_path):
    again = load_track(save_track(track, tmp_path / 'ünal 1.track'))
    assert len(again) == len(track)
    assert again.size == track.size
    assert again.tracker == track.tracker
    assert np.array_equal(again.present, track.present)
    assert again.masks == track.masks
    for g in GROUPS: np.testing.assert_allclose(getattr(again, g), getattr(track, g), atol=.13)
    for i in range(len(track)):
        assert np.array_equal(again.mask(i), track.mask(i))
        assert again.mask(i).shape == track.size[::-1]
    assert (again.plate is None) == (track.plate is None)
    assert (again.matte is None) == (track.matte is None)
    for name in ('light', 'grain', 'scene'):
        assert (getattr(again, name) is None) == (getattr(track, name) is None)
        if getattr(track, name) is not None: np.testing.assert_array_equal(getattr(again, name), getattr(track, name))
    assert not list(tmp_path.glob('.*')), 'nothing left beside the file'

def test_second_round_trip_changes_nothing():
    once = parse_track(dump_track(make_track()))
    twice = parse_track(dump_track(once))
    for g in GROUPS: np.testing.assert_array_equal(getattr(once, g), getattr(twice, g))

def _npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return MAGIC + hashlib.sha256(out.getvalue()).digest() + out.getvalue()

WHOLE = dump_track(make_track())
@pytest.mark.parametrize('data', [
    b'',
    MAGIC,
    WHOLE[:10],
    WHOLE[:len(MAGIC) + 32],
    WHOLE[:-1],
    WHOLE[:len(WHOLE) // 2],
    WHOLE + b'x',
    b'x' + WHOLE,
    WHOLE[:60] + bytes([WHOLE[60] ^ 1]) + WHOLE[61:],
    WHOLE.replace(b'track 2', b'track 1', 1),
    b'PK' + bytes(4000),
    _npz(meta=np.zeros(3, np.uint8)),
    _npz(),
    _npz(meta=np.array([{}], object)),
    MAGIC + hashlib.sha256(b'hm').digest() + b'hm',
])
def test_damage(data, tmp_path):
    (tmp_path / 'x').write_bytes(data)
    with pytest.raises(TrackDamaged): load_track(tmp_path / 'x')

def test_missing_file_is_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError): load_track(tmp_path / 'x')

def test_failed_write_leaves_the_old_file(tmp_path):
    path = save_track(make_track(), tmp_path / 'x')
    with pytest.raises(AttributeError): save_track(None, path)
    assert len(load_track(path)) == 6
    assert [p.name for p in tmp_path.iterdir()] == ['x']

def test_float16_is_precise_enough_everywhere():
    near = np.random.default_rng(0).uniform(-200, 200, (3, 478, 3)).astype(np.float32)
    face = near + np.array([1250, 700, 0], np.float32)
    assert np.abs(unpack_points(*pack_points(face)) - face).max() < .07

def test_masks_round_trip_any_size():
    for h, w in ((1, 1), (7, 9), (360, 640)):
        mask = np.random.default_rng(h).random((h, w)) > .5
        assert np.array_equal(unpack_mask(pack_mask(mask), (w, h)), mask)

# the key

@pytest.mark.parametrize('frames, most', [(1, 1), (64, 64), (65, 65), (200, 114), (1000, 191), (14400, 313)])
def test_each_second_of_a_video_counts_alike_in_the_plate_however_long_it_is(frames, most):
    under = _TrackUnderWay((64, 48), (64, 48), named=False)
    away = np.full((48, 64), 255, np.uint8)
    nobody = np.full((478, 3), np.nan, np.float32)
    taken = [i for i in range(frames) if i % _plate_step(i) == 0]
    for i in taken: under._measure(i, np.full((48, 64, 3), round(240 * i / frames), np.uint8), away, STILL, nobody)
    assert len(taken) <= most
    assert np.abs(under.plate.picture().astype(int) - 120 * (frames - 1) / frames).max() <= 4

def test_key_is_stable_and_says_everything():
    sha = hashlib.sha256(b'v').hexdigest()
    hd = (1280, 720)
    assert track_key(sha, hd, 24) == f'tracks/mediapipe-6/1280x720-24/{sha}.track'
    others = (
        track_key(sha, hd, 25),
        track_key(sha, (640, 360), 24),
        track_key(sha, hd, 24, 'wholebody-sam2'),
        track_key('0' * 64, hd, 24),
    )
    assert len({track_key(sha, hd, 24), *others}) == 5
    for bad in ('', 'abc', '../' + 'a' * 61, 'G' * 64, sha.upper()):
        with pytest.raises(ValueError): track_key(bad, hd, 24)

# nobody there

@pytest.mark.parametrize('n, missing, what, refused', [
    (4, [0, 1], 'video', False),
    (4, [0, 1, 2], 'video', True),
    (5, [0, 1, 2], 'video', True),
    (1, [0], 'video', True),
    (1, [], 'video', False),
    (1, [0], 'image', True),
    (1, [], 'image', False),
])
def test_no_person(n, missing, what, refused):
    track = make_track(n, missing=missing)
    if not refused: return check_person(track, what)
    with pytest.raises(JobError) as e: check_person(track, what)
    assert e.value.code == 'no_person'
    assert what in str(e.value)
    if what == 'video': assert f'{n - len(missing)} of {n}' in str(e.value)

# guessed masks

def test_guesses_are_in_the_file_and_absent_in_older_ones():
    track = make_track(4, missing=[3])
    mended = replace(track, guessed=np.array([True, False, True, False]))
    older = parse_track(dump_track(track))
    newer = parse_track(dump_track(mended))
    assert older.guessed is None
    assert newer.guessed.dtype == bool
    assert newer.guessed.tolist() == [True, False, True, False]
    assert track_facts(older) == {'frames': 4, 'present': 3, 'faces': 3, 'guessed_masks': 0}
    assert track_facts(newer) == {'frames': 4, 'present': 3, 'faces': 3, 'guessed_masks': 2}
    assert all(type(v) is int for v in track_facts(newer).values()), 'they go into JSON'

def test_a_track_written_before_guesses_were_counted_is_read():
    "What version 1 of the whole-body tracker wrote has no such array"
    arrays = np.load(io.BytesIO(dump_track(make_track(4))[len(MAGIC) + 32:]))
    assert 'guessed' not in arrays.files
    assert parse_track(_npz(**arrays)).guessed is None

GUESSES = [
    (8, [], 0, False),
    (8, [], 2, False),
    (8, [], 3, True),
    (8, [5, 6, 7], 1, False),
    (8, [5, 6, 7], 2, True),
    (8, [4, 5, 6, 7], 1, False),
    (1, [], 1, True),
]
@pytest.mark.parametrize('n, missing, guessed, refused', GUESSES)
def test_too_many_guesses(n, missing, guessed, refused):
    track = replace(make_track(n, missing=missing), guessed=np.arange(n) < guessed)
    if not refused: return check_person(track, 'video')
    with pytest.raises(JobError) as e: check_person(track, 'video')
    assert e.value.code == 'no_person'
    assert '25%' in e.value.message
    assert f'lost in {guessed} of the {n - len(missing)} frames' in e.value.message

def turned(track: Track, aside: float, width: float = 100) -> Track:
    "A face so many pixels wide, its nose moved aside by a share of half its width"
    face = np.zeros((1, 478, 3), np.float32)
    face[0, 454, 0], face[0, 1, 0] = width, width / 2 * (1 + aside)
    return replace(track, points=track.points | {'face': face})

def without_face(track: Track) -> Track:
    return replace(track, points=track.points | {'face': np.full((1, 478, 3), np.nan, np.float32)})

FACES = {
    'no face': (without_face, '', 'no_person', 'no face was found in the image'),
    'towards the camera': (lambda t: turned(t, 0), 'draft', '', ''),
    'a little turned': (lambda t: turned(t, .6), 'draft', '', ''),
    'turned too far': (
        lambda t: turned(t, -1), 'draft', 'bad_input', 'by 40 degrees; the profile draft takes up to 35'
    ),
    'turned, for a model that can': (lambda t: turned(t, -1), '', '', ''),
    'large enough': (lambda t: turned(t, 0, 64), '', '', ''),
    'too small': (lambda t: turned(t, 0, 63), '', 'bad_input', 'face is 63 pixels large; it needs 64'),
}
@pytest.mark.parametrize('change, face_for, code, says', FACES.values(), ids=FACES)
def test_a_pictures_face(change, face_for, code, says):
    track = change(make_track(1))
    if not code: return check_person(track, 'image', face_for)
    with pytest.raises(JobError, match=says) as e: check_person(track, 'image', face_for)
    assert e.value.code == code

@pytest.mark.parametrize('faces, refused', [(12, False), (3, False), (2, True), (0, True)])
def test_a_renderer_that_draws_by_the_face_needs_one(faces, refused):
    track = make_track(12)
    track.face[faces:] = np.nan
    check_person(track, 'video')
    if not refused: return check_person(track, 'video', 'draft')
    found = f'a body in 12 of 12 frames, a face in {faces}; the profile draft needs a face in 25%'
    with pytest.raises(JobError, match=found) as e: check_person(track, 'video', 'draft')
    assert e.value.code == 'no_person'

@pytest.mark.parametrize('widths, people', [
    ([], 0),
    ([90], 1),
    ([90, 80], 2),
    ([90, 36], 2),
    ([90, 35, 12], 1),
    ([20, 20, 20], 3),
])
def test_faces_of_a_picture_are_counted_but_for_the_background(widths, people):
    boxes = np.array([(200 * k, 0, 200 * k + w, w) for k, w in enumerate(widths)], float).reshape(-1, 4)
    assert count_faces(boxes) == people
    if people < 2: return check_alone(people)
    with pytest.raises(JobError, match=f'the picture shows {people} people') as e: check_alone(people)
    assert e.value.code == 'bad_input'

def test_presence_needs_both_detectors():
    nan = np.full((478, 3), np.nan)
    body = np.ones((33, 3))
    some = np.ones((9, 9), bool)
    none = np.zeros((9, 9), bool)
    assert is_present(body, nan, some)
    assert is_present(np.full((33, 3), np.nan), np.ones((478, 3)), some)
    assert not is_present(body, nan, none)
    assert not is_present(body * [1, 1, .3], nan, some)
    assert not is_present(np.full((33, 3), np.nan), nan, some)

# smoothing

def test_smoothing_keeps_to_its_side_of_a_gap():
    values = np.array([0, 0, 0, np.nan, 900, 900, np.nan, np.nan, 7], np.float32)[:, None, None]
    np.testing.assert_array_equal(smooth(values), values)

def test_smoothing_calms():
    noise = np.random.default_rng(0).normal(size=(200, 5, 3)).astype(np.float32)
    assert smooth(noise).std() < .7 * noise.std()
    assert np.isnan(smooth(np.full((3, 2, 3), np.nan, np.float32))).all()
    np.testing.assert_allclose(smooth(np.ones((1, 2, 3), np.float32)), 1)

# plate and camera

def room(h=180, w=320) -> np.ndarray:
    noise = np.random.default_rng(3).integers(0, 256, (h // 6 + 2, w // 6 + 2, 3)).astype(np.uint8)
    return cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)

def test_plate_recovers_what_a_walker_uncovers():
    background = room()
    plate = Plate((320, 180))
    for x in range(0, 280, 10):
        frame = background.copy()
        away = np.full((180, 320), 255, np.uint8)
        frame[40:, x:x + 40], away[34:, max(x - 6, 0):x + 46] = (255, 0, 255), 0
        plate.add(frame, away)
    assert np.abs(plate.picture().astype(int) - background).mean() < 1

def test_plate_shows_no_ghost_of_who_never_moves():
    background = np.full((180, 320, 3), (40, 90, 60), np.uint8)
    plate = Plate((320, 180))
    frame = background.copy()
    away = np.full((180, 320), 255, np.uint8)
    frame[40:, 100:200], away[30:, 90:210] = (255, 0, 255), 0
    for _ in range(5): plate.add(frame, away)
    assert np.abs(plate.picture().astype(int) - background).max() <= 2

def test_fill_keeps_what_is_known_and_survives_nothing():
    picture = room().astype(np.float32)
    seen = np.zeros((180, 320), bool)
    assert fill_unseen(picture, seen).shape == (180, 320, 3)
    seen[:, :200] = True
    filled = fill_unseen(picture, seen)
    assert np.abs(filled[:, :160].astype(int) - picture[:, :160]).max() <= 1
    assert np.array_equal(fill_unseen(picture, ~np.zeros_like(seen)), picture.astype(np.uint8))

def test_camera_follows_a_shaking_hand_and_plate_stays_sharp():
    wide = room(240, 400)
    camera = Camera()
    plate = Plate((320, 180))
    away = np.full((180, 320), 255, np.uint8)
    for k in range(12):
        dx, dy = round(8 * np.sin(k)), k % 5
        view = np.ascontiguousarray(wide[20 + dy:200 + dy, 40 + dx:360 + dx])
        move = camera.follow(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), away)
        assert np.abs(move[:, 2] - [-dx, -dy]).max() < .3
        assert np.abs(move[:, :2] - np.eye(2)).max() < .01
        plate.add(view, away, steady_camera(move, (320, 180)))
    assert np.abs(plate.picture()[20:-20, 20:-20].astype(int) - wide[40:180, 60:340]).mean() < 4

def test_camera_without_corners_stands_still():
    camera = Camera()
    for value in (10, 200):
        view = np.full((90, 160), value, np.uint8)
        assert np.array_equal(camera.follow(view, np.full((90, 160), 255, np.uint8)), STILL)

@pytest.mark.parametrize('lost', [
    'corners', # something large hides all that was followed so far
    'picture', # a frame is all grey
    'little', # hardly anything is free for a while
])
def test_camera_finds_corners_again(lost):
    "It goes on from the frame before, and the room moves on as it does"
    wide = room(240, 900)
    camera = Camera()
    everywhere = np.full((180, 320), 255, np.uint8)
    for k in range(40):
        dx = 12 * k
        view = cv2.cvtColor(np.ascontiguousarray(wide[30:210, 20 + dx:340 + dx]), cv2.COLOR_RGB2GRAY)
        away = everywhere.copy()
        if lost == 'corners' and k in (6, 20): camera.corners = camera.corners[:4]
        if lost == 'little' and k in (7, 8): away[:, :-90] = 0
        if lost == 'picture' and k == 9: view = np.full_like(view, 120)
        move = camera.follow(view, away)
        if k > 9 and lost == 'picture': continue # that frame's step is unknown
        if not (lost == 'picture' and k == 9): assert np.abs(move[:, 2] - [-dx, 0]).max() < 1.5, k
    assert np.abs(move[:, 2] - [-12 * (38 if lost == 'picture' else 39), 0]).max() < 14

def test_plate_and_camera_leave_bars_out():
    view = np.full((180, 320, 3), 90, np.uint8)
    for bars in ((slice(0, 20),), (slice(160, 180),), (slice(None), slice(0, 60)), (slice(None), slice(300, 320))):
        barred = view.copy()
        barred[bars] = 3
        inside = inside_bars(barred)
        assert not inside[bars].any()
        assert inside.sum() == (~np.isin(barred[..., 0], 3)).sum() - 3 * (180 if len(bars) > 1 else 320)
    assert inside_bars(view).all()
    assert inside_bars(np.zeros_like(view)).all(), 'a black frame is all scene'
    dim = view.copy()
    dim[:30, :300] = 0 # no bar, but a dark corner
    assert inside_bars(dim).all()

# what is measured of the scene

@pytest.mark.parametrize('size', [(640, 360), (640, 480), (640, 1138), (96, 250)])
def test_colours_of_the_scene_are_those_away_from_the_person(size):
    w, h = size
    view = np.zeros((h, w, 3), np.uint8)
    view[:, :w // 2], view[:, w // 2:] = (200, 100, 50), (10, 220, 120)
    away = np.full((h, w), 255, np.uint8)
    view[h // 4:, w // 4:w // 2 + w // 8], away[h // 4:, w // 4:w // 2 + w // 8] = (255, 0, 255), 0
    cells = scene_colours(view, away)
    assert cells.shape == (*scene_cells(size), 3)
    rows, columns = cells.shape[:2]
    assert np.abs(cells[:, :columns // 4 - 1].astype(int) - (200, 100, 50)).max() <= 2
    assert np.abs(cells[:, -columns // 4:].astype(int) - (10, 220, 120)).max() <= 2
    assert not cells[rows // 4 + 1:, columns // 4 + 1:columns // 2].any()
    assert scene_colours(np.zeros_like(view), np.full((h, w), 255, np.uint8)).min() == 1, 'black is not unknown'

@pytest.mark.parametrize('strength', [0, 1, 4])
def test_grain_is_that_of_flat_places(strength):
    rng = np.random.default_rng(0)
    picture = room(360, 640).astype(float)
    picture[:, :320] = 120
    frame = np.clip(picture + rng.normal(0, strength, picture.shape) + .5, 0, 255).astype(np.uint8)
    away = np.full((180, 320), 255, np.uint8)
    assert np.abs(scene_grain(frame, away) - strength).max() < .2 * strength + .1
    assert np.isnan(scene_grain(frame, np.zeros_like(away))).all()
    assert np.isnan(scene_grain(np.full_like(frame, 255), away)).all(), 'what is blown out says nothing'

def test_light_on_a_face_has_a_middle_and_a_spread():
    face = np.random.default_rng(0).uniform(60, 120, (478, 3)).astype(np.float32)
    even = np.full((180, 320, 3), (200, 150, 120), np.uint8)
    sides = even.copy()
    sides[:, :90] //= 2
    middle, spread = face_light(even, face)
    assert np.abs(middle - [66, 15, 23]).max() < 3
    assert spread.max() < .1
    assert face_light(sides, face)[1, 0] > 5
    assert np.isnan(face_light(even, np.full((478, 3), np.nan, np.float32))).all()
    assert np.isnan(face_light(even, face + 900)).all(), 'outside of the picture'

def test_light_of_a_part_counts_as_much_as_its_faces():
    lights = np.full((LIGHTS * 4, 2, 3), 60.)
    lights[16:] = 20
    lights[20:24], lights[25:28] = np.nan, np.nan
    found = light_of_stretches(lights, np.arange(LIGHTS * 4) // 4)[:, 0, 0]
    assert found[0] == 60
    assert np.isnan(found[5]), 'no face at all'
    assert found[7] == 20
    assert 40 < found[6] < 60, 'a single face of four'
    assert np.isnan(light_of_stretches(lights * np.nan, np.arange(LIGHTS * 4) // 4)).all()

# rows of a video: there or not, and where a mask is; the bridged ones
@pytest.mark.parametrize('there, at, bridged', [
    ('##..##', [0, 1, 2, 3, 4, 5], [2, 3]),
    ('##.##.#', [0, 1, 2, 3, 4, 5, 6], [2, 5]),
    ('..##..', [0, 1, 2, 3, 4, 5], []), # before and after is no gap
    ('##..##', [0, 1, 2, None, 4, 5], []), # the segmenter saw nobody either
    ('##..##', [0, 1, 40, 41, 4, 5], []), # something else is there
    ('##..##', [0, 1, 2, 3, 40, 41], []), # another one comes back
    ('#' + '.' * 12 + '#', [0] * 14, list(range(1, 13))),
    ('#' + '.' * 13 + '#', [0] * 15, []), # an absence
    ('......', [0] * 6, []),
])
def test_short_gaps_keep_a_mask(there, at, bridged):
    def disc(x) -> bytes:
        down, across = np.mgrid[:40, :80]
        return pack_mask((across - x - 15) ** 2 + (down - 20) ** 2 < 150 if x is not None else np.zeros((40, 80), bool))
    rows = [(here == '#', STILL, disc(x if here == '#' else None)) for here, x in zip(there, at, strict=True)]
    unsure = {i: disc(x) for i, x in enumerate(at) if there[i] == '.' and x is not None}
    after = bridge_gaps(rows, unsure, (80, 40))
    assert [row[:2] for row in after] == [row[:2] for row in rows]
    assert [i for i, row in enumerate(after) if row[2] != rows[i][2]] == bridged
    assert all(after[i][2] == unsure[i] for i in bridged)

def test_a_tripod_is_exactly_still():
    moves = np.tile(STILL, (20, 1, 1))
    moves[3, 0, 2], moves[7, 1, 2] = .8, 5
    assert np.array_equal(steady_if_still(moves, (1280, 720))[7], STILL)
    moves[:, 0, 2] = 6
    assert np.array_equal(steady_if_still(moves, (1280, 720)), moves)

# pictures

def test_cut_out_is_one_piece_without_what_is_beside_it():
    image = np.full((200, 200, 3), (30, 60, 200), np.uint8)
    image[60:, 60:140], image[20:60, 5:40] = (220, 60, 40), (200, 0, 0)
    soft = np.full((200, 200), .05, np.float32)
    soft[58:, 62:138], soft[22:58, 8:38], soft[100:104, 90:94] = .95, .9, .2
    matte = refine_matte(image, soft)
    assert matte[150, 100] > 250
    assert matte[102, 92] > 250
    assert matte[:50].max() < 30
    assert np.array_equal(refine_matte(image, soft), matte)
    assert not largest_piece(np.zeros((5, 5), bool)).any()
    assert largest_piece(np.ones((5, 5), bool)).all()

def test_skin_and_debug_picture():
    track = make_track(2, missing=[1])
    frame = np.full((180, 320, 3), (200, 150, 120), np.uint8)
    assert np.isnan(skin_colour(frame, track.face[1])).all()
    assert np.allclose(skin_colour(frame, np.full((478, 3), 50.)), (200, 150, 120))
    assert np.array_equal(draw_debug(frame, track, 1), frame)
    assert not np.array_equal(draw_debug(frame, track, 0), frame)

# the frames between

def groups_at(x: float, *seen: str) -> list[np.ndarray]:
    "A person whose face is 100 pixels wide, of whom these groups were seen"
    body, hands, face = (np.tile([x, 50., 1.], (k, 1)) for k in (33, 21, 478))
    face[::2, 0] += 100
    found = zip(GROUPS, (body, hands, hands, face), strict=True)
    return [points if name in seen else np.full_like(points, np.nan) for name, points in found]

@pytest.mark.parametrize('before, after, level, wanted', [ # `level`: of the picture; 0 is that before, 100 that after
    (groups_at(0, *GROUPS), groups_at(20, *GROUPS), 50, groups_at(10, *GROUPS)),
    (groups_at(0, *GROUPS), groups_at(59, *GROUPS), 50, groups_at(29.5, *GROUPS)), # as fast as a head moves
    (groups_at(0, *GROUPS), groups_at(61, *GROUPS), 40, groups_at(0, *GROUPS)), # another one
    (groups_at(0, *GROUPS), groups_at(61, *GROUPS), 60, groups_at(61, *GROUPS)),
    (groups_at(0, 'body', 'face'), groups_at(9, *GROUPS), 0, [
        *groups_at(4.5, 'body')[:1], *groups_at(9, *GROUPS)[1:3], *groups_at(4.5, 'face')[3:]]), # hands come in
    (groups_at(5, *GROUPS), groups_at(0), 50, groups_at(5, *GROUPS)), # somebody leaves
    (groups_at(0), groups_at(5, *GROUPS), 50, groups_at(5, *GROUPS)),
    (groups_at(0), groups_at(0), 50, groups_at(0)),
])
def test_frames_between_lie_midway(before, after, level, wanted):
    def picture(value: int) -> np.ndarray: return np.full((4, 6, 3), value, np.uint8)
    found = midway(picture(level), (picture(0), before), (picture(100), after))
    for name, a, b in zip(GROUPS, found, wanted, strict=True): np.testing.assert_allclose(a, b, err_msg=name)

# MediaPipe, which is in ComfyUI's environment

ROOT = Path(__file__).parents[1]

def run_beside_comfy(script: str, clip: Path) -> str: # what it prints
    command = [ROOT / '.comfy/env/bin/python', '-c', script, clip]
    environment = {'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

VIEWS = '''
import sys
import numpy as np
from wan_avatar import track
from wan_avatar.media import open_video

def views(unseen):
    with open_video(sys.argv[1]) as container:
        seen = [f.reformat(640, 360, 'rgb24').to_ndarray() for f, _ in zip(container.decode(video=0), range(16))]
    return [*seen[:5], *[np.full_like(seen[0], 90)] * unseen, *seen[5:]] # nobody is there, and somebody again
'''

AHEAD = VIEWS + '''
given = views(2)
with track._holistic(static=False) as holistic:
    alone = [track._point_groups(holistic.process(view), (640, 360)) for view in given]
with track._PointsAhead() as points:
    ahead = []
    for n, view in enumerate(given):
        points.give(view)
        if n >= 3: ahead.append(points.take((640, 360)))
    for _ in range(3): ahead.append(points.take((640, 360)))
assert len(ahead) == len(alone) == 18
assert any(np.isnan(g).all() for groups in alone for g in groups), 'frames without a body are among them'
for n, (one, other) in enumerate(zip(alone, ahead)):
    for a, b in zip(one, other): assert np.array_equal(a, b, equal_nan=True), n

track._STUCK_S = 1
with track._PointsAhead() as points: # nothing was given: nothing comes
    try: points.take((640, 360))
    except track.JobError as e: assert 'for 1 s' in str(e)
    else: raise AssertionError('points of no frame')
'''

def test_points_found_ahead_are_those_found_alone(samples):
    run_beside_comfy(AHEAD, samples / 'pexels.mp4')

BETWEEN = VIEWS + '''
from concurrent.futures import Future

def points(process, given): return [track._point_groups(process(view), (640, 360)) for view in given]

given = views(3)
for n in (19, 18): # the last frame is one between, or not
    looked_at = sorted({*range(0, n, 2), n - 1})
    with track._holistic(static=False) as holistic: all_of_them = points(holistic.process, given[:n])
    with track._holistic(static=False) as holistic: some = points(holistic.process, [given[i] for i in looked_at])
    seen = [track._Seen(view, view, view, True, None, Future()) for view in given[:n]]
    found = list(track._with_points(iter(seen), (640, 360)))
    assert [frame for frame, _ in found] == seen, 'in order, each once'
    for i, groups in zip(looked_at, some):
        for a, b in zip(found[i][1], groups): assert np.array_equal(a, b, equal_nan=True), i
    for i in sorted(set(range(n)) - set(looked_at)):
        face, whole = found[i][1][3], all_of_them[i][3]
        assert np.isnan(face).all() == np.isnan(whole).all(), i
        if np.isnan(face).all(): continue
        assert np.median(np.linalg.norm(face[:, :2] - whole[:, :2], axis=1)) < 1.5, i
    assert any(np.isnan(groups[3]).all() for _, groups in found), 'frames without a face are among them'
'''

def test_frames_between_have_their_own_face(samples):
    run_beside_comfy(BETWEEN, samples / 'pexels.mp4')

OUTLINES = """
import json, sys
from wan_avatar.frames import read_frames
from wan_avatar.track import track_video, unpack_mask
track = track_video(read_frames(sys.argv[1], 150, 36), 36, (640, 360))
areas = [int(unpack_mask(m, track.mask_size).sum()) for m in track.masks]
print(json.dumps([track.present.tolist(), areas]))
"""

def test_a_face_that_comes_back_from_behind_a_hand_keeps_its_outline(samples):
    "In two frames it is not known to be ours yet: without an outline the driver himself would flash up in the result"
    printed = run_beside_comfy(OUTLINES, samples / 'pexels.mp4')
    present, areas = json.loads(printed.splitlines()[-1])
    assert not all(present), 'the detectors lose the person: otherwise this says nothing'
    assert min(areas) > 0.8 * max(areas)
