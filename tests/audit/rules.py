"""What Wan2.2-Animate must be shown, written down a second time: plainly, frame by frame, from the rules in
nbs/22_segments, nbs/32_nodes and the model's papers, importing nothing of the package's drawing code.
`python tests/audit/rules.py` wrote the files beside it, once; the test compares the nodes in a real ComfyUI with them,
so a change of either shows.

A driver of eight frames, 1280x720: he walks 6 pixels a frame to the right, is gone in frame 4, and has no face in
frame 6."""
import colorsys
import math
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).parent
FRAMES, SIZE, SAMPLED = 8, (1280, 720), (256, 144)
START, LENGTH, SEEDS = 2, 9, 5 # the window: frames 2 to 7, the last one held for three more; five frames are given
ABSENT, FACELESS = 4, 6

# what was seen

PLACES = {
    0: (0, 0), 1: (14, -12), 2: (-14, -12), 3: (34, -4), 4: (-34, -4), 5: (90, 110), 6: (-90, 110), 7: (150, 230),
    8: (-170, 190), 9: (190, 340), 10: (-230, 90), 11: (55, 330), 12: (-55, 330), 13: (60, 450), 14: (-60, 450),
    15: (60, 560), 16: (-60, 560), 17: (75, 580), 18: (85, 580), 19: (50, 575), 20: (-75, 580), 21: (-85, 580),
    22: (-50, 575),
}

def keypoints() -> np.ndarray: # (8, 133, 3)
    "COCO-WholeBody: 17 of the body, 6 of the feet, 68 of the face, 21 of each hand"
    points = np.zeros((FRAMES, 133, 3), np.float32)
    for i in range(FRAMES):
        x, y = 600 + 6 * i, 130
        for k, (dx, dy) in PLACES.items(): points[i, k] = x + dx, y + dy, 0.9
        for k in range(68):
            angle = 2 * math.pi * k / 68
            points[i, 23 + k] = x + 46 * math.cos(angle), y + 12 + 58 * math.sin(angle), 0.8
        for first, wrist, way in ((91, 9, 1), (112, 10, -1)):
            points[i, first] = points[i, wrist]
            for finger in range(5):
                for bone in range(4):
                    dx, dy = way * (finger - 2) * 7 * (bone + 1) / 2, way * 16 * (bone + 1)
                    points[i, first + 1 + 4 * finger + bone] = *(points[i, wrist, :2] + (dx, dy)), 0.7
        points[i, 7, 2] = 0.4 # the left elbow: not sure enough to be drawn, nor its limbs
    points[FACELESS, 23:91, :2] = np.nan
    points[ABSENT] = np.nan
    points[..., :2] = np.round(points[..., :2]) # whole pixels, which a track file keeps exactly
    return points

def mask(i: int) -> np.ndarray: # (720, 1280) bool
    "A head and a trunk"
    y, x = np.mgrid[:720, :1280]
    head = (x - 600 - 6 * i) ** 2 + (y - 140) ** 2 < 70 ** 2
    trunk = (abs(x - 600 - 6 * i) < 95) & (y > 200) & (y < 700)
    return (head | trunk) & (i != ABSENT)

def frame(i: int) -> np.ndarray: # (720, 1280, 3) uint8
    "A scene of slow gradients, which a codec keeps"
    y, x = np.mgrid[:720, :1280]
    return np.stack([x / 8 + 4 * i, y / 4, (x + y) / 12 + 40], -1).clip(0, 255).astype(np.uint8)

def picture() -> np.ndarray: # (300, 200, 3) uint8
    "A portrait"
    y, x = np.mgrid[:300, :200]
    return np.stack([x, 255 - y / 2, np.full(x.shape, 90)], -1).clip(0, 255).astype(np.uint8)

# the rules

MEANS = [ # a joint is the mean of two keypoints
    (0, 0), (6, 5), (6, 6), (8, 8), (10, 10), (5, 5), (7, 7), (9, 9), (12, 12), (14, 14), (16, 16), (11, 11), (13, 13),
    (15, 15), (2, 2), (1, 1), (4, 4), (3, 3), (17, 18), (20, 21),
]
LIMBS = '2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18 14-19 11-20' # joints from 1
COLOURS = (
    '255,0,0 255,85,0 255,170,0 255,255,0 170,255,0 85,255,0 0,255,0 0,255,85 0,255,170 0,255,255 0,170,255 0,85,255 '
    '0,0,255 85,0,255 170,0,255 255,0,255 255,0,170 255,0,85 200,200,0 100,100,0'
)

def pose(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    "Limbs: flat ellipses at 60 % of their colour; joints: discs; hands: thin lines round the colour circle; no face"
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    stick = max(min(size) // 200 - 1, 1)
    colours = [tuple(map(int, c.split(','))) for c in COLOURS.split()]
    joints = [(points[a] + points[b]) / 2 for a, b in MEANS]
    for pair, colour in zip(LIMBS.split(), colours, strict=False):
        one, other = (joints[int(n) - 1] for n in pair.split('-'))
        if one[2] < 0.5 or other[2] < 0.5: continue
        (xa, ya), (xb, yb) = one[:2], other[:2]
        middle = int((xa + xb) / 2), int((ya + yb) / 2)
        axes = int(math.dist((xa, ya), (xb, yb)) / 2), stick
        outline = cv2.ellipse2Poly(middle, axes, int(math.degrees(math.atan2(ya - yb, xa - xb))), 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, [int(c * 0.6) for c in colour])
    for joint, colour in zip(joints, colours, strict=True):
        if joint[2] >= 0.5: cv2.circle(canvas, (int(joint[0]), int(joint[1])), stick, colour, -1)
    for first in (91, 112): hand(canvas, points[first:first + 21], max(stick // 2, 1))
    return canvas

def hand(canvas: np.ndarray, points: np.ndarray, thick: int) -> None:
    edges = [
        edge
        for root in (1, 5, 9, 13, 17)
        for edge in [(0, root), (root, root + 1), (root + 1, root + 2), (root + 2, root + 3)]
    ]
    at = [(int(x), int(y)) for x, y in points[:, :2]]
    good = [c >= 0.5 and x > 0 and y > 0 for (x, y), c in zip(at, points[:, 2], strict=True)]
    for n, (a, b) in enumerate(edges):
        colour = [255 * c for c in colorsys.hsv_to_rgb(n / 20, 1, 1)]
        if good[a] and good[b]: cv2.line(canvas, at[a], at[b], colour, thick)
    for i in range(21):
        if good[i]: cv2.circle(canvas, at[i], thick, (0, 0, 255), -1)

def face(image: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """The box of the 68 points at 1.3 times its area: half of the growth to the sides, three quarters of it upwards;
    512x512"""
    (x0, y0), (x1, y1) = points[23:91, :2].min(0), points[23:91, :2].max(0)
    if math.isnan(x0): return None
    wide, high = (x1 - x0) * math.sqrt(1.3), (y1 - y0) * math.sqrt(1.3)
    left, right = int(x0 - (wide - x1 + x0) / 2), int(x1 + (wide - x1 + x0) / 2)
    top, bottom = int(y0 - 3 * (high - y1 + y0) / 4), int(y1 + (high - y1 + y0) / 4)
    return cv2.resize(image[max(top, 0):bottom, max(left, 0):right], (512, 512))

def grown(person: np.ndarray) -> np.ndarray:
    """Three passes of a 7x7 kernel, then the cells of a grid over the bounding box, at least 32 pixels each, that are
    touched"""
    wide = person.astype(np.uint8)
    for _ in range(3): wide = cv2.dilate(wide, np.ones((7, 7), np.uint8))
    out, (ys, xs) = np.zeros_like(wide), np.nonzero(wide)
    if not len(ys): return out.astype(bool)
    top, left = ys.min(), xs.min()
    height, width = ys.max() + 1 - top, xs.max() + 1 - left
    rows, columns = max(height // 32, 1), max(width // 32, 1)
    for r in range(rows):
        for c in range(columns):
            y0, x0 = top + r * (height // rows), left + c * (width // columns)
            y1 = top + height if r == rows - 1 else y0 + height // rows
            x1 = left + width if c == columns - 1 else x0 + width // columns
            if wide[y0:y1, x0:x1].any(): out[y0:y1, x0:x1] = 1
    return out.astype(bool)

def rows(masks: np.ndarray, seeds: int) -> np.ndarray: # (length, h, w) -> (4, latent frames, h/8, w/8)
    "The first frame's mask four times, then one row a frame; the top left pixel of each 8x8 cell; the seeds are given"
    cells = masks[:, ::8, ::8].astype(np.uint8)
    four = [cells[0]] * 4 + list(cells[1:])
    for row in range(4 * ((seeds - 1) // 4 + 1) if seeds else 0): four[row] = np.zeros_like(cells[0])
    return np.stack([np.stack(four[n:n + 4]) for n in range(0, len(four), 4)], 1)

def letterboxed(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    "All of it, in the middle, on black"
    high, wide = image.shape[:2]
    scale = min(size[0] / wide, size[1] / high)
    w, h = int(wide * scale), int(high * scale)
    out = np.zeros((size[1], size[0], 3), np.uint8)
    left, top = (size[0] - w) // 2, (size[1] - h) // 2
    interpolation = cv2.INTER_AREA if w * h < wide * high else cv2.INTER_LINEAR
    out[top:top + h, left:left + w] = cv2.resize(image, (w, h), interpolation=interpolation)
    return out

def window(size: tuple[int, int]) -> dict[str, np.ndarray]:
    "The pictures of the window, by name"
    points = keypoints()
    made = {'pose': [], 'face': [], 'mask': [], 'background': []}
    last = np.zeros((512, 512, 3), np.uint8)
    for i in (min(n, FRAMES - 1) for n in range(START, START + LENGTH)):
        image, here = frame(i), i != ABSENT
        if here and (close := face(image, points[i])) is not None: last = close
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if size != SIZE else image
        where = grown(mask(i)).astype(np.uint8) # in pixels of the frame: what is made is what is delivered
        if size != SIZE: where = cv2.resize(where, size, interpolation=cv2.INTER_NEAREST)
        where = where.astype(bool)
        scaled = points[i] * [size[0] / SIZE[0], size[1] / SIZE[1], 1]
        made['pose'].append(pose(scaled, size) if here else np.zeros((size[1], size[0], 3), np.uint8))
        made['face'].append(last)
        made['mask'].append(where)
        made['background'].append(small * ~where[..., None])
    return {k: np.stack(v) for k, v in made.items()}

SHOWN = slice(None, None, 4) # frames of the window whose pictures are kept

def expected() -> dict[str, np.ndarray]:
    "What must come of clip, track and picture"
    small, whole = window(SAMPLED), window(SIZE)
    return {
        'face': small['face'][SHOWN],
        'small_pose': small['pose'][SHOWN],
        'small_background': small['background'][SHOWN],
        'small_mask': small['mask'],
        'whole_pose': whole['pose'][SHOWN],
        'whole_mask': whole['mask'][SHOWN],
        'reference': letterboxed(picture(), SAMPLED),
        'first_rows': rows(small['mask'], 0),
        'later_rows': rows(small['mask'], SEEDS),
    }

def main() -> None:
    "Write clip, track, picture and what must come of them"
    from PIL import Image

    from wan_avatar.mp4 import Encoder  # a codec and a file format are not what is audited
    from wan_avatar.track import TRACKERS, Track, pack_mask, save_track
    with Encoder(HERE / 'driving.mp4') as encoder:
        for i in range(FRAMES): encoder.write(frame(i))
    points, present = keypoints(), np.arange(FRAMES) != ABSENT
    masks = tuple(pack_mask(mask(i)) for i in range(FRAMES))
    track = Track(SIZE, present, {'wholebody': points}, SIZE, masks, TRACKERS['wholebody-sam2'])
    save_track(track, HERE / 'driving.track')
    Image.fromarray(picture()).save(HERE / 'reference.png')
    np.savez_compressed(HERE / 'expected.npz', **expected())

if __name__ == '__main__': main()
