"Numbers of a result, of a real face: every fault that is put in moves its own number"
import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, cut

from wan_avatar.frames import SIZE, read_frames
from wan_avatar.mp4 import Encoder
from wan_avatar.normalise import normalise_video
from wan_avatar.quality import MEASURES
from wan_avatar.track import Track, pack_mask, save_track
from wan_avatar.workflow import PROFILES

PYTHON = ROOT / '.comfy/env/bin/python'
JUDGE = """
import json, sys
from pathlib import Path
from wan_avatar.quality import Sample, judge
folder, astronaut, *names = sys.argv[1:]
def case(name):
    of = lambda file: Path(folder) / file
    picture = Path(astronaut) if name == 'another picture' else of('picture.png')
    made = of('driver.mp4' if name in ('itself', 'another picture') else f'{name}.mp4')
    return judge(Sample(of('driver.mp4'), made, of('driver.track'), picture)).record()
print(json.dumps({name: case(name) for name in names}))
"""
FAULTS = {'frozen': lambda frames: [frames[36]] * len(frames),
          'late': lambda frames: frames[12:] + frames[:12],
          'blurred': lambda frames: [cv2.GaussianBlur(f, (0, 0), 5) for f in frames],
          'nobody': lambda frames: [np.full_like(f, 90) for f in frames]}
NAMES = ('itself', *FAULTS, 'another picture')

@pytest.fixture(scope='module')
def folder(samples, tmp_path_factory) -> Path:
    "The driving video and its faults, its person's picture being one of its frames"
    folder = tmp_path_factory.mktemp('judged')
    raw = cut(samples / 'pexels.mp4', 190, folder)
    normalise_video(raw, folder / 'all.mp4', folder / 'audio.m4a', 60)
    frames = list(read_frames(folder / 'all.mp4', 118, 72)) # he talks
    for name, fault in {'driver': list, **FAULTS}.items():
        with Encoder(folder / f'{name}.mp4') as encoder:
            for frame in fault(frames): encoder.write(np.ascontiguousarray(frame))
    mask = np.zeros(SIZE[::-1], bool)
    mask[60:, 320:960] = True
    n = len(frames)
    points = {'wholebody': np.zeros((n, 133, 3), np.float32)}
    save_track(Track(SIZE, np.ones(n, bool), points, SIZE, (pack_mask(mask),) * n, 'by hand'), folder / 'driver.track')
    cv2.imwrite(str(folder / 'picture.png'), frames[36][..., ::-1])
    return folder

@pytest.fixture(scope='module')
def judgements(samples, folder) -> dict[str, dict]:
    "What is said of every result"
    command = [PYTHON, '-c', JUDGE, folder, samples / 'astronaut.png', *NAMES]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    return json.loads(said.splitlines()[-1])

@pytest.fixture(scope='module')
def judged(judgements) -> dict[str, dict]: return {name: said['figures'] for name, said in judgements.items()}

EXPECTED = [ # result, measure, least, most
    ('itself', 'background_psnr', 100, 100), ('itself', 'lip_correlation', 0.99, 1), ('itself', 'pose_error', 0, 0.1),
    ('itself', 'ghost', 0.99, 1), ('itself', 'face_found', 1, 1), ('itself', 'id_distance', 0, 0.5),
    ('itself', 'flicker', 0.99, 1.01),
    ('another picture', 'id_distance', 0.6, 1.5), ('another picture', 'lip_correlation', 0.99, 1),
    ('another picture', 'driver_distance', 0, 0.5),
    ('frozen', 'lip_correlation', -0.3, 0.3), ('frozen', 'pose_error', 2, 60), ('frozen', 'id_distance', 0, 0.3),
    ('late', 'lip_correlation', -0.6, 0.6), ('late', 'pose_error', 2, 60), ('late', 'id_distance', 0, 0.5),
    ('blurred', 'sharpness', 0, 0.6), ('blurred', 'ghost', 0, 0.4), ('blurred', 'face_found', 0.9, 1),
    ('nobody', 'face_found', 0, 0), ('nobody', 'background_psnr', 0, 20)]

@pytest.mark.parametrize('result, measure, least, most', EXPECTED, ids=[f'{r}: {m}' for r, m, *_ in EXPECTED])
def test_a_fault_moves_its_own_number(judged, result, measure, least, most):
    assert least <= judged[result][measure] <= most

OF_FACES = ['lip_correlation', 'eye_correlation', 'pose_error', 'id_distance', 'driver_distance']

@pytest.mark.parametrize('measure', OF_FACES)
def test_what_cannot_be_measured_is_null(judged, measure): assert judged['nobody'][measure] is None

def test_there_is_no_seam_and_no_drift_in_one_window(judged):
    assert [judged['itself'][n] for n in ('seam', 'skin_drift', 'scene_drift')] == [None] * 3

def test_the_command_says_the_same(judged, folder):
    files = {'driver': 'driver.mp4', 'made': 'nobody.mp4', 'track': 'driver.track', 'picture': 'picture.png'}
    asked, result = folder / 'asked.json', folder / 'result.json'
    asked.write_text(json.dumps({name: str(folder / file) for name, file in files.items()}))
    subprocess.run([PYTHON, '-m', 'wan_avatar.quality', asked, result], cwd=ROOT, check=True, timeout=120)
    assert json.loads(result.read_text())['figures'] == pytest.approx(judged['nobody'])

def test_every_gate_names_a_measure_and_lets_something_through():
    for name, profile in PROFILES.items():
        assert profile.gates.keys() <= MEASURES.keys(), name
        for measure, (least, most) in profile.gates.items():
            assert (least, most) != (None, None), (name, measure)
            assert least is None or most is None or least < most, (name, measure)
    assert PROFILES['draft'].gates != PROFILES['wan22-animate'].gates
    assert not PROFILES['wan22-animate-tiny'].gates, 'it paints noise'
