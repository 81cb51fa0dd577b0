"""Conditioning pictures against the numbers of the model's own preprocessing"""
import colorsys

import cv2
import numpy as np
import pytest

from wan_avatar.frames import Rectangle
from wan_avatar.segments import (
    FACE_POINTS,
    FINGERS,
    LEFT_HAND,
    LENGTH,
    LIMB_COLOURS,
    LIMBS,
    OVERLAP,
    RIGHT_HAND,
    WHOLE,
    MaskShape,
    background,
    body_joints,
    draw_body,
    draw_pose,
    face_box,
    fit_length,
    grow_mask,
    hold_last,
    letterbox,
    plan_windows,
    stick_width,
    window_pictures,
)

SIZE = (1280, 720)

def unseen() -> np.ndarray: return np.zeros((133, 3))

def spread() -> np.ndarray:
    "Keypoints whose 20 joints lie apart from each other"
    points = unseen()
    rng = np.random.default_rng(3)
    points[:23, :2], points[:23, 2] = rng.uniform([100, 60], [1180, 660], (23, 2)), 1
    return points

@pytest.mark.parametrize('size, width', [
    ((1280, 720), 2),
    ((832, 480), 1),
    ((1920, 1080), 4),
    ((720, 1280), 2),
    ((100, 100), 1),
    ((400, 400), 1),
    ((600, 600), 2),
])
def test_stick_width(size, width): assert stick_width(size) == width

def test_joints_are_means_of_their_sources():
    points = spread()
    assert np.allclose(body_joints(points)[0], points[0]), 'the nose is one keypoint'
    assert np.allclose(body_joints(points)[1], (points[5] + points[6]) / 2), 'the neck lies between the shoulders'
    assert np.allclose(body_joints(points)[18], (points[17] + points[18]) / 2), 'a toe lies between two keypoints'

def drawn(**places) -> np.ndarray:
    "Some of the 20 joints, by number, on black"
    joints = np.zeros((20, 3))
    canvas = np.zeros((720, 1280, 3), np.uint8)
    for joint, (x, y) in places.items(): joints[int(joint[1:])] = x, y, 1
    draw_body(canvas, joints)
    return canvas

@pytest.mark.parametrize('joint', range(20))
def test_every_joint_is_a_disc_in_its_colour(joint):
    picture = drawn(**{f'j{joint}': (300, 200)})
    assert tuple(picture[200, 300]) == LIMB_COLOURS[joint]
    disc = cv2.circle(np.zeros((720, 1280), np.uint8), (300, 200), 2, 1, -1)
    assert picture.any(2).sum() == disc.sum(), 'a disc of radius 2 and nothing else'

@pytest.mark.parametrize('limb', range(19))
def test_every_limb_is_an_ellipse_at_sixty_percent_of_its_colour(limb):
    a, b = LIMBS[limb]
    picture = drawn(**{f'j{a}': (300, 200), f'j{b}': (500, 200)})
    assert tuple(picture[200, 400]) == tuple(int(c * 0.6) for c in LIMB_COLOURS[limb])
    assert picture[:, 400].any(1).sum() == 5, 'two pixels to either side of the middle line'

def test_limb_order_and_colours_of_the_facts():
    "joint numbers from 1, as the model's preprocessing lists them"
    assert ' '.join(f'{a + 1}-{b + 1}' for a, b in LIMBS) == (
        '2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18 14-19 11-20'
    )
    assert LIMB_COLOURS[0] == (255, 0, 0)
    assert LIMB_COLOURS[12] == (0, 0, 255)
    assert LIMB_COLOURS[18:] == [(200, 200, 0), (100, 100, 0)]
    assert len(set(LIMB_COLOURS)) == 20

@pytest.mark.parametrize('confidence, drawn', [(0.5, True), (0.49, False), (0.0, False), (np.nan, False)])
def test_threshold_on_both_ends(confidence, drawn):
    points = unseen()
    points[6], points[8] = (300, 200, 1), (500, 200, confidence)
    assert draw_pose(points, SIZE)[200, 400].any() == drawn

@pytest.mark.parametrize('hand', [LEFT_HAND, RIGHT_HAND])
def test_hands_are_thin_lines_round_the_colour_circle(hand):
    points = unseen()
    points[hand] = [(200 + 40 * ((i - 1) % 4), 100 + 50 * ((i - 1) // 4), 1) if i else (100, 300, 1) for i in range(21)]
    picture = draw_pose(points, SIZE)
    for n, (a, b) in enumerate(FINGERS):
        (xa, ya), (xb, yb) = points[hand][[a, b], :2].astype(int)
        if not a: continue
        colour = np.multiply(colorsys.hsv_to_rgb(n / 20, 1, 1), 255)
        assert np.allclose(picture[ya, (xa + xb) // 2], colour, atol=1), n
    for x, y in points[hand][:, :2].astype(int): assert tuple(picture[y, x]) == (0, 0, 255)
    assert picture[:, 220].any(1).sum() == 5, 'one pixel thick, one line a finger'

def test_face_points_are_not_drawn():
    points = unseen()
    points[FACE_POINTS] = 300, 200, 1
    assert not draw_pose(points, SIZE).any()

@pytest.mark.parametrize('place', [(-500, -500), (5000, 5000), (np.nan, np.nan), (1e9, -1e9), (0, 0), (1279, 719)])
def test_points_anywhere_do_not_raise(place):
    points = np.ones((133, 3))
    points[:, :2] = place
    assert draw_pose(points, SIZE).shape == (720, 1280, 3)

def face(x0, y0, x1, y1) -> np.ndarray:
    points = unseen()
    points[FACE_POINTS, :2] = (x0 + x1) / 2, (y0 + y1) / 2
    points[23, :2], points[24, :2] = (x0, y0), (x1, y1)
    return points

@pytest.mark.parametrize('box, expected', [
    ((300, 200, 400, 300), (292, 189, 407, 303)), # sqrt(1.3) = 1.1402: 7 px to either side, 10.5 up, 3.5 down
    ((300, 200, 500, 300), (285, 189, 514, 303)),
    ((2, 3, 102, 103), (0, 0, 109, 106)),
    ((1200, 640, 1290, 740), (1193, 629, 1280, 720)),
    ((300, 200, 300, 200), None),
    ((np.nan, 1, 2, 3), None),
    ((-90, -90, -50, -50), None),
])
def test_face_box(box, expected): assert face_box(face(*box), SIZE) == expected

def disc(radius: int, centre=(640, 360)) -> np.ndarray:
    y, x = np.mgrid[:720, :1280]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius ** 2

def slow_grid(mask: np.ndarray, block: int) -> np.ndarray:
    "Cells of a grid that stands still, one by one"
    out = np.zeros_like(mask)
    for y in range(0, 720, block):
        for x in range(0, 1280, block): out[y:y + block, x:x + block] = mask[y:y + block, x:x + block].any()
    return out

def slow_blocks(mask: np.ndarray, block: int) -> np.ndarray:
    "The blocks cell by cell: bounding box divided by side // block, the last cell takes the rest"
    out, (ys, xs) = np.zeros_like(mask), np.nonzero(mask)
    y0 = ys.min()
    y1 = ys.max() + 1
    x0 = xs.min()
    x1 = xs.max() + 1
    rows = max((y1 - y0) // block, 1)
    columns = max((x1 - x0) // block, 1)
    high, wide = (y1 - y0) // rows, (x1 - x0) // columns
    for r in range(rows):
        for c in range(columns):
            y_end = y1 if r == rows - 1 else y0 + (r + 1) * high
            x_end = x1 if c == columns - 1 else x0 + (c + 1) * wide
            cell = np.s_[y0 + r * high:y_end, x0 + c * wide:x_end]
            out[cell] = mask[cell].any()
    return out

MASKS = [
    disc(100),
    disc(3),
    disc(200, (0, 0)),
    disc(150, (1279, 719)),
    disc(40, (300, 200)) | disc(60, (900, 500)),
    np.ones((720, 1280), bool),
]

def bounding_box(mask: np.ndarray) -> np.ndarray:
    out, (ys, xs) = np.zeros_like(mask), np.nonzero(mask)
    out[ys.min():ys.max() + 1, xs.min():xs.max() + 1] = True
    return out

@pytest.mark.parametrize('mask_shape, filled', [
    (MaskShape(), lambda m: slow_blocks(m, 32)),
    (MaskShape(block=50), lambda m: slow_blocks(m, 50)),
    (MaskShape('grid'), lambda m: slow_grid(m, 32)),
    (MaskShape('grid', block=100), lambda m: slow_grid(m, 100)), # does not divide 720 or 1280
    (MaskShape('rectangle'), bounding_box),
    (MaskShape('outline'), lambda m: m),
], ids=['blocks', 'larger blocks', 'grid', 'odd grid', 'rectangle', 'outline'])
@pytest.mark.parametrize('mask', MASKS, ids=['disc', 'dot', 'corner', 'other corner', 'two', 'all'])
def test_mask_is_dilated_then_filled(mask, mask_shape, filled):
    dilated = mask.view(np.uint8)
    for _ in range(3): dilated = cv2.dilate(dilated, np.ones((7, 7), np.uint8))
    assert np.array_equal(grow_mask(mask, mask_shape), filled(dilated.astype(bool)))

def test_a_grid_that_stands_still_moves_with_nobody():
    "Two people whose outlines lie in the same cells have the same mask; the cells of a bounding box move with it"
    here = disc(20, (335, 335))
    there = disc(20, (337, 335))
    still = MaskShape('grid', dilation=0)
    moving = MaskShape('blocks', dilation=0, block=16)
    assert np.array_equal(grow_mask(here, still), grow_mask(there, still))
    assert not np.array_equal(grow_mask(here, moving), grow_mask(there, moving))

def test_mask_edges():
    one = np.zeros((720, 1280), bool)
    one[300, 500] = True
    assert grow_mask(one).sum() == 19 * 19 and grow_mask(one)[291:310, 491:510].all(), 'nine pixels to every side'
    assert not grow_mask(np.zeros_like(one)).any()
    assert not grow_mask(np.zeros_like(one), MaskShape('outline')).any()

def test_background_is_black_under_the_mask_and_untouched_outside():
    frame = np.random.default_rng(0).integers(1, 255, (720, 1280, 3), np.uint8)
    mask = disc(100)
    scene = background(frame, mask)
    assert not scene[mask].any()
    assert np.array_equal(scene[~mask], frame[~mask])

@pytest.mark.parametrize('shape, inner', [
    ((900, 600), (480, 720)),
    ((600, 900), (1080, 720)),
    ((720, 1280), (1280, 720)),
    ((100, 1000), (1280, 128)),
])
def test_letterbox_keeps_all_of_the_picture(shape, inner):
    boxed = letterbox(np.full((*shape, 3), 200, np.uint8), SIZE)
    ys, xs = np.nonzero(boxed[..., 0])
    assert boxed.shape == (720, 1280, 3)
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == inner
    assert abs((xs.min() + xs.max()) / 2 - 639.5) <= 0.5
    assert abs((ys.min() + ys.max()) / 2 - 359.5) <= 0.5

def window(n: int, length: int, start=0, present=None, area=WHOLE, size=SIZE):
    frames = [np.full((720, 1280, 3), 10 + i, np.uint8) for i in range(start, n)]
    points = np.stack([spread() + [i, 0, 0] for i in range(n)])
    points[:, FACE_POINTS] = face(300, 200, 400, 300)[FACE_POINTS]
    present = np.ones(n, bool) if present is None else np.array(present)
    return list(window_pictures(frames, start, length, points, present, lambda i: disc(50 + i), area, size))

@pytest.mark.parametrize('n, length, start', [(1, 1, 0), (1, 5, 0), (9, 9, 0), (12, 9, 5), (80, 13, 72)])
def test_a_window_is_always_full_and_holds_the_last_frame(n, length, start):
    shown = window(n, length, start)
    assert len(shown) == length
    for i, p in enumerate(shown):
        k = min(start + i, n - 1)
        assert np.array_equal(p.mask, grow_mask(disc(50 + k)))
        assert p.background.max() == 10 + k
        assert p.face.max() == 10 + k
        assert p.face.shape == (512, 512, 3)
        assert not p.background[p.mask].any()

def test_frames_without_a_person():
    shown = window(4, 4, present=[False, True, False, True])
    assert [p.pose.any() for p in shown] == [p.mask.any() for p in shown] == [False, True, False, True]
    assert [int(p.face.max()) for p in shown] == [0, 11, 11, 13], 'black before the first face, then the last one'
    assert (shown[0].background == 10).all(), 'the scene alone'

def test_another_size_scales_everything_but_the_face():
    small = window(2, 2, size=(320, 180))[0]
    assert small.pose.shape == small.background.shape == (180, 320, 3)
    assert small.mask.shape == (180, 320)
    assert small.face.shape == (512, 512, 3)
    assert np.array_equal(small.pose, draw_pose(spread() * [0.25, 0.25, 1], (320, 180)))

def test_an_area_is_cut_out_of_what_the_whole_frame_shows():
    area = Rectangle(400, 80, 480, 560)
    whole, cut = window(2, 2)[1], window(2, 2, area=area, size=(480, 560))[1]
    here = np.s_[area.top:area.bottom, area.left:area.right]
    for name in ('mask', 'area_mask', 'background'):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[here]), name
    assert np.array_equal(cut.face, whole.face), 'the close-up comes from the whole frame'
    points = spread() + [1, 0, 0]
    points[:, :2] -= [area.left, area.top]
    points[FACE_POINTS] = 0
    assert np.array_equal(cut.pose, draw_pose(points, (480, 560)))

def test_a_mask_is_grown_in_pixels_of_the_frame_whatever_is_sampled():
    "So that the mask the model is shown is the one the frame is composed with"
    whole, small = window(1, 1)[0], window(1, 1, size=(320, 180))[0]
    assert np.array_equal(small.mask, whole.mask[::4, ::4])
    assert np.array_equal(small.area_mask, whole.mask)

def test_nothing_to_hold_is_an_error():
    with pytest.raises(Exception, match='none came'): list(hold_last([], 3))

def full_windows(n: int, length: int, overlap: int) -> int:
    "Frames sampled by full windows and a rest: what even ones are measured against"
    sampled = 0
    done = 0
    while done < n:
        seed = min(overlap, done)
        new = min(length - seed, n - done)
        sampled, done = sampled + fit_length(seed + new), done + new
    return sampled

@pytest.mark.parametrize('n, lengths', [
    (1, [1]),
    (2, [5]),
    (41, [41]),
    (42, [45]),
    (77, [77]),
    (78, [45] * 2),
    (149, [77] * 2),
    (150, [57] * 3),
    (221, [77] * 3),
    (222, [61] * 4),
    (240, [65] * 4),
    (472, [73] * 7),
    (1440, [77] * 20),
])
def test_windows_of_a_video_are_equally_long(n, lengths): assert [s.length for s in plan_windows(n)] == lengths

def test_every_length_to_a_minute():
    for n in range(1, 1501):
        windows = plan_windows(n)
        made = [f for s in windows for f in range(s.start + s.overlap, s.stop)]
        assert made == list(range(n)), 'a frame is made twice, or not at all'
        assert all(s.length % 4 == 1 and s.length <= LENGTH and s.length == windows[0].length for s in windows), n
        assert all(s.overlap == OVERLAP for s in windows[1:]) and not any(s.held for s in windows[:-1]), n
        assert windows[0].length >= min(41, n), f'{n} frames: a window of {windows[0].length}'
        assert len(windows) * windows[0].length <= 1.08 * full_windows(n, LENGTH, OVERLAP), n

@pytest.mark.parametrize('length, overlap', [(9, 5), (9, 1), (13, 9), (29, 5), (5, 0), (77, 1)])
def test_other_windows_too(length, overlap):
    for n in range(1, 200):
        windows = plan_windows(n, length, overlap)
        assert [f for s in windows for f in range(s.start + s.overlap, s.stop)] == list(range(n))
        assert all(overlap < s.length <= length or s.length == fit_length(n) for s in windows)

@pytest.mark.parametrize('n', [78, 150, 300])
def test_a_plan_goes_on_with_shorter_windows(n):
    "After 77 frames memory ran out: the rest in windows of 37"
    rest = plan_windows(n, length=37, done=77, index=1)
    assert [f for s in rest for f in range(s.start + s.overlap, s.stop)] == list(range(77, n))
    assert rest[0].index == 1
    assert all(s.overlap == 5 and s.length <= 37 for s in rest)
