"The gate can fail: every check, by a delivery or a file with one thing wrong, and by a worker that cheats"
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import av
import numpy as np
import pytest
from conftest import ROOT, cut
from PIL import Image
from test_judging import comfy_that, comfy_that_says, judged_job

from wan_avatar.client import Status
from wan_avatar.frames import read_frames
from wan_avatar.job import JobError
from wan_avatar.local import up
from wan_avatar.manifest import BootReport, Manifest
from wan_avatar.mp4 import Encoder, check_mp4
from wan_avatar.normalise import normalise_video
from wan_avatar.quality import MEASURES, judgement_of
from wan_avatar.smoke import (
    LEAST_CHANGE,
    Decoded,
    Evidence,
    _judged,
    _with_quality,
    change,
    checks_of,
    decode_result,
    quality_checks,
    run_smoke,
    until_refused,
)
from wan_avatar.timeline import Stage
from wan_avatar.workflow import PROFILES

ANSWER = {
    'minio_key': 'avatars/smoke/now/j1.mp4',
    'frames': 58,
    'width': 1280,
    'height': 720,
    'bytes': 5,
    'sha256': 'ab',
    'has_audio': True,
    'presigned_url': 'http://h/x',
}
MANIFEST = Manifest(
    **{k: v for k, v in ANSWER.items() if k != 'presigned_url'}, fps=24, duration_s=58 / 24, seed=1, profile='draft',
    timings={}, worker={'id': 'w'}, job_id='j1', timeline=[Stage('render', 0.5, 2.0)],
    boot=BootReport(job_number=1, process_s=0.5, taken_s=5, stages=[]))
GOOD = Evidence(
    {'input_image_minio_path': 'a.png', 'user_id': 'smoke', 'avatar_id': 'now'}, 'avatars/',
    Status('j1', 'COMPLETED', ANSWER), Decoded(640, 360, 30, 72, True, 2.4, 2.38), MANIFEST,
    Decoded(1280, 720, 24, 58, True, 58 / 24, 2.37), 5, 'ab', 90.0, (200, 'ab', ''), 403
)

def said(**more) -> Status: return Status('j1', 'COMPLETED', ANSWER | more)
def written(**more) -> Manifest: return MANIFEST.model_copy(update=more)
def seen(**more) -> Decoded: return replace(GOOD.video, **more)

def test_a_good_delivery_passes(): assert [c for c in checks_of(GOOD) if not c.ok] == [] and len(checks_of(GOOD)) == 13

@pytest.mark.parametrize('name, wrong', [
    ('job completed', {'status': Status('j1', 'FAILED', error='no_person: nobody')}),
    ('job completed', {'status': Status('j1', 'TIMED_OUT')}),
    ('key and prefix', {'prefix': 'elsewhere/'}),
    ('key and prefix', {'job': {'input_image_minio_path': 'a.png'}}),
    ('key and prefix', {'status': said(minio_key='avatars/smoke/now/j2.mp4')}),
    ('answer agrees with the file', {'status': said(frames=59)}),
    ('answer agrees with the file', {'sha256': 'cd'}),
    ('answer agrees with the file', {'bytes': 6}),
    ('answer agrees with the file', {'status': said(has_audio=False)}),
    ('manifest agrees with the answer', {'status': said(seed=2)}),
    ('manifest agrees with the answer', {'manifest': None}),
    ('manifest agrees with the answer', {'manifest': None, 'manifest_trouble': 'j1.mp4.json is no manifest'}),
    ('manifest tells how it was made', {'manifest': written(job_id='j2')}),
    ('manifest tells how it was made', {'manifest': written(boot=None)}),
    ('every frame decodes', {'video': seen(trouble='InvalidDataError')}),
    ('size', {'video': seen(width=1920)}),
    ('size', {'video': seen(height=704)}),
    ('frame rate', {'video': seen(fps=25)}),
    ('frame rate', {'video': seen(even=False)}),
    ('frames: driving video\'s seconds x 24', {'video': seen(frames=57)}),
    ('frames: driving video\'s seconds x 24', {'driving': replace(GOOD.driving, end_s=2.5)}),
    ('sound as in the driving video', {'video': seen(audio_s=None)}),
    ('sound as in the driving video', {'video': seen(audio_s=1.9)}),
    ('sound as in the driving video', {'driving': replace(GOOD.driving, audio_s=None)}),
    ('not the driving video unchanged', {'change': LEAST_CHANGE - 0.1}),
    ('presigned address gives the video', {'link': (403, 'ab', '')}),
    ('presigned address gives the video', {'link': (200, 'cd', '')}),
    ('presigned address gives the video', {'link': (0, '', 'no address')}),
    ('presigned address expires', {'after': 200}),
    ('presigned address expires', {'after': 206}),
    ('presigned address expires', {'after': 0}),
    ('presigned address expires', {'after': 500}),
])
def test_every_check_can_fail(name, wrong):
    failed = [c.name for c in checks_of(replace(GOOD, **wrong)) if not c.ok]
    assert name in failed
    assert all(c.wanted and c.found for c in checks_of(replace(GOOD, **wrong)))

def test_every_check_is_in_the_table_above():
    table = {mark.args[1][n][0] for mark in test_every_check_can_fail.pytestmark for n in range(len(mark.args[1]))}
    assert {c.name for c in checks_of(GOOD)} == table

@pytest.fixture(scope='module')
def clips(samples, tmp_path_factory):
    "One second of a driving video, and avatar videos with one thing wrong each"
    folder = tmp_path_factory.mktemp('clips')
    driving = cut(samples / 'pexels.mp4', 24, folder)
    clip = normalise_video(driving, folder / 'same.y4m', folder / 'same.m4a', 60)
    frames = list(read_frames(clip.path))
    def write(name, pictures, **more):
        with Encoder(folder / f'{name}.mp4', **more) as encoder:
            for p in pictures: encoder.write(p)
    painted = [p.copy() for p in frames]
    for p in painted: p[200:600, 500:800] = (180, 40, 90) # a person of another colour
    write('avatar', painted, audio=clip.audio)
    write('copy', frames, audio=clip.audio)
    write('shifted', [frames[0], *frames[:-1]], audio=clip.audio)
    write('dim', [(p * 0.97).astype(np.uint8) for p in frames], audio=clip.audio)
    write('short', painted[:-1], audio=clip.audio)
    write('silent', painted)
    write('small', [np.ascontiguousarray(p[::2, ::2]) for p in painted], audio=clip.audio, size=(640, 360))
    write('slow', painted, audio=clip.audio, fps=23)
    data = (folder / 'avatar.mp4').read_bytes()
    with av.open(str(folder / 'avatar.mp4')) as container:
        at = [p.pos for p in container.demux(container.streams.video[0]) if p.size]
    for n in (10, 23): (folder / f'frame {n}.mp4').write_bytes(data[:at[n]] + b'\xff' * 64 + data[at[n] + 64:])
    (folder / 'cut off.mp4').write_bytes(data[:-2000])
    return folder, driving

def judge(clips, name: str) -> dict[str, bool]:
    folder, driving = clips
    found = decode_result(folder / f'{name}.mp4')
    d = replace(
        GOOD, driving=decode_result(driving), video=found,
        change=change(driving, folder / f'{name}.mp4', found.end_s) if found.trouble is None else 0.0
    )
    return {c.name: c.ok for c in checks_of(d)}

@pytest.mark.parametrize('name, failing', [
    ('avatar', set()),
    ('copy', {'not the driving video unchanged'}),
    ('shifted', {'not the driving video unchanged'}),
    ('dim', {'not the driving video unchanged'}),
    ('short', {'frames: driving video\'s seconds x 24'}),
    ('silent', {'sound as in the driving video'}),
    ('small', {'size'}),
    ('slow', {'frame rate'}),
])
def test_real_files_with_one_thing_wrong(clips, name, failing):
    form = {
        'every frame decodes',
        'size',
        'frame rate',
        'frames: driving video\'s seconds x 24',
        'sound as in the driving video',
        'not the driving video unchanged',
    }
    assert {c for c, ok in judge(clips, name).items() if not ok and c in form} == failing

@pytest.mark.parametrize('name', ['frame 10', 'frame 23', 'cut off'])
def test_damage_is_found(clips, name): assert not judge(clips, name)['every frame decodes']

def test_the_driving_video_is_measured_as_the_worker_measures_it(clips, samples, tmp_path):
    for source in (clips[1], samples / 'single_face.mp4', samples / 'pexels.mp4'):
        clip = normalise_video(source, tmp_path / 'n.y4m', tmp_path / 'n.m4a', 60, size=(320, 180))
        found = decode_result(source)
        assert round(found.end_s * 24) == clip.frames
        assert abs(min(found.audio_s, clip.frames / 24) - clip.audio_s) < 0.05

def test_waiting_for_the_end_of_an_address_is_bounded():
    began = time.monotonic()
    assert until_refused('http://127.0.0.1:9/none', 0.6) == 0
    assert time.monotonic() - began < 5

class Endless:
    "An endpoint whose first job fails at once and whose second never ends"
    def __init__(self): self.jobs, self.cancelled, self.running = iter(('fails', 'goes on')), [], threading.Event()
    def submit(self, job): return Status(next(self.jobs), 'IN_QUEUE')
    def cancel(self, job_id): self.cancelled.append(job_id)
    def follow(self, job_id, interval_s):
        if job_id == 'fails':
            self.running.wait(10)
            yield Status(job_id, 'FAILED', error='no_person: nobody')
        while job_id != 'fails':
            yield Status(job_id, 'IN_PROGRESS')
            self.running.set()
            time.sleep(0.01)

def test_a_run_that_is_interrupted_cancels_its_jobs(clips, tmp_path):
    endless = Endless()
    def interrupt(done: int): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_smoke(
            endless, None, {'input_image_minio_path': 'a.png'}, clips[1], tmp_path, jobs=2, concurrency=2,
            on_done=interrupt
        )
    assert endless.cancelled == ['goes on'], 'what nobody waits for would only be billed'

CHEAT = '''
import os, time, runpod
from pathlib import Path
from wan_avatar.config import load_settings
from wan_avatar.job import output_key, parse_job
from wan_avatar.mp4 import check_mp4
from wan_avatar.store import Store
def handler(event):
    job, store = parse_job(event['input']), Store(load_settings())
    key, video = output_key(event['id'], job), Path(os.environ['CHEAT'])
    store.upload(video, key, 'video/mp4')
    f = check_mp4(video, 24)
    figures = {'frames': f.frames, 'width': f.width, 'height': f.height, 'bytes': f.bytes, 'has_audio': f.has_audio}
    url = store.presign(key, job.presign_seconds)
    return {'minio_key': key, **figures, 'sha256': '0' * 64, 'presigned_url': url}
runpod.serverless.start({'handler': handler})
'''

def test_a_worker_that_hands_back_the_driving_video_fails_the_gate(clips, samples, tmp_path):
    folder, driving = clips
    env = {'CHEAT': str(folder / 'copy.mp4'), 'RUNPOD_SKIP_AUTO_SYSTEM_CHECKS': 'true', 'RUNPOD_SKIP_GPU_CHECK': 'true'}
    with up(tmp_path / 'up', worker_command=[sys.executable, '-c', CHEAT], worker_env=env) as local:
        done = subprocess.run(
            [
                ROOT / '.venv/bin/wan-avatar',
                'smoke',
                '--endpoint',
                local.endpoint.address,
                '--image',
                samples / 'astronaut.png',
                '--driving',
                driving,
                '--jobs',
                '2',
                '--concurrency',
                '2',
                '--json',
                '--out',
                tmp_path / 'out',
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **local.bucket.environment(), 'RUNPOD_API_KEY': local.endpoint.api_key},
        )
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    failed = {c['name']: c['passed'] for c in summary['checks'] if not c['ok']}
    assert failed == {
        'answer agrees with the file': 0,
        'manifest agrees with the answer': 0,
        'manifest tells how it was made': 0,
        'not the driving video unchanged': 0,
    }
    assert json.loads((tmp_path / 'out/summary.json').read_text()) == summary
    assert len((tmp_path / 'out/records.jsonl').read_text().splitlines()) == 2
    assert all(check_mp4(tmp_path / f'out/job-{n}/avatar.mp4', 24) for n in (1, 2))
    assert summary['percentiles']['smoke, unknown']['execution_s'][0]['n'] == 2
    assert local.endpoint.api_key not in done.stdout + done.stderr + (tmp_path / 'out/summary.json').read_text()

class Unwell:
    "A bucket that gives the video, and then fails"
    def download(self, key, path, *rest) -> None: path.write_bytes(b'a video')
    def read_bytes(self, key, most) -> bytes: raise JobError('storage_failed', 'the bucket was gone')

def test_a_bucket_that_fails_between_video_and_manifest_fails_the_gate(tmp_path):
    "The run goes on: the job's checks say why"
    status = said(presigned_url=None)
    found = _judged(status, GOOD.job, GOOD.prefix, tmp_path / 'driving.mp4', GOOD.driving, Unwell(), tmp_path)
    assert found.video.trouble == 'storage_failed: the bucket was gone'
    assert {c.name: c.found for c in checks_of(found)}['every frame decodes'] == found.video.trouble

# %% Is it any good?
BEST = {name: m.best for name, m in MEASURES.items()} # no result could be better

def judged_as(profile: str = 'draft', **found) -> Evidence:
    "A good delivery with these numbers, the others being the best"
    return replace(GOOD, quality=judgement_of(BEST | found, {}, 'mediapipe-6'), manifest=written(profile=profile))

def failed_of(d: Evidence) -> set[str]: return {c.name for c in checks_of(d) if not c.ok}

GATED = ('draft', 'wan22-animate')
GATES = [(profile, name, gate) for profile in GATED for name, gate in PROFILES[profile].gates.items()]

@pytest.mark.parametrize('profile, name, gate', GATES, ids=[f'{p}: {n}' for p, n, _ in GATES])
def test_every_gate_of_a_profile_can_fail(profile, name, gate):
    least, most = gate
    outside = least - 0.01 if least is not None else most + 0.01
    assert failed_of(judged_as(profile)) == set()
    assert failed_of(judged_as(profile, **{name: outside})) == {f'quality: {name}'}
    assert failed_of(judged_as(profile, **{name: least if least is not None else most})) == set()

def test_what_has_no_gate_or_no_number_is_shown_and_does_not_fail():
    ungated = judged_as(eye_correlation=-1.0, lip_correlation='the driver neither opens nor closes them')
    rows = {c.name.removeprefix('quality: '): c for c in quality_checks(ungated)}
    assert rows.keys() == MEASURES.keys()
    assert all(c.ok for c in rows.values())
    assert rows['eye_correlation'].wanted == 'shown, not judged'
    assert rows['lip_correlation'].found == 'not measured: the driver neither opens nor closes them'
    assert 'by the tracker that drove it' in rows['pose_error'].found
    assert failed_of(judged_as('wan22-animate-tiny', lip_correlation=-1.0, face_found=0.0)) == set(), 'it has no gates'

@pytest.fixture(scope='module')
def delivered(samples, tmp_path_factory):
    "A job's files, and its delivery in a folder: a copy of the driving video, which judges do not mind"
    folder = tmp_path_factory.mktemp('delivered')
    job = judged_job(samples, folder)
    evidence = replace(GOOD, job={'input_image_minio_path': 'in/ana.png'}, manifest=job.manifest,
                       video=replace(GOOD.video, frames=24, end_s=1.0))
    (folder / 'avatar.mp4').write_bytes(job.driving.read_bytes())
    return folder, job, evidence

def quality_of(delivered, comfy, folder, **changed) -> list:
    "The rows of a delivery that is judged by this ComfyUI's Python"
    made, job, evidence = delivered
    (folder / 'avatar.mp4').write_bytes((made / 'avatar.mp4').read_bytes())
    def ignore(done: int, total: int) -> None: pass
    found = _with_quality(replace(evidence, **changed), job.driving, job.store, folder, comfy, ignore)
    return quality_checks(found)

def test_the_worst_second_is_named_and_its_frames_are_kept(delivered, tmp_path):
    course = {'ghost': [0.3], 'background_ssim': [0.99], 'lip_correlation': [None]}
    said = judgement_of(BEST | {'ghost': 0.05}, course, 'mediapipe-6')
    rows = quality_of(delivered, comfy_that_says(tmp_path, said.record()), tmp_path)
    assert rows[-1].name == 'quality: worst second'
    assert rows[-1].found == 'from 0 s on, by ghost: 0.30'
    assert all(c.ok for c in rows), 'a second is a place to look at, and no verdict'
    with Image.open(tmp_path / 'worst_second.png') as strip: assert strip.width > strip.height > 300
    assert json.loads((tmp_path / 'judgement.json').read_text()) == json.loads(json.dumps(said.record()))

UNJUDGED = [ # what is so, what the one row says
    ({}, 'no ComfyUI environment in '),
    ({'manifest': None, 'manifest_trouble': 'j1.mp4.json is no manifest'}, 'j1.mp4.json is no manifest'),
    ({'video': Decoded(trouble='InvalidDataError')}, 'the video is damaged'),
    ({'job': {'input_image_url': 'http://127.0.0.1/ana.png'}}, 'the picture could not be fetched here: bad_input')]

@pytest.mark.parametrize('changed, why', UNJUDGED, ids=[why for _, why in UNJUDGED])
def test_what_is_not_judged_says_so_and_does_not_fail(delivered, tmp_path, changed, why):
    (row,) = quality_of(delivered, tmp_path / 'none', tmp_path, **changed)
    assert (row.name, row.ok) == ('quality: not measured', True)
    assert row.found.startswith(why)

def test_a_judge_that_fails_fails_the_gate(delivered, tmp_path):
    (row,) = quality_of(delivered, comfy_that(tmp_path, 'echo out of memory >&2', 'exit 1'), tmp_path)
    assert (row.name, row.ok) == ('quality: judged', False)
    assert row.found.endswith('out of memory')
