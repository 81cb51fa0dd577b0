"""Where and when a window is made: rectangles hold their masks, intervals of presence, one size for a job"""
from dataclasses import replace

import numpy as np
import pytest

from wan_avatar.cards import PRODUCTION, operations, runs_by_folder
from wan_avatar.frames import SIZE, Rectangle
from wan_avatar.plan import MULTIPLE, PlanRules, mask_boxes, petaflop, plan_scene, stretches
from wan_avatar.segments import BLOCKS, SHAPES, WHOLE, MaskShape, grow_mask
from wan_avatar.track import Track, pack_mask

PHONE = Rectangle(438, 0, 404, 720) # 9:16
CINEMA = Rectangle(0, 88, 1280, 544)

def track_of(masks: list[np.ndarray], present=None) -> Track:
    n = len(masks)
    present = np.ones(n, bool) if present is None else np.array(present, bool)
    height, width = masks[0].shape
    points = {'wholebody': np.zeros((n, 133, 3), np.float32)}
    return Track(SIZE, present, points, (width, height), tuple(map(pack_mask, masks)), 'drawn')

def box(left: int, top: int, right: int, bottom: int) -> np.ndarray: # (360, 640) bool, in pixels of the frame
    out = np.zeros((360, 640), bool)
    out[top // 2:bottom // 2, left // 2:right // 2] = True
    return out

def walking(n: int, step: int = 4, wide: int = 140) -> Track:
    return track_of([box(200 + step * i, 140, 200 + step * i + wide, 660) for i in range(n)])

PEOPLE = { # track; content; size of the rectangles
    'standing': (track_of([box(560, 140, 700, 660)] * 60), WHOLE, (480, 656)),
    'small, far away': (track_of([box(600, 300, 640, 420)] * 60), WHOLE, (480, 480)),
    'in a corner': (track_of([box(0, 600, 60, 720)] * 60), WHOLE, (480, 480)),
    'walking': (walking(160), WHOLE, (528, 656)),
    'close-up': (track_of([box(140, 40, 1140, 720)] * 60), WHOLE, SIZE),
    '9:16': (track_of([box(440, 60, 840, 720)] * 60), PHONE, (480, 720)),
    '9:16, mask in the bars': (track_of([box(0, 60, 1280, 720)] * 60), PHONE, (480, 720)),
    'cinema': (track_of([box(500, 120, 700, 630)] * 60), CINEMA, (480, 544))}

@pytest.mark.parametrize('track, content, size', PEOPLE.values(), ids=PEOPLE)
@pytest.mark.parametrize('shape', SHAPES)
def test_rectangles_hold_their_masks_and_have_one_size(track, content, size, shape):
    mask_shape = MaskShape(shape)
    plan = plan_scene(track, content, mask_shape, PlanRules())
    if shape != 'grid': assert plan.size == size
    for w in plan.windows:
        assert (w.area.width, w.area.height) == plan.size == plan.sampled
        assert w.area.width % MULTIPLE == w.area.height % MULTIPLE == 0
        assert 0 <= w.area.left <= w.area.right <= 1280 and 0 <= w.area.top <= w.area.bottom <= 720
        made = np.zeros((720, 1280), bool)
        made[w.area.top:w.area.bottom, w.area.left:w.area.right] = True
        made[:, :content.left] = made[:, content.right:] = made[:content.top] = made[content.bottom:] = True
        for i in {w.start, min(w.start + w.length, len(track)) - 1}:
            assert made[grow_mask(track.mask(i), mask_shape)].all(), 'a pixel of the mask would not be made'

@pytest.mark.parametrize('shape', SHAPES)
def test_boxes_hold_the_grown_masks_closely(shape):
    random = np.random.default_rng(0)
    masks = []
    for _ in range(8):
        y, x = np.sort(random.integers(0, 360, 2)), np.sort(random.integers(0, 640, 2))
        masks.append(box(2 * x[0], 2 * y[0], 2 * x[1] + 8, 2 * y[1] + 8))
    track, mask_shape = track_of(masks), MaskShape(shape)
    for i, (left, top, right, bottom) in enumerate(mask_boxes(track, mask_shape)):
        ys, xs = np.nonzero(grow_mask(track.mask(i), mask_shape))
        room = np.array([xs.min() - left, ys.min() - top, right - 1 - xs.max(), bottom - 1 - ys.max()])
        assert (room >= 0).all() and (room <= 3 + (32 if shape == 'grid' else 0)).all(), room

def test_a_margin_of_64_pixels_around_the_masks_inside_the_content():
    track = track_of([box(500, 240, 800, 560)] * 9)
    plan = plan_scene(track, WHOLE, MaskShape(dilation=0), PlanRules(least_side=16))
    area = plan.windows[0].area
    assert area.left <= 500 - 64 and area.right >= 800 + 64 and area.width < 300 + 2 * 64 + 4 + MULTIPLE

PRESENCE = { # frames: s: somebody, n: nobody; stretches
    'all': ('s' * 50, [(0, 50)]),
    'late': ('n' * 30 + 's' * 20, [(30, 50)]),
    'gap of 23': ('s' * 9 + 'n' * 23 + 's' * 9, [(0, 41)]),
    'gap of 24': ('s' * 9 + 'n' * 24 + 's' * 9, [(0, 9), (33, 42)]),
    'three': ('ss' + 'n' * 40 + 's' + 'n' * 99 + 'sss', [(0, 2), (42, 43), (142, 145)]),
    'nobody': ('n' * 9, [])}

@pytest.mark.parametrize('frames, spans', PRESENCE.values(), ids=PRESENCE)
def test_stretches(frames, spans):
    found = stretches(np.array([c == 's' for c in frames]))
    assert [(s.start, s.stop) for s in found] == spans

@pytest.mark.parametrize('seed', range(30))
def test_every_frame_with_somebody_is_made_once_and_no_window_crosses_an_interval(seed):
    random = np.random.default_rng(seed)
    runs = random.integers(1, 200, 6)
    present = np.concatenate([np.full(r, k % 2 == seed % 2) for k, r in enumerate(runs)])
    track = track_of([box(560, 140, 700, 660)] * len(present), present)
    plan = plan_scene(track, WHOLE, BLOCKS, PlanRules())
    spans = stretches(present)
    made = [f for w in plan.windows for f in range(w.start + w.overlap, w.stop)]
    assert made == [f for s in spans for f in s]
    for w in plan.windows:
        span = next(s for s in spans if w.start in s)
        assert w.stop <= span.stop and w.overlap == (0 if w.start == span.start else 5)
        assert len(span) > 77 or len([v for v in plan.windows if v.start in span]) == 1
        assert w.length >= min(41, len(span))
    assert [w.index for w in plan.windows] == list(range(len(plan.windows)))
    assert plan == plan_scene(track, WHOLE, BLOCKS, PlanRules()), 'the same plan'

def test_a_plan_goes_on_shorter_behind_the_frames_that_are_made():
    present = [True] * 100 + [False] * 30 + [True] * 40
    track = track_of([box(560, 140, 700, 660)] * 170, present)
    whole = plan_scene(track, WHOLE, BLOCKS, PlanRules())
    second = whole.windows[1]
    rest = plan_scene(track, WHOLE, BLOCKS, PlanRules(), 29, done=second.start + second.overlap, index=1)
    assert rest.windows[0].index == 1 and rest.windows[0].start == second.start and rest.windows[0].overlap == 5
    made = [f for w in (whole.windows[0], *rest.windows) for f in range(w.start + w.overlap, w.stop)]
    assert made == [*range(100), *range(130, 170)]
    assert all(w.length <= 29 for w in rest.windows)

SWITCHES = { # rules; size, sampled, frames made of 90 of which 60 show somebody
    'as shipped': (PlanRules(), (480, 656), (480, 656), 60),
    'whole frames': (PlanRules(rectangle=False), SIZE, SIZE, 60),
    'frames without anybody too': (PlanRules(presence=False), (480, 656), (480, 656), 90),
    'half the pixels': (PlanRules(scale=0.5), (480, 656), (240, 320), 60),
    'larger': (PlanRules(scale=2), (480, 656), (960, 1312), 60),
    'up to a quarter of the frame': (PlanRules(most_share=0.25), SIZE, SIZE, 60)}

@pytest.mark.parametrize('rules, size, sampled, made', SWITCHES.values(), ids=SWITCHES)
def test_each_rule_can_be_switched(rules, size, sampled, made):
    track = track_of([box(560, 140, 700, 660)] * 90, [True] * 60 + [False] * 30)
    plan = plan_scene(track, WHOLE, BLOCKS, rules)
    assert (plan.size, plan.sampled, sum(w.new for w in plan.windows)) == (size, sampled, made)

WINDOWS = [(SIZE, 77), (SIZE, 41), ((480, 720), 77), ((480, 480), 61), ((912, 512), 73)]

@pytest.mark.parametrize('sampled, length', WINDOWS)
def test_the_law_of_the_work_is_the_models(sampled, length):
    assert petaflop(sampled, length) == pytest.approx(operations(*sampled, length).total / 1e15, rel=0.01)

@pytest.mark.parametrize('name', [f'{share} of the frame' for share in ('25%', '50%', '75%')])
def test_the_law_holds_for_seconds_of_a_gpu(name):
    run = runs_by_folder()['h200']
    whole, part = run.case(PRODUCTION), run.case(name)
    assert whole.commit == part.commit, 'measured with the same code'
    law = petaflop(SIZE, whole.frames) / petaflop((part.width, part.height), part.frames)
    assert whole.step_s / part.step_s == pytest.approx(law, rel=0.03)

def test_a_window_whose_masks_are_all_empty_is_made_somewhere():
    track = replace(track_of([np.zeros((360, 640), bool)] * 9), present=np.ones(9, bool))
    assert plan_scene(track, PHONE, BLOCKS, PlanRules()).size == (480, 720)
