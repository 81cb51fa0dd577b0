"""The job path with everything real but RunPod: faults in the middle of a job, and jobs beside each other"""
import asyncio
import gc
import gzip
import hashlib
import io
import os
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wan_avatar.avatar import make_avatar
from wan_avatar.clocks import EVERYTHING
from wan_avatar.comfy import Child, Comfy, ComfyProcess, Restarts
from wan_avatar.delivery import Outrun, deliver, find_result
from wan_avatar.frames import Rectangle
from wan_avatar.handler import Handler
from wan_avatar.inputs import Inputs, room_needed
from wan_avatar.job import Job, JobError, ProgressUpdate, manifest_key
from wan_avatar.manifest import BootReport, Manifest, SceneReport
from wan_avatar.mark import MADE
from wan_avatar.mp4 import Encoder
from wan_avatar.normalise import normalise_video
from wan_avatar.render import Rendered
from wan_avatar.run import JobRun, WorkerContext, deadline, work_folder
from wan_avatar.store import Store, fetch_url
from wan_avatar.tasks import Background
from wan_avatar.timeline import Timeline
from wan_avatar.track import load_track, track_key
from wan_avatar.tracks import load_cached_track
from wan_avatar.worker import shut_down
from wan_avatar.workflow import get_profile, prepare

JOB = {'input_image_minio_path': 'in/face.png', 'driving_video_path': 'in/two windows.mp4'}

@pytest.fixture(scope='module')
def alone(service):
    "The video of JOB, made with nothing else going on"
    answer = service.run('alone', **JOB)
    assert 'error' not in answer, answer
    return answer

def test_result_is_what_was_promised(service, alone):
    figures = {k: alone[k] for k in ('width', 'height', 'fps', 'frames', 'has_audio')}
    assert figures == {'width': 1280, 'height': 720, 'fps': 24, 'frames': 48, 'has_audio': True}
    assert alone['minio_key'] == 'avatars/alone.mp4'
    assert service.store.stat(alone['minio_key'])['bytes'] == alone['bytes']
    manifest = Manifest.model_validate(service.store.read_json('avatars/alone.mp4.json'))
    assert manifest.result().answer() == alone
    assert [s.facts['segment'] for s in manifest.timeline if s.name == 'render'] == [0, 1]
    assert service.stages('alone') == ['fetch', 'track', 'render', 'upload'], 'the last report is always sent'

def test_nothing_is_left_in_the_work_folder(service, alone):
    assert list((service.settings.work_dir / 'jobs').iterdir()) == []

def test_a_delivered_job_answers_from_its_manifest(service, alone):
    again = service.run('alone', **JOB, presign=True)
    assert again.pop('presigned_url').startswith('http')
    assert again == alone

def test_same_id_twice_at_once_renders_once(service, alone):
    first = service.submit('twice', **JOB)
    second = service.submit('twice', **JOB)
    a = first.result(timeout=120)
    b = second.result(timeout=120)
    assert a['sha256'] == b['sha256'] == alone['sha256']
    done = [u['done'] for i, u in service.reports if i == 'twice' and u['stage'] == 'render' and 'done' in u]
    assert done == sorted(done), 'rendering began again'

def test_second_job_with_the_same_video_skips_tracking(service, alone):
    service.run('cached', **JOB)
    stages = service.store.read_json('avatars/cached.mp4.json')['timeline']
    assert [s['facts']['cached'] for s in stages if s['name'] == 'track'] == [True]

def test_damaged_track_is_made_again(service, alone):
    key = track_key(hashlib.sha256(service.store.read_bytes('in/two windows.mp4', 10**8)).hexdigest(), (1280, 720), 24)
    good = service.store.read_bytes(key, 10**8)
    service.store.write_bytes(key, good[:len(good) // 2], 'application/octet-stream')
    answer = service.run('healed', **JOB)
    assert answer['sha256'] == alone['sha256']
    assert service.store.read_bytes(key, 10**8) == good

def test_comfyui_killed_in_mid_job(service, alone):
    future = service.submit('killed', **JOB)
    service.wait_report('killed', stage='render', segment=2)
    os.killpg(service.comfy.process.child.pid, signal.SIGKILL)
    answer = future.result(timeout=120)
    assert answer.get('sha256') == alone['sha256'], answer
    segments = [u['segment'] for i, u in service.reports if i == 'killed' and 'segment' in u]
    assert segments == sorted(segments), 'a finished segment was rendered again'

def test_comfyui_that_hangs_is_as_good_as_dead(service, alone, monkeypatch):
    "The process lives, and answers nothing any more"
    monkeypatch.setattr(service.comfy, 'request_timeout_s', 2)
    future = service.submit('hung', **JOB)
    service.wait_report('hung', stage='render', segment=2)
    os.killpg(service.comfy.process.child.pid, signal.SIGSTOP)
    answer = future.result(timeout=120)
    assert answer.get('sha256') == alone['sha256'], answer

def test_comfyui_that_keeps_dying_fails_the_job_and_the_worker(service):
    future = service.submit('dying', **JOB)
    for _ in range(3):
        while not future.done():
            child = service.comfy.process.child
            if service.comfy.process.alive and service.comfy.inboxes:
                os.killpg(child.pid, signal.SIGKILL)
                break
            threading.Event().wait(0.02)
        while not future.done() and service.comfy.process.child is child: threading.Event().wait(0.02)
    answer = future.result(timeout=60)
    assert answer['error'].startswith('comfy_failed: ComfyUI died again')
    assert answer['refresh_worker'] is True

def test_socket_dropped(service, alone):
    future = service.submit('dropped', **JOB)
    service.wait_report('dropped', stage='render', segment=1)
    service.on_loop(service.comfy.socket.close())
    assert future.result(timeout=120)['sha256'] == alone['sha256']

def test_cancel_frees_the_renderer_within_two_seconds(service, alone):
    future = service.submit('cancelled', **JOB)
    service.wait_report('cancelled', stage='render', segment=1)
    future.cancel()
    async def free() -> bool:
        import asyncio
        async with asyncio.timeout(2):
            await service.context.renderer.acquire()
            service.context.renderer.release()
        return not service.comfy.process.alive or not (await service.comfy.get('/queue'))['queue_running']
    assert service.on_loop(free())
    assert service.store.stat('avatars/cancelled.mp4') is None
    assert service.run('after', **JOB)['sha256'] == alone['sha256']

def test_cancel_during_delivery_leaves_nothing(service, alone, monkeypatch):
    "Cancelled when the bucket has the video already, and the worker has not heard of it yet"
    put = service.store.client.put_object
    stored = threading.Event()
    go_on = threading.Event()
    def slow(**asked):
        done = put(**asked)
        if asked['object_name'] == 'avatars/late.mp4':
            stored.set()
            assert go_on.wait(60)
        return done
    monkeypatch.setattr(service.store.client, 'put_object', slow)
    future = service.submit('late', **JOB)
    assert stored.wait(120)
    assert service.store.stat('avatars/late.mp4')
    future.cancel()
    async def heard() -> None: pass
    service.on_loop(heard()) # the cancellation has reached the job
    go_on.set()
    jobs = service.settings.work_dir / 'jobs'
    until = time.monotonic() + 60
    while list(jobs.iterdir()) and time.monotonic() < until: threading.Event().wait(0.05)
    assert service.store.list('avatars/late') == []

def test_bucket_gone_for_ten_seconds_during_delivery(service, bucket, alone):
    future = service.submit('outage', **JOB)
    service.wait_report('outage', stage='render', segment=2)
    bucket.stop()
    threading.Event().wait(10)
    bucket.start()
    assert future.result(timeout=120)['sha256'] == alone['sha256']

def test_two_people_at_once_are_never_mixed(service, alone):
    other = {**JOB, 'input_image_minio_path': 'in/astronaut.png'}
    astronaut = service.run('astronaut', **other)
    assert 'error' not in astronaut
    assert astronaut['sha256'] != alone['sha256']
    both = service.submit('both-a', **JOB), service.submit('both-b', **other)
    assert [f.result(timeout=120)['sha256'] for f in both] == [alone['sha256'], astronaut['sha256']]

# a worker that is stopped in mid-job

class Borrowed(ComfyProcess):
    "The service's ComfyUI seen from another worker; what that one stops is a process of its own"
    def __init__(self, lender: ComfyProcess):
        super().__init__(lender.place)
        self.lender = lender

    async def start(self, http) -> None:
        self.child = Child(subprocess.Popen(['sleep', '600'], start_new_session=True))
        self.port = self.lender.port
        self.secret = self.lender.secret
        self.log = self.lender.log

BRIEF = JOB | {'driving_video_path': 'in/brief.mp4'}

class Doomed:
    "A worker with one job in hand, and word of when that has reported so often"
    def __init__(self, service, reports: int, monkeypatch):
        self.background = Background()
        self.told = 0
        self.reached = threading.Event()
        monkeypatch.setattr('wan_avatar.handler.make_avatar', partial(self.make, reports))
        self.comfy = Comfy(Borrowed(service.comfy.process))
        self.booted = self.background.submit(self.boot(service))
        handler = Handler(self.booted.result(timeout=30), self.note)
        if not reports: self.reached.set()
        self.job = self.background.submit(handler({'id': f'doomed-{reports}', 'input': BRIEF}))
        self.job.add_done_callback(lambda f: self.reached.set())

    async def boot(self, service) -> WorkerContext:
        await self.comfy.start()
        return replace(service.context, store=Store(service.settings), comfy=self.comfy, renderer=asyncio.Lock())

    async def note(self, event: dict, update: dict) -> None: pass

    async def make(self, reports: int, job_id, job, worker, report, timeline):
        def count(update: ProgressUpdate) -> None:
            self.told += 1
            if self.told == reports: self.reached.set()
            report(update)
        return await make_avatar(job_id, job, worker, count, timeline)

MOMENTS = [
    (0, True),
    (1, True),
    (2, True),
    (2, False),
    (3, True),
    (4, True),
    (6, True),
    (8, False),
    (10, True),
    (12, True),
    (15, True),
    (18, False),
    (24, True),
    (30, False),
    (1000, True),
]

@pytest.mark.parametrize('reports, cancelled', MOMENTS)
def test_a_worker_that_is_stopped_in_mid_job_leaves_nothing(service, alone, caplog, monkeypatch, reports, cancelled):
    """When the job has reported so often: at once, in its inputs, its track, its windows, its delivery, after its end;
    and when the SDK has cancelled the job just before, as it does at SIGTERM"""
    gc.collect()
    before = set(threading.enumerate())
    jobs = service.settings.work_dir / 'jobs'
    assert list(jobs.iterdir()) == []
    worker = Doomed(service, reports, monkeypatch)
    assert worker.reached.wait(60)
    began = time.monotonic()
    if cancelled: worker.job.cancel()
    shut_down(worker.background, worker.booted)
    assert time.monotonic() - began < 15
    assert worker.job.done()
    assert list(jobs.iterdir()) == []
    assert not worker.comfy.process.alive
    assert worker.background.loop.is_closed()
    del worker
    gc.collect()
    for thread in set(threading.enumerate()) - before: thread.join(5)
    assert set(threading.enumerate()) <= before
    for words in ('Unclosed', 'destroyed', 'never retrieved'): assert words not in caplog.text

@pytest.mark.parametrize('turns', range(8))
def test_a_folder_goes_at_whatever_moment_of_its_removal_the_loop_ends(tmp_path, turns):
    "The end of a loop cancels every task that is left, those that tidy up too"
    async def job() -> None:
        async with work_folder(tmp_path): await asyncio.Event().wait()
    async def main() -> None:
        task = asyncio.create_task(job())
        await asyncio.sleep(0)
        assert len(list((tmp_path / 'jobs').iterdir())) == 1
        task.cancel()
        for _ in range(turns): await asyncio.sleep(0)
    asyncio.run(main())
    assert list((tmp_path / 'jobs').iterdir()) == []

# two attempts at one job, in two workers

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two finished videos of one job, as two machines might render it"
    folders = [tmp_path_factory.mktemp(name) for name in 'ab']
    for shade, folder in enumerate(folders, 1):
        with Encoder(folder / 'avatar.mp4', (64, 64), source_type=MADE) as encoder:
            for n in range(24): encoder.write(np.full((64, 64, 3), n * shade, np.uint8))
    def inputs(of: int, frames: int = 24) -> Inputs:
        clip = SimpleNamespace(frames=frames, size=(64, 64), fps=24, audio=None, audio_s=0.0, notes=(),
                               content=Rectangle(0, 0, 64, 64), stretch=EVERYTHING)
        return Inputs(folders[of], clip, sha256='0' * 64)
    return inputs

def delivery(service, key: str, inputs: Inputs, store: Store | None = None):
    "One attempt's delivery, from a worker of its own when it has a store of its own"
    worker = replace(service.context, store=store or service.store)
    boot = BootReport(job_number=1, process_s=0, taken_s=0, stages=[])
    run = JobRun(worker, prepare(get_profile('draft')), inputs.folder, Timeline(), Restarts(), job_id='twice',
                 job=Job(input_image_minio_path='a.png'), key=key, seed=1, boot=boot)
    scene = SceneReport(width=64, height=64, sampled=(64, 64), share=1, made=24, saved=None, windows=[])
    return deliver(run, inputs, {}, Rendered(None, scene))

def lost(put, asked): raise JobError('storage_failed', 'the line was cut')
def arrived(put, asked):
    put(**asked)
    raise JobError('storage_failed', 'the line was cut')
def goes_on(put, asked): return put(**asked)

# what happens to the second attempt, in whose upload the first one delivers: which video it has, its frames, what its
# upload does, whether it is cancelled, whether the bucket knows conditions
SECOND = {
    'its upload is lost': (1, 24, lost, False, True),
    'the answer to its upload is lost': (1, 24, arrived, False, True),
    'its upload goes on': (1, 24, goes_on, False, True),
    'its video is not right': (1, 25, goes_on, False, True),
    'it is cancelled': (1, 24, goes_on, True, True),
    'it is cancelled, its upload is lost': (1, 24, lost, True, True),
    'the same bytes, a bucket without conditions': (0, 24, arrived, False, False),
    'the same bytes, cancelled, a bucket without conditions': (0, 24, goes_on, True, False),
    'lost, a bucket without conditions': (1, 24, lost, False, False),
}

@pytest.mark.parametrize('name', SECOND)
def test_a_second_attempt_never_removes_what_the_first_delivered(service, made, monkeypatch, name):
    which, frames, upload, cancelled, conditions = SECOND[name]
    key = f'avatars/{name}.mp4'
    first = [] # the result of the first attempt
    second = Store(service.settings)
    begun = threading.Event()
    go_on = threading.Event()
    put = second.client.put_object
    def hooked(**asked):
        if asked['object_name'] != key: return put(**asked)
        if not first:
            first.append(service.background.submit(delivery(service, key, made(0))).result(timeout=30))
            begun.set()
            assert go_on.wait(30)
        return upload(put, asked)
    monkeypatch.setattr(second.client, 'put_object', hooked)
    if not conditions: monkeypatch.setattr(second.pool, 'only_if', lambda condition: nullcontext())
    attempt = service.background.submit(delivery(service, key, made(which, frames), second))
    assert begun.wait(30)
    if cancelled: attempt.cancel()
    async def heard() -> None: pass
    service.on_loop(heard())
    go_on.set()
    try: answer = attempt.result(timeout=30)
    except (JobError, asyncio.CancelledError, Outrun): answer = None
    except BaseException as e: # noqa: BLE001 - a future of another thread has its own kind of cancellation
        assert type(e).__name__ == 'CancelledError'
        answer = None
        service.on_loop(settled(service))
    assert answer is None or answer.sha256 == first[0].sha256, 'the second attempt says something else'
    found = find_result(service.store, key)
    assert found == first[0]
    assert hashlib.sha256(service.store.read_bytes(key, 10**8)).hexdigest() == found.sha256
    assert service.store.read_json(manifest_key(key))['sha256'] == found.sha256

async def settled(service) -> None:
    "Until nothing but this runs on the service's loop that delivers"
    for task in asyncio.all_tasks():
        if 'deliver' in repr(task.get_coro()) and task is not asyncio.current_task():
            await asyncio.wait({task}, timeout=30)

def test_an_attempt_that_fails_alone_leaves_nothing(service, made):
    with pytest.raises(JobError, match='internal: .*25 frames'):
        service.on_loop(delivery(service, 'avatars/fails alone.mp4', made(0, 25)))
    assert service.store.list('avatars/fails alone') == []

@pytest.mark.parametrize('manifest', [None, b'{"half": ', b'{}'])
def test_what_a_killed_attempt_left_is_replaced(service, made, manifest):
    key = f'avatars/left {manifest}.mp4'
    service.store.write_bytes(key, b'half a video', 'video/mp4', {'attempt': 'killed', 'sha256': '0' * 64})
    if manifest: service.store.write_bytes(manifest_key(key), manifest, 'application/json')
    result = service.on_loop(delivery(service, key, made(0)))
    assert find_result(service.store, key) == result
    assert hashlib.sha256(service.store.read_bytes(key, 10**8)).hexdigest() == result.sha256

def test_a_manifest_of_other_bytes_is_no_delivery(service, made):
    key = 'avatars/swapped.mp4'
    result = service.on_loop(delivery(service, key, made(0)))
    other = bytes(result.bytes)
    service.store.write_bytes(key, other, 'video/mp4', {'sha256': hashlib.sha256(other).hexdigest()})
    assert find_result(service.store, key) is None

# a disk that is full

@pytest.fixture
def small_disk(tmp_path):
    "A disk of its own with room for half a megabyte"
    folder = tmp_path / 'disk'
    folder.mkdir()
    yield from mounted(folder, '512k')

def mounted(folder, size: str):
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: pytest.skip(f'only root may mount a small disk: {done.stderr.strip()}')
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)

class Sends(BaseHTTPRequestHandler):
    "A picture of two megabytes"
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try: self.wfile.write(bytes(2_000_000))
        except OSError: pass # the other side has no room
    def log_message(self, *args): pass

TRACK = Path(__file__).with_name('audit') / 'driving.track'

def from_the_bucket(service, disk, source):
    service.store.download('disk/large', disk / 'x', 'driving_video_path', 10**8)
def unpacked_there(service, disk, source):
    service.store.download('disk/packed', disk / 'x', 'driving_video_path', 10**8)
def from_the_web(service, disk, source):
    with ThreadingHTTPServer(('127.0.0.1', 0), Sends) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        url = f'http://127.0.0.1:{web.server_port}/a.png'
        try:
            fetch_url(url, disk / 'x', allow_private=True, ports={web.server_port})
        finally: web.shutdown()
def normalised(service, disk, source): normalise_video(source, disk / 'driving.y4m', disk / 'audio.m4a', 60)
def tracked(service, disk, source):
    filler = disk / 'filler' # until the disk has no room for a track of 4 kB
    with pytest.raises(OSError), filler.open('wb', buffering=0) as out:
        while True: out.write(bytes(1 << 16))
    made = load_track(TRACK)
    clip = SimpleNamespace(frames=len(made), size=made.size)
    load_cached_track(service.store, 'disk/track', disk / 'x.track', clip, made.tracker)
def encoded(service, disk, source):
    with Encoder(disk / 'avatar.mp4', (640, 360)) as encoder:
        for n in range(48): encoder.write(np.random.default_rng(n).integers(0, 255, (360, 640, 3), dtype=np.uint8))
@pytest.fixture(scope='module')
def large(service, samples):
    "What does not fit on the small disk"
    service.store.write_bytes('disk/large', bytes(2_000_000), 'application/octet-stream')
    service.store.write_bytes('disk/track', TRACK.read_bytes(), 'application/octet-stream')
    body = gzip.compress(bytes(2_000_000))
    service.store.client.put_object(bucket_name=service.store.bucket, object_name='disk/packed', data=io.BytesIO(body),
                                    length=len(body), metadata={'Content-Encoding': 'gzip'})
    return samples / 'pexels.mp4'

WRITERS = (from_the_bucket, unpacked_there, from_the_web, normalised, encoded, tracked)

@pytest.mark.parametrize('writes', WRITERS, ids=lambda f: f.__name__)
def test_a_full_disk_is_the_workers_fault(service, small_disk, large, monkeypatch, writes):
    monkeypatch.setattr('wan_avatar.store.check_room', lambda *a, **more: None) # others took the room meanwhile
    async def job():
        async with deadline(60, Timeline(), small_disk): await asyncio.to_thread(writes, service, small_disk, large)
    with pytest.raises(JobError) as e: asyncio.run(job())
    assert e.value.code == 'storage_failed'
    assert e.value.answer()['refresh_worker'] is True
    assert 'disk of this worker is full' in e.value.message
    assert ' MB free' in e.value.message
    assert [f.name for f in small_disk.iterdir() if f.name.startswith('.')] == [], 'a part was left'

@pytest.mark.parametrize('asks', [True, False])
def test_a_job_on_a_full_disk(service, monkeypatch, asks):
    "Its folder is on a disk with no room for its video: said when the download asks, or when normalising hits it"
    if not asks: monkeypatch.setattr('wan_avatar.store.check_room', lambda *a, **more: None)
    service.reports.clear()
    (service.settings.work_dir / 'jobs').mkdir(exist_ok=True)
    for _ in mounted(service.settings.work_dir / 'jobs', '1m'): answer = service.run(f'full-{asks}', **JOB)
    assert answer['error'].startswith('storage_failed: '), answer
    assert answer['refresh_worker'] is True, answer
    assert ('needs' in answer['error'] and 'a margin of 100 MB' in answer['error']) == asks
    assert 'render' not in service.stages(f'full-{asks}')
    assert list((service.settings.work_dir / 'jobs').iterdir()) == []

def test_a_video_that_is_too_long_for_the_disk_is_not_the_workers_fault(service):
    (service.settings.work_dir / 'jobs').mkdir(exist_ok=True)
    for _ in mounted(service.settings.work_dir / 'jobs', '140m'): answer = service.run('too-long-here', **JOB)
    assert answer['error'].startswith('too_long: the driving video lasts 2 s; '), answer
    assert 'MB of its frames are still to be written' in answer['error']
    assert 'refresh_worker' not in answer

def test_a_job_asks_for_its_room_before_it_starts(service, monkeypatch):
    monkeypatch.setattr('wan_avatar.inputs.VIDEO_RATE', 10**12)
    service.reports.clear()
    answer = service.run('no-room', **JOB, max_seconds=10)
    assert answer['refresh_worker'] is True
    assert service.stages('no-room') == []
    assert 'storage_failed: a job of at most 10 s needs 10,000,' in answer['error']
    assert 'a margin of 100 MB, and ' in answer['error']
    assert ' MB are free' in answer['error']

def test_the_room_a_job_asks_for_grows_with_what_it_may_hold():
    draft = get_profile('draft')
    of = {s: room_needed(Job(input_image_minio_path='a.png', max_seconds=s), draft) for s in (1, 60, 600)}
    frames = 2 * draft.length * 1280 * 720 * 3
    assert frames < of[1] < of[60] < of[600] < 4 * 10**9

def test_out_of_time_says_how_far_it_came(service, bucket):
    from wan_avatar.handler import Handler
    hurried = replace(service.context, settings=service.settings.model_copy(update={'job_seconds': 1.0}))
    handler = Handler(hurried, service.note)
    answer = service.background.submit(handler({'id': 'hurried', 'input': JOB})).result(timeout=60)
    assert answer['error'].startswith('timed_out: the job took longer than 1 s (JOB_SECONDS); so far: '), answer
    assert 'download' in answer['error'], answer

def test_the_timeline_shows_the_picture_beside_the_video(service):
    assert 'error' not in service.run('beside', **BRIEF)
    manifest = service.store.read_bytes(manifest_key('avatars/beside.mp4'), 10**6)
    begun = {s.name: s.begin_s for s in reversed(Manifest.model_validate_json(manifest).timeline)}
    assert begun['track picture'] < begun['wait for renderer'], 'the renderer was free, so it was used at once'
