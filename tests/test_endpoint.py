"""From /run to the MP4 through the local endpoint: the SDK's own worker loop and the SDK's own client"""
import json
import os
import signal
import ssl
import subprocess
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from conftest import ROOT, comfy_dir, cut

from wan_avatar.client import Client, fetch_result, read_manifest
from wan_avatar.config import load_settings
from wan_avatar.launch import FOLDERS, OWN_FOLDERS
from wan_avatar.local import up
from wan_avatar.memory import find_memory
from wan_avatar.mp4 import check_mp4
from wan_avatar.store import Store


@pytest.fixture(scope='module')
def local(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp('local')
    env = {
        'COMFY_DIR': str(comfy_dir()),
        'WORK_DIR': str(folder / 'work'),
        'MODELS_DIR': str(folder / 'models'),
        'PROFILE': 'draft',
    }
    with up(folder, worker_env=env) as started:
        store = Store(load_settings(started.bucket.environment()))
        store.upload(samples / 'astronaut.png', 'in/ana portrait.png', 'image/png')
        store.upload(cut(samples / 'pexels.mp4', 96, folder), 'in/four.mp4', 'video/mp4')
        store.upload(cut(samples / 'pexels.mp4', 12, folder), 'in/half.mp4', 'video/mp4')
        endpoint = started.endpoint
        yield started, store, Client(endpoint.address, endpoint.api_key)

JOB = {'input_image_minio_path': 'in/ana portrait.png', 'driving_video_path': 'in/four.mp4'}
BRIEF = JOB | {'driving_video_path': 'in/half.mp4'}
LIMIT_S = 240 # a worker that never gets ready is not waited for longer

def worker_processes() -> list[psutil.Process]:
    "The endpoint's worker, and everything under it"
    (worker,) = [c for c in psutil.Process().children() if 'wan_avatar.worker' in c.cmdline()]
    return [worker, *worker.children(recursive=True)]

def test_run_to_mp4_with_the_sdk_client(local, tmp_path, monkeypatch):
    started, store, client = local
    import runpod
    monkeypatch.setattr(runpod, 'endpoint_url_base', started.endpoint.url)
    endpoint = runpod.Endpoint(started.endpoint.endpoint_id, api_key=started.endpoint.api_key)
    request = endpoint.run({'input': {**JOB, 'user_id': 'u1', 'avatar_id': 'host'}})
    output = request.output(timeout=240)
    assert output['minio_key'] == f'avatars/u1/host/{request.job_id}.mp4'
    video = fetch_result(output, tmp_path, store)
    manifest = read_manifest(store, output['minio_key'])
    figures = check_mp4(video, output['frames'], has_audio=True, source_type='trainedAlgorithmicMedia')
    assert (figures.width, figures.height, figures.frames) == (1280, 720, 96)
    assert manifest.sha256 == output['sha256']
    assert manifest.input_keys == {k: JOB[k] for k in ('input_image_minio_path', 'driving_video_path')}
    assert manifest.rendered_with.source_type == 'trainedAlgorithmicMedia'
    status = client.status(request.job_id)
    assert status.state == 'COMPLETED'
    assert status.delay_s > 1
    assert status.execution_s > 1, 'a cold start is part of delayTime'

def test_handler_process_never_imports_torch(local):
    client = local[2]
    assert list(client.follow(client.submit(BRIEF).id, LIMIT_S))[-1].state == 'COMPLETED'
    assert not [m.path for m in worker_processes()[0].memory_maps() if '/torch/' in m.path]

def test_worker_says_how_much_memory_it_may_use(local):
    logs = [path.read_text() for path in local[0].endpoint.rules.log_folder.glob('worker-*.log')]
    assert logs
    assert all(f'memory: {find_memory().machine / 1e9:.1f} GB of the machine, ' in text for text in logs)

def test_cancel_in_mid_job(local):
    client = local[2]
    job = client.submit(JOB)
    for status in client.follow(job.id, LIMIT_S):
        if isinstance(status.output, dict) and status.output.get('stage') == 'render': break
    assert client.cancel(job.id).state == 'CANCELLED'
    began = time.monotonic()
    after = list(client.follow(client.submit(BRIEF).id, LIMIT_S))[-1]
    assert after.state == 'COMPLETED'
    assert time.monotonic() - began < 60
    assert client.status(job.id).state == 'CANCELLED'

# every open port

def listening(processes: list[psutil.Process]) -> set[int | str]:
    "Ports these listen on, and paths of their sockets"
    found = set()
    for process in processes:
        for c in process.net_connections('all'):
            if isinstance(c.laddr, str): found |= {c.laddr} - {''}
            elif c.status == psutil.CONN_LISTEN:
                assert c.laddr.ip == '127.0.0.1', f'{process.name()} listens to the network, at port {c.laddr.port}'
                found.add(c.laddr.port)
    return found

SECRET_TEXT = b'what the owner of the bucket keeps'
FORM = {'files': {'file': ('a.txt', b'x')}, 'data': {'key': 'in/evil.txt', 'subfolder': '../base/custom_nodes'}}
PAGE = {'Origin': 'http://page.example', 'Referer': 'http://page.example/'}
READ = [
    '/',
    '/media',
    '/media/',
    '/media/in/secret.txt',
    '/media?list-type=2',
    '/buckets',
    '/buckets/media/in/secret.txt',
    '/dir/status',
    '/dir/assign',
    '/dir/lookup?volumeId=1',
    '/vol/status',
    '/cluster/status',
    '/metrics',
    '/debug/pprof/',
    '/stats/disk',
    '/ui/index.html',
    '/1,01637037d6',
    '/v2/local/health',
    '/v2/local/status/x',
    '/v2/local/job-take/x',
    '/v2/local/ping/x',
    '/system_stats',
    '/history',
    '/view?filename=a',
    '/internal/logs',
]
WRITTEN = ['/media/in/evil.txt', '/buckets/media/in/evil.txt', '/evil', '/1,01637037d6']
DELETED = ['/media/in/secret.txt', '/buckets/media/in/secret.txt', '/buckets?recursive=true', '/1,01637037d6']
CALLED = ['/v2/local/run', '/v2/local/purge-queue', '/v2/local/job-done/x/y', '/prompt', '/free']
FORMS = [
    '/',
    '/media',
    '/media/in/evil.txt',
    '/buckets/media/in/evil.txt',
    '/submit',
    '/col/delete?collection=media',
    '/vol/grow?count=1',
    '/vol/vacuum',
    '/1,01637037d6',
    '/upload/image',
    '/v2/local/run',
    '/v2/local/cancel/x',
]
ASKED = [
    *(('GET', path, {}) for path in READ),
    *(('PUT', path, {'content': b'x'}) for path in WRITTEN),
    *(('DELETE', path, {}) for path in DELETED),
    *(('POST', path, {'json': {'input': {}, 'prompt': {}}}) for path in CALLED),
    *(('POST', path, FORM | {'headers': PAGE}) for path in FORMS),
    ('OPTIONS', '/v2/local/run', {'headers': PAGE | {'Access-Control-Request-Method': 'POST'}})]

EXCEPTIONS: dict[str, str] = {} # what stands open -> why; `up` and the guide would have to say so

def answers(port: int) -> list[str]:
    "What a stranger gets to hear from a port, in plain and in TLS; nothing when all he asks is refused"
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    heard = []
    for scheme, asked in (('http', ASKED), ('https', ASKED[::10])): # without a certificate nobody gets to name a path
        with httpx2.Client(verify=anyone, trust_env=False, timeout=10) as client:
            for method, path, more in asked:
                try: answer = client.request(method, f'{scheme}://127.0.0.1:{port}{path}', **more)
                except httpx2.TransportError: continue
                if answer.status_code < 400 or SECRET_TEXT in answer.content:
                    heard.append(f'{port} {scheme} {method} {path}: {answer.status_code} {answer.text[:60]}')
    return heard

@pytest.mark.hostile('ports of the local endpoint')
def test_every_open_port_refuses_strangers(local, tmp_path):
    started, store, client = local
    (tmp_path / 'secret.txt').write_bytes(SECRET_TEXT)
    store.upload(tmp_path / 'secret.txt', 'in/secret.txt', 'text/plain')
    assert list(client.follow(client.submit(BRIEF).id, LIMIT_S))[-1].state == 'COMPLETED'
    weed = psutil.Process(started.bucket.pid)
    of_workers = listening(worker_processes())
    of_weed = listening([weed, *weed.children(recursive=True)])
    own = {int(started.endpoint.url.split(':')[2].split('/')[0])}
    ports = {p for p in of_workers | of_weed | own if isinstance(p, int)}
    assert (len(of_workers), len(ports)) == (1, 12), 'ComfyUI; the endpoint, five of SeaweedFS, as many for gRPC'
    before = {key: store.stat(key) for key in store.list('')}
    heard = [said for port in sorted(ports) for said in answers(port)]
    assert [h for h in heard if h not in EXCEPTIONS] == []
    assert {key: store.stat(key) for key in store.list('')} == before
    assert 'in/secret.txt' in before
    for path in of_weed - ports: assert Path(path).stat().st_mode & 0o077 == 0, f'others can speak to {path}'

def test_logs_and_folders_are_for_this_user_alone(local):
    started = local[0]
    folders = [started.endpoint.rules.log_folder, started.bucket.folder]
    names = ('weed.log', 's3.json', 'key.pem')
    files = [*folders[0].glob('worker-*.log'), *(started.bucket.folder / name for name in names)]
    assert len(files) > 3
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert {f.stat().st_mode & 0o777 for f in folders} == {0o700}

def test_sigterm_finishes_the_job_and_leaves_nothing(local):
    client = local[2]
    job = client.submit(JOB)
    for status in client.follow(job.id, LIMIT_S):
        if isinstance(status.output, dict) and status.output.get('stage') == 'render': break
    processes = worker_processes()
    processes[0].send_signal(signal.SIGTERM)
    last = list(client.follow(job.id, LIMIT_S))[-1]
    assert last.state == 'COMPLETED', last
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive

def test_worker_that_is_not_configured_says_so(tmp_path):
    others = {k: v for k, v in os.environ.items() if not k.startswith('MINIO_')}
    env = others | {'COMFY_DIR': str(comfy_dir()), 'WORK_DIR': str(tmp_path)}
    argv = [ROOT / '.venv/bin/python', '-m', 'wan_avatar.worker']
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'MINIO_BUCKET: not set' in done.stderr
    assert 'Traceback' not in done.stderr
    assert (tmp_path / 'comfy/comfy.log').exists(), 'ComfyUI was started before the settings were read'
    lines = [' '.join(p.info['cmdline'] or ()) for p in psutil.process_iter(['cmdline'])]
    assert not [line for line in lines if str(tmp_path) in line], 'and ended with the worker'

def test_kinds_of_folders_are_cores_or_ours_alone():
    "Core decides which endings it lists in a kind of its own: in newer ComfyUIs no .onnx in `detection`"
    code = """if True:
        import folder_paths, json
        print(json.dumps({k: sorted(v[1]) for k, v in folder_paths.folder_names_and_paths.items()}))"""
    argv = [comfy_dir() / 'env/bin/python', '-B', '-c', code]
    done = subprocess.run(argv, cwd=comfy_dir() / 'ComfyUI', check=True, capture_output=True, text=True, timeout=60)
    core = json.loads(done.stdout.splitlines()[-1])
    assert OWN_FOLDERS
    assert not OWN_FOLDERS.keys() & core.keys()
    assert all('.safetensors' in core[kind] for kind in FOLDERS.keys() - OWN_FOLDERS.keys())
