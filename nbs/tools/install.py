"""What the image is built with: sources at exact commits, environments from hashed requirements, the package's wheel.

The Dockerfile runs these commands and the tests run them too, so that a build error is found without a Docker engine.
Standard library only, since they run before anything is installed; `make setup` shares `settle`."""
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SECONDS = 3600 # longest wait for git or pip

def run(*argv, **kw): subprocess.run([str(a) for a in argv], check=True, timeout=SECONDS, **kw)

def pip(env, *argv):
    "This Python's pip, at work in another environment: those that ship have none"
    quiet = ('--disable-pip-version-check', '--no-input')
    run(sys.executable, '-m', 'pip', '--python', Path(env) / 'bin/python', *quiet, *argv)

CODE = ('.py', '.json', '.txt', '.toml') # what ComfyUI runs and reads, and what it requires

def code_files(folder):
    """Files of ComfyUI's code, by their path with slashes. Left out is what a clone has and a package may lack, or the
    other way round, and what no worker runs:
    * folders that begin with a dot: .git is the clone's alone, .github and .ci are the project's automation
    * `tests*` at the top: packages often leave tests out, and ComfyUI loads none of them
    * `__pycache__`: made by whoever ran the code
    * source.json at the top: our own note; what else is not the clone's (.ready, install.log, extra_model_paths.yaml)
      is no CODE
    * files that are not CODE: pictures, manuals, empty files that keep folders for weights"""
    found = {}
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        top = here == Path('.')
        folders[:] = [n for n in folders if n[0] != '.' and n != '__pycache__' and not (top and n.startswith('tests'))]
        chosen = [n for n in names if n.endswith(CODE) and not (top and n == 'source.json')]
        found |= {(here / n).as_posix(): Path(place, n) for n in chosen}
    return found

def code_hash(folder):
    """SHA-256 of ComfyUI's code: the same for a clone and for a package that carries it, on every platform. So paths
    are in the order of their characters, not the file system's, and lines end as in git: a Windows clone may have
    CRLF"""
    total = hashlib.sha256()
    for name, path in sorted(code_files(folder).items()):
        content = hashlib.sha256(path.read_bytes().replace(b'\r\n', b'\n'))
        total.update(f'{name} {content.hexdigest()}\n'.encode())
    return total.hexdigest()

def settle(folder, source, wanted):
    "ComfyUI's source as the worker wants it: the code the lock names, no paths of others, and a note where it is from"
    said = folder / 'comfyui_version.py'
    version = re.search(r"__version__ = ['\"]([^'\"]+)", said.read_text()) if said.exists() else None
    if (found := code_hash(folder)) != wanted:
        named = f'ComfyUI {version[1]}' if version else 'something without a version'
        raise ValueError(f'{source} holds {named} whose code has the hash {found}; the lock says {wanted}')
    (folder / 'extra_model_paths.yaml').unlink(missing_ok=True) # names folders of another program
    (folder / 'source.json').write_text(json.dumps({'source': source}))

def checkout(repo, commit, folder):
    "The files of one commit, without history; anything but that commit is an error"
    if not repo: raise ValueError('no repository given; the arguments of a build come from `wan-avatar image build`')
    if not re.fullmatch('[0-9a-f]{40}', commit):
        raise ValueError(f'commit {commit!r} of {repo} is not 40 hexadecimal digits')
    if folder.exists() and any(folder.iterdir()): raise ValueError(f'{folder} is not empty')
    folder.mkdir(parents=True, exist_ok=True)
    git = ['git', '-C', folder, '-c', 'advice.detachedHead=false']
    env = os.environ | {'GIT_TERMINAL_PROMPT': '0'}
    run(*git, 'init', '--quiet', env=env)
    run(*git, 'fetch', '--quiet', '--depth', '1', '--no-tags', repo, commit, env=env)
    run(*git, 'checkout', '--quiet', 'FETCH_HEAD', env=env)
    asked = subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True, timeout=60)
    got = asked.stdout.strip()
    if got != commit: raise ValueError(f'{repo} gave {got} for {commit}')
    shutil.rmtree(folder / '.git')
    compiled = ('compileall', '-q', '--invalidation-mode', 'unchecked-hash') # workers start cold
    run(sys.executable, '-m', *compiled, folder, stdout=subprocess.DEVNULL)

def comfyui(repo, commit, wanted, folder):
    "ComfyUI's source, of the commit and with the code hash that the lock says"
    checkout(repo, commit, Path(folder))
    settle(Path(folder), f'{repo}@{commit}', wanted)

def nodes(specs, folder):
    "Custom nodes from `repo@commit ...`, or `none`: said, not forgotten"
    if not specs.strip(): raise ValueError('no custom nodes given; when there are none, say none')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for spec in [] if specs.strip() == 'none' else specs.split():
        repo, _, commit = spec.rpartition('@')
        target = folder / repo.rstrip('/').rpartition('/')[2].removesuffix('.git')
        checkout(repo, commit, target)
        (target / 'source.json').write_text(json.dumps({'source': spec}))

def environment(folder, requirements, satisfies=None):
    """A virtual environment with exactly the packages of a compiled file, each checked against its hash.
    `satisfies`, ComfyUI's own requirements: what this Python has (the base image's torch) is seen, and they must then
    be met"""
    folder = Path(folder)
    if folder.exists(): raise ValueError(f'{folder} exists')
    venv.create(folder, system_site_packages=bool(satisfies))
    exactly = ('--no-deps', '--no-cache-dir', '--require-hashes', '--only-binary', ':all:')
    pip(folder, 'install', *exactly, '-r', requirements)
    if satisfies: # nothing may be left to install
        pip(folder, 'install', '--no-deps', '--no-index', '--dry-run', '-r', satisfies)

# what runs in the image: the worker (the Dockerfile's CMD), our nodes in ComfyUI's process, the doctor, which an
# operator starts where the card and the network are, and the job plane of one's own GPU box (compose.yaml). Nothing
# there calls the command line, so `cli` and what only it needs (benches, reports, the endpoint's file) stay out
STARTED = ('worker', 'nodes', 'doctor', 'plane')

def reached(tree, package):
    """Modules of our package that a module reaches, and other strings that may name a file.
    Imports count wherever they stand, in functions too; and so do modules named in a string, since ComfyUI's process
    and helper processes are told by name what to load. A docstring is prose and names nothing"""
    modules, strings = set(), []
    holders = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    prose = {id(n.body[0].value) for n in ast.walk(tree)
             if isinstance(n, holders) and n.body and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.name.partition('.')[2] for a in node.names if ours(a.name, package)}
        elif isinstance(node, ast.ImportFrom) and (node.level or ours(node.module, package)):
            within = (node.module or '') if node.level else node.module.partition('.')[2]
            modules |= {within} if within else {a.name for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            strings.append(node.value)
            modules |= set(re.findall(rf'\b{package}\.(\w+)', node.value))
    return modules, strings

def ours(module, package): return module.split('.')[0] == package

def shipped(package):
    """The files of the package's folder that the image needs: modules that STARTED reach, and every other file whose
    name, or whose folder's, one of them has in a string"""
    package = Path(package)
    found, strings, todo = {'__init__'}, [], ['__init__', *STARTED]
    while todo:
        modules, said = reached(ast.parse((package / f'{todo.pop()}.py').read_text()), package.name)
        fresh = {m for m in (*modules, *STARTED) if (package / f'{m}.py').exists()} - found
        found |= fresh
        todo += sorted(fresh)
        strings += said
    text = '\n'.join(strings)
    data = [p for p in package.rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc')]
    needed = [p for p in data if re.search(rf'\b{re.escape(p.relative_to(package).parts[0])}\b', text)]
    return sorted([package / f'{m}.py' for m in found] + needed)

def wheel(env, source, folder):
    "Build a wheel of what the image needs of the package, with what an environment has, nothing fetched"
    source = Path(source)
    with tempfile.TemporaryDirectory() as staged:
        metadata = [source / name for name in ('pyproject.toml', 'setup.py', 'settings.ini')]
        for path in metadata + shipped(source / 'wan_avatar'):
            target = Path(staged, path.relative_to(source))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        pip(env, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '--wheel-dir', folder, staged)

def package(folder, *environments):
    "Install the one wheel of a folder into each environment"
    wheels = list(Path(folder).glob('*.whl'))
    if len(wheels) != 1: raise ValueError(f'{folder} holds {len(wheels)} wheels; it must be one')
    for env in environments: pip(env, 'install', '--no-deps', '--no-index', '--no-cache-dir', wheels[0])

COMMANDS = {'comfyui': comfyui, 'nodes': nodes, 'environment': environment, 'wheel': wheel, 'package': package}

if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f'install.py {"|".join(COMMANDS)} ...; see the Dockerfile')
    try: COMMANDS[sys.argv[1]](*sys.argv[2:])
    except (ValueError, OSError, subprocess.SubprocessError) as e: sys.exit(f'install.py {" ".join(sys.argv[1:])}: {e}')
