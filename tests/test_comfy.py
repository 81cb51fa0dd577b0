"""ComfyUI as our child: how it is started, what it is told, what it says back"""
import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import ROOT, comfy_dir

from wan_avatar.comfy import Comfy, ComfyProcess, run
from wan_avatar.config import SettingsError, load_settings
from wan_avatar.launch import ComfyPlace, launch, place_of
from wan_avatar.memory import Memory, find_memory, held, pinned_at_most, told

PICTURE = {'a': {'class_type': 'EmptyImage', 'inputs': {'width': 64, 'height': 64, 'batch_size': 1, 'color': 255}},
           'b': {'class_type': 'PreviewImage', 'inputs': {'images': ['a', 0]}}}

# how much memory there is

GB = 10**9
MACHINE = {'proc/meminfo': 'MemTotal: 62500000 kB\n'}
V2, V1 = 'sys/fs/cgroup', 'sys/fs/cgroup/memory'

def in_group(*lines: str) -> dict[str, str]: return {'proc/self/cgroup': '\n'.join(lines) + '\n'}

TREES = {
    'v2, own limit': (in_group('0::/a/b'), {f'{V2}/a/b/memory.max': '24000000000\n'}, (24 * GB, f'{V2}/a/b', 2)),
    'v2, of the group around it': (in_group('0::/a/b'), {f'{V2}/a/memory.max': '8000000000', f'{V2}/a/b/memory.max': '24000000000'}, (8 * GB, f'{V2}/a', 2)),
    'v2, max inside, limit outside': (in_group('0::/a/b'), {f'{V2}/a/memory.max': '8000000000', f'{V2}/a/b/memory.max': 'max'}, (8 * GB, f'{V2}/a', 2)),
    'v2, the root is the container': (in_group('0::/'), {f'{V2}/memory.max': '16000000000'}, (16 * GB, V2, 2)),
    'v2, a path that is not seen': (in_group('0::/docker/c0ffee'), {f'{V2}/memory.max': '16000000000'}, (16 * GB, V2, 2)),
    'v2, a group beside the root': (in_group('0::/../other'), {f'{V2}/memory.max': '16000000000', f'{V2}/other/memory.max': '1'}, (16 * GB, V2, 2)),
    'v2, max': (in_group('0::/a'), {f'{V2}/a/memory.max': 'max'}, None),
    'v2, as much as the machine': (in_group('0::/a'), {f'{V2}/a/memory.max': str(62500000 * 1024)}, None),
    'v1, own limit': (in_group('5:cpu:/x', '4:memory:/a/b'), {f'{V1}/a/b/memory.limit_in_bytes': '4000000000'}, (4 * GB, f'{V1}/a/b', 1)),
    'v1, with other controllers': (in_group('4:hugetlb,memory:/a'), {f'{V1}/a/memory.limit_in_bytes': '4000000000'}, (4 * GB, f'{V1}/a', 1)),
    'v1, no limit': (in_group('4:memory:/a'), {f'{V1}/a/memory.limit_in_bytes': '9223372036854771712'}, None),
    'v1, of another group': (in_group('4:memory:/a'), {f'{V1}/b/memory.limit_in_bytes': '4000000000'}, None),
    'both, memory in v1': (in_group('4:memory:/a', '0::/a'), {f'{V1}/a/memory.limit_in_bytes': '4000000000', f'{V2}/unified/a/x': ''}, (4 * GB, f'{V1}/a', 1)),
    'no such file': (in_group('0::/a'), {}, None), 'no groups at all': ({}, {f'{V2}/memory.max': '1'}, None)}

@pytest.mark.parametrize('groups, files, expected', TREES.values(), ids=TREES)
def test_least_limit_is_found(tmp_path, groups, files, expected):
    for name, text in (MACHINE | groups | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = (expected[0], str(tmp_path / expected[1]), expected[2]) if expected else ()
    assert find_memory(tmp_path) == Memory(62500000 * 1024, *limit)

STATS = [(2, {'memory.current': '9', 'memory.stat': 'anon 2\nactive_file 3\ninactive_file 2\nunevictable 1'}, 4), (2, {'memory.current': '9'}, 9), (2, {}, 0),
         (1, {'memory.usage_in_bytes': '9', 'memory.stat': 'active_file 1\ntotal_active_file 3\ntotal_inactive_file 4'}, 2)]

@pytest.mark.parametrize('version, files, expected', STATS)
def test_cached_files_are_not_held(tmp_path, version, files, expected):
    for name, text in files.items(): (tmp_path / name).write_text(text + '\n')
    assert held(Memory(100, 50, str(tmp_path), version)) == expected

def test_this_machine_says_how_much_there_is():
    found = find_memory()
    pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') # some containers show their own number in one of the two
    assert found.machine == pytest.approx(pages, rel=0.5) and (found.allowed or 1) < found.machine

# how it is started

ENVIRONMENTS = [{}, {'COMFY_DIR': '/c', 'WORK_DIR': '/w', 'MODELS_DIR': '/m'}, {'COMFY_DIR': '', 'WORK_DIR': 'here/../there', 'MODELS_DIR': '~/m'},
                *({'USE_SAGE_ATTENTION': said} for said in ('', '1', '0', 'true', 'TRUE', 'Yes', 'y', 't', 'on', 'off', 'no', 'f', 'false'))]

@pytest.mark.parametrize('said', ENVIRONMENTS, ids=str)
def test_both_readers_of_the_environment_agree(said):
    settings = load_settings({'MINIO_ENDPOINT': 'h', 'MINIO_ACCESS_KEY': 'a', 'MINIO_SECRET_KEY': 's', 'MINIO_BUCKET': 'b'} | said)
    place = ComfyPlace(settings.comfy_dir.resolve(), settings.work_dir.resolve(), settings.models_dir.resolve())
    assert place_of(said) == (place, settings.use_sage_attention)

def test_what_is_neither_true_nor_false_is_refused_by_the_settings():
    assert place_of({'USE_SAGE_ATTENTION': 'perhaps'})[1] is False
    with pytest.raises(SettingsError, match='USE_SAGE_ATTENTION'): load_settings({'USE_SAGE_ATTENTION': 'perhaps'})

def test_starting_it_imports_nothing_but_the_standard_library():
    code = 'import sys; before = set(sys.modules); import wan_avatar.launch; print(*{m.split(".")[0] for m in set(sys.modules) - before})'
    said = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert 'wan_avatar' in said and {m for m in said if m not in sys.stdlib_module_names} == {'wan_avatar'}

# in the real process

@pytest.fixture(scope='module')
def told_of_5_gb(tmp_path_factory) -> dict:
    "A ComfyUI that was started early in a group with a limit, taken over, and what it says after a prompt"
    folder = tmp_path_factory.mktemp('limited')
    for name, text in {'memory.current': '3000000000', 'memory.stat': 'inactive_file 1000000000'}.items(): (folder / name).write_text(text)
    early = launch(ComfyPlace(comfy_dir(), folder / 'work', folder / 'models'), memory=Memory(64 * GB, 5 * GB, str(folder)))
    async def drive() -> dict:
        comfy = Comfy(ComfyProcess(early.place, launched=early))
        try:
            await comfy.start()
            await run(comfy, PICTURE)
            return {'pid': comfy.process.child.pid, 'early': early.process.pid, 'history': await comfy._get('/history'),
                    'system': (await comfy._get('/system_stats'))['system'], 'log': early.place.log_path.read_text()}
        finally: await comfy.close()
    return asyncio.run(drive())

def test_one_that_was_started_early_is_taken_over(told_of_5_gb):
    assert told_of_5_gb['pid'] == told_of_5_gb['early']

def test_prompt_ids_are_uuids_with_hyphens(told_of_5_gb):
    "Newer ComfyUIs refuse every other form"
    ids = list(told_of_5_gb['history'])
    assert len(ids) == 1 and str(uuid.UUID(ids[0])) == ids[0]

def test_it_knows_the_containers_memory(told_of_5_gb):
    system = told_of_5_gb['system']
    assert system['ram_total'] == 5 * GB and 0 < system['ram_free'] <= 3 * GB, 'the container has 3 GB left, the machine perhaps less'
    assert 'memory: 64.0 GB of the machine, 5.0 GB allowed by cgroup v2' in told_of_5_gb['log'] and 'ComfyUI pins nothing' in told_of_5_gb['log'], 'no GPU here'

IN_COMFYUI = """
import os, sys, json, psutil, torch
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
from comfy import model_management as m
from wan_avatar.memory import contain
m.MAX_PINNED_MEMORY = 0.95 * m.get_total_memory(torch.device('cpu')) # as on a GPU
contain(os.environ)
print(json.dumps([m.MAX_PINNED_MEMORY, m.get_total_memory(torch.device('cpu')), m.get_free_memory(torch.device('cpu')), psutil.virtual_memory().available]))
"""

@pytest.mark.parametrize('limited', [True, False])
def test_what_may_be_pinned_and_cached_is_of_the_container(tmp_path: Path, limited):
    memory = Memory(64 * GB, 2 * GB, str(tmp_path)) if limited else Memory(64 * GB)
    argv = [comfy_dir() / 'env/bin/python', '-B', '-c', IN_COMFYUI, comfy_dir() / 'ComfyUI']
    done = subprocess.run(argv, env=os.environ | told(memory), check=True, capture_output=True, text=True, timeout=120)
    pinned, total, free, available = json.loads(done.stdout.splitlines()[-1])
    if limited: assert (pinned, total) == (pinned_at_most(memory), 2 * GB) and 0 < free <= 2 * GB and 0 < available <= 2 * GB
    else: assert total == find_memory().machine and pinned == pytest.approx(0.95 * total)

# a newer ComfyUI

COLLECTED = [(None, 0, {'test_store', 'test_wan', 'test_endpoint'}, 'newer ComfyUI: not run'),
             ('.comfy/ComfyUI', 0, {'test_wan', 'test_endpoint'}, 'newer ComfyUI: this run was on .comfy/ComfyUI'),
             ('.comfy', 4, set(), 'ERROR: COMFY_TREE=.comfy is not a ComfyUI: no main.py in it')]

@pytest.mark.parametrize('tree, code, files, words', COLLECTED)
def test_what_runs_on_a_tree(tree, code, files, words):
    env = {k: v for k, v in os.environ.items() if k != 'COMFY_TREE'} | ({'COMFY_TREE': tree} if tree else {})
    done = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only'], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    found = {line.split('.py')[0].split('/')[-1] for line in said.splitlines() if '.py::' in line}
    assert done.returncode == code and words in said
    assert found >= files if tree is None else found == files
