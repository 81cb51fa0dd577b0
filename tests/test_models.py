"""Weights from a local hub through the real huggingface_hub: every fault alone, all at once, kills, caches, mirror"""
import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, make_settings
from typer.testing import CliRunner

import wan_avatar.hub as hub_module
from wan_avatar import bench_boot, download, partial, pinning, sources
from wan_avatar import fetch as fetching
from wan_avatar.cli import app
from wan_avatar.fetch import ProgressLines, fetch
from wan_avatar.hub import Fault, model_hub
from wan_avatar.job import JobError
from wan_avatar.models import (
    FIGURES,
    Lock,
    LockDamaged,
    LockedFile,
    Needs,
    Places,
    dump_lock,
    load_lock,
    parse_lock,
    part_path,
    remembered,
    verified,
)
from wan_avatar.partial import arrived, merged, read_journal
from wan_avatar.pinning import HubUnreachable, changes, checked, pinned
from wan_avatar.sources import Http, Hub, Mirror
from wan_avatar.store import Store
from wan_avatar.track import TRACKERS
from wan_avatar.workflow import PROFILES, WAN, check_weights, locked_files, needed_files, with_tracker


def some_bytes(n: int, seed: int = 0) -> bytes: return random.Random(seed).randbytes(n)

@pytest.fixture
def hub(tmp_path):
    with model_hub(tmp_path / 'hub') as served:
        yield served
        leaked = [r for r in served.requests if r.server == 'storage' and r.authorised]
        assert not leaked, 'the token went to another origin'

class Site:
    "One MODELS_DIR and a client with little patience"
    def __init__(
        self,
        hub,
        folder: Path,
        caches: tuple[Path, ...] = (),
        connections: int = 4,
        stall_s: float = 0.5,
        token: str | bool = 'hf_secret',
        mirror=()
    ):
        self.hub = hub
        self.places = Places(folder, caches)
        self.http = Http(connections, stall_s)
        self.connections = connections
        self.sources = [*mirror, Hub(self.http, token, hub.endpoint)]

    def fetch(self, *files: LockedFile, **more):
        return fetch(files, self.places, self.sources, self.http, self.connections, **{'patience_s': 5, **more})

    def path(self, file: LockedFile) -> Path: return self.places.target(file)

@pytest.fixture
def site(hub, tmp_path): return Site(hub, tmp_path / 'models')

FAULTS = [
    Fault('reset', after=100_000),
    Fault('reset'),
    Fault('cut', after=300_000),
    Fault('stall', after=70_000),
    Fault('corrupt', after=1234),
    Fault('status', status=429, retry_after=0),
    Fault('status', status=500),
    Fault('status', status=503),
    Fault('status', status=403),
    Fault('status', status=200),
]

@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f'{f.kind}-{f.status if f.kind == "status" else f.after}')
def test_each_fault_alone(hub, site, fault):
    data = some_bytes(1_000_000)
    file = hub.put('org/w', 'a.safetensors', data)
    hub.faults = iter([fault, fault])
    (came,) = site.fetch(file)
    assert site.path(file).read_bytes() == data
    assert came.source == 'hub'
    again = 3 if fault.kind == 'corrupt' else 1 # equal size, other bytes: the whole file comes again
    assert came.fetched <= again * len(data)
    assert remembered(site.path(file), file.sha256)

def test_all_faults_at_once(hub, site):
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(400_000 + n, n)) for n in range(6)]
    dice = random.Random(5)
    faults = [replace(dice.choice(FAULTS), after=dice.randrange(300_000)) for _ in range(40)]
    refusals = sum(f.kind == 'status' and f.status == 403 for f in faults)
    assert sum(f.kind == 'corrupt' for f in faults) < fetching.TRIES, 'else one file may rightly be given up'
    assert refusals <= sources.REFUSALS, 'else one file may rightly be given up'
    hub.faults = iter(faults)
    site.fetch(*files, patience_s=60)
    assert [hub.blob(f.sha256).read_bytes() == site.path(f).read_bytes() for f in files] == [True] * 6

def test_addresses_that_expire_on_the_way(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, 'CHUNK_SIZES', (20_000, 20_000))
    file = hub.put('org/w', 'a.safetensors', some_bytes(1_500_000))
    def expire():
        for n in range(10**6):
            if n % 10 == 9: hub.signature = f'{n}' # 7 times, under the hands of 16 connections
            yield None
    hub.faults = expire()
    (came,) = Site(hub, tmp_path / 'models', connections=16).fetch(file, patience_s=60)
    assert came.fetched == file.bytes
    assert sum(r.method == 'HEAD' for r in hub.requests) >= 7

def test_addresses_that_are_never_good(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(600_000))
    hub.faults = (Fault('status', status=403) for _ in range(10**6))
    with pytest.raises(JobError, match='HTTP 403 from storage, from 5 addresses in a row; run it again'):
        site.fetch(file, patience_s=60)

def test_no_files_but_whole_ones_under_their_names(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(600_000))
    hub.faults = (Fault('reset', after=50_000) if n < 4 else Fault('status', status=503) for n in range(10**6))
    with pytest.raises(JobError, match='HTTP 503, and nothing else for 1 s; run it again: what has arrived is kept'):
        site.fetch(file, patience_s=1)
    assert not site.path(file).exists()
    assert not list(site.places.models_dir.rglob('*.safetensors'))
    have = arrived(part_path(site.path(file), file.sha256), file.bytes)
    assert 0 < have < file.bytes
    hub.faults = iter(())
    (came,) = site.fetch(file)
    assert came.fetched == file.bytes - have

def test_a_source_that_keeps_lying_is_named(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(200_000))
    hub.faults = (Fault('corrupt', after=5) for _ in range(10**6))
    with pytest.raises(JobError, match='hub gives bytes with sha256'): site.fetch(file)
    assert not site.path(file).exists()
    assert hub.sent == fetching.TRIES * file.bytes

REFUSALS = [
    (
        'gated, no token',
        {'gated': True},
        False,
        {},
        r'org/w@.*gated; accept its licence at https://huggingface.co/org/w and set HF_TOKEN',
    ),
    ('wrong token', {}, 'hf_wrong', {}, 'HTTP 401.*check HF_TOKEN'),
    ('private', {'private': True}, False, {}, 'HTTP 401.*check HF_TOKEN'),
    ('revision', {}, 'hf_secret', {'revision': 'b' * 40}, 'there is no revision b{40}; correct the lock'),
    ('file', {}, 'hf_secret', {'path': 'nowhere'}, 'no such file; correct the lock'),
    ('size', {}, 'hf_secret', {'bytes': 5}, 'the hub has 100 bytes.*the lock says 5 bytes'),
    ('hash', {}, 'hf_secret', {'sha256': 'c' * 64}, 'the hub has 100 bytes, etag'),
    ('not pinned', {}, 'hf_secret', {'sha256': None}, 'pins no revision, size or sha256 for vae/a'),
]

@pytest.mark.parametrize(('repo', 'token', 'change', 'said'), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_waiting_does_not_cure(hub, tmp_path, repo, token, change, said):
    file = replace(hub.put('org/w', 'a.safetensors', some_bytes(100), **repo), **change)
    with pytest.raises(JobError, match=said) as e: Site(hub, tmp_path / 'models', token=token).fetch(file)
    assert e.value.code == 'models_unavailable'
    assert 'hf_' not in str(e.value).replace('https', '')
    assert hub.sent == 0

def test_gated_with_a_token(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(100), gated=True)
    assert site.fetch(file)[0].source == 'hub'

def test_disk_that_is_too_small(hub, site, monkeypatch):
    file = hub.put('org/w', 'a.safetensors', some_bytes(5_000_000))
    with pytest.raises(JobError, match='do not fit in MODELS_DIR'): fetching.check_space(10**18, site.places.models_dir)
    write = os.pwritev
    left = [3_000_000]
    def full(fd, chunks, at):
        left[0] -= sum(map(len, chunks))
        if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        return write(fd, chunks, at)
    monkeypatch.setattr(os, 'pwritev', full)
    with pytest.raises(JobError, match='no space in MODELS_DIR') as e: site.fetch(file)
    assert e.value.code == 'storage_failed'
    assert e.value.worker_unfit
    monkeypatch.undo()
    assert site.fetch(file)[0].fetched < file.bytes

def test_damaged_file_of_equal_size_is_the_only_one_fetched_again(hub, site):
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(100_000, n)) for n in range(3)]
    site.fetch(*files)
    with site.path(files[1]).open('r+b') as f: f.write(b'x')
    os.utime(site.path(files[1]), ns=(1, 1))
    assert [verified(f, site.places) is None for f in files] == [True, False, True]
    before = hub.sent
    assert [c.source for c in site.fetch(*files)] == ['verified', 'hub', 'verified']
    assert hub.sent == before + files[1].bytes

def test_silent_rot_is_found_by_verify_deep_only(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(100_000))
    site.fetch(file)
    stat = site.path(file).stat()
    with site.path(file).open('r+b') as f: f.write(b'x')
    os.utime(site.path(file), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert verified(file, site.places) is None
    assert 'sha256' in verified(file, site.places, deep=True)
    assert site.fetch(file)[0].source == 'hub'
    assert verified(file, site.places, deep=True) is None

# Processes

CLIENT = '''
import sys
from wan_avatar.config import WeightSettings, load_settings
from wan_avatar.fetch import fetch_weights
from wan_avatar.models import load_lock
from wan_avatar.workflow import WAN, locked_files
settings = load_settings(kind=WeightSettings)
print([c.fetched for c in fetch_weights(locked_files(WAN, load_lock(settings.models_lock)), settings)])
'''

def client(hub, folder: Path, *files: LockedFile, connections: int = 4) -> subprocess.Popen:
    "A process that fetches these files"
    lock = replace(
        load_lock(), profiles={'wan22-animate': Needs(renderer=tuple(f.name for f in files))},
        files={f.name: f for f in files}
    )
    (folder / 'lock.json').write_text(dump_lock(lock))
    env = (
        os.environ
        | {
            'HF_ENDPOINT': hub.endpoint,
            'HF_TOKEN': hub.token,
            'HF_HOME': str(folder / 'hf'),
            'MODELS_LOCK': str(folder / 'lock.json'),
            'MODELS_DIR': str(folder / 'models'),
            'MODELS_CACHE': str(folder / 'none'),
            'FETCH_CONNECTIONS': str(connections),
        }
    )
    return subprocess.Popen(
        [sys.executable, '-c', CLIENT], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

def test_ten_kills_lose_little(hub, tmp_path):
    # a second: what a busy machine leaves in its sockets when the client dies stays small beside the files
    hub.speed = 7e5
    files = [
        hub.put('org/w', f'{n}.safetensors', some_bytes(size, n))
        for n, size in enumerate((12_000_000, 9_000_000, 3_000_000))
    ]
    total = sum(f.bytes for f in files)
    dice = random.Random(3)
    for _ in range(10):
        until = hub.sent + dice.randrange(total // 20, total // 12)
        child = client(hub, tmp_path, *files)
        deadline = time.monotonic() + 30
        while hub.sent < until and child.poll() is None and time.monotonic() < deadline: time.sleep(0.002)
        assert child.poll() is None, child.communicate()
        assert hub.sent >= until, child.communicate()
        child.kill()
        child.communicate()
    kept = sum(on_disk(tmp_path / 'models', f) for f in files)
    before = hub.sent
    assert kept < total
    assert kept > 0.85 * before, 'what a client had not read from its sockets is lost, and nothing else'
    hub.speed = None
    out, err = (last := client(hub, tmp_path, *files)).communicate(timeout=60)
    assert last.returncode == 0, err
    assert all((tmp_path / 'models' / f.place).read_bytes() == hub.blob(f.sha256).read_bytes() for f in files)
    late = 4 * 2**16 # bytes a connection of a killed client may still have been given
    assert total - kept <= hub.sent - before <= total - kept + late, 'what was on the disk was fetched again'

def on_disk(models: Path, file: LockedFile) -> int: # bytes
    "What a killed client left of a file"
    target = models / file.place
    return file.bytes if target.exists() else arrived(part_path(target, file.sha256), file.bytes)

def test_two_processes_fetch_once(hub, tmp_path):
    hub.speed = 1.5e6
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(2_000_000, n)) for n in range(3)]
    both = [client(hub, tmp_path, *files) for _ in range(2)]
    said = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert hub.sent == sum(f.bytes for f in files)

def test_cancelled_fetch_ends_soon_and_goes_on_later(hub, site):
    file = hub.put('org/w', 'a.safetensors', some_bytes(2_000_000))
    hub.speed = 1e5
    began = time.monotonic()
    with pytest.raises(JobError, match='cancelled'): site.fetch(file, cancelled=lambda: hub.sent > 100_000)
    assert time.monotonic() - began < 10
    hub.speed = None
    assert site.fetch(file)[0].fetched < file.bytes

# What is here already

def cache_of(
    folder: Path,
    repo: str,
    files: dict[str, bytes],
    commit: str = 'c0ffee',
    ref: str | None = 'c0ffee'
) -> Path:
    "A cache as huggingface_hub lays it out: snapshots of links to blobs"
    root = folder / repo
    (root / 'blobs').mkdir(parents=True)
    (root / 'refs').mkdir()
    if ref is not None: (root / 'refs/main').write_text(ref)
    for n, (path, data) in enumerate(files.items()):
        (root / f'blobs/{n}').write_bytes(data)
        link = root / 'snapshots' / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / f'blobs/{n}', link.parent))
    return folder

def tree(folder: Path) -> list:
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob('*'))

CACHES = {
    'complete': dict(repo='models--org--w'),
    'bundle layout': dict(repo='models--me--bundle', prefix='vae/'),
    'other case': dict(repo='Models--ORG--W'),
    'newline in refs/main': dict(repo='models--org--w', ref='c0ffee\n'),
    'no refs': dict(repo='models--org--w', ref=None),
    'stale refs': dict(repo='models--org--w', ref='0' * 40),
}

@pytest.mark.parametrize('name', CACHES)
def test_a_whole_cache_costs_no_request_and_is_not_written_to(hub, tmp_path, name):
    spec = CACHES[name]
    data = {f'{n}.safetensors': some_bytes(50_000, n) for n in range(2)}
    files = [hub.put('org/w', path, d) for path, d in data.items()]
    cache = cache_of(
        tmp_path / 'mount', spec['repo'], {spec.get('prefix', '') + p: d for p, d in data.items()},
        ref=spec.get('ref', 'c0ffee')
    )
    before = tree(cache)
    site = Site(hub, tmp_path / 'models', (tmp_path / 'no mount', cache))
    assert [c.source for c in site.fetch(*files)] == ['cache'] * 2
    assert (hub.requests, hub.sent) == ([], 0)
    assert all(site.path(f).is_symlink() and site.path(f).read_bytes() == data[f.path] for f in files)
    assert tree(cache) == before
    assert [c.source for c in site.fetch(*files)] == ['verified'] * 2

DEFECTS = {
    'absent': lambda p: p.unlink(),
    'dangling': lambda p: p.resolve().unlink(),
    'cut short': lambda p: p.resolve().write_bytes(b'x'),
    'flipped bit': lambda p: p.resolve().write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
}

@pytest.mark.parametrize('defect', DEFECTS)
def test_a_cache_with_a_defect_costs_that_file_only(hub, tmp_path, defect, caplog):
    caplog.set_level('INFO')
    data = {f'{n}.safetensors': some_bytes(50_000, n) for n in range(2)}
    files = [hub.put('org/w', path, d) for path, d in data.items()]
    cache = cache_of(tmp_path / 'mount', 'models--org--w', data)
    DEFECTS[defect](cache / 'models--org--w/snapshots/c0ffee/1.safetensors')
    site = Site(hub, tmp_path / 'models', (cache,))
    assert [c.source for c in site.fetch(*files)] == ['cache', 'hub']
    assert hub.sent == files[1].bytes
    assert site.path(files[1]).read_bytes() == data['1.safetensors']
    assert '1.safetensors' in ' '.join(r.message for r in caplog.records if r.message.startswith('cache'))

def read_only(*folders: Path) -> list[str]:
    "What to run a command with, so that it finds these folders mounted read-only; skips without mount namespaces"
    steps = ''.join(
        f'mount --bind {f} {f} && mount -o remount,ro,bind {f} && ! touch {f}/try 2>/dev/null && '
        for f in folders
    )
    before = ['unshare', '-rm', 'sh', '-c', steps + 'exec "$@"', 'sh']
    if subprocess.run([*before, 'true'], capture_output=True, check=False).returncode:
        pytest.skip('no mount namespaces here')
    return before

@pytest.mark.parametrize('mounted', [(), ('mount',), ('mount', 'models')], ids=[
    'no permission',
    'read-only cache',
    'read-only cache and MODELS_DIR',
])
def test_a_mount_that_can_not_be_written_is_enough(hub, tmp_path, mounted):
    "RunPod's cached model, as an unprivileged worker or a read-only mount has it; nothing that could fail is attempted"
    data = some_bytes(50_000)
    file = hub.put('org/w', 'a.safetensors', data)
    cache = cache_of(tmp_path / 'mount', 'models--org--w', {'a.safetensors': data})
    for p in [cache, *cache.rglob('*')]: p.chmod(0o555, follow_symlinks=True)
    child = client(hub, tmp_path, file)
    child.communicate(timeout=60)
    env = {
        'HF_HOME': str(tmp_path / 'mount'),
        'MODELS_CACHE': str(cache),
        'MODELS_LOCK': str(tmp_path / 'lock.json'),
        'MODELS_DIR': str(tmp_path / 'models'),
        'HF_ENDPOINT': hub.endpoint,
    }
    before = tree(cache)
    requests = len(hub.requests)
    if 'models' not in mounted: (tmp_path / 'models' / file.place).unlink()
    prefix = read_only(*(tmp_path / m for m in mounted)) if mounted else []
    done = subprocess.run(
        [*prefix, sys.executable, '-c', CLIENT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | env,
    )
    assert (done.returncode, done.stdout.strip()) == (0, '[0]'), done.stderr
    assert len(hub.requests) == requests
    assert tree(cache) == before

def test_mirror_in_the_bucket_before_the_hub(hub, bucket, tmp_path):
    store = Store(make_settings(bucket, tmp_path))
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(3_000_000, n)) for n in range(3)]
    for n, f in enumerate(files[:2]):
        # the second is damaged there, the third missing
        (tmp_path / 'up').write_bytes(hub.blob(f.sha256).read_bytes() if n == 0 else bytes(f.bytes))
        store.upload(tmp_path / 'up', f'mirror/{f.place}', 'application/octet-stream')
    site = Site(hub, tmp_path / 'models', mirror=())
    site.sources.insert(0, Mirror(store, 'mirror', site.http))
    assert [c.source for c in site.fetch(*files)] == ['mirror', 'hub', 'hub']
    assert hub.sent == 2 * files[0].bytes
    assert not [r for r in hub.requests if '0.safetensors' in r.path]

# The lock

def test_lock_pins_what_was_not_known(hub, site):
    small = hub.put('org/w', 'config.json', b'{}', small=True)
    large = hub.put('org/w', 'model.safetensors', some_bytes(1000))
    for file in (small, large):
        assert pinned(replace(file, revision=None, bytes=None, sha256=None, note='unknown'), site.sources[0]) == file

def test_what_the_hub_has_stated_rests_on_one_source_no_longer(hub, site):
    file = hub.put('org/w', 'model.safetensors', some_bytes(1000))
    doubted = replace(file, one_source=('revision', 'bytes'), note='nobody else says so', bytes=999)
    assert pinned(doubted, site.sources[0]) == file
    said = ['bytes 999 -> 1000', 'revision is as one source stated it']
    assert changes(doubted, file) == [f'vae/model.safetensors: {words}' for words in said]

CHECKS = { # repository, how the file is kept there, token, what the lock says otherwise -> verdict, words about it
    'in LFS': ({}, False, 'hf_secret', {}, 'as pinned', ''),
    'in git': ({}, True, 'hf_secret', {}, 'as pinned', ''),
    'gated, with a token': ({'gated': True}, False, 'hf_secret', {}, 'as pinned', ''),
    'another hash': ({}, False, 'hf_secret', {'sha256': 'c' * 64}, 'differs: sha256', 'vae/a: sha256 is cccc'),
    'another hash, in git': ({}, True, 'hf_secret', {'sha256': 'c' * 64}, 'differs: sha256', 'vae/a: sha256 is cccc'),
    'another size': ({}, False, 'hf_secret', {'bytes': 7}, 'differs: bytes', 'vae/a: bytes is 7 in the lock and 100'),
    'another size, in git': ({}, True, 'hf_secret', {'bytes': 7}, 'differs: bytes', 'and 100 at the hub'),
    'all of another file': (
        {}, False, 'hf_secret', {'bytes': 7, 'sha256': 'c' * 64}, 'differs: bytes, sha256', '; sha256 is',
    ),
    'a branch for a revision': ({}, False, 'hf_secret', {'revision': 'main'}, 'differs: revision', 'revision is main'),
    'no such revision': ({}, False, 'hf_secret', {'revision': 'b' * 40}, 'no such revision', 'vae/a: org/w@bbbbbbbb'),
    'no such file': ({}, False, 'hf_secret', {'path': 'moved'}, 'no such file', '/moved: that revision has no'),
    'gated': ({'gated': True}, False, False, {}, 'gated', 'accept its licence at https://huggingface.co/org/w'),
    'private': ({'private': True}, False, False, {}, 'no such repository', 'or one this token may not read'),
    'no such repository': ({}, False, 'hf_secret', {'repo': 'org/elsewhere'}, 'no such repository', 'org/elsewhere@'),
    'a wrong token': ({}, False, 'hf_wrong', {}, 'no such repository', 'HTTP 401'),
    'not pinned': ({}, False, 'hf_secret', {'sha256': None}, 'not pinned', 'vae/a: the lock lacks a figure'),
    'too large to be read': ({}, 'large', 'hf_secret', {}, 'no hash', 'no sha256 for it, and it has 100 bytes'),
}
DOUBTED = {'another hash', 'another size, in git', 'no such revision', 'no such file'} # the one source may be wrong

@pytest.mark.parametrize('name', CHECKS)
def test_a_row_of_the_lock_beside_the_hub(hub, tmp_path, monkeypatch, name):
    repo, in_git, token, change, verdict, words = CHECKS[name]
    if in_git == 'large': monkeypatch.setattr(pinning, '_READABLE', 99)
    file = replace(hub.put('org/w', 'a', some_bytes(100), small=bool(in_git), **repo), **change)
    source = Site(hub, tmp_path / 'models', token=token).sources[0]
    found = checked(file, source)
    doubted = checked(replace(file, one_source=('bytes', 'sha256')), source)
    assert (found.verdict, found.ok) == (verdict, verdict == 'as pinned')
    assert words in found.problem
    assert bool(words) == bool(found.problem)
    assert doubted.verdict == verdict
    assert 'only one source' not in found.problem
    said = doubted.problem.endswith('; only one source stated its bytes and sha256 (a)')
    assert said == (name in DOUBTED or verdict.startswith('differs'))
    assert hub.sent <= 2 * 100 * (in_git is True)
    assert 'hf_' not in found.problem.replace('https', '')

def test_a_hub_that_can_not_be_asked_is_no_verdict(hub, site):
    file = hub.put('org/w', 'config.json', b'{}', small=True)
    hub.faults = iter([Fault('reset'), Fault('status', status=503)]) # passing: asked again
    assert checked(file, site.sources[0]).ok
    hub.faults = (Fault('status', status=503) for _ in range(10**6))
    with pytest.raises(HubUnreachable, match=r'about org/w@.{12}/config.json: HTTP 503; check the network'):
        checked(file, site.sources[0], tries=2)
    with pytest.raises(HubUnreachable, match='ConnectError; check the network and HF_ENDPOINT'):
        checked(file, Hub(site.http, endpoint='http://127.0.0.1:9'), tries=1)

def test_a_small_file_that_comes_whole_is_as_good_as_its_range(hub, site, monkeypatch):
    "Servers of what is kept in git need not know ranges"
    def whole(self, stored, headers, send=hub_module._Answers.send_blob):
        del self.headers['Range']
        send(self, stored, headers)
    monkeypatch.setattr(hub_module._Answers, 'send_blob', whole)
    file = hub.put('org/w', 'config.json', b'{"a": 1}', small=True)
    assert checked(file, site.sources[0], tries=1).ok
    assert site.fetch(file)[0].source == 'hub'
    assert site.path(file).read_bytes() == b'{"a": 1}'

def online(lock: Lock, folder: Path, endpoint: str, *more: str) -> subprocess.CompletedProcess:
    "`wan-avatar models verify --online` of a lock"
    (folder / 'lock.json').write_text(dump_lock(lock))
    env = (
        os.environ
        | {
            'HF_ENDPOINT': endpoint,
            'HF_TOKEN': 'hf_secret',
            'HF_HOME': str(folder / 'hf'),
            'PROFILE': 'draft',
            'MODELS_LOCK': str(folder / 'lock.json'),
            'MODELS_DIR': str(folder / 'models'),
        }
    )
    command = [ROOT / '.venv/bin/wan-avatar', 'models', 'verify', '--online', *more]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)

def test_verify_online_looks_at_every_row(hub, tmp_path):
    "Also at those that no profile needs; one that is wrong is named and fails the command"
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(100, n)) for n in range(2)]
    files.append(hub.put('org/w', 'c.json', b'{}', small=True))
    needs = {'wan22-animate': Needs(renderer=('0.safetensors',))}
    lock = replace(load_lock(), profiles=needs, files={f.name: f for f in files})
    good = online(lock, tmp_path, hub.endpoint)
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.count('as pinned') == len(files), good.stdout + good.stderr
    for f in files:
        (row,) = [line.split() for line in good.stdout.splitlines() if f.place in line]
        assert row == [f.place, f.revision[:12], str(f.bytes), f.sha256[:12], 'as', 'pinned']
        assert f'asking the hub about {f.place}' in good.stderr
    wrong = replace(files[1], sha256='0' * 64, one_source=('sha256',))
    bad = online(replace(lock, files=lock.files | {wrong.name: wrong}), tmp_path, hub.endpoint, '--json')
    said = {f['name']: f for f in json.loads(bad.stdout)}
    assert bad.returncode == 1
    assert [f['verdict'] for f in said.values()] == ['as pinned', 'differs: sha256', 'as pinned']
    assert said[wrong.name]['problem'].endswith('only one source stated its sha256 (1.safetensors)')
    assert said['c.json']['problem'] is None
    assert not (tmp_path / 'models').exists()

def test_verify_online_without_a_hub_says_so(hub, tmp_path):
    file = hub.put('org/w', 'a', b'weights')
    lock = replace(load_lock(), profiles={'wan22-animate': Needs(renderer=('a',))}, files={'a': file})
    done = online(lock, tmp_path, 'http://127.0.0.1:9', '--json')
    assert (done.returncode, done.stdout) == (3, '')
    assert 'the hub cannot be asked about org/w@' in done.stderr
    assert 'Traceback' not in done.stderr

def test_the_lock_that_ships_is_whole():
    lock = load_lock()
    text = (ROOT / 'wan_avatar/models.lock.json').read_text()
    assert all(f.known for f in lock.files.values())
    assert dump_lock(lock) == text
    assert 'AGPL' not in text
    assert all(re.fullmatch('[0-9a-f]{40}', f.revision) for f in lock.files.values()), 'a branch is not a pin'
    doubted = {f.name: f.one_source for f in lock.files.values() if f.one_source}
    assert doubted == {'dit': ('revision',), 'sam2_config': ('bytes', 'sha256'), 'sam2_weights': ('bytes',)}
    assert all(lock.files[n].note for n in doubted)
    kijai = {f.name for f in lock.files.values() if f.repo == 'Kijai/WanVideo_comfy'}
    undeclared = {f.name for f in lock.files.values() if f.licence == 'none declared'}
    assert kijai == undeclared == {'distill_lora', 'relight_lora'}
    person = lock.files['person_detector']
    assert (person.file, person.licence) == ('yolox_l.onnx', 'Apache-2.0')
    named = {n for p in lock.profiles.values() for n in (*p.renderer, *p.tracker, p.text_encoder)}
    assert lock.files.keys() - named == {'distill_lora_official', 'sam2_large_config', 'sam2_large_weights'}

@pytest.mark.parametrize('figures', ['bytes', ['licence'], 3, [['bytes']]])
def test_one_source_names_figures(figures):
    said = json.loads(dump_lock(load_lock()))
    said['files'][0]['one_source'] = figures
    words = f'dit: one_source .* is not a list of {", ".join(FIGURES)}'
    with pytest.raises(LockDamaged, match=words): parse_lock(json.dumps(said))

def test_production_is_planned_without_a_refused_row(tmp_path, monkeypatch):
    for name in ('MODELS_DIR', 'MODELS_CACHE'): monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv('MODELS_LOCK', raising=False)
    command = ['models', 'plan', '--profile', 'wan22-animate', '--with-text-encoder']
    shown, steps = (CliRunner().invoke(app, [*command, *more]) for more in ([], ['--json']))
    assert (shown.exit_code, steps.exit_code) == (0, 0)
    assert 'REFUSED' not in shown.stdout
    planned = [(s['file']['name'], s['where']) for s in json.loads(steps.stdout)]
    assert planned == [(f.name, 'hub') for f in locked_files(WAN, load_lock(), True)]

def test_the_order_files_arrive_in():
    "The tracker is small and the first a job needs; then the largest, because it decides when everything is there"
    lock = load_lock()
    names = [f.name for f in locked_files(WAN, lock, text_encoder=True)]
    tracker = list(lock.profiles['wan22-animate'].tracker)
    sizes = [lock.files[n].bytes for n in names[len(tracker):-1]]
    assert names[:len(tracker)] == tracker
    assert names[-1] == 'text_encoder'
    assert sizes == sorted(sizes, reverse=True)
    assert 'text_encoder' not in [f.name for f in locked_files(WAN, lock)]

SWITCHES = [{'vision': 'off'}, {'vision': 'unconnected'}, {'face': False}, {'cfg': 3.5}] # of profiles with weights
SWITCHED = [p.changed(**changes) for p in PROFILES.values() for changes in ({}, *(SWITCHES if p.weights else []))]

@pytest.mark.parametrize('tracker', sorted(TRACKERS))
@pytest.mark.parametrize('profile', SWITCHED, ids=lambda p: f'{p.name}-{p.vision}-{p.face}-{p.values.get("cfg")}')
def test_boot_fetches_what_a_job_looks_for(profile, tracker, tmp_path):
    "For every profile, tracker and switch: with the locked files that boot asks for, nothing that is pinned is missing"
    if tracker not in (profile.tracker, *profile.other_trackers): pytest.skip('this profile cannot be run with it')
    profile = with_tracker(profile, tracker)
    lock = load_lock()
    pinned = {f.place for f in lock.files.values()}
    for file in locked_files(profile, lock):
        (path := tmp_path / file.place).parent.mkdir(exist_ok=True)
        with path.open('wb') as f: f.truncate(file.bytes) # sparse: no disk
    missing = {w.place for w in needed_files(profile) if not (tmp_path / w.place).exists()}
    assert not missing & pinned
    assert {f.place for f in locked_files(profile, lock)} <= {w.place for w in needed_files(profile)}
    if not missing: check_weights(profile, tmp_path)
    else:
        with pytest.raises(JobError, match='lacks'): check_weights(profile, tmp_path)
    assert (not missing) == (profile.name != 'wan22-animate-tiny'), 'only the tiny weights are made by hand'

def test_a_lock_of_ones_own_may_add_files():
    "A LoRA for research that no graph of ours names is fetched, too"
    extra = replace(load_lock().files['relight_lora'], name='mine', file='mine.safetensors')
    lock = replace(load_lock(), files=load_lock().files | {'mine': extra},
                   profiles={'wan22-animate': replace(load_lock().profiles['wan22-animate'], renderer=('dit', 'mine'))})
    assert extra in locked_files(WAN, lock)
    assert extra in locked_files(with_tracker(WAN, 'mediapipe'), lock)

def test_urgent_files_arrive_first(hub, tmp_path, monkeypatch):
    "Each piece is of the most urgent file that lacks any, whichever asked first"
    monkeypatch.setattr(download, 'CHUNK_SIZES', (50_000, 50_000))
    hub.speed = 2e6
    files = [hub.put('org/w', f'{n}.safetensors', some_bytes(1_000_000, n)) for n in range(3)]
    ended: list[str] = []
    def watch(coming): ended.extend(c.file.name for c in coming if c.state == 'done' and c.file.name not in ended)
    Site(hub, tmp_path / 'models', connections=1).fetch(*files, watch=watch)
    assert ended == [f.name for f in files]

def test_xet_that_fails_falls_back_to_ranges(hub, site, caplog):
    data = some_bytes(1_000_000)
    file = hub.put('org/w', 'a.safetensors', data)
    hub.xet_headers = lambda stored: {
        'X-Xet-Hash': 'd' * 64,
        'X-Xet-Refresh-Route': f'{hub.endpoint}/api/models/org/w/xet-read-token/main',
    }
    (came,) = site.fetch(file)
    assert site.path(file).read_bytes() == data
    assert came.fetched == len(data)
    assert 'Xet failed' in caplog.text
    assert [r for r in hub.requests if 'xet-read-token' in r.path], 'Xet was asked'

def test_the_real_client_takes_the_hub_for_one(hub, tmp_path):
    file = hub.put('org/w', 'a.safetensors', some_bytes(100_000))
    download = f'snapshot_download("org/w", cache_dir={str(tmp_path / "hf")!r})'
    code = f'from huggingface_hub import snapshot_download; print({download})'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {'HF_ENDPOINT': hub.endpoint, 'HF_TOKEN': hub.token}
    )
    assert (Path(done.stdout.strip()) / 'a.safetensors').read_bytes() == hub.blob(file.sha256).read_bytes()

@pytest.mark.parametrize(('records', 'expected'), [
    (b'', []),
    (b'\x00' * 15, []),
    (partial._RECORD.pack(5, 9) + partial._RECORD.pack(0, 5) + b'torn', [(0, 9)]),
    (partial._RECORD.pack(0, 99), []),
    (partial._RECORD.pack(7, 3), []),
])
def test_a_torn_journal_promises_nothing_it_should_not(tmp_path, records, expected):
    part = tmp_path / 'a.part'
    part.write_bytes(bytes(10))
    partial.journal_path(part).write_bytes(records)
    assert read_journal(part, 10) == expected
    assert read_journal(part, 11) == []

def test_progress_lines_tell_how_far_it_is(hub, site):
    lines: list[str] = []
    site.fetch(hub.put('org/w', 'a.safetensors', some_bytes(10_000)), watch=ProgressLines(lines.append, interval_s=0))
    assert json.loads(lines[-1])['done'] == 1
    assert merged([]) == []


@pytest.mark.parametrize('client', ['_OURS', '_THEIRS'])
def test_the_bench_fetches_with_either_client(tmp_path, monkeypatch, client):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs').mkdir()
    bench_boot.write_weights(tmp_path / 'site', gigabytes=0.008)
    with bench_boot.hub_process(tmp_path / 'site') as hub:
        figures = bench_boot._fetched(getattr(bench_boot, client), hub, 'bench/eight', connections=4)
    assert figures.keys() == {'seconds', 'cpu', 'peak_mb'}
