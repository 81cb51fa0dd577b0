"A person drawn by hand, together with the track that a detector would find: the figures of 23_draft's lessons"
import numpy as np
from PIL import Image, ImageDraw

from wan_avatar.draft import EYE_CORNERS, LIDS, LIPS, OVAL
from wan_avatar.track import LIGHTS, Track, pack_mask, scene_cells


def cartoon_points(x, y, r, opened=0.0, closed=0.0):
    "478 points of a face of half height `r` around (x, y): mouth open by `opened`, eyes closed by `closed`"
    k = np.arange(478)
    away = np.sqrt((k + .5) / 478) * .95
    p = np.stack([.78 * away * np.cos(k * 2.4), away * np.sin(k * 2.4)], 1) # sunflower: fills the face
    around = np.radians(np.arange(36) * 10 - 90)
    p[OVAL] = np.stack([.8 * np.cos(around), np.sin(around)], 1)
    p[[151, 9, 8, 168, 6, 197, 195, 5, 4]] = np.stack([np.zeros(9), np.linspace(-.7, .15, 9)], 1)
    across = np.linspace(-.3, .3, 11)
    bow = .06 * (1 - (across / .3) ** 2)
    p[LIPS[:11]] = np.stack([across, .5 - bow * .3], 1)
    p[[78, *LIPS[:10:-1], 308]] = np.stack([across, .5 - bow * .3 + opened * bow / .06], 1)
    for eye, side in enumerate((-1, 1)):
        t = np.linspace(1, -1, 9) * side * .17
        lid = .07 * (1 - (t / .17) ** 2)
        for row, sign in zip(LIDS, (-1, 1), strict=True):
            rim = [EYE_CORNERS[eye][0], *row[eye * 7:eye * 7 + 7], EYE_CORNERS[eye][1]]
            p[rim] = np.stack([side * .35 + t, -.2 + sign * lid * (1 - closed)], 1)
        p[468 + eye * 5] = side * .35, -.2
        p[[105, 334][eye]] = side * .35, -.45
    depth = -.5 * np.sqrt(np.clip(1.02 - (p[:, 0] / .8) ** 2 - p[:, 1] ** 2, 0, None))
    return (np.column_stack([p, depth]) * r + [x, y, 0]).astype(np.float32)


def cartoon(face, size=(320, 180), behind=(90, 110, 150), flag=False):
    "A picture of that face, and where the person is in it"
    person = Image.new('L', size)
    picture = Image.fromarray(behind) if isinstance(behind, np.ndarray) else Image.new('RGB', size, behind)
    (left, top), (right, bottom) = face[OVAL, :2].min(0), face[OVAL, :2].max(0)
    middle = (left + right) / 2
    tall = bottom - top
    trunk = [(middle - tall * .15, bottom - 3), (middle + tall * .15, bottom - 3),
             (middle + tall * .8, size[1]), (middle - tall * .8, size[1])]
    colours = (60, 40, 30), (225, 130, 60), (235, 190, 160) # hair, trunk, face
    for pen, ink in ((ImageDraw.Draw(person), (255, 255, 255)), (ImageDraw.Draw(picture), colours)):
        if flag and ink[0] != 255: pen.rectangle([0, 0, left - tall * .2, size[1]], fill=(200, 0, 60))
        pen.ellipse([left - tall * .1, top - tall * .2, right + tall * .1, bottom - tall * .3], fill=ink[0])
        pen.polygon(trunk, fill=ink[1])
        pen.polygon([tuple(p) for p in face[OVAL, :2].tolist()], fill=ink[2])
    for eye in range(2):
        up, low = (lids[eye * 7:eye * 7 + 7] for lids in LIDS)
        rim = [EYE_CORNERS[eye][0], *up, EYE_CORNERS[eye][1], *low[::-1]]
        pen.polygon([tuple(p) for p in face[rim, :2].tolist()], fill=(250, 250, 250))
        x, y, _ = face[468 + eye * 5].tolist()
        pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(30, 40, 60))
    pen.line([tuple(p) for p in face[LIPS[:11], :2].tolist()], fill=(150, 60, 60), width=2)
    return np.asarray(picture), np.asarray(person)


def cartoon_track(faces, masks, size=(320, 180), **pictures):
    "The track of such pictures"
    n = len(faces)
    def unseen(k): return np.full((n, k, 3), np.nan, np.float32)
    seen = np.array([not np.isnan(f).any() for f in faces])
    points = {'body': unseen(33), 'left_hand': unseen(21), 'right_hand': unseen(21), 'face': np.stack(faces)}
    unmeasured = {
        'light': np.full((LIGHTS, 2, 3), np.nan, np.float32),
        'grain': np.zeros(3, np.float32),
        'scene': np.zeros((n, *scene_cells(size), 3), np.uint8),
    }
    return Track(
        size=size,
        present=seen,
        points=points,
        mask_size=size,
        masks=tuple(pack_mask(m > 127) for m in masks),
        tracker='by hand',
        camera=np.tile(np.eye(2, 3, dtype=np.float32), (n, 1, 1)),
        skin=np.array([235, 190, 160], np.float32),
        **(unmeasured | pictures),
    )
