"""The production tracker around its networks; the networks themselves run in test_wan.py, in ComfyUI"""
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wan_avatar import nodes, wholebody
from wan_avatar.job import JobError
from wan_avatar.segments import FACE
from wan_avatar.track import check_person, dump_track, has_face, parse_track, wholebody_points
from wan_avatar.wholebody import CHUNK, GAP, Detectors, bridge, crop_box, decode, first_good, follow, is_seen, overlap, passages, person_boxes, prompt_points, take_crop, to_frame, track_wholebody

def boxes(*rows): return np.array(rows, np.float32).reshape(-1, 4)

# who

ROWS = [([], []), ([[0, 0, 640, 640, .04, 0]], []), ([[0, 0, 64, 64, .9, 15]], []), ([[-50, -50, 320, 700, .9, 0]], [[0, 0, 640, 720]]), ([[10, 10, 10, 90, .9, 0]], []),
        ([[0, 0, 64, 64, .9, 0], [0, 0, 320, 320, .2, 0]], [[0, 0, 640, 360], [0, 0, 128, 72]])]
@pytest.mark.parametrize('rows, people', ROWS, ids=['nothing', 'unsure', 'a dog', 'beyond the frame', 'a line', 'largest first'])
def test_people_in_a_detectors_answer(rows, people):
    assert person_boxes(np.array(rows, np.float32).reshape(-1, 6), (640, 640), (1280, 720)).tolist() == people

@pytest.mark.parametrize('a, b, shared', [((0, 0, 2, 2), (0, 0, 2, 2), 1), ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3), ((0, 0, 2, 2), (2, 0, 4, 2), 0), ((0, 0, 2, 2), (5, 5, 5, 5), 0)])
def test_overlap(a, b, shared): assert overlap(np.array(a, np.float32), boxes(b))[0] == pytest.approx(shared)

HE, SHE = (100, 100, 300, 600), (700, 100, 1000, 700)
def test_the_person_with_the_most_picture_over_time_not_the_largest_of_a_moment():
    found = [boxes((0, 0, 1280, 720), HE) if 10 <= i < 14 else boxes(HE) for i in range(40)]
    assert (follow(found) == HE).all()

def test_two_people_are_not_mixed_when_the_order_of_boxes_changes():
    found = [boxes(SHE, HE) if i % 2 else boxes(HE, SHE) for i in range(20)]
    assert len(passages(found)) == 2 and (follow(found) == SHE).all()

def test_who_leaves_and_comes_back_elsewhere_is_followed():
    found = [boxes(HE)] * 30 + [boxes()] * (GAP + 5) + [boxes(SHE)] * 20
    walk = follow(found)
    assert (walk[:30] == HE).all() and np.isnan(walk[30:30 + GAP + 5]).all() and (walk[30 + GAP + 5:] == SHE).all()

def test_a_bystander_is_not_taken_for_the_person_who_left():
    small = (900, 500, 980, 700)
    found = [boxes(HE)] * 30 + [boxes(small)] * 30
    assert np.isnan(follow(found)[30:]).all() and (follow(found)[:30] == HE).all()

def test_nobody(): assert np.isnan(follow([boxes()] * 5)).all() and follow([]).shape == (0, 4)

@pytest.mark.parametrize('missing, filled', [(range(3, 4), True), (range(3, 3 + GAP - 1), True), (range(3, 3 + GAP), False), (range(0, 3), False), (range(27, 30), False)],
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
    inside = np.random.default_rng(1).uniform([4.8, 6.4], [42.2, 56.6], (133, 2)) # in heatmap pixels: the box is the middle 80 % of the crop
    wanted = inside * (around[2:] - around[:2]) / [48, 64] + around[:2]
    found = to_frame(decode(bumps(inside)), around, (64, 48))
    assert np.abs(found[:, :2] - wanted).max() < 0.5 and np.abs(found[:, 2] - 0.9).max() < 0.15

def test_decoding_what_no_good_network_answers():
    flat, edge, noise = np.zeros((1, 64, 48), np.float32), bumps([(0, 0)]), np.random.default_rng(0).random((5, 64, 48)).astype(np.float32)
    assert decode(flat).tolist() == [[0, 0, 0]] and decode(edge)[0, :2].tolist() == [0, 0]
    found, peaks = decode(noise), np.array([np.unravel_index(h.argmax(), h.shape)[::-1] for h in noise])
    assert np.abs(found[:, :2] - peaks).max() <= 1 and np.isfinite(found).all()

def test_crop_shows_what_is_in_the_box():
    frame = np.zeros((720, 1280, 3), np.uint8)
    frame[300:400, 600:700] = 255
    around = crop_box(np.array([500, 200, 800, 500], np.float32))
    assert (around[2] - around[0]) / (around[3] - around[1]) == pytest.approx(192 / 256)
    crop = take_crop(frame, around)[0].mean(0)
    y, x = np.nonzero(crop > 1)
    scale = 192 / (around[2] - around[0])
    assert abs(x.min() - (600 - around[0]) * scale) < 1.5 and abs(y.max() - (400 - around[1]) * scale) < 1.5

# memory of a GPU that belongs to ComfyUI

@pytest.mark.parametrize('kind, needed, gpu', [('cuda', 10, True), ('cuda', 0, False), ('cpu', 10, False)], ids=['a GPU', 'nothing needed', 'no GPU'])
def test_memory_is_asked_of_comfyui_and_given_back(monkeypatch, kind, needed, gpu):
    said = []
    manager = SimpleNamespace(get_torch_device=lambda: SimpleNamespace(type=kind), free_memory=lambda size, device: said.append(size), soft_empty_cache=lambda: said.append('empty'))
    monkeypatch.setitem(sys.modules, 'comfy', SimpleNamespace(model_management=manager))
    with pytest.raises(KeyError), nodes._gpu(needed) as there:
        assert there == gpu and said == ([10] if gpu else [])
        raise KeyError # a network that fails gives its memory back too
    assert said == ([10, 'empty'] if gpu else [])

# a whole video, the networks replaced by what is drawn into its frames

class Frame(np.ndarray):
    "A frame that can be watched, and told from others"
    __hash__ = object.__hash__
    def __eq__(self, other): return self is other

def made_points(box, sure=.9) -> np.ndarray:
    at = np.random.default_rng(2).uniform(box[:2], box[2:], (133, 2))
    return np.concatenate([at, np.full((133, 1), sure)], 1).astype(np.float32)

@pytest.fixture
def stage(monkeypatch):
    "n frames; in those of `empty` the detector sees nobody, in those of `blurred` no body is recognised"
    alive, most, prompts = weakref.WeakSet(), [0], []

    class Stage:
        def run(self, n, empty=(), blurred=()):
            def read():
                for i in range(n):
                    frame = np.full((36, 64, 3), i % 256, np.uint8).view(Frame)
                    frame.number = i
                    alive.add(frame)
                    most[0] = max(most[0], len(alive))
                    yield frame
            monkeypatch.setattr(wholebody, '_person_detector', lambda path, gpu: lambda frame: boxes() if frame.number in empty else boxes((10, 5, 40, 30)))
            monkeypatch.setattr(wholebody, '_keypoint_detector', lambda path, gpu: lambda frame, box: made_points(box, .1 if frame.number in blurred else .9))
            @contextmanager
            def segmenter(path, gpu):
                def masks(frames, here, points):
                    start = first_good(points)
                    prompts.append((frames[start].number, len(prompt_points(points[start], here[start]))))
                    for i in [*range(start, len(frames)), *range(start)]: yield i, np.ones((36, 64), bool)
                yield masks
            monkeypatch.setattr(wholebody, '_segmenter', segmenter)
            said = []
            track = track_wholebody(read, n, (64, 36), Detectors(*[Path('none')] * 3), progress=lambda done, total: said.append((done, total)))
            return track, said
    made = Stage()
    made.most, made.prompts = most, prompts
    return made

def test_frames_of_one_chunk_are_the_most_that_is_held(stage):
    track, said = stage.run(3 * CHUNK + 10)
    assert track.present.all() and len(track) == 3 * CHUNK + 10 and stage.most[0] <= CHUNK + 1
    assert said[-1] == (2 * len(track), 2 * len(track)) and [d for d, _ in said] == sorted(d for d, _ in said)
    assert [number for number, _ in stage.prompts] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]

def test_absent_blurred_and_lost_for_a_moment(stage):
    gone, lost, blurred = range(30, 30 + GAP + 3), (5, 6), (12, 13, 14)
    track, _ = stage.run(60, empty={*gone, *lost}, blurred=set(blurred))
    assert np.flatnonzero(~track.present).tolist() == list(gone)
    assert not track.mask(31).any() and track.mask(5).all() and track.mask(13).all() and np.isnan(track.wholebody[31]).all()
    assert (track.wholebody[13, :, 2] > .8).all(), 'bridged from its good neighbours'

def test_the_first_good_frame_is_prompted(stage):
    stage.run(20, blurred=set(range(8)))
    (number, count), = stage.prompts
    assert number == 8 and count == 8

def test_nobody_in_a_whole_chunk_asks_no_network(stage):
    track, _ = stage.run(CHUNK + 5, empty=set(range(CHUNK)))
    assert len(stage.prompts) == 1 and track.present.tolist() == [False] * CHUNK + [True] * 5

def test_track_file_and_person_check(stage):
    track, _ = stage.run(4)
    again = parse_track(dump_track(track))
    assert again.tracker == 'wholebody-sam2-1' and np.array_equal(again.wholebody, track.wholebody) and (again.plate, again.camera, again.skin) == (None, None, None)
    assert wholebody_points(again) is again.wholebody and has_face(again, 0) and is_seen(again.wholebody).all()
    check_person(again, 'video')
    faceless = made_points((10, 5, 40, 30))
    faceless[FACE, 2] = .1
    again.points['wholebody'][0] = faceless
    with pytest.raises(JobError, match='no face'): check_person(again, 'image')
    with pytest.raises(AttributeError): print(again.left_hand)
