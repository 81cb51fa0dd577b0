"""`wan-avatar doctor` and the commands that read what is kept: rows as pure functions, rights on a real S3 server"""
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT
from control_plane import KEY, control_plane
from typer.testing import CliRunner

from wan_avatar.bucket import bucket_server
from wan_avatar.cli import app
from wan_avatar.cli_operate import made_video, prometheus_text, recent_keys, recent_videos
from wan_avatar.config import load_settings
from wan_avatar.doctor import (
    CUDA,
    Cards,
    ComfyFound,
    bucket_clock,
    bucket_findings,
    clock_finding,
    comfy_finding,
    disk_finding,
    examine,
    gpu_finding,
    hub_finding,
    memory_finding,
    parse_cards,
    ports_finding,
    try_bucket,
    weights_finding,
)
from wan_avatar.endpoint import Control, create, request_body
from wan_avatar.endpoint_file import read_file
from wan_avatar.manifest import BootReport, Manifest
from wan_avatar.memory import Memory
from wan_avatar.metrics import JobRecord, write_records
from wan_avatar.models import Step, load_lock
from wan_avatar.prices import pool_of
from wan_avatar.store import Store
from wan_avatar.timeline import Stage
from wan_avatar.workflow import TINY, WAN, get_profile, locked_files

DRAFT = get_profile('draft')
GB = 10**9
H100 = Cards('570.86', (12, 8), (('NVIDIA H100 80GB HBM3', 85.5),))
FILE = locked_files(WAN, load_lock())[0]
ALL_RIGHT = {'reach': '', 'put': '', 'read': '', 'list': '', 'delete': ''}

# row; its state; words of what was found; words of the remedy
ROWS = [
    (gpu_finding(WAN, H100), 'ok', 'H100 80GB HBM3, 85.5 GB, driver 570.86 for CUDA 12.8', ''),
    (gpu_finding(WAN, Cards('580.1', (13, 0), H100.cards)), 'ok', 'CUDA 13.0', ''),
    (gpu_finding(WAN, Cards('550.1', (12, 4), H100.cards)), 'wrong', 'CUDA 12.4', 'update the driver'),
    (gpu_finding(WAN, Cards('570.86', (12, 8), (('NVIDIA T4', 16.1),))), 'wrong', 'NVIDIA T4', 'to need 24 GB'),
    (gpu_finding(WAN, Cards('570.86', (12, 8), ())), 'wrong', 'no card', '--gpus all'),
    (gpu_finding(WAN, 'there is no nvidia-smi'), 'wrong', 'no nvidia-smi', 'PROFILE=draft'),
    (gpu_finding(DRAFT, 'there is no nvidia-smi'), 'ok', 'needs none', ''),
    (gpu_finding(TINY, 'there is no nvidia-smi'), 'ok', 'needs none', ''),
    (gpu_finding(DRAFT, Cards('535.1', (12, 2), H100.cards)), 'ok', 'CUDA 12.2', ''),
    (memory_finding(Memory(32 * GB)), 'ok', '32.0 GB', ''),
    (memory_finding(Memory(32 * GB, 3 * GB, '/g')), 'wrong', '3.0 GB allowed', 'raise the limit'),
    (memory_finding(Memory(3 * GB)), 'wrong', '3.0 GB', 'raise the limit'),
    (memory_finding(Memory(0)), 'not looked at', 'does not say', ''),
    (disk_finding('WORK_DIR', Path('/w'), 10 * GB, 2 * GB), 'ok', '/w: 10.0 GB free, 2.1 needed', ''),
    (disk_finding('WORK_DIR', Path('/w'), 2 * GB, 2 * GB), 'wrong', '2.0 GB free', 'make room'),
    (disk_finding('WORK_DIR', Path('/w'), 10 * GB, 0, '/w is a link'), 'wrong', 'a link', 'folder of your own'),
    (ports_finding(''), 'ok', 'loopback', ''),
    (ports_finding('Operation not permitted'), 'wrong', 'not permitted', 'allow loopback'),
    (comfy_finding(ComfyFound('2.8.0', True), True), 'ok', 'torch 2.8.0, with a GPU', ''),
    (comfy_finding(ComfyFound('2.14.1'), False), 'ok', 'without a GPU', ''),
    (comfy_finding(ComfyFound('2.14.1'), True), 'wrong', 'without a GPU', 'one with CUDA'),
    (comfy_finding(ComfyFound(trouble='No module named torch'), True), 'wrong', 'torch', 'make setup'),
    (weights_finding(WAN, [Step(FILE, 'verified')]), 'ok', '1 files of profile wan22-animate are here', ''),
    (weights_finding(WAN, [Step(FILE, 'here')]), 'ok', 'are here', ''),
    (weights_finding(WAN, [Step(FILE, 'hub')]), 'ok', 'fetches them when it starts', ''),
    (weights_finding(WAN, [Step(FILE, 'not pinned')]), 'wrong', FILE.place, 'models lock'),
    (weights_finding(TINY, [], 'lacks 5 files; run: x'), 'wrong', 'lacks 5 files', 'run: x'),
    (weights_finding(DRAFT, []), 'ok', 'needs none', ''),
    (hub_finding(0, ''), 'not looked at', 'nothing is to be fetched', ''),
    (hub_finding(GB, ''), 'ok', 'as it is pinned', ''),
    (hub_finding(GB, 'ConnectError'), 'wrong', 'ConnectError', 'HF_TOKEN'),
    (clock_finding(None), 'not looked at', 'does not say', ''),
    (clock_finding(0.4), 'ok', 'as the bucket', ''),
    (clock_finding(-61), 'ok', '61 s behind', ''),
    (clock_finding(301), 'wrong', '301 s ahead of', 'NTP'),
    (clock_finding(-301), 'wrong', '301 s behind', 'NTP'),
    *((row, 'ok', '', '') for row in bucket_findings(ALL_RIGHT, 'm/a/')),
    *((row, state, '', words) for row, state, words in zip(
        bucket_findings({'reach': 'the bucket at x did not answer'}, 'm/a/'), ['wrong', *['not looked at'] * 4],
        ['the variable', '', '', '', ''], strict=True)),
]

@pytest.mark.parametrize('row, state, found, remedy', ROWS)
def test_a_row_says_what_was_found_and_what_to_do(row, state, found, remedy):
    assert row.state == state, row
    assert found in row.found
    assert remedy in row.remedy
    assert bool(row.remedy) == (state == 'wrong')

NO_CARDS = ['', 'no devices were found', '<html>', '{}']

@pytest.mark.parametrize('text', NO_CARDS)
def test_another_answer_of_the_driver_is_an_error(text):
    with pytest.raises(ValueError, match='no XML'): parse_cards(text)

def test_the_driver_is_held_against_the_cuda_of_the_image():
    base = re.search(r'cu(\d\d)(\d)', (ROOT / 'Dockerfile').read_text())
    assert CUDA == (int(base[1]), int(base[2]))

# %% a real S3 server with keys that may do less
def s3_keys(folder: Path) -> None:
    "The keys of a bucket server: its own, and some with fewer rights"
    rights = {'wan_avatar': ['Admin', 'Read', 'Write', 'List', 'Tagging'], 'reader': ['Read', 'List'],
              'writer': ['Read', 'List', 'Write']}
    identities = [{'name': name, 'credentials': [{'accessKey': f'{name}-access', 'secretKey': f'{name}-secret'}],
                   'actions': actions} for name, actions in rights.items()]
    folder.mkdir(mode=0o700)
    (folder / 's3.json').write_text(json.dumps({'identities': identities}))

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rights') / 'bucket'
    s3_keys(folder)
    with bucket_server(folder) as server: yield server

def keys_of(server, name: str) -> dict[str, str]:
    return server.environment() | {'MINIO_ACCESS_KEY': f'{name}-access', 'MINIO_SECRET_KEY': f'{name}-secret'}

RIGHTS = { # whose key -> states of reach, put, read, list, delete
    'wan_avatar': ['ok', 'ok', 'ok', 'ok', 'ok'],
    'writer': ['ok', 'ok', 'ok', 'ok', 'ok'],
    'reader': ['ok', 'wrong', 'not looked at', 'ok', 'not looked at'],
    'nobody': ['wrong', 'not looked at', 'not looked at', 'not looked at', 'not looked at'],
}

@pytest.mark.parametrize('name, states', RIGHTS.items())
def test_rights_are_tried(server, name, states):
    store = Store(load_settings(keys_of(server, name)))
    rows = bucket_findings(try_bucket(store, 'avatars/'), 'media/avatars/')
    assert [r.state for r in rows] == states, rows
    if name == 'reader':
        assert 'refused the credentials' in rows[1].found
        assert rows[1].remedy == 'give the key s3:PutObject on media/avatars/*'
    assert f'{name}-secret' not in str(rows)
    assert Store(load_settings(server.environment())).list('avatars/doctor') == []
    assert clock_finding(bucket_clock(store)).state == 'ok'

def test_the_command_says_it_all(server, tmp_path):
    (tmp_path / 'python').write_text('#!/bin/sh\necho \'["2.8.0", false]\'\n')
    (tmp_path / 'python').chmod(0o755)
    for path in ('comfy/env/bin', 'comfy/ComfyUI'): (tmp_path / path).mkdir(parents=True)
    (tmp_path / 'python').rename(tmp_path / 'comfy/env/bin/python')
    (tmp_path / 'comfy/ComfyUI/main.py').touch()
    folders = {n: f'{tmp_path}/{n[:5].lower().rstrip("_")}' for n in ('COMFY_DIR', 'WORK_DIR', 'MODELS_DIR')}
    environ = folders | keys_of(server, 'wan_avatar') | {'PROFILE': 'draft'}
    good = CliRunner().invoke(app, ['doctor', '--json'], env=environ)
    rows = json.loads(good.stdout)
    assert good.exit_code == 0, rows
    assert {r['state'] for r in rows} == {'ok', 'not looked at'}
    assert {'settings', 'bucket', 'bucket: delete', 'clock', 'memory', 'ports', 'GPU', 'ComfyUI', 'WORK_DIR', 'weights',
            'MODELS_DIR', 'hub'} <= {r['what'] for r in rows}
    reader = CliRunner().invoke(app, ['doctor'], env=environ | keys_of(server, 'reader'))
    assert reader.exit_code == 1
    assert 'give the key s3:PutObject on media/avatars/*' in reader.stdout
    assert not (tmp_path / 'work').exists()

def test_the_image_runs_it_as_a_module(tmp_path):
    "Without the command line, in the environment of a worker that lacks its bucket"
    bare = {k: v for k, v in os.environ.items() if not k.startswith('MINIO_')}
    folders = {n: str(tmp_path / n) for n in ('COMFY_DIR', 'WORK_DIR', 'MODELS_DIR')}
    command = [sys.executable, '-m', 'wan_avatar.doctor', '--json']
    done = subprocess.run(command, env=bare | folders, capture_output=True, text=True, timeout=60)
    rows = {r['what']: r for r in json.loads(done.stdout)}
    assert done.returncode == 1
    assert 'MINIO_ENDPOINT: not set' in rows['settings']['found']
    assert rows['bucket']['state'] == 'not looked at'

def test_an_unknown_profile_is_a_row():
    found = {f.what: f for f in examine({'PROFILE': 'nope'})}
    assert found['settings'].state == 'wrong'
    assert "profile 'nope' does not exist" in found['settings'].found

# %% jobs, logs, metrics
def manifest(key: str, gpu: str, boot: BootReport | None = None) -> Manifest:
    return Manifest(
        minio_key=key, width=1280, height=720, fps=24, frames=24, duration_s=1, bytes=7, sha256='9f', has_audio=False,
        seed=7, profile='draft', timings={}, worker={'id': 'w1', 'gpu': gpu}, job_id='j', boot=boot,
        timeline=[Stage('fetch', 0, 2), Stage('render', 2, 10)])

AT = datetime(2026, 11, 24, tzinfo=UTC)
COLD = BootReport(job_number=1, process_s=1, taken_s=39, stages=[Stage('comfy', 0, 30)])
L40S = pool_of('NVIDIA L40S').usd_per_s # US dollars
COSTS = [ # card, boot, cost in seconds of the card
    ('NVIDIA L40S', None, 10), # no cold start is known
    ('NVIDIA L40S', COLD, 55), # 1 + 39 of the start, 10 of the job, 5 of idling
    ('NVIDIA L40S', COLD.model_copy(update={'job_number': 2}), 10),
    ('cpu', COLD, None),
    ('a card of tomorrow', None, None),
]

@pytest.mark.parametrize('gpu, boot, seconds', COSTS)
def test_a_job_costs_what_its_card_does(gpu, boot, seconds):
    video = made_video('a.mp4', AT, manifest('a.mp4', gpu, boot))
    assert (video.state, video.seconds) == ('COMPLETED', 10)
    assert video.usd == (None if seconds is None else pytest.approx(seconds * L40S))

def test_jobs_lists_the_newest_and_says_where_it_stopped(server):
    store = Store(load_settings(server.environment()))
    for n in range(4): store.write_bytes(f'list/{n}.mp4', b'a video', 'video/mp4')
    store.write_json('list/0.mp4.json', manifest('list/0.mp4', 'cpu').record())
    store.write_json('list/1.mp4.json', {'half': 'a manifest'})
    found, ended = recent_videos(store, 'list/', 3)
    assert ended
    assert len(found) == 3
    states = {v.key: v.state for v in recent_videos(store, 'list/', 10)[0]}
    assert states == {'list/0.mp4': 'COMPLETED', 'list/1.mp4': 'damaged manifest', 'list/2.mp4': 'no manifest',
                      'list/3.mp4': 'no manifest'}
    assert recent_keys(store, 'list/', 10, most=2)[1] is False
    said = CliRunner().invoke(app, ['jobs', '--prefix', 'list/', '--json'], env=server.environment())
    assert sorted(v['key'] for v in json.loads(said.stdout)) == sorted(states)
    none = CliRunner().invoke(app, ['jobs', '--prefix', 'nothing/', '--json'], env=server.environment())
    assert (none.exit_code, json.loads(none.stdout)) == (0, [])

LOGS = { # what is asked for -> the last line of the log that is found; None: none is
    'w1': 'one',
    'w2': '{"job": "shared"}',
    'j-1': 'one',
    'shared': '{"job": "shared"}', # the newest worker that names it
    'j': None,
    '../up.json': None,
    'worker-w1': None,
}

@pytest.mark.parametrize('name, last', LOGS.items())
def test_logs_of_a_worker_or_of_the_one_that_had_a_job(tmp_path, name, last):
    (tmp_path / 'logs').mkdir()
    for n, (worker, text) in enumerate({'w1': '{"job": "j-1"}\n"shared"\none\n', 'w2': '{"job": "shared"}\n'}.items()):
        path = tmp_path / f'logs/worker-{worker}.log'
        path.write_text(text)
        os.utime(path, (n, n))
    (tmp_path / 'up.json').write_text('{"api_key": "hidden"}')
    done = CliRunner().invoke(app, ['logs', name, '--lines', '1', '--folder', str(tmp_path)])
    assert done.exit_code == (3 if last is None else 0), done.output
    if last: assert done.stdout.strip() == last

def test_logs_of_runpod():
    with control_plane() as plane:
        control = Control(KEY, plane.url, f'{plane.url}/jobs')
        wanted = read_file(ROOT / 'endpoint.toml', 'me/worker:wan-worker-20261124-8f3a1c2b4d5e')
        id = create(control, request_body(wanted, {}))['id']
        plane.workers[id] = [{'id': 'w1', 'status': 'RUNNING', 'isStale': False, 'gpuCount': 1}]
        plane.logs['w1'] = [{'source': 'container', 'line': f'boot: {KEY}'}]
        plane.jobs = {'j1': {'id': 'j1', 'status': 'IN_PROGRESS', 'workerId': 'w1'}, 'j2': {'status': 'IN_QUEUE'}}
        addresses = {'RUNPOD_API_BASE_URL': plane.url, 'RUNPOD_ENDPOINT_BASE_URL': f'{plane.url}/jobs'}
        environ = {'RUNPOD_API_KEY': KEY, **addresses}
        def logs(name): return CliRunner().invoke(app, ['logs', name, '--endpoint', id], env=environ)
        assert {logs(name).stdout for name in ('w1', 'j1')} == {'boot: ••••\n'}
        assert 'no worker has job' in logs('j2').stderr
        assert '404' in logs('j3').stderr

def test_metrics_are_prometheus_text_that_adds_up(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families
    job = JobRecord(job_id='j', group='a "b"\\', at='now', submitted_s=0, done_s=30, state='COMPLETED', delay_s=8,
                    execution_s=20, gpu='NVIDIA L40S', profile='draft', duration_s=10)
    failed = job.model_copy(update={'state': 'FAILED', 'gpu': None, 'duration_s': None, 'execution_s': None})
    for name, records in {'one': [job, failed], 'two': [job]}.items():
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / 'records.jsonl', records)
    done = CliRunner().invoke(app, ['metrics', str(tmp_path / 'one'), str(tmp_path / 'two/records.jsonl')])
    assert done.exit_code == 0, done.output
    assert done.stdout == prometheus_text([job, failed, job])
    families = {f.name: f for f in text_string_to_metric_families(done.stdout)}
    sums = {name: round(sum(s.value for s in f.samples), 4) for name, f in families.items()}
    assert sums.pop('wan_avatar_cost_usd') == pytest.approx(40 * L40S)
    assert sums == {'wan_avatar_jobs': 3, 'wan_avatar_starts': 3, 'wan_avatar_queue_seconds': 24,
                    'wan_avatar_execution_seconds': 40, 'wan_avatar_billed_seconds': 40, 'wan_avatar_video_seconds': 20}
    states = {s.labels['state']: s.value for s in families['wan_avatar_jobs'].samples}
    assert states == {'COMPLETED': 2, 'FAILED': 1}
    assert {s.labels['group'] for s in families['wan_avatar_jobs'].samples} == {'a "b"\\'}
