"""The local endpoint under the SDK's worker and the SDK's client"""
import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx2
import psutil
import pytest

from wan_avatar import bucket
from wan_avatar.launch import free_port
from wan_avatar.local import LocalEndpoint, up
from wan_avatar.queue import MB
from wan_avatar.reload import renew_on_change
from wan_avatar.worker_pool import worker_environment

WORKER = '''
import asyncio, os, sys, runpod
async def handler(job):
    do = job['input'].get('do')
    if do == 'crash': os._exit(3)
    if do == 'error': return {'error': 'bad_input: no'}
    if do == 'raise': raise ValueError('inside')
    if do == 'refresh': return {'error': 'storage_failed: full', 'refresh_worker': True}
    if do == 'progress': runpod.serverless.progress_update(job, {'stage': 'render'})
    if do in ('wait', 'progress'):
        try:
            for _ in range(3000):
                if os.path.exists(job['input']['until']): break
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            open(job['input']['until'] + '.cancelled', 'w').close()
            raise
    return {'pid': os.getpid(), 'echo': job['input'].get('echo')}
async def chunks(job):
    for n in range(3): yield n
n = int(os.environ.get('AT_ONCE', '1'))
if os.environ.get('UNFIT'):
    @runpod.serverless.register_fitness_check
    def broken(): raise RuntimeError('no disk')
more = {'return_aggregate_stream': True} if os.environ.get('STREAM') else {}
runpod.serverless.start({'handler': chunks if more else handler, 'concurrency_modifier': lambda current: n, **more})
'''
QUIET = {'RUNPOD_SKIP_AUTO_SYSTEM_CHECKS': 'true', 'RUNPOD_SKIP_GPU_CHECK': 'true', 'RUNPOD_LOG_LEVEL': 'INFO'}

class Site:
    "An endpoint with its events and a plain HTTP client"
    def __init__(self, folder: Path, env=None, command=None, **more):
        self.folder = folder
        self.events: list[tuple[str, dict]] = []
        self.heard = threading.Condition()
        (folder / 'worker.py').write_text(WORKER)
        command = command or [sys.executable, str(folder / 'worker.py')]
        self.endpoint = LocalEndpoint(command, QUIET | (env or {}), folder / 'logs', on_event=self.hear, **more)
        key = {'Authorization': f'Bearer {self.endpoint.api_key}'}
        self.http = httpx2.Client(base_url=f'{self.endpoint.url}/local', headers=key, timeout=30)

    def hear(self, kind: str, details: dict) -> None:
        with self.heard:
            self.events.append((kind, details))
            self.heard.notify_all()

    def wait_event(self, kind: str, n: int = 1) -> dict:
        "The n-th event of a kind, within 20 s"
        with self.heard: came = self.heard.wait_for(lambda: self.count(kind) >= n, 20)
        assert came, (kind, self.events)
        return [d for k, d in self.events if k == kind][n - 1]

    def count(self, kind: str) -> int: return sum(k == kind for k, _ in self.events)

    def run(self, _policy=None, **given) -> str: # job id
        answer = self.http.post('/run', json={'input': given or {'do': ''}, 'policy': _policy or {}})
        return answer.raise_for_status().json()['id']

    def status(self, job: str) -> dict: return self.http.get(f'/status/{job}').json()

    def until(self, job: str, *states: str, **values) -> dict:
        "Poll until the job is in one of these states and shows these values"
        def shown() -> dict | None:
            status = self.status(job)
            if status['status'] in states and all(status.get(k) == v for k, v in values.items()): return status
        return poll(shown, lambda: self.status(job))

def poll(check, why=lambda: ''):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if found := check(): return found
        time.sleep(0.02)
    raise AssertionError(why())

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp('site'), idle_timeout_s=600, webhook_interval_s=0.05, poll_timeout_s=1)
    with made.endpoint: yield made

@pytest.fixture
def client(site, monkeypatch):
    import runpod
    monkeypatch.setattr(runpod, 'endpoint_url_base', site.endpoint.url)
    return runpod.Endpoint('local', api_key=site.endpoint.api_key)

def test_the_sdk_client(site, client):
    said = client.run_sync({'input': {'echo': 'héllo'}})
    assert said['echo'] == 'héllo'
    request = client.run({'input': {'echo': 2}})
    assert request.output(timeout=20)['echo'] == 2
    assert request.status() == 'COMPLETED'
    assert client.health()['jobs']['completed'] >= 2
    assert client.health()['workers']['ready'] == 1
    assert site.count('worker_started') == 1
    assert client.run({'input': {'do': 'error'}}).output(timeout=20) is None

def test_errors_become_failed(site):
    assert site.until(site.run(do='error'), 'FAILED')['error'] == 'bad_input: no'
    assert json.loads(site.until(site.run(do='raise'), 'FAILED')['error'])['error_message'] == 'inside'

def test_progress_then_the_result(site):
    job = site.run(do='progress', until=str(go := site.folder / 'go-progress'))
    assert site.until(job, 'IN_PROGRESS', output={'stage': 'render'})['workerId']
    go.touch()
    assert 'pid' in site.until(job, 'COMPLETED')['output']

def test_the_sdk_client_cancels(site, client):
    mark = site.folder / 'go-cancel'
    request = client.run({'input': {'do': 'progress', 'until': str(mark)}})
    site.until(request.job_id, 'IN_PROGRESS', output={'stage': 'render'})
    assert request.cancel()['status'] == 'CANCELLED'
    poll(Path(f'{mark}.cancelled').exists)
    assert request.status() == 'CANCELLED'
    assert site.until(site.run(echo=3), 'COMPLETED')['output']['echo'] == 3

def test_execution_timeout_and_ttl_reach_the_handler(site):
    a = site.run(do='wait', until=str(slow := site.folder / 'slow'), _policy={'executionTimeout': 300})
    assert site.until(a, 'TIMED_OUT')['executionTime'] >= 300
    poll(Path(f'{slow}.cancelled').exists)
    b = site.run(do='wait', until=str(old := site.folder / 'old'), _policy={'ttl': 2000})
    site.until(b, 'IN_PROGRESS')
    poll(lambda: site.http.get(f'/status/{b}').status_code == 404)
    poll(Path(f'{old}.cancelled').exists)
    assert site.http.post(f'/retry/{a}').json()['status'] == 'IN_QUEUE'
    slow.touch()
    assert site.until(a, 'COMPLETED')

STRANGERS = [ # without a key, or with another's
    ('POST', '/local/run', {}),
    ('GET', '/local/health', {'Authorization': 'Bearer no'}),
    ('GET', '/local/job-take/w', {}),
]

@pytest.mark.parametrize('method, path, headers', STRANGERS)
def test_a_stranger_is_refused(site, method, path, headers):
    answer = httpx2.request(method, site.endpoint.url + path, json={'input': {}}, headers=headers)
    assert answer.status_code == 401

REFUSALS = [ # with a caller's key
    ('GET', '/local/job-take/w', None, 401),
    ('GET', '/local/job-take-batch/w', None, 401),
    ('GET', '/local/job-stop/w', None, 401),
    ('GET', '/local/ping/w', None, 401),
    ('POST', '/local/job-done/w/j', b'{}', 401),
    ('GET', '/local/status/nobody', None, 404),
    ('POST', '/local/cancel/nobody', None, 404),
    ('POST', '/local/retry/nobody', None, 404),
    ('GET', '/other/health', None, 404),
    ('POST', '/local/run', b'{', 400),
    ('POST', '/local/run', b'{}', 400),
    ('POST', '/local/runsync?wait=5', b'{"input": {}}', 400),
]

@pytest.mark.parametrize('method, path, body, status', REFUSALS)
def test_refusals(site, method, path, body, status):
    assert site.http.request(method, site.endpoint.url + path, content=body).status_code == status

def test_a_body_may_be_larger_for_runsync(site):
    big = json.dumps({'input': {'x': 'x' * 11 * MB}}).encode()
    answer = site.http.post('/run', content=big)
    assert answer.status_code == 413
    assert '10 MB' in answer.json()['error']
    assert site.http.post('/runsync', content=big).json()['status'] == 'COMPLETED'

def test_runsync_waits_no_longer_than_asked(site):
    go = site.folder / 'go-sync'
    began = time.monotonic()
    said = site.http.post('/runsync?wait=1000', json={'input': {'do': 'wait', 'until': str(go)}}).json()
    assert said['status'] in ('IN_QUEUE', 'IN_PROGRESS')
    assert time.monotonic() - began < 3
    go.touch()
    site.until(said['id'], 'COMPLETED')

def test_a_caller_who_hangs_up_is_no_fault(site, caplog):
    "As a worker that is killed while it reports, or a browser tab that is closed in an upload"
    caplog.set_level(logging.DEBUG, 'wan_avatar.local')
    host, port = site.endpoint.socket.getsockname()
    head = f'POST /v2/local/run HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {site.endpoint.api_key}\r\n'
    with socket.create_connection((host, port)) as half: half.sendall(f'{head}Content-Length: 1000\r\n\r\n{{'.encode())
    poll(lambda: 'hung up' in caplog.text)
    assert site.http.get('/health').status_code == 200
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

def test_purge_queue(site, client):
    go = site.folder / 'go-purge'
    held = site.run(do='wait', until=str(go))
    site.until(held, 'IN_PROGRESS')
    waiting = [site.run(echo=n) for n in range(2)]
    assert client.purge_queue() == {'removed': 2, 'status': 'completed'}
    assert site.status(waiting[0])['status'] == 'CANCELLED'
    go.touch()
    site.until(held, 'COMPLETED')

def test_webhook_is_tried_three_times(site):
    got = []
    answers = iter([500, 404, 200])
    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(next(answers))
            self.end_headers()
        def log_message(self, *a): pass
    server = HTTPServer(('127.0.0.1', 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = {'input': {'echo': 1}, 'webhook': f'http://127.0.0.1:{server.server_port}/'}
    job = site.http.post('/run', json=asked).json()['id']
    poll(lambda: len(got) == 3)
    server.shutdown()
    server.server_close()
    assert {g['id'] for g in got} == {job}
    assert got[0] == site.status(job)

def test_refresh_worker_replaces_the_worker(site):
    first = site.until(site.run(), 'COMPLETED')['output']['pid']
    started = site.count('worker_started')
    assert site.until(site.run(do='refresh'), 'FAILED')['error'] == 'storage_failed: full'
    assert site.until(site.run(), 'COMPLETED')['output']['pid'] != first
    assert site.count('worker_started') == started + 1
    assert not psutil.pid_exists(first)

def test_a_crash_is_tried_again_then_fails(site):
    started = site.count('worker_started')
    job = site.run(do='crash')
    assert 'status 3' in site.until(job, 'FAILED')['error']
    assert site.count('worker_started') == started + 2, 'the worker that was there, and two more'

def test_sigterm_finishes_the_job_in_hand_and_ends_soon(site):
    worker = site.until(site.run(), 'COMPLETED')['output']['pid']
    gone = site.count('worker_gone')
    job = site.run(do='progress', until=str(go := site.folder / 'go-term'))
    site.until(job, 'IN_PROGRESS', output={'stage': 'render'})
    os.kill(worker, signal.SIGTERM)
    go.touch()
    assert site.until(job, 'COMPLETED')['output']['pid'] == worker
    site.wait_event('worker_gone', gone + 1)

def test_two_at_once_then_idle_and_nothing_is_left(tmp_path):
    site = Site(tmp_path, {'AT_ONCE': '2'}, idle_timeout_s=0.3)
    with site.endpoint:
        jobs = [site.run(do='wait', until=str(go := tmp_path / 'go')) for _ in range(3)]
        for job in jobs[:2]: site.until(job, 'IN_PROGRESS')
        assert site.status(jobs[2])['status'] == 'IN_QUEUE'
        go.touch()
        ends = [site.until(job, 'COMPLETED') for job in jobs]
        assert ends[0]['delayTime'] > 300, 'a cold start'
        pid = ends[0]['output']['pid']
        site.wait_event('worker_gone')
        assert not psutil.pid_exists(pid)
        assert site.http.get('/health').json()['workers']['ready'] == 0
        job = site.run(do='progress', until=str(tmp_path / 'never'))
        second = site.until(job, 'IN_PROGRESS', output={'stage': 'render'})
        tree = [p for p in psutil.Process().children(recursive=True) if 'worker.py' in ' '.join(p.cmdline())]
        assert tree
        assert second['workerId'] != ends[0]['workerId']
        began = time.monotonic()
    assert time.monotonic() - began < 8, 'closing with a job in hand'
    assert not [p for p in tree if p.is_running()], 'closing with a job in hand'

def test_code_that_is_saved_renews_workers(tmp_path):
    "`up --reload`: a job that runs is finished by the worker it has, the next one meets another"
    package, lines = tmp_path / 'package', []
    package.mkdir()
    site = Site(tmp_path, idle_timeout_s=600, poll_timeout_s=1)
    with site.endpoint as endpoint:
        first = site.run(do='progress', until=str(tmp_path / 'go'))
        site.until(first, 'IN_PROGRESS', output={'stage': 'render'})
        renewing = renew_on_change(endpoint.pool, lines.append, package)
        watching = asyncio.run_coroutine_threadsafe(renewing, endpoint.loop)
        def renewed() -> bool: # saved anew until the watch, which may only begin, has noticed
            (package / 'plan.py').write_text(f'LENGTH = {time.monotonic()}')
            return bool(lines)
        poll(renewed)
        (tmp_path / 'go').touch()
        before = site.until(first, 'COMPLETED')['output']['pid']
        site.wait_event('worker_gone')
        assert site.until(site.run(), 'COMPLETED')['output']['pid'] != before
        (package / 'plan.py').write_text('LENGTH =') # of a file that is being written
        poll(lambda: len(lines) > 1)
        started = site.count('worker_started')
        (package / 'plan.py').touch()
        (package / 'notes.txt').write_text('not loaded')
        assert site.until(site.run(), 'COMPLETED') and site.count('worker_started') <= started + 1
        watching.cancel()

def test_streams(tmp_path):
    site = Site(tmp_path, {'STREAM': '1'})
    with site.endpoint:
        assert site.until(job := site.run(), 'COMPLETED')['output'] == [0, 1, 2]
        said = site.http.get(f'/stream/{job}').json()
        assert [c['output'] for c in said['stream']] == [0, 1, 2]
        assert site.http.get(f'/stream/{job}').json()['stream'] == []

@pytest.mark.parametrize('how,why', [
    ('unfit', 'no disk'),
    ('slow', 'not ready within'),
    ('dead', 'status 7'),
    ('missing', 'does not start'),
])
def test_a_worker_that_never_gets_ready_is_unhealthy(tmp_path, how, why):
    command = {'slow': ['sleep', '60'], 'dead': ['sh', '-c', 'exit 7'], 'missing': ['/nowhere/worker']}.get(how)
    site = Site(tmp_path, {'UNFIT': '1'}, command, init_timeout_s=0.5 if how == 'slow' else 30)
    with site.endpoint:
        job = site.run()
        assert why in site.wait_event('worker_unhealthy')['why']
        assert site.status(job)['status'] == 'IN_QUEUE'
        assert site.http.get('/health').json()['workers']['unhealthy'] == 1

def test_what_a_worker_is_told():
    env = worker_environment('http://127.0.0.1:1/v2/ep', 'pod', 'key')
    assert env['RUNPOD_WEBHOOK_GET_JOB'].startswith('http://127.0.0.1:1/v2/ep/job-take/$ID?')
    assert env['RUNPOD_ENDPOINT_ID'] == 'ep'

# ---- what a kill leaves

PARENT = '''
import sys, time, urllib.request
from pathlib import Path
from wan_avatar.local import up
with up(Path(sys.argv[1]), [sys.executable, sys.argv[2]]) as local:
    assert 'runpod' not in sys.modules
    key = {'Authorization': 'Bearer ' + local.endpoint.api_key}
    ask = urllib.request.Request(local.endpoint.url + '/local/runsync', b'{"input": {"a": 1}}', key)
    urllib.request.urlopen(ask).read()
    print('ready', flush=True)
    sys.stdin.read()
'''

def test_sigkill_of_the_parent_leaves_nothing(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    argv = [sys.executable, '-c', PARENT, str(tmp_path / 'up'), str(tmp_path / 'worker.py')]
    pipe = subprocess.PIPE
    parent = subprocess.Popen(argv, env=os.environ | QUIET, stdin=pipe, stdout=pipe, text=True)
    assert parent.stdout.readline() == 'ready\n'
    below = psutil.Process(parent.pid).children(recursive=True)
    lines = [' '.join(p.cmdline()) for p in below]
    assert sum('weed' in c for c in lines) >= 1, lines
    assert sum('worker.py' in c for c in lines) >= 2, lines # a worker and its ping process
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    parent.stdin.close()
    parent.stdout.close()

def test_workers_get_the_bucket_that_was_started_in_the_end(tmp_path, monkeypatch):
    "One of its ports may be taken between choosing and listening; then it has others"
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        free = [free_port() for _ in range(4)]
        choices = [sorted([*free, other.getsockname()[1]])]
        choose = bucket._ports
        monkeypatch.setattr(bucket, '_ports', lambda n: choices.pop() if choices else choose(n))
        with up(tmp_path, [sys.executable, '-c', ''], {'MINE': '1'}) as local:
            env = local.endpoint.rules.env
            assert not choices
            assert other.getsockname()[1] not in local.bucket.ports
            assert env == local.bucket.environment() | {'MINE': '1'}
