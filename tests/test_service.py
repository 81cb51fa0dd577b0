"""The job path with everything real but RunPod: faults in the middle of a job, and jobs beside each other"""
import asyncio
import gc
import hashlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from wan_avatar.avatar import Studio, make_avatar, work_folder
from wan_avatar.comfy import Child, Comfy, ComfyProcess
from wan_avatar.handler import Handler
from wan_avatar.store import Store
from wan_avatar.track import track_key
from wan_avatar.worker import Background, shut_down

JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/two windows.mp4'}

@pytest.fixture(scope='module')
def alone(service):
    "The video of JOB, made with nothing else going on"
    answer = service.run('alone', **JOB)
    assert 'error' not in answer, answer
    return answer

def test_result_is_what_was_promised(service, alone):
    assert (alone['width'], alone['height'], alone['fps'], alone['frames'], alone['has_audio']) == (1280, 720, 24, 48, True)
    assert alone['minio_key'] == 'avatars/alone.mp4' and service.store.stat(alone['minio_key'])['bytes'] == alone['bytes']
    manifest = service.store.read_json('avatars/alone.mp4.json')
    assert manifest['sha256'] == alone['sha256'] and [s['facts']['segment'] for s in manifest['timeline'] if s['name'] == 'render'] == [0, 1]
    assert service.stages('alone') == ['fetch', 'track', 'render', 'upload'] or service.stages('alone') == ['fetch', 'track', 'render']

def test_nothing_is_left_in_the_work_folder(service, alone):
    assert list((service.settings.work_dir / 'jobs').iterdir()) == []

def test_a_delivered_job_answers_from_its_manifest(service, alone):
    again = service.run('alone', **JOB, presign=True)
    assert again.pop('presigned_url').startswith('http')
    assert again == alone

def test_same_id_twice_at_once_renders_once(service, alone):
    first, second = service.submit('twice', **JOB), service.submit('twice', **JOB)
    a, b = first.result(timeout=120), second.result(timeout=120)
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
    assert answer['sha256'] == alone['sha256'] and service.store.read_bytes(key, 10**8) == good

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
    monkeypatch.setattr(service.comfy, 'answer_s', 2)
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
            if service.comfy.process.alive and service.comfy.heard:
                os.killpg(child.pid, signal.SIGKILL)
                break
            threading.Event().wait(0.02)
        while not future.done() and service.comfy.process.child is child: threading.Event().wait(0.02)
    answer = future.result(timeout=60)
    assert answer['error'].startswith('comfy_failed: ComfyUI died again') and answer['refresh_worker'] is True

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
            await service.studio.renderer.acquire()
            service.studio.renderer.release()
        return not service.comfy.process.alive or not (await service.comfy._get('/queue'))['queue_running']
    assert service.on_loop(free())
    assert service.store.stat('avatars/cancelled.mp4') is None and service.run('after', **JOB)['sha256'] == alone['sha256']

def test_cancel_during_delivery_leaves_nothing(service, alone, monkeypatch):
    "Cancelled when the bucket has the video already, and the worker has not heard of it yet"
    put, stored, go_on = service.store.client.put_object, threading.Event(), threading.Event()
    def slow(**asked):
        done = put(**asked)
        if asked['object_name'] == 'avatars/late.mp4':
            stored.set()
            assert go_on.wait(60)
        return done
    monkeypatch.setattr(service.store.client, 'put_object', slow)
    future = service.submit('late', **JOB)
    assert stored.wait(120) and service.store.stat('avatars/late.mp4')
    future.cancel()
    async def heard() -> None: pass
    service.on_loop(heard()) # the cancellation has reached the job
    go_on.set()
    until = time.monotonic() + 60
    while list((service.settings.work_dir / 'jobs').iterdir()) and time.monotonic() < until: threading.Event().wait(0.05)
    assert service.store.list('avatars/late') == []

def test_bucket_gone_for_ten_seconds_during_delivery(service, bucket, alone):
    future = service.submit('outage', **JOB)
    service.wait_report('outage', stage='render', segment=2)
    bucket.stop()
    threading.Event().wait(10)
    bucket.start()
    assert future.result(timeout=120)['sha256'] == alone['sha256']

def test_two_people_at_once_are_never_mixed(service, alone):
    other = {**JOB, 'input_image_minio_path': 'in/face.png'}
    face = service.run('face', **other)
    assert 'error' not in face and face['sha256'] != alone['sha256']
    both = service.submit('both-a', **JOB), service.submit('both-b', **other)
    assert [f.result(timeout=120)['sha256'] for f in both] == [alone['sha256'], face['sha256']]

# a worker that is stopped in mid-job

class Borrowed(ComfyProcess):
    "The service's ComfyUI seen from another worker; what that one stops is a process of its own"
    def __init__(self, lender: ComfyProcess):
        super().__init__(lender.place)
        self.lender = lender

    async def start(self, http) -> None:
        self.child = Child(subprocess.Popen(['sleep', '600'], start_new_session=True))
        self.port, self.secret, self.log = self.lender.port, self.lender.secret, self.lender.log

BRIEF = JOB | {'driving_video_path': 'in/brief.mp4'}

class Doomed:
    "A worker with one job in hand, and word of when that has reported so often"
    def __init__(self, service, reports: int, monkeypatch):
        self.background, self.told, self.reached = Background(), 0, threading.Event()
        monkeypatch.setattr('wan_avatar.handler.make_avatar', partial(self.make, reports))
        self.comfy = Comfy(Borrowed(service.comfy.process))
        self.booted = self.background.submit(self.boot(service))
        handler = Handler(self.booted.result(timeout=30), self.note)
        if not reports: self.reached.set()
        self.job = self.background.submit(handler({'id': f'doomed-{reports}', 'input': BRIEF}))
        self.job.add_done_callback(lambda f: self.reached.set())

    async def boot(self, service) -> Studio:
        await self.comfy.start()
        return replace(service.studio, store=Store(service.settings), comfy=self.comfy, renderer=asyncio.Lock())

    async def note(self, event: dict, update: dict) -> None: pass

    async def make(self, reports: int, job_id, job, studio, report, timeline):
        def count(update: dict) -> None:
            self.told += 1
            if self.told == reports: self.reached.set()
            report(update)
        return await make_avatar(job_id, job, studio, count, timeline)

MOMENTS = [(0, True), (1, True), (2, True), (2, False), (3, True), (4, True), (6, True), (8, False), (10, True), (12, True),
           (15, True), (18, False), (24, True), (30, False), (1000, True)]

@pytest.mark.parametrize('reports, cancelled', MOMENTS)
def test_a_worker_that_is_stopped_in_mid_job_leaves_nothing(service, alone, caplog, monkeypatch, reports, cancelled):
    """When the job has reported so often: at once, in its inputs, its track, its windows, its delivery, after its end;
    and when the SDK has cancelled the job just before, as it does at SIGTERM"""
    gc.collect()
    before, jobs = set(threading.enumerate()), service.settings.work_dir / 'jobs'
    assert list(jobs.iterdir()) == []
    worker = Doomed(service, reports, monkeypatch)
    assert worker.reached.wait(60)
    began = time.monotonic()
    if cancelled: worker.job.cancel()
    shut_down(worker.background, worker.booted)
    assert time.monotonic() - began < 15 and worker.job.done()
    assert list(jobs.iterdir()) == [] and not worker.comfy.process.alive and worker.background.loop.is_closed()
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
