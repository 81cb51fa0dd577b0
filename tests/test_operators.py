"""Every command of `wan-avatar` with what operators get wrong: an exit code and one line, never a traceback"""
import hashlib
import json
import os
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.models import dump_lock, load_lock
from wan_avatar.retry import RetryPolicy

KEY = {'RUNPOD_API_KEY': 'a-key-of-runpod'}
CLOSED = 'http://127.0.0.1:9' # nobody listens on this port
AWAY = {'RUNPOD_ENDPOINT_BASE_URL': CLOSED, 'RUNPOD_API_BASE_URL': CLOSED, **KEY}
BUCKET = {
    'MINIO_ENDPOINT': CLOSED,
    'MINIO_ACCESS_KEY': 'an-access-key',
    'MINIO_SECRET_KEY': 'a-secret-key',
    'MINIO_BUCKET': 'media',
}
SLASH = {**BUCKET, 'MINIO_BUCKET': 'media/avatars'}
HUB = {'HF_ENDPOINT': CLOSED}
NO_GIT = {'PATH': '/nowhere'}
WAN = ('--profile', 'wan22-animate')
JOB = ('--image', 'me.png', '--driving', 'me.mp4', '--endpoint', 'abc')
FILE = ('--file', str(ROOT / 'endpoint.toml'))
IMAGE = ('--image', 'me/worker:wan-worker-20261124-8f3a1c2b4d5e')
OWN = ('MINIO_', 'RUNPOD_', 'MODELS_', 'COMFY_', 'WORK_DIR', 'HF_', 'PROFILE', 'TRACKER', 'ALERT_')
OURS = {k: None for k in os.environ if k.startswith(OWN)} # unset, for CliRunner

# command; environment; exit code; words of the line
CASES = [
    (('status', 'j1'), {}, 3, 'wan-avatar up'),
    (('status', 'j1', '--endpoint', 'abc'), {}, 3, 'RUNPOD_API_KEY'),
    (('status', 'j1', '--endpoint', 'abc'), AWAY, 3, 'Connection refused'),
    (('status', 'j1', '--endpoint', 'abc'), AWAY | {'RUNPOD_API_KEY': 'a key\n'}, 3, 'a blank or a line end'),
    (('status', 'j1', '--endpoint', 'abc'), AWAY | {'RUNPOD_API_KEY': 'clé'}, 3, 'not ASCII'),
    (('cancel', 'j1', '--endpoint', 'abc'), AWAY, 3, 'Connection refused'),
    (('fetch', 'j1', '--endpoint', 'abc'), AWAY, 3, 'Connection refused'),
    (('fetch', 'a.mp4', '--endpoint', 'abc'), AWAY, 3, 'which name the bucket, are not set'),
    (('fetch', 'a.mp4', '--endpoint', 'abc'), AWAY | SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('fetch', 'a.mp4', '--endpoint', 'abc'), AWAY | BUCKET, 3, 'did not answer'),
    (('fetch', 'a.mp4', '--endpoint', 'abc', '--out', 'file'), AWAY | BUCKET, 2, '--out file is not a folder'),
    (('put', 'none.png', '--endpoint', 'abc'), AWAY, 2, 'none.png'),
    (('estimate', 'none.mp4'), {}, 1, 'neither a file here nor a number of seconds'),
    (('estimate', '5', '--quality', 'perfect'), {}, 1, "quality 'perfect'"),
    (('submit', *JOB), {}, 3, 'RUNPOD_API_KEY'),
    (('submit', *JOB), AWAY, 3, 'which name the bucket, are not set'),
    (('submit', *JOB), AWAY | SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('submit', *JOB), AWAY | BUCKET, 3, 'did not answer'),
    (('smoke', *JOB), {}, 3, 'RUNPOD_API_KEY'),
    (('smoke', *JOB), AWAY, 3, 'which name the bucket, are not set'),
    (('smoke', *JOB), AWAY | SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('smoke', *JOB), AWAY | BUCKET, 3, 'did not answer'),
    (('smoke', '--driving', 'folder'), {}, 2, "'folder' is not a file"),
    (('smoke', '--driving', 'me.mp4', '--folder', 'file'), {}, 2, 'file cannot be used: File exists'),
    (('demo', '--image', 'folder'), {}, 2, "'folder' is not a file"),
    (('demo', '--image', 'me.png', '--driving', 'me.mp4', '--folder', 'file'), {}, 2, 'file cannot be used'),
    (('up', '--folder', 'file'), {}, 2, 'file cannot be used: File exists'),
    (('up', '--folder', 'file/x'), {}, 2, 'file/x cannot be used: Not a directory'),
    (('worker', '--port', '1'), {}, 2, 'No such option'),
    (('page',), {}, 3, 'no page runs here'),
    (('page', '--endpoint', 'abc'), {}, 3, 'RUNPOD_API_KEY'),
    (('page', '--endpoint', 'abc'), AWAY, 3, 'which name the bucket, are not set'),
    (('profiles', 'draft'), {}, 2, 'unexpected extra argument'),
    (('bench', 'nope'), {}, 2, 'no bench nope'),
    (('bench', 'gpu', 'boot'), {}, 2, 'gpu is run alone'),
    (('bench', 'gpu', '--small', '--out', 'file'), {'COMFY_DIR': 'nowhere'}, 2, 'cannot be used: Not a directory'),
    (('tiny-weights', 'new'), {'COMFY_DIR': 'nowhere'}, 2, 'no ComfyUI environment'),
    (('tiny-weights', 'file'), {}, 2, 'file cannot be used: File exists'),
    (('tiny-weights', 'file/x'), {}, 2, 'file/x cannot be used: Not a directory'),
    (('report', 'smoke', '-p'), {}, 2, "'-p' requires an argument"), # parameters: tests/test_reports.py
    (('report', 'cold-start', '-p'), {}, 2, "'-p' requires an argument"),
    (('report', 'experiment', '-p'), {}, 2, "'-p' requires an argument"),
    (('report', 'compare', 'nowhere', 'folder'), {}, 2, 'nowhere cannot be read'),
    (('report', 'compare', 'file', 'file'), {}, 2, 'file, line 1'),
    (('experiment', 'nowhere'), {}, 2, 'nowhere cannot be read'),
    (('experiment', 'folder'), {}, 2, 'folder cannot be read'),
    (('experiment', 'binary'), {}, 2, 'binary cannot be read'),
    (('models', 'plan', *WAN, '--speed', '0'), {}, 2, '--speed'),
    *((('models', command, *args), environ, code, words) for command in ('plan', 'fetch', 'verify') for
      args, environ, code, words in (
        (('--profile', 'nope'), {}, 1, "profile 'nope' does not exist"),
        ((), {'PROFILE': 'nope'}, 1, "profile 'nope' does not exist"),
        (WAN, {'TRACKER': 'nope'}, 1, "TRACKER='nope'"),
        (WAN, {'MODELS_LOCK': 'nowhere'}, 2, 'MODELS_LOCK nowhere is not there'),
        (WAN, {'MODELS_LOCK': 'folder'}, 2, 'folder cannot be used: Is a directory'),
        (WAN, {'MODELS_LOCK': 'file/x'}, 2, 'file/x cannot be used: Not a directory'),
        (WAN, {'MODELS_LOCK': 'binary'}, 2, 'binary: not JSON'),
        (WAN, {'MODELS_MIRROR': 'm'}, 3, 'MINIO_ENDPOINT: not set'),
        (WAN, {'MODELS_MIRROR': 'm', **SLASH}, 3, 'MINIO_BUCKET: has a slash'),
        (WAN, {'FETCH_CONNECTIONS': 'x'}, 3, 'FETCH_CONNECTIONS'),
    )),
    (('models', 'fetch', *WAN), {'MODELS_DIR': 'file'}, 2, 'cannot be used'),
    (('models', 'verify', *WAN), {'MODELS_DIR': 'file'}, 2, 'cannot be used: Not a directory'),
    (('models', 'verify', '--online'), HUB, 3, 'ConnectError'),
    (('models', 'lock', '--check'), HUB, 1, 'ConnectError'),
    (('bundle', 'build', 'new'), {}, 1, 'profile draft has no files'),
    (('bundle', 'build', 'new', *WAN), {}, 1, 'no embedding of the default prompt'),
    (('bundle', 'build', 'new', '--profile', 'nope'), {}, 1, "profile 'nope' does not exist"),
    (('bundle', 'build', 'folder', *WAN), {'MODELS_LOCK': 'one.json'}, 2, 'folder cannot be used: it holds mine,'),
    (('bundle', 'build', 'file', *WAN), {'MODELS_LOCK': 'one.json'}, 2, 'file cannot be used: Not a directory'),
    (('bundle', 'push', 'folder', 'bundle'), {}, 2, "'bundle' is no OWNER/NAME"),
    (('bundle', 'push', 'folder', 'me/my bundle'), {}, 2, "'me/my bundle' is no OWNER/NAME"),
    (('bundle', 'push', 'nowhere', 'me/bundle'), {}, 2, 'nowhere is no bundle'),
    (('bundle', 'push', 'file', 'me/bundle'), {}, 2, 'cannot be used: Not a directory'),
    (('bundle', 'push', 'bundle', 'me/bundle'), HUB, 1, 'could not be uploaded'),
    (('bundle', 'check', '@main', *WAN), HUB, 2, 'is no OWNER/NAME'),
    (('bundle', 'check', 'a/b/c', *WAN), HUB, 2, 'is no OWNER/NAME'),
    (('bundle', 'check', 'me/bundle', *WAN), HUB, 1, 'ConnectError'),
    (('image', 'tag'), {}, 2, 'not a git checkout'),
    (('image', 'build'), {}, 2, 'not a git checkout'),
    (('image', 'push'), {}, 2, 'not a git checkout'),
    (('image', 'lock'), {}, 2, 'no settings.ini'),
    (('image', 'tag'), NO_GIT, 2, 'git cannot be used'),
    (('endpoint', 'diff', 'staging', 'prod'), {}, 2, 'there is no endpoint.staging.toml'),
    (('endpoint', 'diff', 'file', 'folder'), {}, 2, 'file is no TOML'),
    (('doctor', 'now'), {}, 2, 'unexpected extra argument'),
    (('jobs',), {}, 3, 'start one with `wan-avatar up`'),
    (('jobs',), {'MINIO_BUCKET': 'media'}, 3, 'MINIO_ENDPOINT, MINIO_ACCESS_KEY'),
    (('jobs', '--endpoint', 'abc'), {}, 3, 'which name the bucket, are not set'),
    (('jobs',), SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('jobs',), BUCKET, 3, 'did not answer'),
    (('jobs', '--last', '0'), BUCKET, 2, '--last'),
    (('forget',), {}, 2, 'Missing argument'),
    (('forget', 'ann'), {}, 3, 'start one with `wan-avatar up`'),
    (('forget', 'ann'), SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('forget', 'ann'), BUCKET, 3, 'did not answer'),
    (('forget', 'a/b'), BUCKET, 2, "'a/b' is no id"),
    (('forget', 'ann', '--of', 'dog'), BUCKET, 2, "'dog'"),
    (('logs', 'w1'), {}, 3, "no log in runs/local/logs is of 'w1'"),
    (('logs', 'w1', '--folder', 'file'), {}, 3, 'no log in file/logs'),
    (('logs', 'w1', '--endpoint', 'e1'), {}, 3, 'RUNPOD_API_KEY is not set'),
    (('logs', '../w1', '--endpoint', 'e1'), AWAY, 3, 'Connection refused'),
    (('metrics', 'nowhere'), {}, 2, 'nowhere cannot be read'),
    (('metrics', 'folder'), {}, 2, 'folder/records.jsonl cannot be read'),
    (('metrics', 'binary'), {}, 2, 'binary cannot be read'),
    (('endpoint', 'plan', '--offline', '--exit-code'), {}, 2, '--exit-code'),
    (('endpoint', 'apply', '--rollback', *IMAGE, *FILE), AWAY, 2, '--rollback finds the image itself'),
    (('endpoint', 'apply', '--rollback', *FILE), {}, 3, 'RUNPOD_API_KEY is not set'),
    (('endpoint', 'apply', '--rollback', *FILE), AWAY, 3, 'Connection refused'),
    (('endpoint', 'apply', '--canary', *IMAGE, *FILE), AWAY | BUCKET, 3, 'Connection refused'),
    (('watch',), {}, 2, 'say --once'),
    (('watch', '--once', '--cold-starts', 'x'), {}, 2, '--cold-starts'),
    (('watch', '--once'), AWAY, 2, 'there is no endpoint.toml'),
    (('watch', '--once', '--daily-usd', '-1', *FILE), AWAY, 2, '--daily-usd: Input should be greater than 0'),
    (('watch', '--once', *FILE), {}, 3, 'RUNPOD_API_KEY is not set'),
    (('watch', '--once', *FILE), AWAY, 3, 'which name the bucket, are not set'),
    (('watch', '--once', *FILE), AWAY | SLASH, 3, 'MINIO_BUCKET: has a slash'),
    (('watch', '--once', *FILE), AWAY | BUCKET, 3, 'Connection refused'),
    *((('endpoint', command, *args), environ, code, words) for command in ('plan', 'apply', 'status', 'destroy') for
      args, environ, code, words in (
        (('--file', 'nowhere'), AWAY, 2, 'there is no nowhere'),
        (('--file', 'folder'), AWAY, 2, 'folder cannot be read: Is a directory'),
        (('--file', 'file/x'), AWAY, 2, 'file/x cannot be read: Not a directory'),
        (('--file', 'binary'), AWAY, 2, 'binary is no TOML'),
        (('--file', 'file'), AWAY, 2, 'file is no TOML'),
        (FILE, {}, 3, 'RUNPOD_API_KEY is not set'),
        (FILE, AWAY | {'RUNPOD_API_KEY': 'clé'}, 3, 'not ASCII'),
        (FILE, AWAY | {'RUNPOD_API_KEY': 'a key\n'}, 3, 'a blank or a line end'),
    )),
    *((('endpoint', command, *args, *FILE), environ | BUCKET, 3, words) for
      command, *args in (('plan', *IMAGE), ('apply', *IMAGE), ('status',), ('destroy',)) for environ, words in (
        (AWAY, 'Connection refused'),
        (AWAY | {'RUNPOD_API_BASE_URL': 'nonsense'}, 'UnsupportedProtocol'),
    )),
]

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with what arguments can name"
    folder = tmp_path_factory.mktemp('wrong')
    for name in ('folder', 'bundle'): (folder / name).mkdir()
    for name in ('file', 'me.png', 'me.mp4', 'folder/mine'): (folder / name).write_text('text')
    (folder / 'binary').write_bytes(bytes(range(256)))
    lock = load_lock()
    (folder / 'bundle/models.lock.json').write_text(dump_lock(replace(lock, profiles={}, files={})))
    needs = replace(lock.profiles['wan22-animate'], renderer=('vae',), tracker=(), text_encoder=None)
    one = replace(lock, profiles={'wan22-animate': needs}, files={'vae': lock.files['vae']})
    (folder / 'one.json').write_text(dump_lock(one))
    return folder

def run(args, environ):
    "One command as a shell runs it, but in this process, where it costs no start"
    return CliRunner().invoke(app, [*map(str, args)], env=OURS | environ)

@pytest.mark.parametrize('args, environ, code, words', CASES, ids=[' '.join(args) for args, *_ in CASES])
def test_what_is_wrong_is_said_in_a_line(place, monkeypatch, args, environ, code, words):
    def once(policy: RetryPolicy) -> None: object.__setattr__(policy, 'attempts', 1)
    monkeypatch.setattr(RetryPolicy, '__post_init__', once) # what is away stays away
    monkeypatch.chdir(place)
    done = run(args, {'COMFY_DIR': str(ROOT / '.comfy')} | environ)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    assert 'Traceback' not in done.output
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert words in done.stderr.replace('\n│ ', ' '), done.stderr
    of_typer = said[0].lstrip().startswith(('Usage:', '╭─ Error'))
    assert len(said) == 1 or of_typer or words in said[-1], done.stderr # the stages of a command come before its end
    assert sorted(p.name for p in (place / 'folder').iterdir()) == ['mine']

def test_every_command_is_called_with_something_wrong():
    def names(command, path=()):
        for name, inner in getattr(command, 'commands', {}).items(): yield from names(inner, (*path, name))
        if not hasattr(command, 'commands'): yield path
    called = {args for args, *_ in CASES}
    missing = [path for path in names(get_command(app)) if not any(args[:len(path)] == path for args in called)]
    assert missing == []

# %% something else answers
PAGES = ['<html>hello</html>', '[]', '{}', '""', 'null']
ASKS = [*((command, 'j1', '--endpoint', 'abc') for command in ('status', 'cancel', 'fetch')),
        ('endpoint', 'plan', *IMAGE, *FILE), ('endpoint', 'status', *FILE), ('endpoint', 'status', '--id', 'e1', *FILE),
        ('endpoint', 'apply', '--rollback', *FILE), ('watch', '--once', *FILE),
        ('endpoint', 'destroy', '--yes', *FILE), ('logs', 'w1', '--endpoint', 'e1')]

class Page(BaseHTTPRequestHandler):
    "A web server that is not RunPod's: the same page for everybody"
    text = ''
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text.encode())
    do_POST = do_DELETE = do_GET
    def log_message(self, *args: object) -> None: pass

@pytest.fixture(scope='module')
def page():
    with ThreadingHTTPServer(('127.0.0.1', 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

@pytest.mark.parametrize('text', PAGES)
def test_what_is_not_runpod_is_told_apart(page, monkeypatch, text):
    monkeypatch.setattr(Page, 'text', text)
    environ = BUCKET | KEY | {'RUNPOD_ENDPOINT_BASE_URL': page, 'RUNPOD_API_BASE_URL': page}
    for args in ASKS:
        done = run(args, environ)
        assert isinstance(done.exception, SystemExit), (args, done.exception)
        assert done.exit_code == 3, (args, done.output)
        assert len(done.stderr.splitlines()) == 1, (args, done.stderr)
        assert KEY['RUNPOD_API_KEY'] not in done.output

# %% weights
def lock_with(folder, *files):
    "A lock whose production profile needs these files alone"
    lock = load_lock()
    of_files = {'renderer': tuple(f.name for f in files), 'tracker': (), 'text_encoder': None}
    needs = replace(lock.profiles['wan22-animate'], **of_files)
    own = replace(lock, profiles={'wan22-animate': needs}, files={f.name: f for f in files})
    (folder / 'lock.json').write_text(dump_lock(own))
    return {'MODELS_LOCK': str(folder / 'lock.json'), 'MODELS_DIR': str(folder / 'models'), 'MODELS_CACHE': str(folder)}

@pytest.mark.parametrize('unpinned', ['revision', 'bytes', 'sha256'])
def test_a_plan_with_a_refused_row_exits_with_1(tmp_path, unpinned):
    vae, clip = (load_lock().files[name] for name in ('vae', 'clip_vision'))
    whole = run(('models', 'plan', *WAN), lock_with(tmp_path, vae, clip))
    assert whole.exit_code == 0, whole.output
    environ = lock_with(tmp_path, vae, replace(clip, **{unpinned: None}))
    people, programs = (run(('models', 'plan', *WAN, *more), environ) for more in ((), ('--json',)))
    assert people.exit_code == programs.exit_code == 1
    assert sorted(s['where'] for s in json.loads(programs.stdout)) == ['hub', 'not pinned']

def test_verify_prints_what_it_verified(tmp_path):
    vae = replace(load_lock().files['vae'], bytes=7, sha256=hashlib.sha256(b'weights').hexdigest())
    environ = lock_with(tmp_path, vae)
    place = tmp_path / 'models' / vae.place
    place.parent.mkdir(parents=True)
    said = []
    for content in (b'weights', b'waights', None):
        if content is None: place.unlink()
        else: place.write_bytes(content)
        done = run(('models', 'verify', *WAN, '--deep'), environ)
        said.append((done.exit_code, done.stdout.splitlines()[-1], vae.sha256[:12] in done.stdout))
    ends = [f'{n} of 1 files of profile wan22-animate in {tmp_path}/models are as locked: {size} bytes' for
            n, size in ((1, 7), (0, 0), (0, 0))]
    assert said == [(code, end, True) for code, end in zip((0, 1, 1), ends, strict=True)]
    nothing = run(('models', 'verify'), environ)
    assert nothing.stdout.splitlines()[-1] == 'the lock has no files of profile draft: nothing was verified'

@pytest.mark.parametrize('code', [0, 3])
def test_tiny_weights_say_where_they_are(tmp_path, monkeypatch, code):
    "ComfyUI's Python is a stand-in here; conftest's `tiny` has the true one write them"
    python = tmp_path / 'comfy/env/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexit {code}\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    done = run(('tiny-weights', 'runs/local/models'), {'COMFY_DIR': str(tmp_path / 'comfy')})
    assert done.exit_code == code, done.output
    told = f'workers with MODELS_DIR={tmp_path}/runs/local/models find them\n'
    assert done.stdout == ('' if code else told)

def test_a_bundle_never_takes_a_folder_with_other_files(tmp_path):
    vae = replace(load_lock().files['vae'], bytes=7, sha256=hashlib.sha256(b'weights').hexdigest())
    environ = lock_with(tmp_path, vae)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/letter').write_text('mine')
    refused = run(('bundle', 'build', tmp_path / 'mine', *WAN), environ)
    assert refused.exit_code == 2, refused.output
    assert 'it holds letter' in refused.stderr
    assert (tmp_path / 'mine/letter').read_text() == 'mine'
