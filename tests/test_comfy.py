"""ComfyUI as a child process: its start, its memory, access to its port, its folders and its log"""
import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import httpx2
import psutil
import pytest
from conftest import ROOT, comfy_dir, comfy_with_probe

from wan_avatar.comfy import Comfy, ComfyProcess, node_error, run
from wan_avatar.config import SettingsError, load_settings
from wan_avatar.job import JobError
from wan_avatar.launch import HEADER, BoundedFile, ComfyPlace, Log, launch, lay_out, place_of, private_folder
from wan_avatar.memory import Memory, find_memory, memory_in_use, memory_variable, pinned_at_most
from wan_avatar.tasks import Background
from wan_avatar.worker import check_disk

PICTURE = {'a': {'class_type': 'EmptyImage', 'inputs': {'width': 64, 'height': 64, 'batch_size': 1, 'color': 255}},
           'b': {'class_type': 'PreviewImage', 'inputs': {'images': ['a', 0]}}}

# how much memory there is

GB = 10**9
MACHINE = {'proc/meminfo': 'MemTotal: 62500000 kB\n'}
V2 = 'sys/fs/cgroup'
V1 = 'sys/fs/cgroup/memory'

def in_group(*lines: str) -> dict[str, str]: return {'proc/self/cgroup': '\n'.join(lines) + '\n'}

BESIDE_THE_ROOT = {f'{V2}/memory.max': '16000000000', f'{V2}/other/memory.max': '1'}
OUTSIDE_IS_LESS = {f'{V2}/a/memory.max': '8000000000', f'{V2}/a/b/memory.max': '24000000000'}
OUTSIDE_ALONE = {f'{V2}/a/memory.max': '8000000000', f'{V2}/a/b/memory.max': 'max'}
IN_BOTH = {f'{V1}/a/memory.limit_in_bytes': '4000000000', f'{V2}/unified/a/x': ''}

def v2(limit: str, group: str = '') -> dict[str, str]: return {f'{V2}{group}/memory.max': limit}

def v1(limit: str, group: str) -> dict[str, str]: return {f'{V1}{group}/memory.limit_in_bytes': limit}

TREES = { # groups of the process; files of the groups; limit, its folder and cgroup's version
    'v2, own limit':
        (in_group('0::/a/b'), v2('24000000000\n', '/a/b'), (24 * GB, f'{V2}/a/b', 2)),
    'v2, of the group around it':
        (in_group('0::/a/b'), OUTSIDE_IS_LESS, (8 * GB, f'{V2}/a', 2)),
    'v2, max inside, limit outside':
        (in_group('0::/a/b'), OUTSIDE_ALONE, (8 * GB, f'{V2}/a', 2)),
    'v2, the root is the container':
        (in_group('0::/'), v2('16000000000'), (16 * GB, V2, 2)),
    'v2, a path that is not seen':
        (in_group('0::/docker/c0ffee'), v2('16000000000'), (16 * GB, V2, 2)),
    'v2, a group beside the root':
        (in_group('0::/../other'), BESIDE_THE_ROOT, (16 * GB, V2, 2)),
    'v2, max':
        (in_group('0::/a'), v2('max', '/a'), None),
    'v2, as much as the machine':
        (in_group('0::/a'), v2(str(62500000 * 1024), '/a'), None),
    'v1, own limit':
        (in_group('5:cpu:/x', '4:memory:/a/b'), v1('4000000000', '/a/b'), (4 * GB, f'{V1}/a/b', 1)),
    'v1, with other controllers':
        (in_group('4:hugetlb,memory:/a'), v1('4000000000', '/a'), (4 * GB, f'{V1}/a', 1)),
    'v1, no limit':
        (in_group('4:memory:/a'), v1('9223372036854771712', '/a'), None),
    'v1, of another group':
        (in_group('4:memory:/a'), v1('4000000000', '/b'), None),
    'both, memory in v1':
        (in_group('4:memory:/a', '0::/a'), IN_BOTH, (4 * GB, f'{V1}/a', 1)),
    'no such file':
        (in_group('0::/a'), {}, None),
    'no groups at all':
        ({}, v2('1'), None)}

@pytest.mark.parametrize('groups, files, expected', TREES.values(), ids=TREES)
def test_least_limit_is_found(tmp_path, groups, files, expected):
    for name, text in (MACHINE | groups | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = (expected[0], str(tmp_path / expected[1]), expected[2]) if expected else ()
    assert find_memory(tmp_path) == Memory(62500000 * 1024, *limit)

V2_STAT = 'anon 2\nactive_file 3\ninactive_file 2\nunevictable 1'
V1_STAT = 'active_file 1\ntotal_active_file 3\ntotal_inactive_file 4'

STATS = [ # cgroup's version; files; bytes held
    (2, {'memory.current': '9', 'memory.stat': V2_STAT}, 4),
    (2, {'memory.current': '9'}, 9),
    (2, {}, 0),
    (1, {'memory.usage_in_bytes': '9', 'memory.stat': V1_STAT}, 2)]

@pytest.mark.parametrize('version, files, expected', STATS)
def test_cached_files_are_not_held(tmp_path, version, files, expected):
    for name, text in files.items(): (tmp_path / name).write_text(text + '\n')
    assert memory_in_use(Memory(100, 50, str(tmp_path), version)) == expected

def test_this_machine_says_how_much_there_is():
    found = find_memory()
    # some containers show their own number in one of the two
    pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    assert found.machine == pytest.approx(pages, rel=0.5)
    assert (found.allowed or 1) < found.machine

# how it is started

ENVIRONMENTS = [
    {},
    {'COMFY_DIR': '/c', 'WORK_DIR': '/w', 'MODELS_DIR': '/m'},
    {'COMFY_DIR': '', 'WORK_DIR': 'here/../there', 'MODELS_DIR': '~/m'}]
MINIO = {'MINIO_ENDPOINT': 'h', 'MINIO_ACCESS_KEY': 'a', 'MINIO_SECRET_KEY': 's', 'MINIO_BUCKET': 'b'}

@pytest.mark.parametrize('said', ENVIRONMENTS, ids=str)
def test_both_readers_of_the_environment_agree(said):
    settings = load_settings(MINIO | said)
    place = ComfyPlace(settings.comfy_dir.resolve(), settings.work_dir.resolve(), settings.models_dir.resolve())
    assert place_of(said) == place

def test_what_is_neither_true_nor_false_is_refused_by_the_settings():
    with pytest.raises(SettingsError, match='USE_SAGE_ATTENTION'): load_settings({'USE_SAGE_ATTENTION': 'perhaps'})

def test_starting_it_imports_nothing_but_the_standard_library():
    code = """import sys
before = set(sys.modules)
import wan_avatar.launch
print(*{m.split(".")[0] for m in set(sys.modules) - before})
"""
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, timeout=60)
    assert {m for m in done.stdout.split() if m not in sys.stdlib_module_names} == {'wan_avatar'}

# in the real process

@pytest.fixture(scope='module')
def running(tmp_path_factory):
    "A ComfyUI with the nodes of the tests, started early in a group with a limit, and taken over"
    folder = tmp_path_factory.mktemp('limited')
    (folder / 'memory.current').write_text('3000000000')
    (folder / 'memory.stat').write_text('inactive_file 1000000000')
    place = ComfyPlace(comfy_with_probe(folder / 'comfy'), folder / 'work', folder / 'models')
    early = launch(place, memory=Memory(64 * GB, 5 * GB, str(folder)))
    background = Background()
    async def begin() -> Comfy:
        comfy = Comfy(ComfyProcess(early.place, launched=early))
        await comfy.start()
        return comfy
    def do(work): return background.submit(work).result(timeout=60)
    comfy = do(begin())
    yield SimpleNamespace(comfy=comfy, early=early, do=do, place=place)
    do(comfy.close())
    background.close()

@pytest.fixture(scope='module')
def told_of_5_gb(running) -> dict:
    "What it says after a prompt"
    comfy = running.comfy
    async def drive() -> dict:
        await run(comfy, PICTURE)
        pids = {'pid': comfy.process.child.pid, 'early': running.early.process.pid}
        return pids | {'history': await comfy.get('/history'),
                       'system': (await comfy.get('/system_stats'))['system'], 'log': comfy.process.log.since(0)}
    return running.do(drive())

def test_one_that_was_started_early_is_taken_over(told_of_5_gb):
    assert told_of_5_gb['pid'] == told_of_5_gb['early']

def test_prompt_ids_are_uuids_with_hyphens(told_of_5_gb):
    "Newer ComfyUIs refuse every other form"
    ids = list(told_of_5_gb['history'])
    assert ids == [str(uuid.UUID(ids[0]))]

def test_it_knows_the_containers_memory(told_of_5_gb):
    system = told_of_5_gb['system']
    assert system['ram_total'] == 5 * GB
    assert 0 < system['ram_free'] <= 3 * GB, 'the container has 3 GB left, the machine perhaps less'
    assert 'memory: 64.0 GB of the machine, 5.0 GB allowed by cgroup v2' in told_of_5_gb['log']
    assert 'ComfyUI pins nothing' in told_of_5_gb['log'], 'no GPU here'

IN_COMFYUI = """
import os, sys, json, psutil, torch
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
from comfy import model_management as m
from wan_avatar.memory import contain
m.MAX_PINNED_MEMORY = 0.95 * m.get_total_memory(torch.device('cpu')) # as on a GPU
contain(os.environ)
cpu = torch.device('cpu')
said = m.MAX_PINNED_MEMORY, m.get_total_memory(cpu), m.get_free_memory(cpu), psutil.virtual_memory().available
print(json.dumps(said))
"""

@pytest.mark.parametrize('limited', [True, False])
def test_what_may_be_pinned_and_cached_is_of_the_container(tmp_path: Path, limited):
    memory = Memory(64 * GB, 2 * GB, str(tmp_path)) if limited else Memory(64 * GB)
    argv = [comfy_dir() / 'env/bin/python', '-B', '-c', IN_COMFYUI, comfy_dir() / 'ComfyUI']
    environment = os.environ | memory_variable(memory)
    done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True, timeout=120)
    pinned, total, free, available = json.loads(done.stdout.splitlines()[-1])
    if limited:
        assert (pinned, total) == (pinned_at_most(memory), 2 * GB)
        assert 0 < free <= 2 * GB
        assert 0 < available <= 2 * GB
    else:
        assert total == find_memory().machine
        assert pinned == pytest.approx(0.95 * total)

# access to its port

SECRET, PORT = '<secret>', '<port>' # stand for those of the start
OURS = {HEADER: SECRET}
PAGE = {'Origin': 'http://page.example'}
ASKED_FOR = {'json': {'prompt': PICTURE}}
CODE = {'files': {'image': ('evil.py', b'raise SystemExit')}}

def into(folder: str) -> dict: return {'data': {'subfolder': folder}}

STRANGERS = {
    'no secret': ('GET', '/system_stats', {}, {}),
    'another secret': ('GET', '/system_stats', {HEADER: 'x' * 43}, {}),
    'an empty secret': ('GET', '/system_stats', {HEADER: ''}, {}),
    'more than the secret': ('GET', '/system_stats', {HEADER: SECRET + 'x'}, {}),
    'the secret in the query': ('GET', f'/queue?{HEADER}={SECRET}', {}, {}),
    'a rebound name': ('GET', '/queue', OURS | {'Host': f'page.example:{PORT}'}, {}),
    'localhost': ('GET', '/queue', OURS | {'Host': f'localhost:{PORT}'}, {}),
    'a host without port': ('GET', '/queue', OURS | {'Host': '127.0.0.1'}, {}),
    'a page': ('POST', '/prompt', OURS | PAGE, ASKED_FOR),
    'a sandboxed page': ('POST', '/prompt', OURS | {'Origin': 'null'}, ASKED_FOR),
    'a page of its own': ('POST', '/prompt', OURS | {'Origin': f'http://127.0.0.1:{PORT}'}, ASKED_FOR),
    'a form of a page': ('POST', '/prompt', {'Content-Type': 'text/plain'}, {'content': json.dumps(ASKED_FOR['json'])}),
    'a preflight': ('OPTIONS', '/prompt', PAGE | {'Access-Control-Request-Method': 'POST'}, {}),
    'a preflight with the secret': ('OPTIONS', '/prompt', OURS, {}),
    'the socket': ('GET', '/ws', {'Upgrade': 'websocket', 'Connection': 'Upgrade', 'Sec-WebSocket-Version': '13',
                                  'Sec-WebSocket-Key': 'MDEyMzQ1Njc4OTAxMjM0NQ=='}, {}),
    'the other name of the socket': ('GET', '/api/ws', OURS, {}),
    'another name of a prompt': ('POST', '/api/prompt', OURS, ASKED_FOR),
    'an upload': ('POST', '/upload/image', OURS, CODE),
    'an upload of code': ('POST', '/upload/image', OURS, CODE | into('comfy/base/custom_nodes')),
    'an upload of code as it was once': ('POST', '/upload/image', OURS, CODE | into('comfy/custom_nodes')),
    'an upload of code beside the input': ('POST', '/upload/image', OURS, CODE | into('../base/custom_nodes')),
    'an upload by the other name': ('POST', '/api/upload/image', OURS, CODE),
    'an upload of a mask': ('POST', '/upload/mask', OURS, CODE),
    'an upload by a stranger': ('POST', '/upload/image', {}, CODE),
    'a view': ('GET', '/view?filename=comfy.log', OURS, {}),
    'a view upwards': ('GET', '/view?filename=comfy.log&subfolder=..&type=input', OURS, {}),
    'metadata of a model': ('GET', '/view_metadata/loras?filename=a.safetensors', OURS, {}),
    'user data': ('GET', '/userdata?dir=.', OURS, {}),
    'a file of user data': ('POST', '/userdata/..%2f..%2fbase%2fcustom_nodes%2fevil.py', OURS, {'content': b'exit()'}),
    'user data by the other name': ('POST', '/api/userdata/evil.py', OURS, {'content': b'raise SystemExit'}),
    'no more user data': ('DELETE', '/userdata/evil.py', OURS, {}),
    'settings': ('POST', '/settings', OURS, {'json': {'a': 1}}),
    'users': ('GET', '/users', OURS, {}),
    'logs': ('GET', '/internal/logs', OURS, {}),
    'raw logs': ('GET', '/internal/logs/raw', OURS, {}),
    'logs of a stranger': ('GET', '/internal/logs', {}, {}),
    'its files': ('GET', '/internal/files/output', OURS, {}),
    'its folders': ('GET', '/internal/folder_paths', OURS, {}),
    'the manager': ('POST', '/manager/queue/install', OURS, {'json': {}}),
    'the manager of newer ones': ('GET', '/v2/manager/queue/start', OURS, {}),
    'a node by its address': ('POST', '/customnode/install/git_url', OURS, {'content': 'https://page.example/a.git'}),
    'the page': ('GET', '/', OURS, {}),
    'a file of the page': ('GET', '/index.html', OURS, {}),
    'extensions': ('GET', '/extensions', OURS, {}),
    'models': ('GET', '/models/loras', OURS, {}),
    'no more history': ('POST', '/history', OURS, {'json': {'clear': True}}),
    'a prompt upwards': ('GET', '/history/../view', OURS, {}),
    'twice a slash': ('POST', '//prompt', OURS, ASKED_FOR),
    'a slash more': ('POST', '/prompt/', OURS, ASKED_FOR),
    'another method': ('PUT', '/prompt', OURS, ASKED_FOR),
    'nothing that there is': ('GET', '/nowhere', OURS, {})}

def of_this_start(text: str, process: ComfyProcess) -> str:
    return text.replace(SECRET, process.secret).replace(PORT, str(process.port))

@pytest.mark.parametrize('method, path, headers, more', STRANGERS.values(), ids=STRANGERS)
@pytest.mark.hostile('requests to ComfyUI')
def test_requests_that_are_not_ours_are_refused(running, method, path, headers, more):
    process = running.comfy.process
    before = sorted(running.place.work_dir.rglob('*'))
    headers = {k: of_this_start(v, process) for k, v in headers.items()}
    with httpx2.Client(trust_env=False) as client:
        answer = client.request(method, process.url + of_this_start(path, process), headers=headers, timeout=10, **more)
    assert answer.status_code == 403
    assert answer.text.startswith('refused: ')
    assert not [name for name in answer.headers if name.startswith('access-control')]
    assert sorted(running.place.work_dir.rglob('*')) == before

ASKED = [
    ('GET', '/system_stats'),
    ('GET', '/object_info'),
    ('GET', '/queue'),
    ('GET', '/history/823b84a2-b993-4d56-9818-05967d7429fd'),
    ('POST', '/queue'),
    ('POST', '/interrupt'),
    ('POST', '/free')]

@pytest.mark.parametrize('method, path', ASKED)
def test_what_the_worker_asks_for_is_answered(running, method, path):
    process = running.comfy.process
    body = {} if method == 'POST' else None
    with httpx2.Client(trust_env=False) as client:
        answer = client.request(method, process.url + path, headers=process.headers, timeout=30, json=body)
    assert answer.status_code == 200

def test_the_secret_stays_with_the_two(running):
    process = running.comfy.process
    said = running.do(run(running.comfy, {'v': {'class_type': 'Variables', 'inputs': {}}}))['v']['variables']
    child = psutil.Process(process.child.pid)
    commands = [' '.join(p.cmdline()) for p in (child, *child.children(recursive=True))]
    assert len(process.secret) >= 43
    assert len(said) > 3
    assert process.log.end() > 100
    for text in (*said, process.log.since(0), *commands): assert process.secret not in text
    files = [path for path in running.place.work_dir.rglob('*') if path.is_file()]
    assert files
    assert not [path for path in files if process.secret.encode() in path.read_bytes()]

def test_nobody_else_can_open_its_folders_or_change_its_code(running):
    place = running.place
    modes = {place.work_dir: 0o700, place.home: 0o700, place.log_path: 0o600,
             place.base: 0o500, place.base / 'custom_nodes': 0o500,
             place.base / 'extra_paths.json': 0o400, place.base / 'custom_nodes/wan_avatar_nodes.py': 0o400}
    assert {p: p.stat().st_mode & 0o777 for p in modes} == modes
    assert not [p for p in (place.home / 'input').rglob('*') if p.is_file()], 'ComfyUI has no inputs of its own'
    before = place.base.stat().st_ino
    lay_out(place)
    assert place.base.stat().st_ino == before, 'a start has changed nothing there'

STRANGER = """#!{python}
import http.server, os, sys
class Any(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(dict(self.headers), flush=True)
        self.send_response({status})
        self.send_header('X-Wan-Avatar', 'a guess')
        self.end_headers()
        Any.left -= 1
        if not Any.left: os._exit(9)
    left = 3
http.server.HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Any).serve_forever()
"""

ANSWERS = [ # status of a program that guesses; why it is not taken for ours
    (200, 'answers requests that are not ours'),
    (404, 'answers requests that are not ours'),
    (403, 'ended with 9 while starting')]

@pytest.mark.parametrize('status, why', ANSWERS)
@pytest.mark.hostile('requests to ComfyUI')
def test_a_program_without_the_secret_is_not_sent_it(tmp_path, status, why):
    "Another program on the port, or a ComfyUI that lets strangers in"
    (python := tmp_path / 'comfy/env/bin/python').parent.mkdir(parents=True)
    python.write_text(STRANGER.replace('{python}', sys.executable).replace('{status}', str(status)))
    python.chmod(0o755)
    async def begin() -> ComfyProcess:
        process = ComfyProcess(ComfyPlace(tmp_path / 'comfy', tmp_path / 'work', tmp_path / 'models'))
        async with aiohttp.ClientSession() as http:
            with pytest.raises(JobError, match=why) as e: await process.start(http)
        assert e.value.worker_unfit
        return process
    process = asyncio.run(begin())
    asked = process.log.since(0)
    assert not process.alive
    assert 'X-Wan-Avatar-Asked' in asked
    assert process.secret not in asked

def test_one_that_cannot_close_its_door_ends(tmp_path):
    lay_out(place := ComfyPlace(tmp_path / 'comfy', tmp_path / 'work', tmp_path / 'models'))
    nodes = place.base / 'custom_nodes/wan_avatar_nodes.py' # outside of ComfyUI there is no server to guard
    environ = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, nodes], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert 'server' in done.stderr

# folders

def replace_with(path: Path, text: str = 'raise SystemExit') -> None:
    path.parent.chmod(0o700)
    path.unlink()
    path.write_text(text)

def plant(path: Path, text: str = 'raise SystemExit') -> None:
    for folder in (path.parent.parent, path.parent):
        if folder.exists(): folder.chmod(0o700)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)

def link(path: Path, target: str) -> None:
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    path.symlink_to(target)

def plant_compiled_code(nodes: Path) -> None:
    nodes.chmod(0o700)
    (nodes / '__pycache__').unlink()
    plant(nodes / '__pycache__/wan_avatar_nodes.cpython-311.pyc')

PLANTED = {
    'a node': lambda base: plant(base / 'custom_nodes/evil.py'),
    'a folder of nodes': lambda base: plant(base / 'custom_nodes/evil/__init__.py'),
    'a script before the start': lambda base: plant(base / 'custom_nodes/evil/prestartup_script.py'),
    'other code in our file': lambda base: replace_with(base / 'custom_nodes/wan_avatar_nodes.py'),
    'a link in place of our file': lambda base: link(base / 'custom_nodes/wan_avatar_nodes.py', '/etc/passwd'),
    'a link to nodes': lambda base: link(base / 'custom_nodes/evil', '/var'),
    'the nodes of the image from elsewhere': lambda base: link(base / 'custom_nodes/theirs', '/var'),
    'compiled code': lambda base: plant_compiled_code(base / 'custom_nodes'),
    'other paths': lambda base: replace_with(base / 'extra_paths.json', '{"a": {"custom_nodes": "/var"}}'),
    'a large file': lambda base: replace_with(base / 'extra_paths.json', 'x' * 2**20)}

@pytest.mark.parametrize('change', PLANTED.values(), ids=PLANTED)
@pytest.mark.hostile('folders')
def test_code_that_was_changed_is_made_anew(tmp_path, change):
    (tmp_path / 'comfy/custom_nodes/theirs').mkdir(parents=True)
    place = ComfyPlace(tmp_path / 'comfy', tmp_path / 'work', tmp_path / 'models')
    def contents() -> dict[Path, str]:
        there = [p for p in place.base.rglob('*') if p.is_symlink() or not p.is_dir()]
        return {p: os.readlink(p) if p.is_symlink() else p.read_text() for p in there}
    lay_out(place)
    before = contents()
    change(place.base)
    assert contents() != before
    lay_out(place)
    assert contents() == before
    assert [p.name for p in place.home.iterdir() if p.name.startswith('.')] == []
    assert (place.base / 'custom_nodes').stat().st_mode & 0o777 == 0o500

def opened(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)

FOLDERS = {
    'none': (lambda p: None, ''),
    'ours': (lambda p: opened(p, 0o700), ''),
    'for the group': (lambda p: opened(p, 0o770), ''),
    'for all': (lambda p: opened(p, 0o777), ''),
    'sticky': (lambda p: opened(p, 0o1777), ''),
    'read-only': (lambda p: opened(p, 0o500), ''),
    'a link': (lambda p: p.symlink_to('/var'), 'is a link; name a folder'),
    'a link to ours': (lambda p: p.symlink_to(p.parent), 'is a link'),
    'a broken link': (lambda p: p.symlink_to('nowhere'), 'is a link'),
    'a file': (lambda p: p.touch(), 'is no folder; name a folder')}

@pytest.mark.parametrize('make, why', FOLDERS.values(), ids=FOLDERS)
@pytest.mark.hostile('folders')
def test_the_work_folder_is_ours_alone_or_refused(tmp_path, make, why):
    make(folder := tmp_path / 'work')
    settings = SimpleNamespace(work_dir=folder)
    if why:
        with pytest.raises(JobError, match=f'storage_failed: WORK_DIR .*{why}') as e: check_disk(settings)
        assert e.value.worker_unfit
        with pytest.raises(OSError, match=why): launch(ComfyPlace(tmp_path, folder, tmp_path))
    else:
        check_disk(settings, needed=0)
        assert folder.stat().st_mode & 0o7777 == 0o700

def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 10001)
    whose = f'belongs to user {tmp_path.stat().st_uid}, this worker is user 10001: name another folder'
    with pytest.raises(PermissionError, match=f'WORK_DIR .* {whose}'): private_folder(tmp_path)

def test_a_link_is_seen_through_the_environment(tmp_path):
    (tmp_path / 'link').symlink_to('/var')
    assert place_of({'WORK_DIR': f'{tmp_path}/link'}).work_dir == tmp_path / 'link'
    assert place_of({'WORK_DIR': f'{tmp_path}/link/..'}).work_dir == Path('/')

# its log

PRINTS = 'i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; echo last words; kill -9 $$'

def test_a_log_is_bounded_while_its_process_lives_and_keeps_the_last_words(tmp_path):
    log = Log(tmp_path / 'log', most=20_000)
    child = subprocess.Popen(['sh', '-c', PRINTS], stdout=log.writer)
    log.follow()
    child.wait()
    end = log.end()
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files] == ['log', 'log.1']
    assert max(p.stat().st_size for p in files) <= 20_000
    assert {p.stat().st_mode & 0o777 for p in files} == {0o600}
    assert end == sum(len(f'line {i}\n') for i in range(20000)) + len('last words\n')
    assert log.since(end - 30).endswith('line 19999\nlast words\n')
    assert len(log.since(end - 30)) == 30
    kept = log.since(0).splitlines()
    assert kept[-2::-1][:1000] == [f'line {i}' for i in range(19999, 18999, -1)], 'nothing is missing between the two'

def test_what_was_printed_can_be_read_at_once(tmp_path):
    log = Log(tmp_path / 'log')
    for n in range(200):
        before = log.end()
        os.write(log.writer, f'prompt {n}\n'.encode())
        assert log.since(before) == f'prompt {n}\n'
    log.follow()
    assert log.end() == sum(len(f'prompt {n}\n') for n in range(200))

def test_the_log_of_the_next_start_goes_on(tmp_path):
    BoundedFile(tmp_path / 'log', 100).write(b'x' * 80)
    kept = BoundedFile(tmp_path / 'log', 100)
    assert kept.end() == 80
    kept.write(b'y' * 30)
    assert (tmp_path / 'log').read_text() == 'y' * 30
    assert kept.since(75) == 'x' * 5 + 'y' * 30
    assert kept.end() == 110

def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(tmp_path):
    kept = BoundedFile(tmp_path / 'log')
    file, kept.file = kept.file, os.open('/dev/full', os.O_WRONLY)
    kept.write(b'lost')
    os.close(kept.file)
    kept.file = file
    kept.write(b'kept')
    assert kept.since(0) == 'kept'

def test_a_link_in_place_of_the_log_is_not_followed(tmp_path):
    (tmp_path / 'log').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(OSError): BoundedFile(tmp_path / 'log')

# a full disk

@pytest.mark.parametrize('writer', ['python', 'numpy', 'numpy archive', 'torch', 'pillow', 'pyav'])
def test_a_node_that_meets_a_full_disk_ends_the_worker(running, writer):
    graph = {'full': {'class_type': 'FullDisk', 'inputs': {'writer': writer}}}
    with pytest.raises(JobError, match='storage_failed: the disk of this worker is full: node "full"') as e:
        running.do(run(running.comfy, graph))
    assert e.value.answer()['refresh_worker'] is True

RAISED = [
    ('OSError', '[Errno 28] No space left on device: a.u8', True),
    ('builtins.OSError', '3600 requested and 512 written', True),
    ('OSError', '[Errno 122] Disk quota exceeded', True),
    ('av.error.OSError', "[Errno 28] No space left on device: 'a.mp4'", True),
    ('RuntimeError', '[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598', True),
    ('RuntimeError', 'PytorchStreamWriter failed writing file data/0: file write failed', True),
    ('RuntimeError', 'write(): fd 3 failed with No space left on device', True),
    ('SafetensorError', 'Error while serializing: I/O error: No space left on device (os error 28)', True),
    ('wan_avatar.job.JobError', 'input_unreadable: no video: [Errno 28] No space left on device', True),
    ('wan_avatar.job.JobError', 'input_unreadable: no video', False),
    ('OSError', '[Errno 2] No such file or directory', False),
    ('OSError', '[Errno 280] no', False),
    ('RuntimeError', 'unexpected pos 3 of tensor', False)]

@pytest.mark.parametrize('kind, message, full', RAISED, ids=[r[1][:40] for r in RAISED])
def test_what_a_full_disk_says(kind, message, full):
    node = {'node_id': '7', 'node_type': 'AvatarFrames'}
    error = node_error(node | {'exception_type': kind, 'exception_message': message})
    assert (error.code == 'storage_failed') is full
    assert error.worker_unfit is full

# a newer ComfyUI

COLLECTED = [ # COMFY_TREE; exit status; files that are collected; words
    (None, 0, {'test_store', 'test_wan', 'test_endpoint'}, 'newer ComfyUI: not run'),
    ('.comfy/ComfyUI', 0, {'test_wan', 'test_endpoint'}, 'newer ComfyUI: this run was on .comfy/ComfyUI'),
    ('.comfy', 4, set(), 'ERROR: COMFY_TREE=.comfy is not a ComfyUI: no main.py in it')]

@pytest.mark.parametrize('tree, code, files, words', COLLECTED)
def test_what_runs_on_a_tree(tree, code, files, words):
    env = {k: v for k, v in os.environ.items() if k != 'COMFY_TREE'} | ({'COMFY_TREE': tree} if tree else {})
    few = '--ignore-glob=*/test_[!sew]*.py' # all of them would take ten seconds to collect
    command = [sys.executable, '-m', 'pytest', '--collect-only', few]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    found = {line.split('.py')[0].split('/')[-1] for line in said.splitlines() if '.py::' in line}
    assert done.returncode == code
    assert words in said
    assert found >= files if tree is None else found == files
