"What a file does to the process that reads it stays there: memory, crashes, endless loops; and nothing is left running"
import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from wan_avatar.apart import MEMORY_LIMIT, Apart, bare_environment, peak_memory
from wan_avatar.comfy import Restarts
from wan_avatar.inputs import take_image, take_video
from wan_avatar.job import Job, JobError
from wan_avatar.normalise import normalise_video
from wan_avatar.run import JobRun, WorkerContext
from wan_avatar.samples import draw_test_video
from wan_avatar.tasks import in_thread
from wan_avatar.timeline import Timeline


def children(apart: Apart) -> list[psutil.Process]: return psutil.Process(apart.process.pid).children(recursive=True)

def gone(pid: int, seconds: float = 10) -> bool:
    "Does a process end within so long?"
    try: psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess: return True
    except psutil.TimeoutExpired: return False
    return True

# what happens over there (these run apart)

def ready() -> None: "This module is imported once"
def fill() -> int: return len([np.ones(10**7) for _ in range(1000)]) # 80 GB, bit by bit
def ask_at_once() -> int: return np.empty(10**12, np.uint8).size
def many_threads() -> int:
    "Decoders start threads: their stacks count too"
    held = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(64)]
    for thread in held: thread.start()
    return len(held)
def endless() -> None:
    while True: pass
def deaf() -> None:
    "Would outlive a signal that can be ignored"
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(each, signal.SIG_IGN)
    endless()
def end_by(number: int) -> None: os.kill(os.getpid(), number)
def segfault() -> None:
    import ctypes
    ctypes.string_at(1)
class Odd(Exception):
    "Cannot be pickled: it is made of two values and remembers one"
    def __init__(self, a, b): super().__init__(f'{a}{b}')
def odd() -> None: raise Odd('not', 'picklable')
def full_disk() -> None: raise av.FFmpegError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def no_memory() -> None: raise av.FFmpegError(errno.ENOMEM, os.strerror(errno.ENOMEM))
def refuse() -> None: raise JobError('too_long', 'video lasts 61 s', worker_unfit=True)
def count(n: int, progress) -> str:
    for i in range(n): progress(i + 1, n)
    return 'counted'
def about() -> dict:
    return {
        'environment': dict(os.environ),
        'limit': resource.getrlimit(resource.RLIMIT_DATA)[0],
        'core': resource.getrlimit(resource.RLIMIT_CORE)[0],
        'files': len(os.listdir('/proc/self/fd')),
        'score': Path('/proc/self/oom_score_adj').read_text().strip(),
        'threads': threading.active_count(),
    }

FAULTS = [
    (fill, (), 'input_unreadable', 'the video needs more than 300 MB of memory to be read, the limit for one file'),
    (ask_at_once, (), 'input_unreadable', 'the video needs more than 300 MB'),
    (no_memory, (), 'input_unreadable', 'the video needs more than 300 MB'),
    (segfault, (), 'input_unreadable', 'the decoder of the video crashed (by SIGSEGV)'),
    (os.abort, (), 'input_unreadable', 'the decoder of the video crashed (by SIGABRT)'),
    (end_by, (signal.SIGKILL,), 'input_unreadable', 'the decoder of the video crashed (by SIGKILL)'),
    (end_by, (signal.SIGFPE,), 'input_unreadable', 'the decoder of the video crashed (by SIGFPE)'),
    (os._exit, (3,), 'input_unreadable', 'the decoder of the video crashed (with 3)'),
    (refuse, (), 'too_long', 'video lasts 61 s'),
]
@pytest.mark.parametrize('function, args, code, words', FAULTS, ids=[f'{f[0].__name__}{f[1]}' for f in FAULTS])
@pytest.mark.hostile('processes that read')
def test_what_a_file_can_do(apart, function, args, code, words):
    with pytest.raises(JobError) as e: apart.run(function, *args, what='the video', memory=300_000_000)
    assert e.value.code == code
    assert words in e.value.message
    assert e.value.worker_unfit == (function is refuse)
    assert apart.run(pow, 2, 3) == 8 and not children(apart), 'the next call, and nothing left'

ERRORS = [
    (full_disk, (), OSError, 'No space'),
    (os.stat, ('/no/such',), FileNotFoundError, '/no/such'),
    (int, ('x',), ValueError, 'invalid literal'),
    (odd, (), RuntimeError, 'Odd: notpicklable'),
    (os.listdir, ('/proc/self/exe',), NotADirectoryError, 'exe'),
    (divmod, (1, 0), ZeroDivisionError, 'division'),
]
@pytest.mark.parametrize('function, args, kind, words', ERRORS, ids=[e[0].__name__ for e in ERRORS])
def test_other_errors_come_back_as_they_are(apart, function, args, kind, words):
    with pytest.raises(kind, match=words) as e: apart.run(function, *args)
    if function is full_disk: assert e.value.errno == errno.ENOSPC, 'a full disk is no fault of the file'

def test_progress_comes_in_order_and_ends_with_the_last(apart):
    seen = []
    assert apart.run(count, 5000, progress=lambda *p: seen.append(p)) == 'counted'
    assert seen[-1] == (5000, 5000)
    assert seen == sorted(seen)
    assert len(seen) < 1000

def test_what_the_child_is_given(apart, monkeypatch):
    for name in (
        'MINIO_SECRET_KEY',
        'RUNPOD_API_KEY',
        'HF_TOKEN',
        'AWS_SECRET_ACCESS_KEY',
        'SOMETHING_OF_THE_OPERATOR',
    ): monkeypatch.setenv(name, 'secret')
    fresh = Apart('gc:collect')
    told = fresh.run(about)
    fresh.close()
    assert 'secret' not in told['environment'].values()
    assert set(told['environment']) <= set(bare_environment(os.environ)) | {'LC_CTYPE'}
    assert told['limit'] == MEMORY_LIMIT < 10**9
    assert told['core'] == 0
    assert told['score'] == '1000'
    assert told['threads'] == 1
    assert told['files'] <= 12, 'no socket of the worker is open over there'

def test_stacks_of_threads_do_not_eat_the_limit(apart):
    assert apart.run(many_threads, memory=300_000_000) == 64

@pytest.mark.parametrize('function', [endless, deaf])
@pytest.mark.hostile('processes that read')
def test_a_cancelled_call_ends_its_process_at_once(apart, function):
    begun = time.monotonic()
    asked = iter([False] * 3)
    with pytest.raises(JobError, match='cancelled while the video was read') as e:
        apart.run(function, what='the video', cancelled=lambda: next(asked, True))
    assert e.value.code == 'cancelled'
    assert time.monotonic() - begun < 5
    assert not children(apart)

def test_a_call_has_a_longest_time(apart):
    with pytest.raises(JobError, match='the picture takes longer than 0.2 s') as e:
        apart.run(endless, what='the picture', timeout_s=0.2)
    assert e.value.code == 'input_unreadable'
    assert not children(apart)

def test_a_caller_that_fails_ends_the_process(apart):
    def fails(*progress): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): apart.run(count, 10**9, progress=fails)
    assert not children(apart)

def test_calls_beside_each_other_never_notice(apart):
    "Each third one crashes, each third takes all memory"
    def one(i: int):
        try: return apart.run((pow, segfault, ask_at_once)[i % 3], *((i, 2) if i % 3 == 0 else ()))
        except JobError as e: return e.code
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(one, range(30)))
    assert got == [i * i if i % 3 == 0 else 'input_unreadable' for i in range(30)]
    assert not children(apart)

def test_the_waiting_process_may_die():
    apart = Apart('gc:collect')
    assert apart.run(pow, 2, 2) == 4
    first = apart.process.pid
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(apart.run, endless, what='the video')
        while not children(apart): assert not call.done()
        child = children(apart)[0].pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(JobError, match='the process that reads files ended') as e: call.result(timeout=10)
    assert e.value.code == 'internal'
    assert gone(child)
    assert apart.run(pow, 2, 2) == 4
    assert apart.process.pid != first
    last = apart.process.pid
    apart.close()
    assert gone(last)

WORKER = '''
import sys, threading, time
from wan_avatar.apart import Apart
apart = Apart('gc:collect')
threading.Thread(target=lambda: apart.run(time.sleep, 600), daemon=True).start()
import psutil
while not (found := psutil.Process().children(recursive=True))[1:]: time.sleep(0.01)
print(*(p.pid for p in found), flush=True)
time.sleep(600)
'''
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.hostile('processes that read')
def test_nothing_outlives_the_worker(number):
    with subprocess.Popen([sys.executable, '-c', WORKER], stdout=subprocess.PIPE, text=True) as worker:
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.send_signal(number)
        assert len(pids) == 2
        assert all(gone(pid) for pid in pids)

def test_a_forgotten_one_ends_by_itself():
    apart = Apart('gc:collect')
    apart.run(pow, 2, 2)
    pid = apart.process.pid
    del apart
    assert gone(pid)

def test_what_it_costs(apart):
    "The best of several, since others may keep the processor busy"
    apart.run(pow, 2, 2)
    def once() -> float:
        begin = time.perf_counter()
        apart.run(pow, 2, 2)
        return time.perf_counter() - begin
    assert min(once() for _ in range(20)) < 0.05
    assert len(psutil.Process(apart.process.pid).threads()) == 1, 'a process with threads is not to be forked'

# videos

def drawn(path: Path, codec: str, size: tuple[int, int], frames: int, **options: str) -> Path:
    "A video of 10 bits in which something moves"
    with av.open(str(path), 'w') as out:
        options = {'preset': 'ultrafast', **options}
        video = out.add_stream(codec, rate=24, width=size[0], height=size[1], pix_fmt='yuv420p10le', options=options)
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        for i in range(frames):
            picture[:, i * 40:i * 40 + 40] = 50 + 8 * i
            frame = av.VideoFrame.from_ndarray(picture, 'rgb24')
            frame.pts = i
            frame.time_base = Fraction(1, 24)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return path

def normalise(source: Path, folder: Path, progress) -> tuple:
    "Runs apart"
    clip = normalise_video(source, folder / 'driving.y4m', folder / 'audio.m4a', 60, progress=progress)
    return clip, peak_memory()

FOUR_K = [('libx265', 6, {'x265-params': 'log-level=none'}), ('libx264', 18, {'refs': '16'})]
@pytest.mark.parametrize('codec, frames, options', FOUR_K, ids=[f[0] for f in FOUR_K])
def test_4k_of_ten_bits_is_read_within_the_limit(apart, tmp_path, codec, frames, options):
    "H.264 with as many reference frames as there can be"
    source = drawn(tmp_path / 'x.mp4', codec, (3840, 2160), frames, **options)
    seen = []
    clip, peak = apart.run(normalise, source, tmp_path, progress=lambda *p: seen.append(p))
    assert (clip.frames, clip.source.width, clip.source.pixel_format) == (frames, 3840, 'yuv420p10le')
    assert clip.path.exists()
    assert seen[-1] == (frames, replace(clip, audio=None))
    assert peak < 10**9

@pytest.mark.hostile('processes that read')
def test_a_video_that_needs_more_is_refused(apart, tmp_path):
    source = drawn(tmp_path / 'x.mp4', 'libx264', (1920, 1080), 8, refs='16')
    with pytest.raises(JobError) as e: apart.run(normalise, source, tmp_path, memory=130_000_000, progress=print)
    assert e.value.code == 'input_unreadable'
    assert apart.run(pow, 2, 2) == 4

# in a job

def sabotage() -> None:
    "Runs in the waiting process: a decoder of pictures that crashes"
    import wan_avatar.normalise
    wan_avatar.normalise.read_image = lambda path: segfault()

class Shelf:
    "A store of files on this disk"
    def __init__(self, folder: Path): self.folder = folder
    def download(self, key: str, target: Path, *rest, **more) -> int:
        return target.write_bytes((self.folder / key).read_bytes())

JOB = Job(input_image_minio_path='picture', driving_video_path='video')

def a_run(shelf: Path, reading: Apart, folder: Path) -> JobRun:
    worker = WorkerContext(SimpleNamespace(default_driving_video_path=None), Shelf(shelf), None, {}, reading=reading)
    return JobRun(worker, None, folder, Timeline(), Restarts(), job_id='j', job=JOB, key='j.mp4', seed=1, boot=None)

@pytest.mark.hostile('processes that read')
def test_a_decoder_that_crashes_fails_its_job_alone(tmp_path):
    "Two jobs in hand share the waiting process"
    draw_test_video(tmp_path / 'video', size=(320, 240), seconds=2, container='mp4')
    Image.new('RGB', (64, 64)).save(tmp_path / 'picture', 'PNG')
    reading = Apart('wan_avatar.normalise:load_decoders', f'{__name__}:sabotage')
    folders = [tmp_path / name for name in ('a', 'b')]
    for folder in folders: folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = [a_run(tmp_path, reading, folder) for folder in folders]
        whole = pool.submit(take_video, runs[0], lambda *p: None, lambda: False)
        crashed = pool.submit(take_image, runs[1], lambda: False)
        with pytest.raises(JobError) as e: crashed.result(timeout=60)
        assert whole.result(timeout=60)[0].frames == 48
    reading.close()
    assert e.value.code == 'input_unreadable'
    assert 'the decoder of the picture crashed (by SIGSEGV)' in e.value.message

def test_a_cancelled_job_leaves_no_process(apart, tmp_path):
    "Its thread is told, and the process that reads its video is gone when the job is"
    draw_test_video(tmp_path / 'video', size=(320, 240), seconds=20, container='mp4')
    moving = threading.Event()
    async def job() -> None:
        reading = in_thread(take_video, a_run(tmp_path, apart, tmp_path), lambda *p: moving.set())
        task = asyncio.create_task(reading)
        await asyncio.to_thread(moving.wait, 30)
        assert children(apart)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        assert not children(apart)
    asyncio.run(job())

def test_a_clip_comes_back_whole(apart, tmp_path):
    source = draw_test_video(tmp_path / 'x.mp4', audio='aac', size=(64, 48))
    there, _ = apart.run(normalise, source, tmp_path, progress=print)
    here = normalise_video(source, tmp_path / 'driving.y4m', tmp_path / 'audio.m4a', 60)
    assert there == here
