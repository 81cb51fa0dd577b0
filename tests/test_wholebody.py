"""The production tracker around its networks, and YOLOX and SAM2 on random weights in ComfyUI's environment

All three networks together run in test_wan.py."""
import json
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT

from wan_avatar import nodes, wholebody
from wan_avatar.job import JobError
from wan_avatar.people import GAP
from wan_avatar.segments import FACE_POINTS
from wan_avatar.track import Track, check_person, dump_track, parse_track, track_facts, wholebody_points, with_face
from wan_avatar.wholebody import (
    CHUNK,
    MOST_PEOPLE,
    PROMPTED_FRAMES,
    Detectors,
    box_pixels,
    bridge,
    chunks,
    count_people,
    crop_box,
    decode_heatmaps,
    guess_mask,
    is_mask_of,
    is_seen,
    key_frames,
    mend_mask,
    person_boxes,
    take_crop,
    to_frame,
    track_picture,
    track_wholebody,
)

PYTHON = ROOT / '.comfy/env/bin/python'

PERSON = (10, 5, 40, 30) # in a frame of 64x36
def boxes(*rows): return np.array(rows, np.float32).reshape(-1, 4)
def box_mask(box=PERSON) -> np.ndarray: return box_pixels(np.array(box, np.float32), (64, 36))

def made_points(box, sure=.9) -> np.ndarray:
    at = np.random.default_rng(2).uniform(box[:2], box[2:], (133, 2))
    return np.concatenate([at, np.full((133, 1), sure)], 1).astype(np.float32)

# who

ROWS = {
    'nothing': ([], [], []),
    'a chair': ([(0, 0, 128, 72)], [56], []),
    'beyond the frame': ([(-50, -50, 640, 800)], [0], [[0, 0, 640, 720]]),
    'a line': ([(20, 10, 21, 90)], [0], []),
    'outside': ([(1300, 10, 1400, 90)], [0], []),
    'largest first': ([(0, 0, 128, 72), (0, 0, 900, 700), (0, 0, 640, 360)], [0, 15, 0],
        [[0, 0, 640, 360], [0, 0, 128, 72]]),
    'a crowd': (
        [(0, 0, k, 9) for k in range(2, 60)],
        [0] * 58,
        [[0, 0, k, 9] for k in range(59, 59 - MOST_PEOPLE, -1)],
    ),
}
@pytest.mark.parametrize('found, kinds, people', ROWS.values(), ids=ROWS)
def test_people_in_a_detectors_answer(found, kinds, people):
    assert person_boxes(np.array(found), np.array(kinds), (1280, 720)).tolist() == people

@pytest.mark.parametrize('missing, filled', [
    (range(3, 4), True),
    (range(3, 3 + GAP - 1), True),
    (range(3, 3 + GAP), False),
    (range(0, 3), False),
    (range(27, 30), False),
],
                         ids=['one', 'just short enough', 'half a second', 'at the beginning', 'at the end'])
def test_gaps(missing, filled):
    line = np.stack([np.arange(30.), 2 * np.arange(30.)], 1).astype(np.float32)
    holes = line.copy()
    holes[list(missing)] = np.nan
    done = bridge(holes)
    if filled: np.testing.assert_allclose(done, line, atol=1e-4)
    else: np.testing.assert_array_equal(done, holes)

# where

def bumps(at, shape=(64, 48), height=.9) -> np.ndarray:
    y, x = np.mgrid[:shape[0], :shape[1]]
    return np.stack([height * np.exp(-((x - px)**2 + (y - py)**2) / 8) for px, py in at]).astype(np.float32)

@pytest.mark.parametrize('person', [(400, 60, 640, 700), (0, 0, 1280, 720), (600, 300, 640, 340), (-40, 500, 200, 900)])
def test_heatmaps_become_points_of_the_frame_to_half_a_pixel(person):
    around = crop_box(np.array(person, np.float32))
    # in heatmap pixels: the box is the middle 80 % of the crop
    inside = np.random.default_rng(1).uniform([4.8, 6.4], [42.2, 56.6], (133, 2))
    wanted = inside * (around[2:] - around[:2]) / [48, 64] + around[:2]
    found = to_frame(decode_heatmaps(bumps(inside)), around, (64, 48))
    assert np.abs(found[:, :2] - wanted).max() < 0.5
    assert np.abs(found[:, 2] - 0.9).max() < 0.15

def test_decoding_what_no_good_network_answers():
    flat = np.zeros((1, 64, 48), np.float32)
    edge = bumps([(0, 0)])
    noise = np.random.default_rng(0).random((5, 64, 48)).astype(np.float32)
    assert decode_heatmaps(flat).tolist() == [[0, 0, 0]]
    assert decode_heatmaps(edge)[0, :2].tolist() == [0, 0]
    found = decode_heatmaps(noise)
    peaks = np.array([np.unravel_index(h.argmax(), h.shape)[::-1] for h in noise])
    assert np.abs(found[:, :2] - peaks).max() <= 1
    assert np.isfinite(found).all()

def test_crop_shows_what_is_in_the_box():
    frame = np.zeros((720, 1280, 3), np.uint8)
    frame[300:400, 600:700] = 255
    around = crop_box(np.array([500, 200, 800, 500], np.float32))
    assert (around[2] - around[0]) / (around[3] - around[1]) == pytest.approx(192 / 256)
    crop = take_crop(frame, around)[0].mean(0)
    y, x = np.nonzero(crop > 1)
    scale = 192 / (around[2] - around[0])
    assert abs(x.min() - (600 - around[0]) * scale) < 1.5
    assert abs(y.max() - (400 - around[1]) * scale) < 1.5

# a mask that is none of this person

HEAD = [(0, .1), (.02, .08), (-.02, .08), (.04, .09), (-.04, .09)]
STANDING = HEAD + [(.1, .2), (-.1, .2), (.14, .35), (-.14, .35), (.16, .5), (-.16, .5), # shoulders, elbows, wrists
                   (.06, .5), (-.06, .5), (.06, .75), (-.06, .75), (.06, .97), (-.06, .97)] # hips, knees, ankles
UP = {7: (.14, .05), 8: (-.14, .05), 9: (.16, -.1), 10: (-.16, -.1)}
SPREAD = {
    7: (.25, .12),
    8: (-.25, .12),
    9: (.4, .02),
    10: (-.4, .02),
    13: (.17, .72),
    14: (-.17, .72),
    15: (.3, .95),
    16: (-.3, .95),
}
LIMBS = ((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16))

# joints moved, how wide, where the top of the head is, how tall
POSES = {
    'standing': ({}, 1, (640, 20), 680),
    'arms up': (UP, 1, (640, 100), 560),
    'arms and legs spread': (SPREAD, 1, (640, 60), 620),
    'from the side': ({}, .25, (900, 20), 680),
    'close-up, cut off at the chest': ({}, 1, (640, 20), 2600),
    'small and far': ({}, 1, (200, 300), 150),
}

def person_of(pose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Keypoints, those outside the picture unsure; mask; box"
    moved, wide, top, height = POSES[pose]
    body = np.array([moved.get(k, at) for k, at in enumerate(STANDING)]) * (wide * height, height) + top
    feet = np.repeat(body[[15, 16]], 3, 0)
    face = np.repeat(body[:1], 68, 0)
    hands = np.repeat(body[[9, 10]], 21, 0)
    points = np.concatenate([body, feet, face, hands])
    pixel = body.astype(int).tolist()
    mask = np.zeros((720, 1280), np.uint8)
    for a, b in LIMBS: cv2.line(mask, pixel[a], pixel[b], 1, int(height * .06))
    torso = body[[5, 6, 12, 11]] + np.array([[1, 0], [-1, 0], [-1, 0], [1, 0]]) * height * .03
    cv2.fillPoly(mask, [torso.astype(int)], 1)
    cv2.line(mask, pixel[0], body[[5, 6]].mean(0).astype(int).tolist(), 1, int(height * .05))
    cv2.ellipse(mask, pixel[0], (int(height * .055), int(height * .08)), 0, 0, 360, 1, -1)
    ys, xs = np.nonzero(mask)
    sure = np.where(((points >= 0) & (points < (1280, 720))).all(1), .9, .1)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
    return np.concatenate([points, sure[:, None]], 1).astype(np.float32), mask > 0, box

def square(middle: np.ndarray, half: int) -> np.ndarray:
    return box_pixels(np.concatenate([middle - half, middle + half]), (1280, 720))

def part(which: str, mask: np.ndarray, points: np.ndarray, box: np.ndarray) -> np.ndarray:
    "What a segmenter might make of a person's mask"
    rows = np.arange(720)[:, None]
    around = box_pixels(box, (1280, 720))
    neck = points[5, 1] - points[0, 1]
    noise = np.random.default_rng(0).random(mask.shape)
    return {'whole': mask, 'nothing': mask & False, 'head alone': mask & (rows < points[0, 1] + neck * .7),
            'a hand': mask & square(points[9, :2], 9), 'ragged': mask & (noise > .2), 'the box': around,
            'with a bag beside it': mask | square(box[2:], 15), 'spilled over everything': mask | True,
            'the wall alone': ~around}[which]

MASKS = [*((pose, which, True) for pose in POSES for which in ('whole', 'ragged', 'with a bag beside it', 'the box')),
         *((pose, which, False) for pose in POSES for which in ('nothing', 'the wall alone')),
         *((pose, 'head alone', False) for pose in POSES if pose != 'close-up, cut off at the chest'),
         *((pose, which, False) for pose in ('standing', 'arms up') for which in ('a hand', 'spilled over everything')),
         *((pose, 'spilled over everything', False) for pose in ('from the side', 'small and far'))]
@pytest.mark.parametrize('pose, which, good', MASKS, ids=[f'{pose}: {which}' for pose, which, _ in MASKS])
def test_is_this_mask_the_persons(pose, which, good):
    points, mask, box = person_of(pose)
    found = part(which, mask, points, box)
    used, guessed = mend_mask(found, points, box)
    assert is_mask_of(found, points, box) == good
    assert guessed == (not good)
    assert used[mask].mean() >= .7, 'the original person is not delivered'
    assert not (used & ~box_pixels(box, (1280, 720), 1.25)).any(), 'nor is the whole picture painted anew'
    if guessed:
        assert np.array_equal(used, guess_mask(points, box, (1280, 720)))
        assert used[mask].all()

@pytest.mark.parametrize('pose', ['close-up, cut off at the chest', 'arms and legs spread'])
def test_a_mask_that_spills_is_cut_off_where_the_box_is_most_of_the_picture(pose):
    points, mask, box = person_of(pose)
    used, guessed = mend_mask(mask | True, points, box)
    assert not guessed
    assert np.array_equal(used, box_pixels(box, (1280, 720), 1.25))

def test_legs_that_only_the_keypoints_see_behind_a_table_do_not_count():
    points, mask, box = person_of('standing')
    box[3] = 250
    above = mask & box_pixels(box, (1280, 720))
    assert is_mask_of(above, points, box)
    assert not is_mask_of(above & (np.arange(720)[:, None] < 120), points, box)

def test_where_no_limb_is_sure_the_box_decides():
    points, mask, box = person_of('standing')
    points[:, 2] = .4
    assert is_mask_of(mask, points, box)
    assert not is_mask_of(part('a hand', mask, points, box), points, box)

def test_a_guess_holds_a_hand_outside_the_box():
    points, mask, box = person_of('standing')
    points[112:133, :2] = (400, 300)
    guess = guess_mask(points, box, (1280, 720))
    assert guess[300, 400]
    assert guess[mask].all()
    arm = mask | box_pixels(np.array([400, 290, 640, 310]), (1280, 720))
    assert np.array_equal(mend_mask(arm, points, box)[0], arm), 'nor is it cut off from a good mask'
    points[112:133, 2] = .4 # not drawn
    assert np.array_equal(guess_mask(points, box, (1280, 720)), box_pixels(box, (1280, 720)))

BOXES = [
    ((1, 2, 4, 4), 1, 6),
    ((1.2, 2.7, 3.1, 3.3), 1, 6),
    ((-5, -5, 2, 2), 1, 4),
    ((2, 2, 6, 6), 1.5, 30),
    ((0, 0, 8, 6), 3, 48),
    ((9, 9, 12, 12), 1, 0),
]
@pytest.mark.parametrize('box, room, pixels', BOXES)
def test_pixels_of_a_box(box, room, pixels): assert box_pixels(np.array(box, np.float32), (8, 6), room).sum() == pixels

# where SAM2 is told

def presence(n: int, gone=(), blurred=()) -> tuple[np.ndarray, np.ndarray]:
    here = np.tile(boxes(PERSON), (n, 1))
    points = np.tile(made_points(PERSON), (n, 1, 1))
    here[list(gone)], points[list(gone)] = np.nan, np.nan
    points[list(blurred), :, 2] = .1
    return here, points

KEYED = {
    'a chunk': (72, (), (), [[9, 27, 45, 63]]),
    'short': (20, (), (), [[2, 7, 12, 17]]),
    'three frames': (3, (), (), [[0, 1, 2]]),
    'one frame': (1, (), (), [[0]]),
    'nobody': (72, range(72), (), []),
    'recognised late': (72, (), range(40), [[44, 52, 60, 68]]),
    'comes back': (72, range(20, 50), (), [[5, 15], [53, 61, 68]]),
    'soon gone': (72, range(5, 60), (), [[1, 3], [62, 66, 70]]),
    'one frame, then two': (72, (*range(13), *range(14, 70)), (), [[13], [70, 71]]),
    'never recognised': (40, (), range(40), [[20]]),
    'recognised only after coming back': (72, range(30, 45), range(30), [[15], [48, 55, 61, 68]]),
}
@pytest.mark.parametrize('n, gone, blurred, keys', KEYED.values(), ids=KEYED)
def test_key_frames(n, gone, blurred, keys):
    here, points = presence(n, gone, blurred)
    plan = key_frames(here, points)
    assert [k for _, k in plan] == keys
    assert all(set(k) <= set(stretch) for stretch, k in plan)
    assert [i for stretch, _ in plan for i in stretch] == np.flatnonzero(~np.isnan(here[:, 0])).tolist()

@pytest.mark.parametrize('n', [1, 5, 30, 72])
def test_at_least_four_frames_and_one_in_each_stretch_whoever_comes_and_goes(n):
    rng = np.random.default_rng(n)
    for _ in range(50):
        here, points = presence(n, np.flatnonzero(rng.random(n) < rng.random()))
        plan = key_frames(here, points)
        there = int((~np.isnan(here[:, 0])).sum())
        told = sum(len(keys) for _, keys in plan)
        assert all(keys for _, keys in plan)
        assert min(PROMPTED_FRAMES, there) <= told <= PROMPTED_FRAMES + len(plan)

LISTS = [
    ('abcde', 2, 0, ['ab', 'cd', 'e']),
    ('abcde', 3, 1, ['abc', 'cde']),
    ('abcd', 3, 1, ['abc', 'cd']),
    ('abc', 3, 1, ['abc']),
    ('', 3, 1, []),
    ('a', 3, 1, ['a']),
]
@pytest.mark.parametrize('items, size, shared, lists', LISTS)
def test_chunks(items, size, shared, lists): assert [''.join(c) for c in chunks(items, size, shared)] == lists

# memory of a GPU that belongs to ComfyUI

@pytest.mark.parametrize('kind, needed, gpu', [
    ('cuda', 10, True),
    ('cuda', 0, False),
    ('cpu', 10, False),
], ids=['a GPU', 'nothing needed', 'no GPU'])
def test_memory_is_asked_of_comfyui_and_given_back(monkeypatch, kind, needed, gpu):
    said = []
    manager = SimpleNamespace(
        get_torch_device=lambda: SimpleNamespace(type=kind),
        free_memory=lambda size, device: said.append(size),
        soft_empty_cache=lambda: said.append('empty'),
    )
    monkeypatch.setitem(sys.modules, 'comfy', SimpleNamespace(model_management=manager))
    with pytest.raises(KeyError), nodes._gpu_beside_comfy(needed) as there:
        assert there == gpu
        assert said == ([10] if gpu else [])
        raise KeyError # a network that fails gives its memory back too
    assert said == ([10, 'empty'] if gpu else [])

@pytest.mark.parametrize('noses, sure, people', [
    ([(0, 0)], .9, 1),
    ([(0, 0), (4, 0)], .9, 1),
    ([(0, 0), (90, 0)], .9, 2),
    ([(0, 0), (90, 0)], .1, 0),
    ([(0, 0), (90, 0), (92, 1), (0, 3), (0, 90)], .9, 3),
    ([], .9, 0),
])
def test_people_in_a_picture_are_counted_by_their_noses(noses, sure, people):
    points = np.array([made_points((10, 5, 40, 30), sure) + [*at, 0] for at in noses]).reshape(-1, 133, 3)
    points[:, 5, :2], points[:, 6, :2] = points[:, 0, :2] - [10, -20], points[:, 0, :2] + [10, 20] # shoulders
    assert count_people(points) == people

# a whole video, the networks replaced by what is drawn into its frames

class Frame(np.ndarray):
    "A frame that can be watched, and told from others"
    __hash__ = object.__hash__
    def __eq__(self, other): return self is other

class Answer(np.ndarray):
    "As much of a tensor as is asked of one"
    def float(self): return self
    def cpu(self): return self
    def numpy(self): return np.asarray(self)

class FakeSam2:
    """Model and processor with the rules of `transformers`: a prompt counts when its frame is run at once

    `sees(i, told)` is the mask of frame `i` when the nearest frame it was told about is `told`."""
    def __init__(self, frames, sees):
        self.numbers = [f.number for f in frames]
        self.sees = sees
        self.new = None
        self.told = []
        self.given = {}
        self.followed = set()

    def add_inputs_to_inference_session(self, session, frame_idx, obj_ids, input_masks=None, input_boxes=None, **more):
        assert (input_masks is None) != (input_boxes is None)
        self.new = frame_idx
        if input_masks is not None: self.given[frame_idx] = input_masks

    def __call__(self, inference_session, frame_idx):
        assert frame_idx == self.new and not self.followed, 'forgotten'
        self.told.append(frame_idx)

    def propagate_in_video_iterator(self, session, start_frame_idx, max_frame_num_to_track, reverse):
        assert start_frame_idx in self.told
        if reverse and not start_frame_idx: return
        for k in range(max_frame_num_to_track + 1):
            i = start_frame_idx - k if reverse else start_frame_idx + k
            assert k == 0 or i not in self.followed, 'twice'
            self.followed.add(i)
            near = min(self.told, key=lambda told: abs(i - told))
            mask = self.given[i] if i in self.given else self.sees(self.numbers[i], self.numbers[near])
            yield SimpleNamespace(frame_idx=i, pred_masks=mask[None, None].view(Answer))

@pytest.fixture
def stage(monkeypatch):
    "n frames; in `empty` the detector sees nobody, in `blurred` no body is recognised; `where(i)` is the person's box"
    alive = weakref.WeakSet()
    most = [0]
    models = []

    class Stage:
        def run(
            self, n, empty=(), blurred=(), sees=lambda i, told: box_mask(), where=lambda i: PERSON, faceless=(),
            paint=lambda frame, i: None
        ):
            def read():
                for i in range(n):
                    frame = np.full((36, 64, 3), 100 + i % 100, np.uint8).view(Frame)
                    frame.number = i
                    paint(frame, i)
                    alive.add(frame)
                    most[0] = max(most[0], len(alive))
                    yield frame
            def people(frame): return boxes() if frame.number in empty else boxes(where(frame.number))
            def keypoints(frame, box):
                points = made_points(box, .1 if frame.number in blurred else .9)
                if frame.number in faceless: points[FACE_POINTS, 2] = .1
                return points
            @contextmanager
            def segmenter(path, gpu):
                def masks(frames, here, points, first):
                    models.append(model := FakeSam2(frames, sees))
                    session = SimpleNamespace(video_height=36, video_width=64)
                    starts = wholebody._prompt(model, model, session, here, points, first)
                    yield from wholebody._propagate(model, session, starts, lambda masks, **options: masks)
                yield masks
            monkeypatch.setattr(wholebody, '_person_detector', lambda path, gpu: people)
            monkeypatch.setattr(wholebody, '_keypoint_detector', lambda path, gpu: keypoints)
            monkeypatch.setattr(wholebody, '_segmenter', segmenter)
            said = []
            def progress(done, total): said.append((done, total))
            track = track_wholebody(read, n, (64, 36), Detectors(*[Path('none')] * 3), progress=progress)
            return track, said

        def picture(self, rows: list) -> Track:
            "Of a picture in which the detector finds these boxes"
            monkeypatch.setattr(wholebody, '_person_detector', lambda path, gpu: lambda frame: boxes(*rows))
            monkeypatch.setattr(wholebody, '_keypoint_detector', lambda path, gpu: lambda frame, box: made_points(box))
            return track_picture(np.zeros((720, 1280, 3), np.uint8), Detectors(*[Path('none')] * 3))

        def told(self) -> list[list[int]]: return [[m.numbers[i] for i in m.told] for m in models]
    made = Stage()
    made.most = most
    made.models = models
    return made

def test_frames_of_one_chunk_are_the_most_that_is_held(stage):
    track, said = stage.run(3 * CHUNK + 10)
    assert track.present.all()
    assert len(track) == 3 * CHUNK + 10
    assert CHUNK <= stage.most[0] <= CHUNK + 1
    assert said[-1] == (2 * len(track), 2 * len(track))
    assert [d for d, _ in said] == sorted(d for d, _ in said)
    assert set(range(1, 2 * len(track) + 1)) == {d for d, _ in said}, 'every frame counts, none twice'
    assert [m.numbers[0] for m in stage.models] == [0, CHUNK - 1, 2 * (CHUNK - 1), 3 * (CHUNK - 1)]

def test_absent_blurred_and_lost_for_a_moment(stage):
    gone = range(30, 30 + GAP + 3)
    lost = (5, 6)
    blurred = (12, 13, 14)
    track, said = stage.run(60, empty={*gone, *lost}, blurred=set(blurred))
    assert np.flatnonzero(~track.present).tolist() == list(gone)
    assert said[-1] == (120, 120)
    assert not track.mask(31).any()
    assert np.isnan(track.wholebody[31]).all()
    assert track.mask(5)[box_mask()].all()
    assert track.mask(13)[box_mask()].all()
    assert (track.wholebody[13, :, 2] > .8).all(), 'bridged from its good neighbours'

def test_four_frames_of_each_chunk_are_told(stage):
    stage.run(CHUNK + 30, blurred=set(range(8)))
    assert stage.told() == [[16, 32, 48, 64], [71, 74, 82, 90, 98]], 'the second chunk begins with a mask of the first'

def test_nobody_in_a_whole_chunk_asks_no_network(stage):
    track, said = stage.run(CHUNK + 5, empty=set(range(CHUNK)))
    assert len(stage.models) == 1
    assert track.present.tolist() == [False] * CHUNK + [True] * 5
    assert (2 * CHUNK + 5, 2 * CHUNK + 10) in said, 'the empty chunk counts at once'

# a segmenter that loses the person

def fading(i: int, told: int) -> np.ndarray:
    "A twentieth of the person's height is lost with every frame from where it was told"
    return box_mask((10, 5, 40, 30 - 25 * min(abs(i - told) / 20, 1)))

def test_drift_does_not_last_to_the_end_of_a_chunk(stage):
    track, _ = stage.run(3 * CHUNK, sees=fading)
    share = [track.mask(i)[box_mask()].mean() for i in range(len(track))]
    assert min(share) >= .5
    assert not track.guessed.any()
    assert max(share) == 1

def test_who_comes_back_elsewhere_within_a_chunk_is_found_again(stage):
    def where(i: int) -> tuple: return PERSON if i < 30 else (36, 5, 60, 34)
    track, _ = stage.run(CHUNK, empty=set(range(20, 40)), where=where, sees=lambda i, told: box_mask(where(told)))
    assert not track.guessed.any()
    assert not track.present[20:40].any()
    assert all(np.array_equal(track.mask(i), box_mask(where(i))) for i in np.flatnonzero(track.present))
    assert stage.told() == [[5, 15, 45, 56, 66]]

def test_the_last_mask_of_a_chunk_is_the_first_prompt_of_the_next(stage):
    outline = box_mask() & (np.indices((36, 64)).sum(0) % 7 > 0)
    track, _ = stage.run(2 * CHUNK, sees=lambda i, told: outline)
    first, second, third = stage.models
    assert not first.given
    assert second.told[0] == 0
    assert np.array_equal(second.given[0], outline)
    assert np.array_equal(track.mask(CHUNK - 1), outline)
    assert third.numbers == [2 * CHUNK - 2, 2 * CHUNK - 1]

@pytest.mark.parametrize('case', ['lost', 'spilled', 'blurred', 'absent'])
def test_an_error_is_not_handed_on(stage, case):
    last = CHUNK - 1
    bad = {'lost': box_mask() & False, 'spilled': ~box_mask()}.get(case, box_mask())
    blurred = {last} if case == 'blurred' else ()
    empty = set(range(last - GAP, last + 1)) if case == 'absent' else ()
    track, _ = stage.run(2 * CHUNK - 1, empty, blurred, sees=lambda i, told: bad if i == last else box_mask())
    assert not stage.models[1].given
    assert np.flatnonzero(track.guessed).tolist() == ([last] if case in ('lost', 'spilled') else [])

def test_lost_masks_are_guessed_and_counted_bridged_frames_too(stage):
    lost = {3, 4, 13, 40}
    track, _ = stage.run(60, sees=lambda i, told: box_mask() & (i not in lost), blurred={12, 13, 14})
    assert np.flatnonzero(track.guessed).tolist() == sorted(lost)
    assert track_facts(track) == {'frames': 60, 'present': 60, 'faces': 60, 'guessed_masks': 4}
    assert all(track.mask(i)[box_mask()].all() for i in range(60))
    check_person(track, 'video')

def test_a_person_whose_outline_is_lost_all_the_time_is_refused(stage):
    track, _ = stage.run(60, empty=set(range(40, 60)), sees=lambda i, told: box_mask() & (i >= 11))
    assert track_facts(track) == {'frames': 60, 'present': 40, 'faces': 40, 'guessed_masks': 11}
    with pytest.raises(JobError, match='lost in 11 of the 40 frames') as e: check_person(track, 'video')
    assert e.value.code == 'no_person'

PICTURES = {
    'one person': ([(300, 100, 700, 700)], ''),
    'nobody': ([], 'no person was found in the image'),
    'two people': ([(300, 100, 700, 700), (800, 100, 1200, 700)], 'the picture shows 2 people'),
    'somebody small in the background': ([(300, 100, 700, 700), (900, 300, 980, 450)], ''),
    'a face of a few pixels': ([(300, 100, 350, 160)], 'pixels large; it needs 64'),
}
@pytest.mark.parametrize('rows, refused', PICTURES.values(), ids=PICTURES)
def test_pictures(stage, rows, refused):
    if not refused: return check_person(stage.picture(rows), 'image')
    with pytest.raises(JobError, match=refused) as e: check_person(stage.picture(rows), 'image')
    assert e.value.code == ('bad_input' if rows else 'no_person'), 'two people are not reported as nobody'

def test_a_person_seen_from_behind_is_found(stage):
    "No face point is sure; the body's are"
    track, _ = stage.run(20, faceless=range(20))
    assert track.present.all()
    assert track_facts(track)['faces'] == 0
    check_person(track, 'video')
    with pytest.raises(JobError, match='a body in 20 of 20 frames, a face in 0; the profile draft needs a face') as e:
        check_person(track, 'video', 'draft')
    assert e.value.code == 'no_person'

def test_who_stands_where_the_person_was_is_not_the_person(stage):
    "The person leaves after 20 frames; somebody of another colour comes to the same place"
    def paint(frame, i): frame[5:30, 10:40] = (200, 60, 40) if i < 20 else (40, 160, 60)
    track, _ = stage.run(60, empty=range(20, 40), paint=paint)
    assert track.present.tolist() == [True] * 20 + [False] * 40

def test_who_is_hidden_behind_somebody_is_not_there(stage):
    "Five frames show somebody else's box over the person's place, as when they walk past in front"
    def where(i: int) -> tuple: return (2, 2, 50, 34) if 20 <= i < 25 else PERSON
    def paint(frame, i): frame[:, :50] = (40, 160, 60) if 20 <= i < 25 else (200, 60, 40)
    track, _ = stage.run(45, where=where, paint=paint, sees=lambda i, told: box_mask(where(i)))
    assert np.flatnonzero(~track.present).tolist() == list(range(20, 25))
    assert not track.mask(22).any()

def test_track_file_and_person_check(stage):
    track, _ = stage.run(4)
    again = parse_track(dump_track(track))
    assert again.tracker == 'wholebody-sam2-3'
    assert np.array_equal(again.wholebody, track.wholebody)
    assert (again.plate, again.camera, again.skin) == (None, None, None)
    assert again.guessed.dtype == bool
    assert again.guessed.tolist() == [False] * 4
    assert wholebody_points(again) is again.wholebody
    assert with_face(again)[0]
    assert is_seen(again.wholebody).all()
    check_person(again, 'video')
    faceless = made_points((10, 5, 40, 30))
    faceless[FACE_POINTS, 2] = .1
    again.points['wholebody'][0] = faceless
    with pytest.raises(JobError, match='no face'): check_person(again, 'image')
    with pytest.raises(AttributeError): print(again.left_hand)

# the real networks, of random weights, in ComfyUI's environment

@pytest.fixture(scope='module')
def networks(detectors) -> Path: return detectors

def in_comfyui(script: str, *arguments: Path) -> dict:
    "What a script prints on its last line, run where the networks are"
    done = subprocess.run([PYTHON, '-c', script, *arguments], env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

YOLOX = '''
import json, sys
from pathlib import Path
import cv2, numpy as np, onnxruntime
from rtmlib import YOLOX
from wan_avatar import wholebody
from wan_avatar.job import JobError
models = Path(sys.argv[1])
path = models / 'detection/yolox_l.onnx'
find = wholebody._person_detector(path, False)
wholebody.PERSON_SCORE = .99
find_nobody = wholebody._person_detector(path, False)
wholebody.PERSON_SCORE = .3
rng = np.random.default_rng(0)
frame = rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8)
def by_hand(frame):
    seen = np.full((640, 640, 3), 114, np.uint8)
    seen[:360] = cv2.resize(frame[..., ::-1], (640, 360))
    answer, = onnxruntime.InferenceSession(path).run(None, {'images': seen.transpose(2, 0, 1)[None].astype(np.float32)})
    x, y, w, h = answer[0, 20 * 80 + 40, :4]
    x, y, w, h = (x + 40) * 8, (y + 20) * 8, np.exp(w) * 8, np.exp(h) * 8
    return [2 * float(v) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
frame[..., 0] //= 2 # so that RGB and BGR are different pictures
def refused(path):
    try: wholebody._person_detector(path, False)
    except JobError as e: return str(e)
def plain(**options): return YOLOX(str(path), backend='onnxruntime', **options)(frame)
session = onnxruntime.InferenceSession(path)
answer = {'found': find(frame), 'by hand': by_hand(frame), 'rgb': find(frame[..., ::-1]),
          'half': find(cv2.resize(frame, (640, 360))), 'tall': find(np.zeros((1280, 720, 3), np.uint8)),
          'nobody': find_nobody(frame)}
print(json.dumps({k: np.asarray(v).tolist() for k, v in answer.items()} | {
    'kind': str(find(frame).dtype), 'all kinds': len(plain(score_thr=.3)),
    'shapes': [session.get_inputs()[0].shape, session.get_outputs()[0].shape],
    'missing': refused(models / 'detection/gone.onnx'),
    'other': refused(models / 'detection/vitpose-l-wholebody.onnx')}))
'''

def test_yolox_through_rtmlib(networks):
    made = in_comfyui(YOLOX, networks)
    assert made['shapes'] == [[1, 3, 640, 640], [1, 8400, 85]]
    assert made['kind'] == 'float32'
    (box,), person = made['found'], np.array([440, 67.5, 840, 697.5])
    assert np.abs(box - person).max() < 2 and made['all kinds'] == 2, 'rtmlib returns the chair as well'
    off = np.abs(np.array(box) - made['by hand']).max(), np.abs(np.array(box) - made['rgb'][0]).max()
    assert off[0] < 1e-3 < off[1], 'BGR, 0 to 255, grey below'
    assert np.abs(np.array(made['half'][0]) * 2 - person).max() < 2, 'boxes are in pixels of the frame'
    assert np.abs(np.array(made['tall'][0]) - [440, 67.5, 720, 697.5]).max() < 2
    assert made['nobody'] == []
    assert 'models_unavailable' in made['missing']
    assert 'gone.onnx' in made['missing']
    assert all(word in made['other'] for word in ('models_unavailable', '[1, 133, 64, 48]', 'yolox_l.onnx'))

SAM2 = '''
import json, sys
from pathlib import Path
import numpy as np
from wan_avatar import wholebody
rng = np.random.default_rng(0)
frames = [rng.integers(0, 256, (72, 128, 3), dtype=np.uint8) for _ in range(10)]
box = np.array([44, 7, 84, 70], np.float32)
points = np.concatenate([rng.uniform(box[:2], box[2:], (133, 2)), np.full((133, 1), .9)], 1).astype(np.float32)
boxes, points = np.tile(box, (10, 1)), np.tile(points, (10, 1, 1))
boxes[6:8], points[6:8] = np.nan, np.nan
sessions, prompt = [], wholebody._prompt
def watched(model, processor, session, *rest):
    starts = prompt(model, processor, session, *rest)
    stored = session.output_dict_per_obj[0]['cond_frame_outputs']
    sessions.append((session, {i: out['pred_masks'].clone() for i, out in stored.items()}))
    return starts
wholebody._prompt = watched
answer, given = {}, wholebody.box_pixels(np.array([50, 10, 70, 60]), (128, 72))
with wholebody._segmenter(Path(sys.argv[1]) / 'sam2/model.safetensors', False) as segment:
    for name, n, first in (('alone', 10, None), ('handed on', 5, given)):
        made = list(segment(frames[:n], boxes[:n], points[:n], first))
        session, before = sessions[-1]
        stored, (_, mask) = session.output_dict_per_obj[0], made[0]
        told = stored['cond_frame_outputs']
        answer[name] = {
            'order': [int(i) for i, _ in made], 'conditioned': sorted(told),
            'followed': sorted(stored['non_cond_frame_outputs']),
            'kept': all(bool((told[i]['pred_masks'] == m).all()) for i, m in before.items()),
            'remembers': all('maskmem_features' in out for outputs in stored.values() for out in outputs.values()),
            'given': sorted(session.mask_inputs_per_obj[0]),
            'joints': {i: p['point_coords'].shape[2] for i, p in session.point_inputs_per_obj[0].items()},
            'shape': list(mask.shape), 'kind': str(mask.dtype),
            'good': [wholebody.is_mask_of(m, points[0], box) for _, m in made],
            'like': float((mask & given).sum() / (mask | given).sum())}
print(json.dumps(answer))
'''

def test_sam2_is_told_in_four_frames_and_makes_one_mask_for_each_frame_with_the_person(networks):
    made = in_comfyui(SAM2, networks)
    alone = made['alone']
    handed = made['handed on']
    assert alone['order'] == [1, 2, 3, 4, 5, 0, 9, 8], 'each stretch from its first prompt on, then back'
    assert alone['conditioned'] == [1, 3, 5, 9]
    assert alone['followed'] == [0, 2, 4, 8]
    assert not alone['given']
    assert alone['kept'] and alone['remembers'], 'following overwrites no prompted frame'
    assert alone['joints'] == {'1': 10, '3': 10, '5': 10, '9': 10}, 'two corners and eight joints'
    assert alone['shape'] == [72, 128]
    assert alone['kind'] == 'bool'
    assert all(alone['good'])
    assert handed['order'] == [0, 1, 2, 3, 4]
    assert handed['given'] == [0]
    assert handed['conditioned'] == [0, 1, 3, 4]
    assert handed['kept'] and handed['like'] > .9 > alone['like'], 'the mask handed on is the mask of its frame'
