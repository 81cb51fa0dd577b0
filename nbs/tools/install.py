"""What the image is built with: sources at exact commits, environments from hashed requirements, the package's wheel.

The Dockerfile runs these commands and the tests run them too, so that a build error is found without a Docker engine.
Standard library only, since they run before anything is installed; `make setup` shares `settle`."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
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

def wheel(env, source, folder):
    "Build the package's wheel with what an environment has, nothing fetched"
    pip(env, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '--wheel-dir', folder, source)

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
