"Numbers of a result, of a real face: every fault that is put in moves its own number"
import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from wan_avatar.frames import read_frames
from wan_avatar.mp4 import Encoder
from wan_avatar.quality import MEASURES, judgement_of
from wan_avatar.track import Track, pack_mask, save_track
from wan_avatar.workflow import PROFILES

PYTHON = ROOT / '.comfy/env/bin/python'
SIDES = (640, 360) # of the samples
N = 60 # frames of the driving video
JOIN = 30 # the first frame of a second window
PERSON = (slice(20, 360), slice(180, 640)) # rows and columns of the mask

def inside(frame: np.ndarray, change) -> np.ndarray:
    "The frame with the person's rectangle changed"
    made = frame.copy()
    made[PERSON] = np.clip(change(frame[PERSON].astype(np.float32)), 0, 255).astype(np.uint8)
    return made

def each(change): return lambda frames: [change(f, i) for i, f in enumerate(frames)]
def mirrored(part: np.ndarray) -> np.ndarray: return part[:, ::-1]

FAULTS = {'frozen': lambda frames: [frames[36]] * len(frames),
          'late': lambda frames: frames[12:] + frames[:12],
          'shuffled': lambda frames: [frames[i] for i in np.random.default_rng(1).permutation(len(frames))],
          'blurred': each(lambda f, i: cv2.GaussianBlur(f, (0, 0), 2.5)),
          'seam': each(lambda f, i: inside(f, lambda p: np.roll(p, 8 * (i >= JOIN), 0))),
          'drift': each(lambda f, i: np.clip(f.astype(np.int32) + [20 * (i >= JOIN), 0, 0], 0, 255).astype(np.uint8)),
          'jitter': each(lambda f, i: inside(f, lambda p: np.roll(p, 2 * (-1)**i, 1))),
          'somebody': each(lambda f, i: inside(f, mirrored)), # without a ghost
          'ghost': each(lambda f, i: inside(f, lambda p: 0.6 * mirrored(p) + 0.4 * p)),
          'nobody': lambda frames: [np.full_like(f, 90) for f in frames]}

def write(frames, path: Path) -> None:
    with Encoder(path, size=SIDES) as encoder:
        for frame in frames: encoder.write(np.ascontiguousarray(frame))

def track_of(n: int, path: Path) -> None:
    mask = np.zeros(SIDES[::-1], bool)
    mask[PERSON] = True
    points = {'wholebody': np.zeros((n, 133, 3), np.float32)}
    save_track(Track(SIDES, np.ones(n, bool), points, SIDES, (pack_mask(mask),) * n, 'by hand'), path)

@pytest.fixture(scope='module')
def cases(samples, tmp_path_factory) -> dict[str, dict]:
    "What is judged: a driving video and its faults, and two short ones of which body and hand are seen"
    folder = tmp_path_factory.mktemp('judged')
    def of(name: str) -> str: return str(folder / name)
    frames = list(read_frames(samples / 'pexels.mp4', 118, N)) # she talks
    hand = list(read_frames(samples / 'pexels.mp4', 72, 12))
    body = list(read_frames(samples / 'single_face.mp4', 40, 12))
    stranger = cv2.resize(cv2.imread(str(samples / 'astronaut.png'))[:288, :, ::-1], SIDES)
    videos = {'driver': frames, **{name: fault(frames) for name, fault in FAULTS.items()}, 'stranger': [stranger] * N,
              'hand': hand, 'body': body, 'aside': [np.roll(f, 80, 1) for f in body]}
    for name, made in videos.items(): write(made, folder / f'{name}.mp4')
    for n in (N, 12): track_of(n, folder / f'{n}.track')
    cv2.imwrite(of('picture.png'), frames[36][..., ::-1])
    mask = {'shape': 'outline', 'dilation': 0}
    def case(made: str, driver: str = 'driver', picture: str = 'picture.png', **more) -> dict:
        n = len(videos[driver])
        return {'driver': of(f'{driver}.mp4'), 'made': of(f'{made}.mp4'), 'track': of(f'{n}.track'), 'mask_shape': mask,
                'picture': of(picture), 'joins': [JOIN] if n == N else [], **more}
    other = str(samples / 'astronaut.png')
    return {'itself': case('driver'), **{name: case(name) for name in FAULTS},
            'another picture': case('driver', picture=other), 'stranger': case('stranger', picture=other),
            'true': case('driver', truth=True), 'true, blurred': case('blurred', truth=True),
            'hand': case('hand', 'hand'), 'no hand': case('body', 'hand'), 'body': case('body', 'body'),
            'aside': case('aside', 'body')}

@pytest.fixture(scope='module')
def all_judgements(cases, tmp_path_factory) -> dict[str, dict[str, dict]]:
    "What is said of every result: by the measures as they are, and broken"
    asked, said = (tmp_path_factory.mktemp('said') / name for name in ('asked.json', 'said.json'))
    asked.write_text(json.dumps(cases))
    subprocess.run([PYTHON, ROOT / 'tests/judge_cases.py', asked, said], cwd=ROOT, check=True, timeout=300,
                   env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'})
    return json.loads(said.read_text())

@pytest.fixture(scope='module')
def judgements(all_judgements) -> dict[str, dict]: return all_judgements['as it should be']

@pytest.fixture(scope='module')
def judged(judgements) -> dict[str, dict]:
    "Figures of every result"
    return {name: said['figures'] for name, said in judgements.items()}

EXPECTED = [ # result, measure, least, most
    ('itself', 'background_psnr', 100, 100), ('itself', 'lip_correlation', 0.99, 1), ('itself', 'pose_error', 0, 0.1),
    ('itself', 'ghost', 0.99, 1), ('itself', 'face_found', 1, 1), ('itself', 'id_distance', 0, 0.5),
    ('itself', 'flicker', 0.99, 1.01), ('itself', 'background_ssim', 0.99, 1), ('itself', 'sharpness', 0.8, 1.2),
    ('itself', 'seam', 0.9, 1.1), ('itself', 'skin_drift', 0, 0.1), ('itself', 'scene_drift', 0, 0.1),
    ('itself', 'eye_correlation', 0.99, 1),
    ('another picture', 'id_distance', 0.6, 1.5), ('another picture', 'lip_correlation', 0.99, 1),
    ('another picture', 'driver_distance', 0, 0.5), ('another picture', 'id_margin', -1, -0.2),
    ('another picture', 'background_psnr', 100, 100),
    ('stranger', 'id_distance', 0, 0.3), ('stranger', 'driver_distance', 0.6, 1.5), ('stranger', 'id_margin', 0.3, 1),
    ('frozen', 'lip_correlation', -0.3, 0.3), ('frozen', 'pose_error', 2, 60), ('frozen', 'id_distance', 0, 0.3),
    ('frozen', 'face_found', 0.9, 1),
    ('late', 'lip_correlation', -0.6, 0.6), ('late', 'pose_error', 2, 60), ('late', 'id_distance', 0, 0.5),
    ('late', 'scene_drift', 0, 1),
    ('shuffled', 'flicker', 4, 100), ('shuffled', 'lip_correlation', -0.6, 0.6),
    ('shuffled', 'eye_correlation', -0.6, 0.6), ('shuffled', 'pose_error', 4, 60), ('shuffled', 'scene_drift', 0, 1),
    ('seam', 'seam', 3, 100), ('seam', 'background_psnr', 40, 100), ('seam', 'lip_correlation', 0.85, 1),
    ('seam', 'flicker', 0.8, 1.5), ('seam', 'skin_drift', 0, 1), ('seam', 'id_distance', 0, 0.5),
    ('drift', 'skin_drift', 5, 100), ('drift', 'scene_drift', 5, 100), ('drift', 'lip_correlation', 0.9, 1),
    ('drift', 'pose_error', 0, 2), ('drift', 'flicker', 0.8, 1.2), ('drift', 'id_distance', 0, 0.5),
    ('jitter', 'flicker', 3, 100), ('jitter', 'seam', 0, 1.5), ('jitter', 'lip_correlation', 0.85, 1),
    ('jitter', 'background_psnr', 40, 100), ('jitter', 'skin_drift', 0, 1),
    ('somebody', 'ghost', 0, 0.1), ('somebody', 'background_psnr', 40, 100), ('somebody', 'background_ssim', 0.95, 1),
    ('ghost', 'ghost', 0.3, 0.5), ('ghost', 'background_psnr', 40, 100), ('ghost', 'scene_drift', 0, 1),
    ('blurred', 'sharpness', 0, 0.6), ('blurred', 'ghost', 0, 0.4), ('blurred', 'face_found', 0.9, 1),
    ('blurred', 'lip_correlation', 0.9, 1), ('blurred', 'skin_drift', 0, 1),
    ('nobody', 'face_found', 0, 0), ('nobody', 'background_psnr', 0, 20), ('nobody', 'background_ssim', 0, 0.8),
    ('true', 'truth_psnr', 100, 100), ('true', 'truth_ssim', 0.99, 1),
    ('true, blurred', 'truth_psnr', 20, 35), ('true, blurred', 'truth_ssim', 0.5, 0.95),
    ('hand', 'hands_kept', 1, 1), ('no hand', 'hands_kept', 0, 0),
    ('body', 'body_error', 0, 0.01), ('aside', 'body_error', 0.15, 1)]

@pytest.mark.parametrize('result, measure, least, most', EXPECTED, ids=[f'{r}: {m}' for r, m, *_ in EXPECTED])
def test_a_fault_moves_its_own_number(judged, result, measure, least, most):
    assert least <= judged[result][measure] <= most

# name of a way to break measures -> those that it breaks; LPIPS has no number that could be wrong
MEASURED = [name for name in MEASURES if name != 'lpips']
BROKEN = {'reads the driver': MEASURED, 'returns a constant': MEASURED,
          'ignores the mask': ['background_psnr', 'background_ssim', 'ghost', 'flicker', 'seam']}

@pytest.mark.parametrize('how, measure', [(how, m) for how, measures in BROKEN.items() for m in measures])
def test_a_broken_measure_is_noticed(all_judgements, how, measure):
    "The table above does not hold for a measure that was broken on purpose"
    broken = all_judgements[how]
    def holds(result: str, least: float, most: float) -> bool:
        value = broken[result]['figures'][measure]
        return value is not None and least <= value <= most
    rows = [row for row in EXPECTED if row[1] == measure and row[0] in broken]
    assert rows
    assert not all(holds(result, least, most) for result, _, least, most in rows)

@pytest.mark.parametrize('measure', MEASURED)
def test_no_constant_passes_for_a_measure(measure):
    "Whatever it were: what one result must have, another must not"
    rows = [(least, most) for _, name, least, most in EXPECTED if name == measure]
    assert max(least for least, _ in rows) > min(most for _, most in rows)

OF_FACES = ['lip_correlation', 'eye_correlation', 'pose_error', 'id_distance', 'driver_distance', 'id_margin']

@pytest.mark.parametrize('measure', OF_FACES)
def test_what_cannot_be_measured_is_null(judged, measure): assert judged['nobody'][measure] is None

def test_there_is_no_seam_and_no_drift_in_one_window(judged):
    assert [judged['body'][n] for n in ('seam', 'skin_drift', 'scene_drift')] == [None] * 3

WHY = [ # result, measure, what the reason says
    ('itself', 'truth_psnr', 'no frame of the driving video'), ('itself', 'lpips', 'no pinned package'),
    ('true', 'lpips', 'no pinned package'), ('true', 'ghost', 'the driver himself'),
    ('true', 'id_margin', 'the driver himself'), ('true', 'driver_distance', 'the driver himself'),
    ('nobody', 'pose_error', 'no frame shows both faces'), ('nobody', 'lip_correlation', 'fewer than 8'),
    ('nobody', 'id_distance', 'the result shows no face'), ('itself', 'hands_kept', 'shows no hand'),
    ('nobody', 'body_error', 'no frame shows'), ('body', 'seam', 'one window')]

@pytest.mark.parametrize('result, measure, why', WHY)
def test_what_has_no_number_says_why(judgements, result, measure, why):
    assert why in judgements[result]['reasons'][measure]

def test_every_measure_has_a_finite_number_or_a_reason(judgements):
    for name, said in judgements.items():
        assert said['figures'].keys() == MEASURES.keys(), name
        none = {measure for measure, value in said['figures'].items() if value is None}
        assert none == said['reasons'].keys(), name
        assert all(np.isfinite(v) for v in said['figures'].values() if v is not None), name
        assert not none & said['by_second'].keys(), name

BY_SECOND = [ # result, measure, seconds in which it must be worse than `limit`, the others being better
    ('drift', 'skin_drift', 5, {1, 2}), ('drift', 'scene_drift', 5, {1, 2}), ('seam', 'seam', 3, {1}),
    ('nobody', 'background_ssim', 0.9, set()), ('shuffled', 'flicker', 2, {0, 1, 2})]

@pytest.mark.parametrize('result, measure, limit, worse', BY_SECOND)
def test_the_course_says_when(judgements, result, measure, limit, worse):
    values = judgements[result]['by_second'][measure]
    assert len(values) == 3
    assert {second for second, value in enumerate(values) if value is not None and value > limit} == worse

def test_the_tracker_that_judges_is_named_where_it_drove():
    found = dict.fromkeys(MEASURES, 0.5)
    of_tracker = {'face_found', 'lip_correlation', 'eye_correlation', 'pose_error', 'body_error', 'hands_kept'}
    assert set(judgement_of(found, {}, 'mediapipe-6').circular) == of_tracker
    assert judgement_of(found, {}, 'wholebody-sam2-3').circular == ()
    without = judgement_of(found | {'hands_kept': 'no hand'}, {}, 'mediapipe-6')
    assert set(without.circular) == of_tracker - {'hands_kept'}

def test_the_command_says_the_same(judged, cases, tmp_path):
    asked, result = tmp_path / 'asked.json', tmp_path / 'result.json'
    asked.write_text(json.dumps(cases['body']))
    subprocess.run([PYTHON, '-m', 'wan_avatar.quality', asked, result], cwd=ROOT, check=True, timeout=120)
    assert json.loads(result.read_text())['figures'] == pytest.approx(judged['body'])

def test_every_gate_names_a_measure_and_lets_something_through():
    for name, profile in PROFILES.items():
        assert profile.gates.keys() <= MEASURES.keys(), name
        for measure, (least, most) in profile.gates.items():
            assert (least, most) != (None, None), (name, measure)
            assert least is None or most is None or least < most, (name, measure)
    assert PROFILES['draft'].gates != PROFILES['wan22-animate'].gates
    assert not PROFILES['wan22-animate-tiny'].gates, 'it paints noise'
