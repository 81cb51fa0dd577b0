"""`wan-avatar endpoint apply --canary` and `--rollback`, as operators run them: real bucket, real HTTP, a stand-in of
RunPod's control plane whose endpoints take jobs"""
import os
import shutil
import signal
import subprocess
import threading

import pytest
from conftest import ROOT
from control_plane import KEY, control_plane
from typer.testing import CliRunner

from wan_avatar.canary import CanaryFailed, canary_file, run_canary
from wan_avatar.cli import app
from wan_avatar.config import load_settings
from wan_avatar.endpoint import Control, create, request_body
from wan_avatar.endpoint_file import read_file
from wan_avatar.store import Store

OLD, NEW, NEWER = (f'dexsynccom/twin-avatar:wan-worker-2026112{n}-{n}f3a1c2b4d5e' for n in (4, 5, 6))
VIDEO = 'avatars/canary/made.mp4'
MADE = {'minio_key': VIDEO, 'width': 1280, 'height': 720, 'fps': 24, 'frames': 24, 'duration_s': 1.0, 'bytes': 7,
        'sha256': '9f', 'has_audio': False, 'seed': 7, 'profile': 'draft', 'timings': {}, 'timeline': []}
COMPLETED = {'status': 'COMPLETED', 'output': MADE, 'delayTime': 61_000, 'executionTime': 30_000}

@pytest.fixture(scope='module')
def store(bucket, samples):
    store = Store(load_settings(bucket.environment()))
    store.write_bytes(VIDEO, b'a video', 'video/mp4')
    for key in ('people/ana.png', 'templates/wave.mp4'): store.write_bytes(key, b'a picture', 'image/png')
    return store

def made_by(store, commit: str) -> None:
    worker = {'id': 'w1', 'gpu': 'NVIDIA L40S', 'git_sha': commit}
    store.write_json(f'{VIDEO}.json', MADE | {'job_id': 'job0001-u1', 'worker': worker})

@pytest.fixture
def plane():
    with control_plane() as plane: yield plane

@pytest.fixture
def environ(plane, bucket, store):
    return bucket.environment() | {'RUNPOD_API_KEY': KEY, 'RUNPOD_API_BASE_URL': plane.url, 'COLUMNS': '160',
                                   'RUNPOD_ENDPOINT_BASE_URL': f'{plane.url}/jobs'}

@pytest.fixture
def operator(environ, tmp_path, monkeypatch):
    "Run `wan-avatar endpoint ...` where the old image is deployed"
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / 'endpoint.toml', tmp_path)
    def run(*args: str):
        done = CliRunner().invoke(app, ['endpoint', *args], env=environ)
        assert KEY not in done.output
        assert environ['MINIO_SECRET_KEY'] not in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done
    assert run('apply', '--image', OLD).exit_code == 0
    return run

def images(plane) -> dict[str, str]: return {e['name']: e['image'] for e in plane.endpoints.values()}

KEYS = ('--canary-image', 'people/ana.png', '--canary-driving', 'templates/wave.mp4')

# %% back to the image before
def test_rollback_finds_the_image_that_ran_before(operator, plane, tmp_path):
    nothing = operator('apply', '--rollback')
    assert (nothing.exit_code, images(plane)) == (3, {'wan-avatar': OLD})
    assert 'none of the 1 releases of wan-avatar replaced another image' in nothing.stderr
    for image in (NEW, NEWER): operator('apply', '--image', image)
    text = (ROOT / 'endpoint.toml').read_text()
    (tmp_path / 'endpoint.toml').write_text(text.replace('disk_gb = 120', 'disk_gb = 130')) # a release of its own
    assert operator('apply', '--image', NEWER).exit_code == 0
    back = operator('apply', '--rollback')
    assert back.exit_code == 0, back.stderr
    assert f'back to {NEW}, which was replaced at' in back.stderr
    assert images(plane) == {'wan-avatar': NEW}
    assert operator('apply', '--rollback').exit_code == 0 # and forth again
    assert images(plane) == {'wan-avatar': NEWER}
    both = operator('apply', '--rollback', '--image', OLD)
    assert (both.exit_code, images(plane)) == (2, {'wan-avatar': NEWER})

# %% a canary
NO_VIDEO = {'status': 'COMPLETED', 'output': {'minio_key': 'avatars/no.mp4'}}
CANARIES = { # what the job's `/status` says; commit in the manifest; exit code; words; is the new image deployed?
    'made': ([{'status': 'IN_QUEUE'}, COMPLETED], '5f3a1c2b4d5e6f70', 0, '30 s at work, 0.016 USD', True),
    'failed': ([{'status': 'FAILED', 'error': 'comfy_failed: node 7'}], '5f3a', 1, 'comfy_failed: node 7', False),
    'cancelled': ([{'status': 'CANCELLED'}], '5f3a', 1, 'RunPod gives no reason', False),
    'too long': ([{'status': 'TIMED_OUT', 'error': 'too long'}], '5f3a', 1, 'TIMED_OUT: too long', False),
    'no video': ([NO_VIDEO], '5f3a', 1, 'is not in the bucket', False),
    'no answer': ([{'status': 'COMPLETED', 'output': None}], '5f3a', 1, 'is not in the bucket', False),
    'another image': ([COMPLETED], 'aaaa1c2b4d5e', 1, 'was done by commit aaaa1c2b4d5e, which is not that of', False),
    'a job that is forgotten': ([], '5f3a', 1, 'does not know job', False),
}

@pytest.mark.parametrize('script, commit, code, words, switched', CANARIES.values(), ids=CANARIES)
def test_only_a_job_that_gave_a_video_switches_the_image(operator, plane, store, script, commit, code, words, switched):
    made_by(store, commit)
    plane.script = script
    (deployed,) = plane.endpoints
    before = len(plane.writes())
    done = operator('apply', '--image', NEW, '--canary', *KEYS)
    assert (done.exit_code, images(plane)) == (code, {'wan-avatar': NEW if switched else OLD}), done.stderr
    assert words in done.stderr
    assert done.stdout == (f'{deployed}\n' if switched else '')
    ((canary, sent),) = plane.sent
    assert canary != deployed
    assert sent == {'input': {'input_image_minio_path': 'people/ana.png', 'driving_video_path': 'templates/wave.mp4',
                              'user_id': 'canary'}, 'policy': {'ttl': 3_600_000, 'executionTimeout': 1_200_000}}
    assert [path for method, path in plane.writes()[before:] if method == 'DELETE'] == [f'/v2/serverless/{canary}']
    assert [path for method, path in plane.writes() if method == 'PATCH'] == [f'/v2/serverless/{deployed}'] * switched

def test_the_canary_has_the_settings_of_the_endpoint(operator, plane, store):
    made_by(store, '5f3a1c2b4d5e6f70')
    made = []
    plane.script = [COMPLETED]
    plane.on_run = lambda endpoint: made.append(dict(endpoint))
    operator('apply', '--image', NEW, '--canary', *KEYS)
    assert {k: v for k, v in made[0].items() if k not in ('id', 'name')} == {
        k: v for k, v in next(iter(plane.endpoints.values())).items() if k not in ('id', 'name')}
    assert made[0]['name'] == 'wan-avatar-canary'

def test_a_first_image_is_tried_before_there_is_an_endpoint(operator, plane, store):
    made_by(store, '5f3a1c2b4d5e6f70')
    assert operator('destroy', '--yes').exit_code == 0
    plane.script = [{'status': 'FAILED', 'error': 'comfy_failed: node 7'}]
    assert operator('apply', '--image', NEW, '--canary', *KEYS).exit_code == 1
    assert not plane.endpoints
    plane.script = [COMPLETED]
    assert operator('apply', '--image', NEW, '--canary', *KEYS).exit_code == 0
    assert images(plane) == {'wan-avatar': NEW}

def test_a_creation_whose_answer_is_lost_is_deleted_too(operator, plane, store):
    made_by(store, '5f3a1c2b4d5e6f70')
    plane.script = [COMPLETED]
    plane.faults += [('POST', ''), ('POST', 'lost')] # the first is GraphQL's, which the plan reads
    done = operator('apply', '--image', NEW, '--canary', *KEYS)
    assert (done.exit_code, images(plane), plane.faults) == (0, {'wan-avatar': NEW}, []), done.stderr
    assert [path for method, path in plane.writes() if method == 'DELETE'] == [f'/v2/serverless/{plane.sent[0][0]}']

REFUSED = [ # arguments; exit code; words
    (('--image', NEW, '--canary', '--canary-image', 'me.png'), 2, "--canary-image 'me.png' is neither a file"),
    (('--image', NEW, '--canary', '--canary-image', 'people/nobody'), 2, 'neither a file here nor a key'),
    (('--image', 'me/worker:latest', '--canary', *KEYS), 2, 'can mean other content tomorrow'),
]

@pytest.mark.parametrize('args, code, words', REFUSED)
def test_nothing_is_made_for_a_job_that_cannot_be(operator, plane, args, code, words):
    before = len(plane.writes())
    done = operator('apply', *args)
    assert done.exit_code == code, done.stderr
    assert words in done.stderr
    assert len(plane.writes()) == before
    assert not plane.sent

def test_a_canary_that_is_there_is_left_to_its_owner(operator, plane, environ):
    control = Control(KEY, plane.url, f'{plane.url}/jobs')
    file = canary_file(read_file(ROOT / 'endpoint.toml', NEW))
    other = create(control, request_body(file, environ))['id']
    done = operator('apply', '--image', NEW, '--canary', *KEYS)
    assert done.exit_code == 3
    assert f'wan-avatar-canary ({other}) is there already' in done.stderr
    assert images(plane) == {'wan-avatar': OLD, 'wan-avatar-canary': NEW}

def test_nothing_to_try_where_nothing_differs(operator, plane):
    done = operator('apply', '--image', OLD, '--canary', *KEYS)
    assert done.exit_code == 0
    assert 'nothing differs' in done.stderr
    assert not plane.sent

def test_a_job_is_waited_for_no_longer_than_the_file_says(plane, store):
    control = Control(KEY, plane.url, f'{plane.url}/jobs', pause=lambda s: None)
    plane.script = [{'status': 'IN_PROGRESS'}]
    with pytest.raises(CanaryFailed, match='was still IN_PROGRESS after 0 s'):
        run_canary(control, read_file(ROOT / 'endpoint.toml', NEW), {'RUNPOD_API_KEY': KEY}, {}, store, wait_s=0.2)
    assert not plane.endpoints

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_deletes_the_canary_and_changes_nothing(operator, plane, environ, tmp_path, number):
    plane.script = [{'status': 'IN_PROGRESS'}]
    asked = threading.Event()
    plane.on_run = lambda endpoint: asked.set()
    def heed() -> None: signal.signal(signal.SIGINT, signal.default_int_handler) # may be ignored here
    command = [ROOT / '.venv/bin/wan-avatar', 'endpoint', 'apply', '--image', NEW, '--canary', *KEYS]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | environ, preexec_fn=heed, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert asked.wait(30)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally: process.kill()
    assert (process.returncode, out) == (130, ''), err
    assert images(plane) == {'wan-avatar': OLD}
