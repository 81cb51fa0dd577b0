"""A bundle built, uploaded and checked by the command line, then taken as RunPod's cached model and as a source"""
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from test_models import CLIENT, some_bytes

import wan_avatar.hub as hub_module
from wan_avatar.files import whole_file
from wan_avatar.hub import Stored, model_hub
from wan_avatar.models import Needs, dump_lock, load_lock
from wan_avatar.prompt import Embedding
from wan_avatar.workflow import WAN

EMBEDDING = Embedding(WAN.prompt, WAN.encoder_sha256)

def embedding_bytes(wanted: Embedding = EMBEDDING) -> bytes:
    "A whole embedding, by default of the default prompt, all zeros"
    size = 2 * 512 * 4096
    tensor = {'dtype': 'F16', 'shape': wanted.shape, 'data_offsets': [0, size]}
    header = json.dumps({'__metadata__': wanted.metadata(), 'embedding': tensor}).encode()
    return len(header).to_bytes(8, 'little') + header + bytes(size)

class Shop:
    "Two hubs: one has the originals, one takes bundles; and an operator's environment"
    def __init__(self, folder: Path, originals, bundles):
        self.folder = folder
        self.bundles = bundles
        files = [
            replace(
                originals.put('org/w', f'deep/{n}.safetensors', some_bytes(200_000, n)), name=f'w{n}',
                licence='Apache-2.0'
            )
            for n in range(3)
        ]
        lock = replace(
            load_lock(), profiles={'wan22-animate': Needs(renderer=('w0', 'w1'), tracker=('w2',), prompt=WAN.prompt)},
            files={f.name: f for f in files}
        )
        (folder / 'lock.json').write_text(dump_lock(lock))
        self.files = files
        self.env = {
            'MODELS_LOCK': str(folder / 'lock.json'),
            'MODELS_DIR': str(folder / 'models'),
            'PROFILE': 'wan22-animate',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HOME': str(folder / 'hf'),
            'MODELS_CACHE': str(folder / 'none'),
            'HF_ENDPOINT': originals.endpoint,
            'HF_TOKEN': originals.token,
        }

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(a) for a in argv], cwd=ROOT, env={**os.environ, **self.env, **env}, capture_output=True, text=True,
            timeout=60, check=False
        )

    def cli(self, *argv: str, **env: str) -> subprocess.CompletedProcess:
        return self.run(ROOT / '.venv/bin/wan-avatar', *argv, **env)

@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shop')
    with model_hub(folder / 'originals') as originals, model_hub(folder / 'bundles') as bundles:
        yield Shop(folder, originals, bundles)

@pytest.fixture(scope='module')
def built(shop) -> Path:
    refused = shop.cli('bundle', 'build', shop.folder / 'bundle')
    assert refused.returncode == 1
    assert 'no embedding of the default prompt' in refused.stderr
    fetched = shop.cli('models', 'fetch')
    assert fetched.returncode == 0, fetched.stderr
    with whole_file(Path(shop.env['MODELS_DIR']) / 'embeddings' / EMBEDDING.name) as part:
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(embedding_bytes())
    (shop.folder / 'bundle/vae').mkdir(parents=True)
    (shop.folder / 'bundle/vae/left-over.safetensors').touch()
    done = shop.cli('bundle', 'build', shop.folder / 'bundle')
    assert done.returncode == 0, done.stderr
    return shop.folder / 'bundle'

@pytest.fixture(scope='module')
def pushed(shop, built) -> dict:
    done = shop.cli('bundle', 'push', built, 'me/bundle', '--json', HF_ENDPOINT=shop.bundles.endpoint)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def test_bundle_holds_exactly_what_is_needed(shop, built):
    there = {p.relative_to(built).as_posix() for p in built.rglob('*') if p.is_file()}
    assert there == {f.place for f in shop.files} | {f'embeddings/{EMBEDDING.name}', 'models.lock.json', 'README.md'}
    assert all((built / f.place).stat().st_nlink == 2 for f in shop.files), 'hard links'
    text = (built / 'README.md').read_text()
    assert all(f'`{f.place}` | {f.bytes:,} | Apache-2.0' in text for f in shop.files)
    assert '600,000 bytes' in text

def test_push_is_private_pins_a_revision_and_sends_nothing_twice(shop, built, pushed):
    hub = shop.bundles
    assert pushed['private']
    assert hub.repos['me/bundle'].private
    assert pushed['revision'] == hub.repos['me/bundle'].commit
    sent = [r for r in hub.requests if r.method == 'PUT']
    again = shop.cli('bundle', 'push', built, 'me/bundle', '--json', HF_ENDPOINT=hub.endpoint)
    assert json.loads(again.stdout)['revision'] == pushed['revision']
    assert [r for r in hub.requests if r.method == 'PUT'] == sent
    assert hub.token not in again.stdout + again.stderr

def test_a_push_that_is_killed_goes_on(shop, built, tmp_path, monkeypatch):
    "A SIGKILL in mid-upload leaves no half bundle to be found, and what had arrived is not sent again"
    whole = []
    arrived = threading.Event()
    over = threading.Event()
    put = hub_module._Hub.do_PUT
    first = threading.Lock()
    def one_then_none(self) -> None:
        if first.acquire(blocking=False):
            put(self)
            whole.append(self.path)
            arrived.set()
        else: over.wait(60)
    with model_hub(tmp_path / 'hub') as hub:
        env = {**os.environ, **shop.env, 'HF_ENDPOINT': hub.endpoint}
        with monkeypatch.context() as patched:
            patched.setattr(hub_module._Hub, 'do_PUT', one_then_none)
            child = subprocess.Popen(
                [ROOT / '.venv/bin/wan-avatar', 'bundle', 'push', built, 'me/bundle'], cwd=ROOT, env=env,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try: assert arrived.wait(60)
            finally:
                child.kill()
                child.wait()
                over.set()
        assert hub.repos['me/bundle'].files == {}
        before = len(hub.requests)
        done = shop.cli('bundle', 'push', built, 'me/bundle', '--json', HF_ENDPOINT=hub.endpoint)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)['revision'] == hub.repos['me/bundle'].commit, done.stderr
        sent = [r.path for r in hub.requests[before:] if r.method == 'PUT']
        assert len(whole) == 1
        assert sent
        assert whole[0] not in sent
        assert {f.place for f in shop.files} <= hub.repos['me/bundle'].files.keys()

def test_check_proves_it_or_says_what_is_wrong(shop, pushed):
    hub = shop.bundles
    good = shop.cli('bundle', 'check', 'me/bundle', HF_ENDPOINT=hub.endpoint)
    assert good.returncode == 0, good.stdout + good.stderr
    files = dict(hub.repos['me/bundle'].files)
    try:
        hub.repos['me/bundle'].files |= {shop.files[0].place: Stored('0' * 64, shop.files[0].bytes)}
        del hub.repos['me/bundle'].files[f'embeddings/{EMBEDDING.name}']
        bad = json.loads((said := shop.cli('bundle', 'check', 'me/bundle', '--json', HF_ENDPOINT=hub.endpoint)).stdout)
        assert said.returncode == 1, bad
        assert len([f for f in bad['files'] if f['problem']]) == 2, bad
    finally: hub.repos['me/bundle'].files = files

def test_fetch_from_the_bundle(shop, pushed, tmp_path):
    back = shop.cli(
        'models', 'fetch', '--json', MODELS_LOCK=pushed['lock'], MODELS_DIR=str(tmp_path),
        HF_ENDPOINT=shop.bundles.endpoint
    )
    assert back.returncode == 0, back.stderr
    assert {f['from'] for f in json.loads(back.stdout)} == {'hub'}
    assert all((tmp_path / f.place).read_bytes() == some_bytes(200_000, n) for n, f in enumerate(shop.files))

def test_as_a_cached_model_it_costs_no_request(shop, pushed, tmp_path):
    "The client of the hub fills the mount as RunPod does; the worker's lock still names the originals"
    filled = shop.run(
        sys.executable,
        '-c',
        'from huggingface_hub import snapshot_download; snapshot_download("me/bundle", '
        f'cache_dir={str(tmp_path / "hub")!r})',
        HF_ENDPOINT=shop.bundles.endpoint,
    )
    assert filled.returncode == 0, filled.stderr
    before = len(shop.bundles.requests)
    for name, value in {'MODELS_CACHE': tmp_path / 'hub', 'HF_HOME': tmp_path}.items():
        done = shop.run(
            sys.executable, '-c', CLIENT, MODELS_DIR=str(tmp_path / name), HF_ENDPOINT='http://127.0.0.1:9',
            **{name: str(value)}
        )
        assert (done.returncode, done.stdout.strip()) == (0, '[0, 0, 0]'), done.stderr
    assert len(shop.bundles.requests) == before
