"""`wan-avatar` as people and scripts use it: real processes, real endpoint, real ComfyUI"""
import json
import os
import re
import signal
import stat
import subprocess
import time

import httpx2
import psutil
import pytest
from conftest import ROOT, cut
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.mp4 import check_mp4

WAN_AVATAR = str(ROOT / '.venv/bin/wan-avatar')
OTHERS = {k: v for k, v in os.environ.items() if not k.startswith(('MINIO_', 'RUNPOD_'))}
ENV = OTHERS | {'COMFY_DIR': str(ROOT / '.comfy')}
SUBMIT = ('submit', '--image', 'ana.png', '--driving', 'cut.mp4')

def run(folder, *args, timeout=180) -> subprocess.CompletedProcess:
    return subprocess.run([WAN_AVATAR, *args], cwd=folder, env=ENV, capture_output=True, text=True, timeout=timeout)

def left_behind(before: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(before, timeout=20)
    return [' '.join(p.cmdline()) for p in alive]

@pytest.fixture(scope='module')
def place(samples, tmp_path_factory):
    "A folder with a running `wan-avatar up`"
    folder = tmp_path_factory.mktemp('cli')
    cut(samples / 'pexels.mp4', 30, folder)
    (folder / 'ana.png').write_bytes((samples / 'astronaut.png').read_bytes())
    def heed() -> None: # a shell's background jobs ignore Ctrl-C, and these tests may be one
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with (folder / 'up.log').open('wb') as log:
        child = subprocess.Popen([WAN_AVATAR, 'up'], cwd=folder, env=ENV, stdout=log, stderr=log, preexec_fn=heed)
    until = time.monotonic() + 60
    while 'Ctrl-C stops it.' not in (folder / 'up.log').read_text():
        assert child.poll() is None, (folder / 'up.log').read_text()
        assert time.monotonic() < until, (folder / 'up.log').read_text()
        time.sleep(0.05)
    yield folder, child
    child.kill()
    child.wait()

def test_from_submit_to_fetch(place):
    folder, _ = place
    done = run(folder, *SUBMIT, '--user-id', 'u1', '--presign', '60', '--out', 'mine', '--json')
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said['status'] == 'COMPLETED'
    assert said['output']['minio_key'] == f'avatars/u1/{said["id"]}.mp4'
    assert said['output']['presigned_url'].startswith('http')
    assert 'rendering' in done.stderr
    assert said['video'] == f'mine/avatar-{said["id"]}.mp4'
    assert check_mp4(folder / said['video'], 30, has_audio=True).frames == 30
    assert json.loads((folder / said['video']).with_suffix('.json').read_text())['job_id'] == said['id']
    status = run(folder, 'status', said['id'])
    assert status.returncode == 0
    assert said['output']['minio_key'] in status.stdout
    for what in (said['id'], said['output']['minio_key']):
        fetched = json.loads(run(folder, 'fetch', what, '--json').stdout)
        assert (folder / fetched['video']).stat().st_size == said['output']['bytes']
        assert fetched['manifest']['sha256'] == said['output']['sha256']
    news = [line for line in (folder / 'up.log').read_text().splitlines() if said['id'] in line]
    assert [words for words in ('waits', 'finding the person, ', 'rendering, segment 1 of 1, ', 'COMPLETED, ')
            if not any(words in line for line in news)] == [], news

@pytest.mark.parametrize('args, code, words', [
    (['submit', '--image', 'people/nobody.png', '--driving', 'cut.mp4'], 2, 'neither a file here nor a key'),
    (['submit', '--image', '../ana', '--driving', 'cut.mp4'], 2, 'not a file here'),
    (['submit'], 2, '--image'),
    (['status', 'no-such-job'], 4, 'does not know job'),
    (['up'], 2, 'runs in runs/local already'),
    (['fetch', 'avatars/none.mp4'], 1, 'input_missing'),
    (['status', 'x', '--endpoint', 'abc'], 3, 'RUNPOD_API_KEY'),
    (['demo', '--image', 'nobody.png'], 2, 'nobody.png'),
])
def test_exit_codes(place, monkeypatch, args, code, words):
    "In this process, since each of its own would import everything for a second; the other tests start processes"
    monkeypatch.chdir(place[0])
    for name in os.environ.keys() - ENV.keys(): monkeypatch.delenv(name)
    for name, value in ENV.items(): monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, args)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), 'a traceback for the user'
    assert words in done.output, done.output

def test_detach_then_cancel(place):
    folder, _ = place
    job = json.loads(run(folder, *SUBMIT, '--detach', '--json').stdout)['id']
    assert json.loads(run(folder, 'cancel', job, '--json').stdout) == {'id': job, 'status': 'CANCELLED'}
    assert run(folder, 'status', job).returncode == 1

def test_a_demo_uses_the_endpoint_that_runs(place):
    folder, _ = place
    done = run(folder, 'demo', '--image', 'ana.png', '--driving', 'cut.mp4')
    assert done.returncode == 0, done.stderr
    assert 'an endpoint runs in runs/local already' in done.stderr
    assert 'rendering' in done.stderr
    check_demo(folder, done)

def check_demo(folder, done) -> None:
    "What a demo leaves, under its job's id"
    job = re.search('^job (.+)$', done.stderr, re.MULTILINE)[1]
    video, *pictures = done.stdout.split()[-3:]
    assert video == f'runs/demo/avatar-{job}.mp4'
    assert pictures == [f'runs/demo/avatar-{job}-{name}.png' for name in ('filmstrip', 'timeline')]
    assert all((folder / p).stat().st_size > 1000 for p in (video, *pictures))
    assert json.loads((folder / video).with_suffix('.json').read_text())['job_id'] == job

def test_ctrl_c_leaves_nothing(place):
    folder, child = place
    said = (folder / 'up.log').read_text()
    assert 'endpoint  http://127.0.0.1:' in said
    page = re.search(r'^page      (http://127\.0\.0\.1:\d+/\?token=[\w-]+)$', said, re.MULTILINE)[1]
    assert run(folder, 'page').stdout == page + '\n'
    assert stat.S_IMODE((folder / 'runs/local/page/page.json').stat().st_mode) == 0o600
    assert httpx2.get(page, trust_env=False).status_code == 200
    assert httpx2.get(page.partition('?')[0], trust_env=False).status_code == 401
    assert 'wan-avatar submit' in said
    assert json.loads((folder / 'runs/local/up.json').read_text())['api_key'] not in said
    def children(): return psutil.Process(child.pid).children(recursive=True)
    def comfy(): return any('main.py' in ' '.join(p.cmdline()) for p in children())
    if not comfy(): run(folder, *SUBMIT) # the tests before this one may not have run
    assert comfy(), 'the worker and its ComfyUI should be idle, not gone'
    family = children()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == 130
    assert left_behind(family) == []
    assert (folder / 'up.log').read_text().endswith('stopped\n')
    assert not (folder / 'runs/local/up.json').exists()
    assert run(folder, 'page').returncode == 3
    assert run(folder, 'status', 'x').returncode == 3

def test_demo(samples, place, tmp_path):
    done = run(tmp_path, 'demo', '--image', str(place[0] / 'ana.png'), '--driving', str(place[0] / 'cut.mp4'))
    assert done.returncode == 0, done.stderr
    check_demo(tmp_path, done)
    assert 'render' in done.stdout
