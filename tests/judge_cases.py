"""Judges many results in ComfyUI's environment: as it should be done, and with the measures broken on purpose.

`python judge_cases.py CASES.json RESULTS.json`; networks read each frame once, whoever asks for it and however often"""
import functools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np

from wan_avatar import quality
from wan_avatar.frames import read_frames

# of the results, those on which a broken measure is noticed
WITNESSES = ['itself', 'shuffled', 'blurred', 'seam', 'drift', 'somebody', 'nobody', 'another picture', 'stranger',
             'true, blurred', 'no hand', 'aside']
WITNESSES_OF = {'ignores the mask': ['itself', 'somebody']}
read_once = functools.lru_cache(maxsize=3)(lambda path: tuple(read_frames(path)))

class Once:
    "A network that is opened once, and remembers what it saw in a frame"
    def __init__(self, network: object):
        self.network, self.seen = network, {}

    def _ask(self, how: str, frame: np.ndarray, *more: object) -> object:
        key = how, frame.tobytes().__hash__(), more
        if key not in self.seen: self.seen[key] = getattr(self.network, how)(frame, *more)
        return self.seen[key]

    def __call__(self, frame: np.ndarray, *more: object) -> object: return self._ask('__call__', frame, *more)
    def body(self, frame: np.ndarray) -> object: return self._ask('body', frame)
    def boxes(self, frame: np.ndarray) -> object: return self._ask('boxes', frame)
    def close(self) -> None: pass

def pixels_of(change: Callable[..., tuple]) -> Callable[..., None]:
    right = quality.PixelQuality.add
    return lambda self, driver, made, mask, face=None: right(self, *change(driver, made, mask), face)

def people_of_the_driver(right: Callable) -> Callable:
    return lambda self, i, driver, made: right(self, i, driver, driver)

def faces_always(right: Callable) -> Callable: return lambda pairs: right(pairs) | {'face_found': 1.0}

def breakages() -> dict[str, dict[str, object]]: # name -> what stands in the place of what
    "Ways in which a measure can be broken, each of several measures at once"
    q = quality
    return {
        'as it should be': {},
        'reads the driver': {
            'PixelQuality.add': pixels_of(lambda driver, made, mask: (driver, driver, mask)),
            'PeopleQuality.add': people_of_the_driver(q.PeopleQuality.add)},
        'ignores the mask': {'PixelQuality.add': pixels_of(lambda driver, made, mask: (driver, made, mask & False))},
        'returns a constant': {
            'psnr': lambda error: 40.0, 'ssim_map': lambda a, b: np.full_like(a, 0.99), 'sharpness': lambda a, b: 1.0,
            'detail': np.ones_like, 'Motion.change': lambda self, *frames: (1.0, 1.0),
            'seams_of': lambda changes, joins: dict.fromkeys(joins, 1.0),
            'PixelQuality.drift': lambda self, part: (0.5, []), 'correlation': lambda a, b: 0.95,
            'head_errors': lambda turns: [1.0] * len(turns), 'body_distance': lambda a, b: 0.02,
            'hands_found': lambda a, b: [1.0] * len(a), 'compare_faces': faces_always(q.compare_faces),
            'identity_distances': lambda *people: {name: [(0, 0.45)] for name in q.IDENTITY}}}

def judge_all(cases: dict[str, dict], swaps: dict[str, object]) -> dict[str, dict]: # name -> record
    with ExitStack() as stack:
        for name, other in swaps.items(): stack.enter_context(patch(f'wan_avatar.quality.{name}', other))
        return {name: quality.judge(quality.sample_of(case)).record() for name, case in cases.items()}

if __name__ == '__main__':
    asked = json.loads(Path(sys.argv[1]).read_text())
    for name in ('FaceReader', 'BodyReader', 'FaceIdentity'):
        setattr(quality, name, functools.partial(lambda once: once, Once(getattr(quality, name)())))
    quality.read_frames = read_once
    whole, *broken = breakages().items()
    found = {whole[0]: judge_all(asked, whole[1])}
    found |= {how: judge_all({name: asked[name] for name in WITNESSES_OF.get(how, WITNESSES)}, swaps)
              for how, swaps in broken}
    Path(sys.argv[2]).write_text(json.dumps(found))
