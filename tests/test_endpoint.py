"""From /run to the MP4 through the local endpoint: the SDK's own worker loop and the SDK's own client"""
import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from conftest import ROOT, comfy_dir, cut

from wan_avatar.client import Client, fetch_result
from wan_avatar.config import load_settings
from wan_avatar.launch import FOLDERS, OWN_FOLDERS
from wan_avatar.local import up
from wan_avatar.media import check_mp4
from wan_avatar.memory import find_memory
from wan_avatar.store import Store

@pytest.fixture(scope='module')
def local(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp('local')
    env = {'COMFY_DIR': str(comfy_dir()), 'WORK_DIR': str(folder / 'work'), 'MODELS_DIR': str(folder / 'models'), 'PROFILE': 'draft'}
    with up(folder, worker_env=env) as started:
        store = Store(load_settings(started.bucket.environment()))
        store.upload(samples / 'astronaut.png', 'in/ana portrait.png', 'image/png')
        store.upload(cut(samples / 'pexels.mp4', 96, folder), 'in/four.mp4', 'video/mp4')
        store.upload(cut(samples / 'pexels.mp4', 12, folder), 'in/half.mp4', 'video/mp4')
        yield started, store, Client(f'{started.endpoint.url}/{started.endpoint.endpoint_id}', started.endpoint.api_key)

JOB = {'input_image_minio_path': 'in/ana portrait.png', 'driving_video_path': 'in/four.mp4'}
BRIEF = JOB | {'driving_video_path': 'in/half.mp4'}
LIMIT_S = 240 # a worker that never gets ready is not waited for longer

def worker_processes() -> list[psutil.Process]:
    "The endpoint's worker, and everything under it"
    (worker,) = [c for c in psutil.Process().children() if 'wan_avatar.worker' in c.cmdline()]
    return [worker, *worker.children(recursive=True)]

def test_run_to_mp4_with_the_sdk_client(local, tmp_path):
    started, store, client = local
    import runpod
    runpod.endpoint_url_base = started.endpoint.url
    request = runpod.Endpoint(started.endpoint.endpoint_id, api_key=started.endpoint.api_key).run({'input': {**JOB, 'user_id': 'u1', 'avatar_id': 'host'}})
    output = request.output(timeout=240)
    assert output['minio_key'] == f'avatars/u1/host/{request.job_id}.mp4'
    video, manifest = fetch_result(output, tmp_path, store)
    figures = check_mp4(video, output['frames'], has_audio=True)
    assert (figures.width, figures.height, figures.frames, manifest['sha256']) == (1280, 720, 96, output['sha256'])
    status = client.status(request.job_id)
    assert status.state == 'COMPLETED' and status.delay_s > 1 and status.execution_s > 1, 'a cold start is part of delayTime'

def test_handler_process_never_imports_torch(local):
    client = local[2]
    assert list(client.follow(client.submit(BRIEF).id, LIMIT_S))[-1].state == 'COMPLETED'
    assert not [m.path for m in worker_processes()[0].memory_maps() if '/torch/' in m.path]

def test_worker_says_how_much_memory_it_may_use(local):
    logs = [path.read_text() for path in local[0].endpoint.rules.log_folder.glob('worker-*.log')]
    assert logs and all(f'memory: {find_memory().machine / 1e9:.1f} GB of the machine, ' in text for text in logs)

def test_cancel_in_mid_job(local):
    client = local[2]
    job = client.submit(JOB)
    for status in client.follow(job.id, LIMIT_S):
        if isinstance(status.output, dict) and status.output.get('stage') == 'render': break
    assert client.cancel(job.id).state == 'CANCELLED'
    began = time.monotonic()
    after = list(client.follow(client.submit(BRIEF).id, LIMIT_S))[-1]
    assert after.state == 'COMPLETED' and time.monotonic() - began < 60 and client.status(job.id).state == 'CANCELLED'

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
    env = {k: v for k, v in os.environ.items() if not k.startswith('MINIO_')} | {'COMFY_DIR': str(comfy_dir()), 'WORK_DIR': str(tmp_path)}
    done = subprocess.run([ROOT / '.venv/bin/python', '-m', 'wan_avatar.worker'], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'MINIO_BUCKET: not set' in done.stderr and 'Traceback' not in done.stderr
    assert (tmp_path / 'comfy/comfy.log').exists(), 'ComfyUI was started before the settings were read'
    assert not [p for p in psutil.process_iter(['cmdline']) if str(tmp_path) in ' '.join(p.info['cmdline'] or ())], 'and ended with the worker'

def test_kinds_of_folders_are_cores_or_ours_alone():
    "Core decides which endings it lists in a kind of its own: in newer ComfyUIs no .onnx in `detection`"
    code = 'import folder_paths, json; print(json.dumps({k: sorted(v[1]) for k, v in folder_paths.folder_names_and_paths.items()}))'
    argv = [comfy_dir() / 'env/bin/python', '-B', '-c', code]
    done = subprocess.run(argv, cwd=comfy_dir() / 'ComfyUI', check=True, capture_output=True, text=True, timeout=60)
    core = json.loads(done.stdout.splitlines()[-1])
    assert OWN_FOLDERS and not OWN_FOLDERS.keys() & core.keys()
    assert all('.safetensors' in core[kind] for kind in FOLDERS.keys() - OWN_FOLDERS.keys())
