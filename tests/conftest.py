"""Fixtures of the end-to-end tests: a bucket, samples, and one booted ComfyUI (booting takes seconds, so it is kept)"""
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from wan_avatar.apart import Apart
from wan_avatar.bucket import bucket_server
from wan_avatar.clocks import Stretch
from wan_avatar.config import load_settings
from wan_avatar.frames import FPS, read_frames
from wan_avatar.handler import Handler
from wan_avatar.mp4 import Encoder
from wan_avatar.normalise import normalise_video
from wan_avatar.tasks import Background
from wan_avatar.timeline import Timeline
from wan_avatar.worker import boot, shut_down
from wan_avatar.workflow import PROFILES, Profile

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / 'runs/samples'

# Where Python is told to keep no compiled files, as in many containers, each of the processes that the tests start
# would compile our modules anew, and each ComfyUI its own
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False

LONG = [
    'test_notebooks', 'test_service', 'test_reports', 'test_wan', 'test_production_size', 'test_experiment',
    'test_image', 'test_cli', 'test_local', 'test_models', 'test_media', 'test_scene', 'test_job_choices', 'test_store',
    'test_boot', 'test_endpoint', 'test_quality', 'test_page', 'test_smoke', 'test_bad_input', 'test_wholebody',
    'test_experiment_report', 'test_queue', 'test_judging', 'test_variants', 'test_callers', 'test_bucket',
    'test_comfy', 'test_charts', 'test_operators', 'test_own_box', 'test_deployment', 'test_arriving', 'test_watch',
]

ON_A_TREE = ['test_wan', 'test_endpoint'] # what another ComfyUI could break
TREE = os.environ.get('COMFY_TREE')

def pytest_configure(config) -> None:
    "COMFY_TREE=<folder of a ComfyUI>: the tests that depend on ComfyUI run on that one, in .comfy/env's environment"
    hostile = 'damaged or made on purpose; `pytest -m hostile` runs these alone and counts them'
    config.addinivalue_line('markers', f'hostile(kind, cases=1): {hostile}')
    if not TREE: return
    if not (Path(TREE) / 'main.py').is_file():
        raise pytest.UsageError(f'COMFY_TREE={TREE} is not a ComfyUI: no main.py in it; name the folder of its source')
    os.environ['COMFY_DIR'] = str(comfy_dir()) # what the tests start themselves takes it from here
    config.add_cleanup(lambda: shutil.rmtree(comfy_dir(), ignore_errors=True))

@functools.cache
def comfy_dir() -> Path:
    "The ComfyUI and environment to test on; a tree one has is copied, so that nothing is written into it"
    if not TREE: return ROOT / '.comfy'
    folder = Path(tempfile.mkdtemp(prefix='comfy-tree-'))
    shutil.copytree(TREE, folder / 'ComfyUI', symlinks=True, ignore=_source_alone)
    (folder / 'env').symlink_to(ROOT / '.comfy/env')
    return folder

def comfy_with_probe(folder: Path) -> Path:
    "The same with the nodes of the tests, which come as an image's do"
    (nodes := folder / 'custom_nodes/probe').mkdir(parents=True)
    shutil.copy(ROOT / 'tests/comfy_probe.py', nodes / '__init__.py')
    for name in ('ComfyUI', 'env'): (folder / name).symlink_to(comfy_dir() / name)
    return folder

def _source_alone(folder: str, names: list[str]) -> set[str]:
    "Models, results and installations in a tree are not its source"
    besides = {
        '.git', '.venv', 'custom_nodes', 'extra_model_paths.yaml', 'input', 'models',
        'output', 'temp', 'user', 'venv',
    }
    return (besides if Path(folder) == Path(TREE) else set()) & set(names) | {n for n in names if n == '__pycache__'}

def pytest_ignore_collect(collection_path: Path) -> bool | None:
    "The rest does not depend on ComfyUI's version"
    if TREE and collection_path.suffix == '.py' and collection_path.stem not in ON_A_TREE: return True

def pytest_terminal_summary(terminalreporter) -> None:
    "Which ComfyUI was tested, and how many hostile cases"
    ran = f'this run was on {TREE}' if TREE else 'not run (COMFY_TREE=<folder of its source> runs what depends on it)'
    terminalreporter.write_line(f'newer ComfyUI: {ran}')
    if find_browser() is None: terminalreporter.write_line('page in a browser: not run (no Chromium; README says how)')
    tried = Counter()
    for report in terminalreporter.stats.get('passed', []) + terminalreporter.stats.get('failed', []):
        for name, value in report.user_properties:
            if name == 'hostile': tried[value[0]] += value[1]
    kinds = ', '.join(f'{n} {kind}' for kind, n in tried.most_common())
    if tried: terminalreporter.write_line(f'hostile cases: {sum(tried.values())}, of them {kinds}')
    took = Counter() # seconds of setups, calls and teardowns
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, 'duration')):
        took[Path(report.fspath).stem] += report.duration
    longest = ', '.join(f'{name} {seconds:.0f}' for name, seconds in took.most_common(12) if seconds > 10)
    if longest: terminalreporter.write_line(f'seconds of the longest files, for the order of LONG: {longest}')

@functools.cache
def find_browser() -> str | None: # None: no Chromium is installed
    "The program of a Chromium; one that plays H.264 before Playwright's own"
    names = ('chromium', 'google-chrome', 'google-chrome-stable')
    installed = next(filter(None, map(shutil.which, names)), None)
    cache = Path(os.environ.get('PLAYWRIGHT_BROWSERS_PATH') or Path.home() / '.cache/ms-playwright')
    own = sorted(cache.glob('chromium-*/chrome-linux*/chrome'))
    return installed or (str(own[-1]) if own else None)

def pytest_collection_modifyitems(items) -> None:
    "Files that take longest come first, so that the processes of `make test` end together; hostile cases are counted"
    for item in items:
        mark = item.get_closest_marker('hostile')
        if mark: item.user_properties.append(('hostile', (mark.args[0], mark.kwargs.get('cases', 1))))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))

@pytest.fixture(scope='module')
def apart(request):
    "Runs functions of the test's module in processes of their own; its `ready` loads the module there, once"
    made = Apart('wan_avatar.normalise:load_decoders', f'{request.module.__name__}:ready')
    made.start()
    yield made
    made.close()
    assert made.process is None

@pytest.fixture(scope='session')
def samples() -> Path:
    assert (SAMPLES / 'pexels.mp4').exists(), 'run make setup first'
    return SAMPLES

@pytest.fixture(scope='session')
def bucket(tmp_path_factory):
    with bucket_server(tmp_path_factory.mktemp('bucket')) as server: yield server

def made_once(factory: pytest.TempPathFactory, name: str, *command: str | Path) -> Path:
    "A folder that a command fills, the same one in all processes of a run; the process that needs it first makes it"
    parallel = 'PYTEST_XDIST_WORKER' in os.environ
    shared = factory.getbasetemp().parent if parallel else factory.getbasetemp()
    folder = shared / f'once-{name}'
    with (shared / f'once-{name}.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix('.part')
            subprocess.run([*command, part], cwd=ROOT, check=True, capture_output=True, timeout=300)
            part.rename(folder)
    return folder

@pytest.fixture(scope='session')
def detectors(tmp_path_factory) -> Path:
    "Small networks of the production tracker, to be read only"
    command = [ROOT / '.comfy/env/bin/python', ROOT / 'tests/tiny_detectors.py']
    return made_once(tmp_path_factory, 'detectors', *command)

@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> Callable[..., Path]:
    "Gives a folder with the tiny profile's weights, to write into; `--face`: with the close-up's encoders"
    def copy(*options: str) -> Path:
        command = [ROOT / '.venv/bin/wan-avatar', 'tiny-weights', *options]
        made = made_once(tmp_path_factory, '-'.join(['tiny', *options]), *command)
        return shutil.copytree(made, tmp_path_factory.mktemp('models'), dirs_exist_ok=True)
    return copy

# For a ComfyUI that renders on a CPU. glibc gives every freed picture back to the kernel, which then clears its pages
# for the next one: a third of the time at 1280x720. And torch's threads spin while they wait for each other, on cores
# that the other processes of `make test` need
SPARING = {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**40),
    'OMP_WAIT_POLICY': 'passive',
}

def make_settings(bucket, work: Path, **more: str):
    folders = {'COMFY_DIR': str(comfy_dir()), 'WORK_DIR': str(work), 'MODELS_DIR': str(work / 'models')}
    return load_settings({**bucket.environment(), **folders, 'ALLOW_PRIVATE_URLS': 'false', **more})

class Service:
    "A booted worker without RunPod around it: real bucket, real ComfyUI, the real handler"
    def __init__(self, bucket, work: Path, profiles: Sequence[Profile] = (), **more: str):
        "`profiles`: those that jobs can name beside, or instead of, the ones that ship"
        self.background = Background()
        self.reports: list[tuple[str, dict]] = []
        self.settings = make_settings(bucket, work, **more)
        self.profiles = PROFILES | {p.name: p for p in profiles}
        self.booted = self.background.submit(boot(self.settings, Timeline(), profiles=self.profiles))
        self.context = self.booted.result(timeout=120)
        self.store = self.context.store
        self.comfy = self.context.comfy
        self.handler = Handler(self.context, self.note, interval_s=0.1) # short windows are soon over

    async def note(self, event: dict, update: dict) -> None: self.reports.append((event['id'], update))

    def submit(self, job_id: str, **job):
        "Start a job; a concurrent Future of its answer"
        return self.background.submit(self.handler({'id': job_id, 'input': job}))

    def run(self, job_id: str, **job) -> dict:
        "A job to its end"
        return self.submit(job_id, **job).result(timeout=180)

    def stages(self, job_id: str) -> list[str]:
        "The stages a job reported, in order, without repeats"
        return list(dict.fromkeys(u['stage'] for i, u in self.reports if i == job_id))

    def wait_report(self, job_id: str, **wanted) -> dict:
        "Until a job reports these values; fails after a minute"
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for i, update in list(self.reports):
                if i == job_id and all(update.get(k) == v for k, v in wanted.items()): return update
            time.sleep(0.02)
        raise AssertionError(f'{job_id} never reported {wanted}; it reported {self.stages(job_id)}')

    def on_loop(self, work):
        "Run a coroutine where the service lives"
        return self.background.submit(work).result(timeout=180)

    def close(self) -> None: shut_down(self.background, self.booted)

def sparing_service(*args, **more: str) -> Service:
    "A Service whose ComfyUI renders on a CPU with SPARING; nobody else sees these variables"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SPARING.items(): patched.setenv(name, value)
        return Service(*args, **more)

@pytest.fixture(scope='session')
def service(bucket, samples, tmp_path_factory):
    "One service for all tests that do not break its settings; inputs are in its bucket, and its windows are short"
    short = PROFILES['draft'].changed(length=29) # faults of windows need no long ones
    made = sparing_service(bucket, tmp_path_factory.mktemp('work'), [short])
    for name in ('astronaut.png', 'single_face.mp4'):
        made.store.upload(samples / name, f'in/{name}', 'application/octet-stream')
    for name, source, frames in (('two windows', 'pexels', 48), ('brief', 'pexels', 12), ('no_face', 'no_face', 12)):
        clip = cut(samples / f'{source}.mp4', frames, tmp_path_factory.mktemp('cut'))
        made.store.upload(clip, f'in/{name}.mp4', 'video/mp4')
    face = next(read_frames(samples / 'single_face.mp4', start=10))
    Image.fromarray(face).save(picture := tmp_path_factory.mktemp('face') / 'face.png')
    made.store.upload(picture, 'in/face.png', 'image/png')
    yield made
    made.close()

def cut(source: Path, frames: int, folder: Path) -> Path:
    "The first frames of a clip as a driving video of its own, 640x360 with sound"
    stretch = Stretch(0, frames / FPS)
    clip = normalise_video(source, folder / 'part.y4m', folder / 'sound.m4a', 60, size=(640, 360), stretch=stretch)
    assert clip.frames == frames
    with Encoder(folder / 'cut.mp4', size=(640, 360), audio=clip.audio) as encoder:
        for frame in read_frames(clip.path): encoder.write(frame)
    return folder / 'cut.mp4'
