"""What callers do, on the command line and with RunPod's SDK: local endpoint, real bucket, a worker of a few lines"""
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from wan_avatar.access import find_endpoint, local_endpoint
from wan_avatar.cli import app
from wan_avatar.client import EndpointError
from wan_avatar.terminal import Code

WORKER = """
import asyncio
import runpod
async def handler(job):
    wish = job['input'].get('prompt')
    await asyncio.sleep({'wait': 60, 'nap': 2}.get(wish, 0))
    runpod.serverless.progress_update(job, {'stage': 'render', 'segment': 1, 'segments': 2})
    if wish == 'fail': return {'error': 'no_person: nobody is to be seen'}
    return {'minio_key': f'avatars/{job["id"]}.mp4', 'presigned_url': 'http://127.0.0.1/signed'}
runpod.serverless.start({'handler': handler, 'concurrency_modifier': lambda now: 4})
"""
QUIET = {'RUNPOD_SKIP_AUTO_SYSTEM_CHECKS': 'true', 'RUNPOD_SKIP_GPU_CHECK': 'true'}
OTHERS = {k: v for k, v in os.environ.items() if not k.startswith(('MINIO_', 'RUNPOD_'))}
JOB = ('submit', '--image', 'people/ana', '--driving', 'templates/wave')
TAKEN = {'width': 1280, 'height': 720, 'fps': 24, 'frames': 24, 'duration_s': 1.0, 'bytes': 7, 'sha256': '9f',
         'has_audio': False, 'seed': 7, 'profile': 'draft', 'timings': {}, 'worker': {}, 'timeline': []}

class Place:
    "A folder in which an endpoint runs, and its bucket's keys `people/ana` and `templates/wave`"
    def __init__(self, folder: Path, local, access):
        self.folder = folder
        self.local = local
        self.access = access
        self.store = access.store()
        (folder / 'video').write_bytes(b'a video')
        for key in ('people/ana', 'templates/wave', 'people/ana.png', 'templates/wave.mp4'): self.put(key)

    def put(self, key: str) -> None: self.store.upload(self.folder / 'video', key, 'video/mp4')

    def deliver(self, job: str, key: str) -> None:
        "What a worker leaves"
        self.put(key)
        self.store.write_json(f'{key}.json', TAKEN | {'minio_key': key, 'job_id': job})

    @property
    def jobs(self) -> dict: return self.local.endpoint.pool.queue.jobs

    def invoke(self, *args, **environ):
        "A command in this process"
        return CliRunner().invoke(app, [*map(str, args)], env=environ)

    def start(self, *args, stderr: int = subprocess.PIPE) -> subprocess.Popen:
        "A command in a process of its own, which heeds Ctrl-C"
        def heed() -> None: signal.signal(signal.SIGINT, signal.default_int_handler) # may be ignored here
        return subprocess.Popen([ROOT / '.venv/bin/wan-avatar', *args], cwd=self.folder, text=True, preexec_fn=heed,
                                env=OTHERS | {'RUNPOD_API_KEY': 'k', 'TERM': 'xterm'},
                                stdout=subprocess.PIPE, stderr=stderr)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp('callers')
    command = [sys.executable, '-c', WORKER]
    limits = {'worker_command': command, 'idle_timeout_s': 120, 'stop_timeout_s': 0.5}
    with local_endpoint(folder / 'runs/local', environment=QUIET, **limits) as (local, access):
        yield Place(folder, local, access)

@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home.folder)
    for name in [n for n in os.environ if n.startswith(('MINIO_', 'RUNPOD_'))]: monkeypatch.delenv(name)
    return home

# what is said before a job is sent

KEY = ('--image', 'people/ana')
@pytest.mark.parametrize('args, words', [
    (('--image', 'anna.png'), '--image \'anna.png\' is neither a file here nor a key in the bucket "media"'),
    (('--image', 'people/anna'), 'neither a file here nor a key'),
    (('--image', './ana'), 'not a file here'),
    (('--image', '../ana.png'), 'not a file here'),
    (('--image', '/nowhere/ana.png'), 'not a file here'),
    (('--image', '~/no-such-folder/ana.png'), 'neither a file here nor a key'),
    (('--image', 'folder'), 'is a folder'),
    (('--image', 'empty.png'), 'is empty'),
    (('--image', '/proc/self/mem'), 'cannot be read'),
    (('--image', 's3://media/people/ana'), 'no "//"'),
    (('--image', 'a' * 5000), '1 to 1024 bytes'),
    (('--image', 'data:image/png;base64,' + 'iVBORw0KGgo' * 200), '1 to 1024 bytes'),
    (('--image', 'people/an\aa'), 'no control characters'),
    (('--image', 'an\0a.png'), 'not a file here'),
    ((*KEY, '--driving', 'wave.mp4'), '--driving \'wave.mp4\' is neither'),
    ((*KEY, '--driving', 'https://'), 'driving_video_url'),
    ((*KEY, '--duration', '90'), 'duration_seconds 90 is more than max_seconds 60'),
    ((*KEY, '--start', '-1'), 'start_seconds'),
    ((*KEY, '--person', 'middle'), 'person \'middle\''),
    ((*KEY, '--person', '0.2,x'), 'person \'0.2,x\''),
    ((*KEY, '--person', '0.2,1.5'), 'person [0.2, 1.5]'),
    ((*KEY, '--person', '0.2,0.5,'), 'person'),
    ((*KEY, '--quality', 'perfect'), 'quality'),
    ((*KEY, '--size', '640x480'), 'size'),
    ((*KEY, '--user-id', 'a/b'), 'user_id'),
    ((*KEY, '--max-seconds', '1e9'), 'max_seconds'),
    ((*KEY, '--presign', '0'), 'presign'),
    ((*KEY, '--out', 'empty.png'), '--out empty.png cannot be made'),
    ((*KEY, '--out', 'mine', '--detach'), '--out waits for the result, --detach does not'),
    ((*KEY, '--webhook', 'example.org'), '--webhook \'example.org\' must begin with http:// or https://'),
])
def test_what_is_wrong_is_said_before_a_job_is_sent(place, args, words):
    (place.folder / 'folder').mkdir(exist_ok=True)
    (place.folder / 'empty.png').touch()
    before = set(place.jobs)
    done = place.invoke('submit', *args, '--ttl', '1')
    assert done.exit_code == Code.USAGE, done.stderr
    assert words in done.stderr
    assert set(place.jobs) == before

NO_BUCKET: dict[str, str] = {}
DEAD = {'MINIO_ENDPOINT': 'http://127.0.0.1:9', 'MINIO_BUCKET': 'ours',
        'MINIO_ACCESS_KEY': 'k', 'MINIO_SECRET_KEY': 's'}

@pytest.mark.parametrize('bucket, image, code', [
    (NO_BUCKET, 'people/anyone', Code.OK),
    (NO_BUCKET, 'http://example.org/ana.png', Code.OK),
    (NO_BUCKET, 'anyone.png', Code.USAGE), # a path, as far as anybody can tell
    (NO_BUCKET, 'video', Code.UNREACHABLE), # a file, which has to be uploaded
    (DEAD, 'people/anyone', Code.OK),
    (DEAD, 'anyone.png', Code.USAGE),
])
def test_keys_need_no_bucket(place, bucket, image, code, monkeypatch):
    monkeypatch.setattr('wan_avatar.access.LOOKUP_S', 0.1)
    before = set(place.jobs)
    done = place.invoke('submit', '--image', image, '--driving', 'templates/any', '--detach', '--endpoint',
                        place.access.endpoint, RUNPOD_API_KEY=place.access.api_key, **bucket)
    assert done.exit_code == code, done.stderr
    sent = [place.jobs[job].request.input for job in set(place.jobs) - before]
    assert [job['driving_video_path'] for job in sent] == (['templates/any'] if code == Code.OK else [])
    if code == Code.OK: assert "--driving 'templates/any' is taken for a key and was not looked up" in done.stderr

@pytest.mark.parametrize('args, words', [
    (('anna.png', 'video'), "'anna.png': not a file here"),
    (('empty.png',), 'is empty'),
    (('video', 'other', '--as', 'x'), 'is the key of one file'),
    (('other', '--as', 'people/ours'), 'another file lies there'),
    (('video', '--as', '../x'), 'no "." or ".." parts'),
    (('video', '--as', 'tracks/x'), 'a file of the worker itself'),
])
def test_files_that_are_not_put(place, args, words):
    (place.folder / 'other').write_bytes(b'another')
    (place.folder / 'empty.png').touch()
    assert place.invoke('put', 'video', '--as', 'people/ours').stdout == 'people/ours\n'
    done = place.invoke('put', *args)
    assert done.exit_code == Code.USAGE, done.stderr
    assert words in done.stderr
    assert place.store.read_bytes('people/ours', 100) == b'a video'

# a job that was sent

def heard(child: subprocess.Popen, words: str) -> str:
    "Its stderr up to a line with these words"
    lines = []
    for line in child.stderr:
        lines.append(line)
        if words in line: return ''.join(lines)
    raise AssertionError(f'never said {words}: {lines}')

def further(job: str, endpoint: str = '') -> str:
    option = f' --endpoint {endpoint}' if endpoint else ''
    return ''.join(f'wan-avatar {command} {job}{option}\n' for command in ('status', 'cancel'))

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_ctrl_c_cancels_the_job(place, number):
    child = place.start(*JOB, '--prompt', 'wait', '--json')
    job = re.search('^job (.+)$', heard(child, 'job '), re.MULTILINE)[1]
    assert place.jobs[job].state in ('IN_QUEUE', 'IN_PROGRESS')
    for _ in range(2): child.send_signal(number) # as `timeout` does; it is one wish
    said, told = child.communicate(timeout=30)
    assert child.returncode == Code.INTERRUPTED, told
    assert json.loads(said) == {'id': job, 'status': 'CANCELLED'}
    assert place.jobs[job].state == 'CANCELLED'
    assert 'Traceback' not in told

class Slow:
    "An endpoint that answers one kind of request only when it is told to"
    def __init__(self, kind: str):
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.paths: list[str] = []
        def answer(request) -> None:
            self.paths.append(what := request.path.split('/')[3])
            if what == kind:
                self.asked.set()
                self.go_on.wait(60)
            states = {'run': 'IN_QUEUE', 'cancel': 'CANCELLED'}
            request.rfile.read(int(request.headers.get('Content-Length', 0)))
            request.send_response(200)
            request.end_headers()
            request.wfile.write(json.dumps({'id': 'j1', 'status': states.get(what, 'IN_PROGRESS')}).encode())
        members = {'do_GET': answer, 'do_POST': answer, 'log_message': lambda *_: None}
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Answers', (BaseHTTPRequestHandler,), members))
        self.url = f'http://127.0.0.1:{self.server.server_port}/v2/x'

    def __enter__(self) -> 'Slow':
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

def test_ctrl_c_while_the_job_is_sent_waits_for_its_id(place):
    with Slow('run') as slow:
        child = place.start(*JOB, '--endpoint', slow.url, '--detach')
        assert slow.asked.wait(30)
        child.send_signal(signal.SIGINT)
        slow.go_on.set()
        said, told = child.communicate(timeout=30)
        assert child.returncode == Code.INTERRUPTED, told
        assert said == 'j1 CANCELLED\n'
        assert slow.paths == ['run', 'cancel']

def test_a_second_ctrl_c_leaves_the_job(place):
    with Slow('cancel') as slow:
        child = place.start(*JOB, '--endpoint', slow.url)
        heard(child, 'job j1')
        child.send_signal(signal.SIGINT)
        assert slow.asked.wait(30)
        until = time.monotonic() + 30
        while child.poll() is None and time.monotonic() < until: # presses of one moment count as one
            child.send_signal(signal.SIGINT)
            try: child.wait(0.4)
            except subprocess.TimeoutExpired: pass
        said, told = child.communicate(timeout=30)
        assert child.returncode == Code.INTERRUPTED, told
        assert told.endswith('the job was left alone:\n' + further('j1', slow.url)), told
        assert said == 'j1 IN_QUEUE\n'

def test_a_detached_job_says_how_to_go_on(place):
    done = place.invoke(*JOB, '--detach', '--json')
    job = json.loads(done.stdout)['id']
    assert done.exit_code == Code.OK
    assert done.stderr == f'job {job}\n' + further(job)
    assert place.jobs[job].request.input['driving_video_path'] == 'templates/wave'

def test_a_job_whose_time_to_live_ends_is_not_waited_for(place):
    done = place.invoke(*JOB, '--prompt', 'nap', '--ttl', '0.5', '--json')
    assert done.exit_code == Code.UNKNOWN_JOB
    said = json.loads(done.stdout)
    assert (f'job {said["id"]}\n' in done.stderr, said['status']) == (True, 'UNKNOWN')
    assert 'may go on' not in done.stderr

@pytest.mark.parametrize('prompt, code', [('show', Code.OK), ('wait', Code.INTERRUPTED)])
def test_the_object_goes_to_stdout_when_bars_are_on_the_terminal(place, prompt, code):
    screen, terminal = pty.openpty()
    child = place.start(*JOB, '--prompt', prompt, '--json', stderr=terminal)
    os.close(terminal)
    seen = b''
    try:
        while chunk := os.read(screen, 4096):
            first = b'job ' not in seen
            seen += chunk
            if prompt == 'wait' and first and b'job ' in seen: child.send_signal(signal.SIGINT)
    except OSError: pass # the other side has ended
    os.close(screen)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == code, seen
    assert json.loads(said)['id'].encode() in seen

# results

def test_out_never_overwrites(place):
    out = place.folder / 'mine'
    place.deliver('j7', 'avatars/j7.mp4')
    kept = place.store.read_json('avatars/j7.mp4.json') | {'sha256': 'of another'}
    out.mkdir()
    (out / 'avatar-j7.mp4').write_bytes(b'mine')
    done = place.invoke('fetch', 'avatars/j7.mp4', '--out', 'mine', '--json')
    assert Path(json.loads(done.stdout)['video']).name == 'avatar-j7-2.mp4', done.stderr
    assert {p.name for p in out.iterdir()} == {'avatar-j7.mp4', 'avatar-j7-2.mp4', 'avatar-j7-2.json'}
    assert (out / 'avatar-j7.mp4').read_bytes() == b'mine'
    assert json.loads((out / 'avatar-j7-2.json').read_text())['job_id'] == kept['job_id']

@pytest.mark.parametrize('command', ['status', 'cancel', 'fetch'])
@pytest.mark.parametrize('job, state, code', [
    ('no-such-job', 'UNKNOWN', Code.UNKNOWN_JOB),
    ('../j8', 'UNKNOWN', Code.UNKNOWN_JOB),
    ('j8', 'COMPLETED', Code.OK), # forgotten by the endpoint, not by the bucket
])
def test_a_job_the_endpoint_does_not_know(place, command, job, state, code):
    place.deliver('j8', 'avatars/u1/a2/j8.mp4')
    done = place.invoke(command, job, '--json')
    assert done.exit_code == code, done.stderr
    said = json.loads(done.stdout)
    if command == 'fetch' and code == Code.OK: assert said['manifest']['job_id'] == job
    else: assert {name: said[name] for name in ('id', 'status')} == {'id': job, 'status': state}
    assert 'does not know job' in done.stderr

def test_an_endpoint_that_is_not_there_knows_no_job_either(place):
    other = place.access.endpoint.replace('/local', '/another')
    done = place.invoke('status', 'j8', '--endpoint', other, RUNPOD_API_KEY=place.access.api_key)
    assert done.exit_code == Code.UNREACHABLE
    assert '/another/health: HTTP 404' in done.stderr

# README

def snippet() -> str:
    "README's Python, as it stands there"
    (found,) = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    return found

class Hook:
    "Somebody's web server, which notes what it is sent"
    def __enter__(self) -> 'Hook':
        self.told: list[dict] = []
        self.came = threading.Event()
        def answer(request) -> None:
            self.told.append(json.loads(request.rfile.read(int(request.headers['Content-Length']))))
            request.send_response(200)
            request.end_headers()
            self.came.set()
        members = {'do_POST': answer, 'log_message': lambda *_: None}
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Receives', (BaseHTTPRequestHandler,), members))
        self.url = f'http://127.0.0.1:{self.server.server_port}/secret'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

@pytest.mark.parametrize('prompt, state', [(None, 'COMPLETED'), ('fail', 'FAILED')])
def test_the_snippet_of_the_readme(place, prompt, state):
    code = snippet()
    if prompt: code = code.replace("'presign': True", f"'presign': True, 'prompt': '{prompt}'")
    with Hook() as hook:
        shown = "# 'webhook': 'https://example.org/a-long-secret/avatar'"
        if prompt: code = code.replace(shown, f"'webhook': '{hook.url}'")
        done = subprocess.run([sys.executable, '-c', code], cwd=place.folder, env=OTHERS, capture_output=True,
                              text=True, timeout=60, check=True)
        if prompt: assert hook.came.wait(10)
    job, *said = done.stdout.splitlines()
    assert place.jobs[job].state == state
    if prompt:
        assert said == ['FAILED no_person: nobody is to be seen']
        assert [(told['id'], told['status'], told['error']) for told in hook.told] == [(job, state, said[0][7:])]
    else: assert said == [f'avatars/{job}.mp4 http://127.0.0.1/signed']

@pytest.mark.parametrize('text', ['', '{', '[]', '{"endpoint": 1}', '{"what": 2}', '5'])
def test_a_damaged_note_of_an_endpoint_is_one_line(tmp_path, text):
    (tmp_path / 'up.json').write_text(text)
    with pytest.raises(EndpointError, match='is damaged'): find_endpoint(None, {}, tmp_path)
