"""The image without a Docker engine: the Dockerfile is run here line by line, and the worker it makes does the jobs of
the guide, whose every command is run"""
import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, cut
from control_plane import control_plane
from docker.utils.build import exclude_paths
from test_endpoint_file import STUB
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.image import (
    Commit,
    build_arguments,
    lock_of,
    read_metadata,
    requirement_inputs,
    requirement_name,
    requirements_file,
    stale_requirements,
)
from wan_avatar.local import up
from wan_avatar.mp4 import check_mp4

BASE = 'runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404'

def instructions() -> list[tuple[str, str]]:
    "The Dockerfile as (instruction, rest), in order"
    text = re.sub(r'^\s*#.*\n', '', (ROOT / 'Dockerfile').read_text(), flags=re.M)
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r'\\\n', ' ', text).splitlines() if line.strip()]

def context() -> set[str]:
    "What Docker would be sent, as Docker's own Python client reads .dockerignore"
    patterns = [line for line in (ROOT / '.dockerignore').read_text().splitlines() if line and not line.startswith('#')]
    return {p for p in exclude_paths(str(ROOT), patterns) if (ROOT / p).is_file()} - {'Dockerfile', '.dockerignore'}

def pinned(name: str) -> dict[str, str]:
    "Packages of a requirements file"
    return dict(re.findall(r'^([\w.-]+)==(\S+) \\$', requirements_file(ROOT, name).read_text(), re.M))

def test_hadolint_passes():
    done = subprocess.run(
        [ROOT / '.venv/bin/hadolint', ROOT / 'Dockerfile'], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr

def test_lock_and_dockerfile_agree():
    said = instructions()
    arguments = [rest for what, rest in said if what == 'ARG']
    given = build_arguments(lock_of(ROOT), Commit('0' * 40, '20260101'), '1')
    assert set(arguments) == set(given), 'an argument has a default, or nobody gives it'
    assert [rest.split(' AS ')[0] for what, rest in said if what == 'FROM'] == [BASE, BASE]
    dockerfile = (ROOT / 'Dockerfile').read_text()
    assert not re.search(
        r'[0-9a-f]{40}|:latest|:main|git clone|huggingface-cli|hf download|\.safetensors|SECRET|TOKEN|PASSWORD',
        dockerfile
    )
    last = {what: rest for what, rest in said}
    assert int(last['USER']) > 0
    assert json.loads(last['CMD']) == ['python', '-m', 'wan_avatar.worker']
    assert json.loads(last['ENTRYPOINT'])[0].endswith('/tini')

def test_lock_and_requirements_agree():
    assert stale_requirements(ROOT) == []
    metadata, (worker, comfy) = read_metadata(ROOT), (pinned('worker'), pinned('comfy'))
    for name, there in (('worker', worker), ('comfy', comfy)):
        text = requirements_file(ROOT, name).read_text()
        assert '://' not in text
        assert len(re.findall(r'^\S+==', text, re.M)) == len(there), 'a package without a hash, or with an address'
        for asked in requirement_inputs(metadata)[name].wanted:
            package, _, version = asked.partition('==')
            assert requirement_name(package) in there, asked
            assert not version or there[requirement_name(package)] == version, asked
    asked = dict(re.findall(r'^(comfyui-[\w-]+)==(\S+)', (ROOT / '.comfy/ComfyUI/requirements.txt').read_text(), re.M))
    assert len(asked) == 3
    assert asked.items() <= comfy.items(), 'not the packages that the locked commit asks for'
    torch = metadata['image_given'].split()[0].partition('==')[2]
    cuda = int(BASE.partition('cu')[2][:2])
    assert f'torch{torch.replace(".", "")}-' in BASE
    assert cuda == 12
    assert not {'torch', 'torchvision', 'torchaudio', 'triton', *metadata['image_without'].split()} & set(comfy)
    assert not [p for p in comfy if p.startswith('nvidia-')]
    assert 'torch' not in worker
    assert int(comfy['protobuf'].partition('.')[0]) < 5 <= int(worker['protobuf'].partition('.')[0])

# %% ComfyUI's code has a hash
def test_what_is_tested_is_what_the_lock_names():
    "ComfyUI here, from a package, has the code of the commit that the image is built from"
    lock = lock_of(ROOT).comfyui
    version = (ROOT / '.comfy/ComfyUI/comfyui_version.py').read_text()
    assert install.code_hash(ROOT / '.comfy/ComfyUI') == lock['code_sha256']
    assert f'"{lock["version"]}"' in version
    assert re.fullmatch('[0-9a-f]{40}', lock['commit'])

CODE = {
    'main.py': b'import a\n',
    'comfy/a.py': b'x = 1\n',
    'comfy/tests/b.py': b'',
    'comfy/config.json': b'{}\n',
    'comfyui_version.py': b'__version__ = "0.1"\n',
    'requirements.txt': b'torch\n',
    'pyproject.toml': b'[tool]\n',
}

def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder

SAME = {
    '.git and .github': {'.git/hooks/a.py': b'1', '.github/scripts/a.py': b'1', '.github/a.json': b'1'},
    'other dot folders': {'.ci/README.txt': b'1', '.vscode/b.json': b'1'},
    'tests': {'tests/a.py': b'1', 'tests-unit/requirements.txt': b'1', 'tests-unit/comfy/a.py': b'1'},
    'what Python left': {'__pycache__/a.py': b'1', 'comfy/__pycache__/a.pyc': b'1'},
    'our own notes': {'source.json': b'{}', '.ready': b'1', 'install.log': b'1', 'extra_model_paths.yaml': b'1'},
    'places for files': {'models/loras/put_loras_here': b'', 'input/example.png': b'1'},
    'lines as on Windows': {name: data.replace(b'\n', b'\r\n') for name, data in CODE.items()},
}
OTHER = {
    'a line more': {'comfy/a.py': b'x = 1\ny = 2\n'},
    'a line changed': {'main.py': b'import b\n'},
    'a file more': {'comfy/c.py': b''},
    'a file less': {'comfy/config.json': None},
    'a file renamed': {'comfy/a.py': None, 'comfy/z.py': b'x = 1\n'},
    'other packages': {'requirements.txt': b'torch==1\n'},
    'a setting': {'pyproject.toml': b'[tools]\n'},
    'tests of a part': {'comfy/tests/b.py': b'1'},
    'a note of another': {'comfy/source.json': b'{}'},
    'contents swapped': {'main.py': CODE['comfy/a.py'], 'comfy/a.py': CODE['main.py']},
}

@pytest.mark.parametrize('name', [*SAME, *OTHER])
def test_the_hash_is_of_comfyuis_code_alone(tmp_path, name):
    pinned = install.code_hash(write_tree(tmp_path / 'pinned', CODE))
    files = CODE | (SAME | OTHER)[name]
    changed = write_tree(tmp_path / 'changed', {k: v for k, v in files.items() if v is not None})
    found = install.code_hash(changed)
    assert (found == pinned) == (name in SAME)
    if name in SAME: install.settle(changed, 'here', pinned)
    else:
        words = f'^here holds ComfyUI 0.1 whose code has the hash {found}; the lock says {pinned}$'
        with pytest.raises(ValueError, match=words): install.settle(changed, 'here', pinned)
    assert (changed / 'source.json').exists() == (name in SAME), 'a note of where it is from, or no sign of it'
    assert not (changed / 'extra_model_paths.yaml').exists()

def test_the_hash_is_the_same_on_every_machine(tmp_path):
    "However its file system sorts: capitals before small letters, and a folder among the files beside it"
    files = {'b.py': b'2', 'B.py': b'1', 'a/c.py': b'4\r\n', 'a.py': b'3'}
    contents = {'B.py': b'1', 'a.py': b'3', 'a/c.py': b'4\n', 'b.py': b'2'}
    lines = [f'{name} {hashlib.sha256(data).hexdigest()}\n' for name, data in contents.items()]
    for order in (list(files), list(files)[::-1]):
        made = write_tree(tmp_path / order[0][0], {n: files[n] for n in order})
        assert install.code_hash(made) == hashlib.sha256(''.join(lines).encode()).hexdigest()

@pytest.mark.parametrize('autocrlf', ['false', 'true'])
def test_a_clone_has_the_hash_of_the_package(tmp_path, autocrlf):
    "Real git, with what only a clone has, and with the line ends it makes on Windows"
    copy_comfyui(tmp_path / 'origin')
    write_tree(tmp_path / 'origin', {'.github/scripts/check.py': b'1\n', '.ci/README.txt': b'1\n'})
    repository(tmp_path / 'origin')
    clone = ['git', '-c', f'core.autocrlf={autocrlf}', 'clone', '-q', tmp_path / 'origin', tmp_path / 'clone']
    subprocess.run(clone, check=True, timeout=120)
    assert (b'\r\n' in (tmp_path / 'clone/main.py').read_bytes()) == (autocrlf == 'true')
    install.settle(tmp_path / 'clone', 'a clone', lock_of(ROOT).comfyui['code_sha256'])

def test_context_is_small_and_has_what_is_copied():
    there = context()
    assert sum((ROOT / p).stat().st_size for p in there) < 3e6, sorted(there)
    assert not [
        p
        for p in there
        if p.startswith(('.git', '.venv', '.comfy', 'runs', 'tests', 'nbs/images')) or p.endswith(('.ipynb', '.pyc'))
    ]
    for what, rest in instructions():
        if what == 'COPY' and not rest.startswith('--from'):
            for source in rest.split()[:-1]:
                assert any(p == source or p.startswith(f'{source}/') for p in there), source

# %% the image's tree, made by the Dockerfile's own lines
class Tree:
    "A folder in place of / and what the Dockerfile does to it"
    def __init__(self, root: Path, context: Path, arguments: dict[str, str], env: dict[str, str]):
        self.root = root
        self.context = context
        self.arguments = arguments
        self.env = env
        self.folder = root
        self.skipped = []

    def here(self, text: str) -> str:
        "Absolute paths of the image, under our root"
        return re.sub(r'(?<![\w.$])/(opt|src|wheel|var/lib/wan-avatar)\b', rf'{self.root}/\1', text)

    def do(self, what: str, rest: str) -> None:
        if what in ('ENV', 'ARG'):
            pairs = dict(p.split('=', 1) for p in rest.split()) if what == 'ENV' else {rest: self.arguments[rest]}
            known = {'$PATH': self.env['PATH'], '$GIT_SHA': self.arguments['GIT_SHA']}
            for k, v in pairs.items():
                value = self.here(v)
                for name, text in known.items(): value = value.replace(name, text)
                self.env[k] = os.path.expandvars(value)
        elif what == 'WORKDIR':
            self.folder = Path(self.here(rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif what == 'COPY': self.copy(rest.split())
        elif what == 'RUN' and rest.startswith('apt-get'): self.skipped.append(rest)
        elif what == 'RUN': self.run(rest)

    def copy(self, words: list[str]) -> None:
        stage = words.pop(0) if words[0].startswith('--from') else None
        *sources, target = words
        for source in sources:
            origin = Path(self.here(source)) if stage else self.context / source
            to = Path(self.here(target)) if target.startswith('/') else self.folder / target
            assert origin.exists(), f'{source} is not there to be copied'
            if origin == to: continue # both stages have the same root here
            if origin.is_dir(): shutil.copytree(origin, to, dirs_exist_ok=True)
            elif target.endswith('/'): shutil.copy(origin, (to.mkdir(parents=True, exist_ok=True), to)[1])
            else: shutil.copy(origin, to)

    def run(self, command: str) -> None:
        done = subprocess.run(
            ['sh', '-ec', self.here(command)], cwd=self.folder, env=self.env, capture_output=True, text=True,
            timeout=300
        )
        assert done.returncode == 0, f'RUN {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}'

def load_tool(name: str):
    "A file of nbs/tools as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT / f'nbs/tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

install = load_tool('install')

def make_wheel(folder: Path, name: str, version: str) -> str:
    "A package of one empty module; its line in a requirements file"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{name}-{version}-py3-none-any.whl'
    files = {
        f'{name}.py': '',
        f'{name}-{version}.dist-info/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n',
        f'{name}-{version}.dist-info/WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    }
    record = ''.join(
        f'{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).decode().rstrip("=")},{len(t)}\n'
        for n, t in files.items()
    )
    with zipfile.ZipFile(path, 'w') as z:
        for n, t in {**files, f'{name}-{version}.dist-info/RECORD': record}.items(): z.writestr(n, t)
    return f'{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n'

def repository(folder: Path) -> str:
    "Put a folder under git; its commit"
    git = ['git', '-C', str(folder), '-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'core.autocrlf=false']
    for args in (['init', '-q'], ['add', '-A', '-f'], ['commit', '-q', '-m', 'all']):
        subprocess.run([*git, *args], check=True, timeout=120)
    return subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()

def copy_comfyui(folder: Path) -> None:
    "ComfyUI's source as git has it, as far as this checkout has it"
    ours = shutil.ignore_patterns('__pycache__', '.ready', 'source.json', 'install.log')
    shutil.copytree(ROOT / '.comfy/ComfyUI', folder, ignore=ours)

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """The image's tree: real ComfyUI and a custom node from local repositories, real environments from hashed
    requirements (a tiny package in place of the 200; those are linked in afterwards from the environments of this
    checkout), the real wheel"""
    base = tmp_path_factory.mktemp('image')
    copy_comfyui(base / 'ComfyUI')
    (base / 'ComfyUI/requirements.txt').write_text('tinydep>=1\n')
    (base / 'Sage').mkdir()
    (base / 'Sage/__init__.py').write_text(
        'NODE_CLASS_MAPPINGS = {"SageNode": type("SageNode", (), {"INPUT_TYPES": classmethod(lambda c: {"required": '
        '{}}), "RETURN_TYPES": (), "FUNCTION": "f", "CATEGORY": "x"})}\n',
    )
    for name in context():
        (base / 'context' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, base / 'context' / name)
    line = make_wheel(base / 'wheels', 'tinydep', '1.0')
    for name in ('worker', 'comfy'): requirements_file(base / 'context', name).write_text(line)
    comfyui = {'repo': f'file://{base}/ComfyUI', 'commit': repository(base / 'ComfyUI'),
               'code_sha256': install.code_hash(base / 'ComfyUI')} # of other requirements
    sage = {'repo': f'file://{base}/Sage', 'commit': repository(base / 'Sage')}
    lock = lock_of(ROOT)
    lock = replace(lock, comfyui={**lock.comfyui, **comfyui}, custom_nodes=(sage,))
    (base / 'bin').mkdir()
    (base / 'bin/python3.12').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n') # the image's Python is this one
    (base / 'bin/python3.12').chmod(0o755)
    env = {
        'PATH': f'{base}/bin:{os.environ["PATH"]}',
        'HOME': str(base),
        'PIP_NO_INDEX': '1',
        'PIP_FIND_LINKS': str(base / 'wheels'),
        'PIP_CONFIG_FILE': os.devnull,
    }
    made = Tree(base / 'root', base / 'context', build_arguments(lock, Commit('5' * 40, '20261124'), '0.1.0'), env)
    made.root.mkdir()
    for what, rest in instructions():
        if rest.startswith('python3.12 nbs/tools/install.py wheel'):
            link(made.root / 'opt/worker', ROOT / '.venv') # setuptools is one of the 200
        made.do(what, rest)
    link(made.root / 'opt/comfy/env', ROOT / '.comfy/env')
    return made

def link(env: Path, other: Path) -> None:
    "Let an environment see the packages of another, behind its own"
    site = f'lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages'
    (env / site / 'others.pth').write_text(f'{(other / site).resolve()}\n')

def test_what_the_dockerfile_runs_makes_the_layout(tree):
    assert len(tree.skipped) == 1
    assert 'tini' in tree.skipped[0], 'only Ubuntu packages are not installed here'
    comfy = tree.root / 'opt/comfy'
    assert {p.name for p in comfy.iterdir()} == {'ComfyUI', 'env', 'custom_nodes'}
    assert not list(comfy.rglob('.git'))
    assert not (comfy / 'ComfyUI/extra_model_paths.yaml').exists()
    assert list((comfy / 'ComfyUI').rglob('server.*.pyc'))
    assert tree.env['WAN_AVATAR_GIT_SHA'] == '5' * 40
    assert tree.env['PATH'].startswith(f'{tree.root}/opt/worker/bin:')
    for python in (tree.root / 'opt/worker/bin/python', comfy / 'env/bin/python'):
        where = subprocess.run(
            [python, '-c', 'import wan_avatar, tinydep; print(wan_avatar.__file__)'], env=tree.env, cwd='/', check=True,
            capture_output=True, text=True
        ).stdout
        assert where.startswith(str(python.parents[1])), 'the wheel is not what is imported'

def test_the_wheel_carries_what_the_image_runs_and_nothing_else(tree):
    (wheel,) = (tree.root / 'wheel').glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in install.shipped(ROOT / 'wan_avatar')}
    assert {n for n in names if '.dist-info/' not in n} == ours
    assert {'wan_avatar/worker.py', 'wan_avatar/nodes.py', 'wan_avatar/models.lock.json'} <= names
    assert {f'wan_avatar/workflows/{p.name}' for p in (ROOT / 'wan_avatar/workflows').iterdir()} <= names
    assert wheel.stat().st_size < 1e6
    commands = {p.name for p in (tree.root / 'opt/worker/bin').iterdir()}
    assert 'wan-avatar' not in commands, 'a command without its module'

@pytest.mark.parametrize('environment', ['worker', 'comfy/env'])
def test_what_the_image_carries_is_imported_from_it_alone(tree, environment):
    "The worker's modules in its environment, the nodes in ComfyUI's, and no bench, hub or command line in either"
    python = tree.root / f'opt/{environment}/bin/python'
    (found,) = python.parents[1].glob('lib/*/site-packages/wan_avatar')
    there = {p.stem for p in found.glob('*.py')}
    assert there == {p.stem for p in install.shipped(ROOT / 'wan_avatar') if p.suffix == '.py'}
    absent = {p.stem for p in (ROOT / 'wan_avatar').glob('*.py')} - there
    assert {'hub', 'tiny', 'bench', 'cli'} <= absent
    wanted = there if environment == 'worker' else {'nodes'}
    code = f"""if True:
        import importlib.util, sys
        for name in {sorted(wanted)}: importlib.import_module(f'wan_avatar.{{name}}')
        assert not [name for name in {sorted(absent)} if importlib.util.find_spec(f'wan_avatar.{{name}}')]
        ours = [m.__file__ for name, m in sys.modules.items() if name.startswith('wan_avatar')]
        assert all(f.startswith({str(found)!r}) for f in ours), ours"""
    subprocess.run([python, '-c', code], env=tree.env, cwd='/', check=True, timeout=60)

MODULES = { # text of `worker.py`, whether `other.py` and `data.json` ship
    'a name in the package': ('from wan_avatar.other import a', True, False),
    'a neighbour': ('from .other import a', True, False),
    'the package': ('from wan_avatar import other', True, False),
    'here': ('from . import other', True, False),
    'a module': ('import wan_avatar.other as o', True, False),
    'in a function': ('def f():\n    from .other import a', True, False),
    'by name': ('argv = ["-m", "wan_avatar.other"]', True, False),
    'in code for another process': ('CODE = "import sys\\nfrom wan_avatar.other import a"', True, False),
    'in prose': ('"""`python -m wan_avatar.other` reads data.json"""', False, False),
    'in the prose of a function': ('def f():\n    "wan_avatar.other reads data.json"', False, False),
    "another's": ('import other\nfrom json import other\nimport json.other', False, False),
    'a file': ('PATH = FOLDER / "data.json"', False, True),
    'through another': ('from .between import a', True, True),
}

@pytest.mark.parametrize('text, module, data', MODULES.values(), ids=MODULES)
def test_what_ships_follows_from_the_imports(tmp_path, text, module, data):
    files = {'__init__': '', 'worker': text, 'nodes': '', 'doctor': '', 'plane': '', 'other': 'import json',
             'bench': 'from .worker import f', 'between': 'from .other import a\nNAME = "data.json"'}
    write_tree(tmp_path / 'wan_avatar', {f'{name}.py': text.encode() for name, text in files.items()})
    write_tree(tmp_path / 'wan_avatar', {'data.json': b'{}', 'py.typed': b''})
    wanted = {'__init__.py', 'worker.py', 'nodes.py', 'doctor.py', 'plane.py'}
    if module: wanted.add('other.py')
    if data: wanted.add('data.json')
    assert {p.name for p in install.shipped(tmp_path / 'wan_avatar')} - {'between.py'} == wanted

def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        str(p): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }

def test_the_images_worker_says_what_it_lacks(tree):
    done = subprocess.run(
        [tree.root / 'opt/worker/bin/python', '-m', 'wan_avatar.worker'], env=tree.env, cwd='/', capture_output=True,
        text=True, timeout=60
    )
    assert done.returncode == 1
    assert 'MINIO_ENDPOINT: not set' in done.stderr
    assert 'Traceback' not in done.stderr

@pytest.mark.parametrize('args, words', [
    (['comfyui', '', '0' * 40, 'CODE', 'F'], 'no repository given'),
    (['comfyui', 'file:///nowhere', '', 'CODE', 'F'], "commit '' of"),
    (['comfyui', 'file:///nowhere', 'main', 'CODE', 'F'], 'not 40 hexadecimal digits'),
    (['comfyui', 'file://REPO', '0' * 40, 'CODE', 'F'], 'exit status 128'),
    (['comfyui', 'file://REPO', 'SHA', 'f00d', 'F'], 'ComfyUI 0.1 whose code has the hash CODE; the lock says f00d'),
    (['nodes', '', 'F'], 'when there are none, say none'),
    (['environment', 'F', 'BADHASH'], 'DO NOT MATCH THE HASHES'),
    (['environment', 'F', 'NOHASH'], 'Hashes are required'),
    (['environment', 'F', 'GOOD', 'MORE'], 'torch-of-the-base'),
    (['package', 'REPO'], '0 wheels'),
])
def test_a_build_that_can_not_be_right_fails(args, words, tmp_path):
    (repo := tmp_path / 'repo').mkdir()
    (repo / 'comfyui_version.py').write_text('__version__ = "0.1"\n')
    sha = repository(repo)
    code = install.code_hash(repo)
    line = make_wheel(tmp_path / 'wheels', 'tinydep', '1.0')
    texts = {
        'GOOD': line,
        'BADHASH': line[:-5] + 'beef\n',
        'NOHASH': 'tinydep==1.0\n',
        'MORE': 'torch-of-the-base>=2\n',
    }
    for name, text in texts.items(): (tmp_path / name).write_text(text)
    files = ('GOOD', 'BADHASH', 'NOHASH', 'MORE', 'F')
    filled = [a.replace('REPO', str(repo)).replace('SHA', sha).replace('CODE', code) for a in args]
    given = [str(tmp_path / a) if a in files else a for a in filled]
    env = os.environ | {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(tmp_path / 'wheels'), 'PIP_CONFIG_FILE': os.devnull}
    done = subprocess.run(
        [sys.executable, ROOT / 'nbs/tools/install.py', *given], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert words.replace('CODE', code) in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr

# %% the guide, with the worker of the tree above
def blocks() -> list[str]:
    cells = json.loads((ROOT / 'nbs/guide_deploy.ipynb').read_text())['cells']
    return [
        b
        for c in cells if c['cell_type'] == 'markdown'
        for b in re.findall(r'^```sh\n(.*?)^```', ''.join(c['source']), re.M | re.S)
    ]

@pytest.fixture
def checkout(tmp_path, samples):
    "A committed copy of this repository's sources, and the stand-in for docker"
    root = tmp_path / 'checkout'
    for name in ('endpoint.toml', 'settings.ini', 'Dockerfile', '.gitignore', 'wan_avatar', 'nbs/tools'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy(ROOT / name, root / name)
    text = (ROOT / 'endpoint.toml').read_text().replace('job_ttl_s = 3600', 'job_ttl_s = 1900')
    text = text.replace('execution_timeout_s = 1200', 'execution_timeout_s = 1300')
    (root / 'endpoint.toml').write_text(text)
    author = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    for args in (['init', '-q'], ['add', '.'], [*author, 'commit', '-q', '-m', 'all']):
        subprocess.run(['git', '-C', str(root), *args], check=True)
    (root / 'runs/samples').mkdir(parents=True)
    (root / 'runs/samples/astronaut.png').symlink_to(samples / 'astronaut.png')
    # half a second, to be done sooner
    cut(samples / 'single_face.mp4', 12, tmp_path).rename(root / 'runs/samples/single_face.mp4')
    (root / '.venv').symlink_to(ROOT / '.venv')
    (root / '.git/info/exclude').write_text('.venv\n') # a folder in real life
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/docker').write_text(STUB)
    (tmp_path / 'bin/docker').chmod(0o755)
    return root

def test_every_command_of_the_guide(tree, checkout, tmp_path):
    """In its order and in one shell, as it stands there. Stand-ins: RunPod's control plane, and an executable called
    docker that only writes down how it was called. Real: the shell, git, `wan-avatar`, the local endpoint under the id
    that `apply` printed, and the image's worker with its ComfyUI, which writes nothing where the image's user may not
    write"""
    script = (
        'set -eu\n'
        + ''.join(f'echo "## block {n}" >&2\n{b}' for n, b in enumerate(blocks()))
        + 'echo "$TAG $ENDPOINT"\n'
    )
    before = snapshot(tree.root / 'opt')
    home = tree.root / 'var/lib/wan-avatar'
    command = [
        'env',
        '-u',
        'PYTHONPATH',
        *(f'{k}={v}' for k, v in tree.env.items() if not k.startswith('PIP')),
        str(tree.root / 'opt/worker/bin/python'),
        '-m',
        'wan_avatar.worker',
    ]
    with control_plane() as plane, up(tmp_path / 'local', command, {'PROFILE': 'draft'}, endpoint_id='ep0001') as local:
        plane.key = local.endpoint.api_key
        env = (
            os.environ
            | local.bucket.environment()
            | {
                'RUNPOD_API_KEY': plane.key,
                'RUNPOD_API_BASE_URL': plane.url,
                'RUNPOD_ENDPOINT_BASE_URL': local.endpoint.url,
                'BUNDLE': 'dexsync/bundle',
                'STUB_LOG': str(tmp_path / 'docker.log'),
                'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
            }
        )
        done = subprocess.run(
            ['bash', '-c', script], cwd=checkout, env=env, capture_output=True, text=True, timeout=300
        )
        logs = ''.join(p.read_text()[-3000:] for p in tmp_path.glob('local/logs/*.log'))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + logs
        secret = [
            v
            for v in (local.bucket.environment()['MINIO_SECRET_KEY'], plane.key) if v in done.stdout + done.stderr
        ]
        *_, job = local.endpoint.pool.queue.jobs.values()
    times = (job.request.ttl_s, job.request.execution_timeout_s)
    assert times == (1900, 1300), 'the file\'s times do not travel with the job'
    tag, endpoint = done.stdout.split()[-2:]
    docker = (tmp_path / 'docker.log').read_text()
    assert f'build --platform linux/amd64 --tag {tag} ' in docker
    assert f'push {tag}' in docker
    assert '\nlogin' in docker
    assert not secret
    assert endpoint == 'ep0001'
    assert [m for m, _ in plane.writes()] == ['POST', 'POST', 'DELETE'] # created, given its model, destroyed
    assert not plane.endpoints
    assert plane.models[endpoint] == ['https://huggingface.co/dexsync/bundle:main']
    (video,) = (checkout / 'runs/first').glob('avatar-*.mp4')
    assert check_mp4(video, 12, has_audio=True)
    assert re.search(r'completed .*\n\s*[1-9]', done.stdout), 'the queue of the very endpoint the job went to'
    check_versions(job.output['worker'], tree.arguments)
    assert 'custom_nodes/Sage' in (home / 'work/comfy/comfy.log').read_text(), 'ComfyUI did not load the custom node'
    assert snapshot(tree.root / 'opt') == before, 'the worker writes into the image'

def check_versions(worker: dict, built: dict[str, str]) -> None:
    "What made a video can be read from its manifest"
    assert worker['git_sha'] == built['GIT_SHA']
    assert worker['comfyui'] == lock_of(ROOT).comfyui['version']
    assert worker['comfyui_source'] == f'{built["COMFYUI_REPO"]}@{built["COMFYUI_COMMIT"]}'
    assert worker['custom_nodes'] == built['CUSTOM_NODES']
    assert worker['lock'] == hashlib.sha256((ROOT / 'wan_avatar/models.lock.json').read_bytes()).hexdigest()[:12]

def test_commands_in_the_prose_exist():
    "Inline code that begins with wan-avatar names a command of ours"
    text = (ROOT / 'nbs/guide_deploy.ipynb').read_text() + (ROOT / 'endpoint.toml').read_text()
    for words in sorted({tuple(found.split()) for found in re.findall(r'`wan-avatar ((?:[a-z]+ ?){1,2})', text)}):
        done = CliRunner().invoke(app, [*words[:2 if words[0] in ('image', 'endpoint') else 1], '--help'])
        assert done.exit_code == 0, (words, done.output)
