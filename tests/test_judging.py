"A finished job judged apart: what its manifest says, what may be missing, and a process that fails or hangs"
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wan_avatar import judging
from wan_avatar.files import sha256_of
from wan_avatar.judging import JudgingFailed, joins_of, judge_apart, judge_result, mask_shape_of
from wan_avatar.manifest import Manifest, RenderSettings, SceneReport, WindowReport
from wan_avatar.quality import MEASURES, Judgement, Sample, judgement_of
from wan_avatar.segments import BLOCKS, MaskShape
from wan_avatar.track import TRACKERS, Track, dump_track, pack_mask, track_key
from wan_avatar.workbench import first_frames

N = 24 # frames
SIDES = (640, 360)
SAID = judgement_of(dict.fromkeys(MEASURES, 0.5), {'ghost': [0.02, 0.3]}, 'wholebody')

def comfy_that(folder: Path, *lines: str) -> Path:
    "A COMFY_DIR whose Python is a shell script; $3 is the case, $4 the result"
    python = folder / 'comfy/env/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text('\n'.join(['#!/bin/sh', *lines, '']))
    python.chmod(0o755)
    return folder / 'comfy'

def comfy_that_says(folder: Path, said: dict, *lines: str) -> Path:
    "One that answers, and keeps what it was asked in asked.json"
    (folder / 'said.json').write_text(json.dumps(said))
    return comfy_that(folder, f'cp "$3" "{folder}/asked.json"', *lines, f'cp "{folder}/said.json" "$4"')

class Cupboard:
    "A bucket that holds what it was given"
    def __init__(self, objects: dict[str, bytes]): self.objects = objects
    def stat(self, key: str) -> dict | None: return {'bytes': len(self.objects[key])} if key in self.objects else None
    def read_bytes(self, key: str, most: int) -> bytes: return self.objects[key]
    def download(self, key: str, path: Path, *rest) -> None: path.write_bytes(self.objects[key])

def window(start: int, overlap: int) -> WindowReport:
    return WindowReport(index=0, start=start, frames=77, overlap=overlap, left=0, top=0)

def scene(*windows: WindowReport) -> SceneReport:
    return SceneReport(width=640, height=360, sampled=SIDES, share=1, made=N, saved=None, windows=list(windows))

DRAWN = RenderSettings(prompt=None, graph='draft', tracker=TRACKERS['mediapipe'], length=77, overlap=5, face=True,
                       files=[])

def judged_job(samples: Path, folder: Path) -> SimpleNamespace:
    "A job's driving video and picture, a result, its manifest, and a bucket with its track"
    driving = first_frames(samples / 'pexels.mp4', folder / 'driving.mp4', N)
    picture = Path(shutil.copy(samples / 'astronaut.png', folder))
    track = Track(SIDES, np.ones(N, bool), {'wholebody': np.zeros((N, 133, 3), np.float32)}, SIDES,
                  (pack_mask(np.ones(SIDES[::-1], bool)),) * N, TRACKERS['mediapipe'])
    key = track_key(sha256_of(driving), SIDES, 24)
    manifest = Manifest(
        minio_key='avatars/j1.mp4', width=640, height=360, fps=24, frames=N, duration_s=1, bytes=1, sha256='', seed=1,
        has_audio=False, profile='draft', timings={}, worker={}, job_id='j1', timeline=[], rendered_with=DRAWN,
        scene=scene(window(0, 0), window(12, 5)), track_object=key)
    store = Cupboard({key: dump_track(track), 'in/ana.png': picture.read_bytes()})
    return SimpleNamespace(driving=driving, picture=picture, manifest=manifest, store=store, key=key)

@pytest.fixture(scope='module')
def job(samples, tmp_path_factory) -> SimpleNamespace: return judged_job(samples, tmp_path_factory.mktemp('job'))

WINDOWS = [ # start and overlap of each, joins
    ([], ()), ([(0, 0)], ()), ([(0, 0), (72, 5), (144, 5)], (77, 149)), ([(0, 0), (77, 0)], (77,)),
    ([(72, 5), (0, 0)], (77,)), ([(40, 0), (200, 0)], (200,))] # out of order; somebody who comes back

@pytest.mark.parametrize('windows, joins', WINDOWS)
def test_a_join_is_the_first_new_frame_of_a_window(job, windows, joins):
    assert joins_of(job.manifest.model_copy(update={'scene': scene(*(window(*w) for w in windows))})) == joins
    assert joins_of(job.manifest.model_copy(update={'scene': None})) == ()

SHAPES = [({}, BLOCKS), ({'mask_shape': 'outline', 'mask_dilation': 3, 'mask_block': 8}, MaskShape('outline', 3, 8)),
          ({'mask_dilation': 0}, MaskShape(dilation=0))]

@pytest.mark.parametrize('values, shape', SHAPES)
def test_the_mask_is_grown_as_the_job_grew_it(job, values, shape):
    drawn = RenderSettings(**DRAWN.model_dump(), **values)
    assert mask_shape_of(job.manifest.model_copy(update={'rendered_with': drawn})) == shape
    assert mask_shape_of(job.manifest.model_copy(update={'rendered_with': None})) == BLOCKS

def asked_of(job: SimpleNamespace, folder: Path, comfy: Path, **changed) -> Judgement | str:
    "The answer to a job with something changed: of its manifest, or `store`"
    store = changed.pop('store', job.store)
    made = job.manifest.model_copy(update=changed)
    return judge_result(made, job.driving, job.picture, job.driving, store, folder / 'out', comfy)

@pytest.mark.parametrize('changed, why', [
    ({'track_object': None}, 'the manifest names no track'),
    ({'rendered_with': None}, 'the manifest names no track'),
    ({'track_object': 'tracks/mediapipe-6/640x360-24/00.track'}, 'is not the driving video of this job'),
    ({'frames': N + 1}, f'the video has {N + 1} frames, its driver {N}'),
    ({'store': Cupboard({})}, 'is no longer in the bucket'),
    ({'store': 'damaged'}, 'or damaged'),
    ({'store': 'huge'}, 'or damaged'),
    ({'width': 320, 'height': 180}, 'or damaged'), # a track of another size
    ({'rendered_with': DRAWN.model_copy(update={'tracker': 'mediapipe-3'})}, 'or damaged'),
], ids=lambda value: value if isinstance(value, str) else ', '.join(value))
def test_what_is_missing_is_named_and_nothing_is_started(job, tmp_path, changed, why):
    good = job.store.objects[job.key]
    stores = {'damaged': Cupboard({job.key: good[:-9]}), 'huge': Cupboard({job.key: good + bytes(10**8)})}
    if isinstance(changed.get('store'), str): changed = {'store': stores[changed['store']]}
    said = asked_of(job, tmp_path, comfy_that(tmp_path, 'exit 9'), **changed)
    assert isinstance(said, str)
    assert said.startswith('quality: not measured: ')
    assert why in said
    assert not (tmp_path / 'out/judgement.json').exists()

def test_without_the_environment_or_its_packages_that_is_the_answer(job, tmp_path):
    assert 'no ComfyUI environment in ' in asked_of(job, tmp_path, tmp_path / 'none')
    bare = comfy_that_says(tmp_path, {'not_measured': 'mediapipe is not installed in this environment'})
    assert asked_of(job, tmp_path, bare) == 'quality: not measured: mediapipe is not installed in this environment'

@pytest.mark.parametrize('truth', [False, True])
def test_a_judgement_comes_back_with_what_the_job_says(job, tmp_path, truth):
    told = []
    comfy = comfy_that_says(tmp_path, SAID.record(), 'echo INFO: a network', 'echo 12 24', 'echo 24 24')
    said = judge_result(job.manifest, job.driving, job.picture, job.driving, job.store, tmp_path / 'out', comfy, truth,
                        lambda done, total: told.append((done, total)))
    assert said == SAID
    assert told == [(12, 24), (24, 24)]
    asked = json.loads((tmp_path / 'asked.json').read_text())
    assert (asked['truth'], asked['joins']) == (truth, [17])
    assert asked['mask_shape'] == {'shape': 'blocks', 'dilation': 9, 'block': 32}
    kept = [p.name for p in (tmp_path / 'out').iterdir()]
    assert kept == ['judgement.json'], 'the normalised video and the track are gone'

NOTHING = Sample(*map(Path, ('driving.mp4', 'avatar.mp4', 'driving.track', 'picture.png')))

def test_a_process_that_fails_says_its_last_words_and_knows_no_keys(tmp_path, monkeypatch):
    monkeypatch.setenv('MINIO_SECRET_KEY', 'not for a judge')
    comfy = comfy_that(tmp_path, 'yes noise | head -c 100000 >&2', 'env >&2', 'echo no such network >&2', 'exit 3')
    with pytest.raises(JudgingFailed, match='ended with 3') as e: judge_apart(NOTHING, N, comfy)
    assert str(e.value).endswith('no such network')
    assert 'not for a judge' not in str(e.value)
    assert len(str(e.value)) < 700

def test_a_process_that_hangs_is_ended_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, 'START_S', 0.2)
    monkeypatch.setattr(judging, 'FRAME_S', 0.01)
    comfy = comfy_that(tmp_path, 'echo 1 24', 'echo half done >&2', 'exec sleep 60')
    began = time.monotonic()
    with pytest.raises(JudgingFailed, match='took longer than') as e: judge_apart(NOTHING, N, comfy)
    assert 'half done' in str(e.value)
    assert time.monotonic() - began < 30

def test_who_stops_waiting_leaves_no_process(tmp_path):
    comfy = comfy_that(tmp_path, f'echo $$ > "{tmp_path}/pid"', 'echo 1 24', 'exec sleep 60')
    def interrupt(done: int, total: int) -> None: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): judge_apart(NOTHING, N, comfy, interrupt)
    assert not Path(f'/proc/{(tmp_path / "pid").read_text().strip()}').exists()
