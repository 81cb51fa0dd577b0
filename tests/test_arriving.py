"""What is done with a job's inputs while they are still on their way"""
import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pytest
from av.video.reformatter import VideoReformatter

from wan_avatar.comfy import run as run_graph
from wan_avatar.frames import FrameWriter, measure_frames, read_frames, to_yuv
from wan_avatar.inputs import Arriving, fetch_inputs, is_soon_whole
from wan_avatar.job import JobError
from wan_avatar.samples import read_test_picture
from wan_avatar.timeline import Timeline
from wan_avatar.track import load_track
from wan_avatar.tracks import Early, track_early
from wan_avatar.workflow import bind, get_profile, track_graph

# a video that is read while it is written

WRITER = """
import sys
from av.video.reformatter import VideoReformatter
from wan_avatar.frames import FrameWriter, read_frames, to_yuv
from wan_avatar.samples import draw_test_picture
target, source, stops = sys.argv[1], sys.argv[2], int(sys.argv[3])
shown = read_frames(source, 120, 24) if source else (draw_test_picture(i, (64, 48)) for i in range(24))
with FrameWriter(target, (640, 360) if source else (64, 48)) as made:
    for n, frame in enumerate(shown, 1):
        made.write(to_yuv(frame, VideoReformatter()))
        if n == stops: print(n, flush=True), input()
"""

class Writer:
    "Another process that writes 24 frames, and stops after some of them until it is told to go on"
    def __init__(self, target: Path, stops: int, source: Path | str = ''):
        command = [sys.executable, '-c', WRITER, target, source, str(stops)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().strip() == str(stops)

    def go_on(self) -> None: self.process.communicate('\n', timeout=60)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=60)

@pytest.mark.parametrize('stops', [1, 7, 23])
def test_a_reader_waits_for_frames_and_not_for_the_end(tmp_path, stops):
    writer = Writer(tmp_path / 'v.y4m', stops)
    shown = read_frames(tmp_path / 'v.y4m')
    assert [read_test_picture(next(shown)) for _ in range(stops)] == list(range(stops))
    with ThreadPoolExecutor(1) as pool:
        next_one = pool.submit(next, shown)
        with pytest.raises(TimeoutError): next_one.result(0.2)
        writer.go_on()
        rest = [read_test_picture(frame) for frame in (next_one.result(60), *shown)]
    assert rest == list(range(stops, 24))
    assert measure_frames(tmp_path / 'v.y4m') == ((64, 48), 24)

def test_a_reader_ends_where_a_killed_writer_stopped(tmp_path):
    writer = Writer(tmp_path / 'v.y4m', 5)
    shown = read_frames(tmp_path / 'v.y4m')
    first = read_test_picture(next(shown))
    writer.kill()
    assert [first, *map(read_test_picture, shown)] == list(range(5))
    with pytest.raises(JobError, match='has 5 frames; 24 from 0 on were asked for'):
        list(read_frames(tmp_path / 'v.y4m', count=24))

@pytest.mark.parametrize('taken', [1, 24])
def test_a_reader_that_ends_holds_no_file(tmp_path, taken):
    Writer(tmp_path / 'v.y4m', 24).go_on()
    shown = read_frames(tmp_path / 'v.y4m')
    for _ in range(taken): next(shown)
    shown.close()
    assert [f.path for f in psutil.Process().open_files() if f.path.endswith('.y4m')] == []

@pytest.mark.parametrize('start, count', [(0, 3), (1, 1), (23, 1), (5, None), (0, None), (5, 0)])
def test_frames_of_any_index_come_back_as_they_are(tmp_path, start, count):
    shapes = np.random.default_rng(3).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    with FrameWriter(tmp_path / 'v.y4m', (64, 48)) as made:
        for frame in shapes: made.write(to_yuv(frame, VideoReformatter()))
    whole = list(read_frames(tmp_path / 'v.y4m'))
    part = list(read_frames(tmp_path / 'v.y4m', start, count))
    assert np.array_equal(part, whole[start:None if count is None else start + count])

@pytest.mark.parametrize('name, says', [('v.mp4', 'call it \\*.y4m'), ('v.y4m', "\\(48, 64, 'yuv420p'\\)")])
def test_a_video_that_cannot_be_read_so_is_not_written(tmp_path, name, says):
    with pytest.raises(JobError, match=says), FrameWriter(tmp_path / name, (64, 48)) as made:
        made.write(av.VideoFrame(48, 64))
    assert list(tmp_path.iterdir()) == []

def test_comfyui_tracks_a_video_that_is_still_written(service, samples):
    "Its writer goes on only when frames were tracked; the track is that of the complete video"
    folder = service.settings.work_dir / 'jobs/growing'
    folder.mkdir(parents=True)
    writer = Writer(folder / 'v.y4m', 12, samples / 'pexels.mp4')
    tracked = threading.Event()
    seen = []
    def progress(p) -> None:
        seen.append((p.value, p.maximum))
        tracked.set()
    def track(name: str, **more) -> dict:
        slots = {'source': 'jobs/growing/v.y4m', 'kind': 'video', 'track': f'jobs/growing/{name}.track'}
        graph = bind(track_graph(get_profile('draft')), slots)
        graph['track']['inputs'].update(more)
        return graph
    running = service.background.submit(run_graph(service.comfy, track('early', expected=24), progress))
    assert tracked.wait(60), 'no frame was tracked before all were written'
    assert not running.done()
    writer.go_on()
    running.result(60)
    assert seen[-1] == (24, 24)
    service.on_loop(run_graph(service.comfy, track('late')))
    early, late = (load_track(folder / f'{name}.track') for name in ('early', 'late'))
    assert len(early) == 24 and early.masks == late.masks
    for name in early.points: assert np.array_equal(early.points[name], late.points[name], equal_nan=True), name
    assert np.array_equal(early.plate, late.plate)

# who has the renderer meanwhile

class Stage:
    "A job's run without a worker around it: what was tracked, and what was reported"
    def __init__(self, monkeypatch, cached: bool = False, fault: JobError | None = None):
        self.renderer = asyncio.Lock()
        store = SimpleNamespace(stat=lambda key: {'bytes': 9} if cached else None)
        self.worker = SimpleNamespace(renderer=self.renderer, store=store)
        self.timeline = Timeline()
        self.fault = fault
        self.tracked: list[str] = []
        self.stages: list[str] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        for name in ('track_reference', 'track_file', '_keep_track'): monkeypatch.setattr(
            f'wan_avatar.tracks.{name}', getattr(self, name))
        monkeypatch.setattr('wan_avatar.tracks.track_object', lambda run, inputs: 'key')

    def report(self, update) -> None: self.stages.append(update.stage)

    async def track_reference(self, run, picture) -> Path:
        assert self.renderer.locked()
        self.tracked.append('picture')
        if self.fault: raise self.fault
        return Path('picture.track')

    async def track_file(self, run, source, kind, progress, expected) -> Path:
        assert self.renderer.locked() and (kind, expected) == ('video', 24)
        self.tracked.append('video')
        progress(1, expected)
        await self.goes_on.wait()
        progress(2, expected)
        return Path('video.track')

    async def _keep_track(self, run, inputs, file) -> str: return f'read from {file}'

    async def early(self, person=None, whole: bool = True) -> Early:
        loop = asyncio.get_running_loop()
        self.arriving = Arriving(loop.create_future(), loop.create_future(), asyncio.Event())
        self.arriving.picture.set_result(Path('a.png'))
        clip = SimpleNamespace(path=Path('v.y4m'), frames=24)
        self.arriving.video.set_result(SimpleNamespace(clip=clip, person=person))
        if whole: self.arriving.whole.set()
        return await track_early(self, self.arriving)

BOTH = Early(Path('picture.track'), 'read from video.track')
PICTURE = Early(Path('picture.track'))
@pytest.mark.parametrize('taken, cached, person, found', [
    (False, False, None, BOTH),
    (False, True, None, PICTURE), # the video's track is in the bucket
    (False, False, 'the left one', PICTURE), # where the picture's corner is, is certain only at the end
    (True, False, None, Early()), # a job has the renderer
])
def test_what_is_tracked_early(monkeypatch, taken, cached, person, found):
    async def job():
        stage = Stage(monkeypatch, cached)
        if taken: await stage.renderer.acquire()
        assert await stage.early(person) == found
        assert stage.renderer.locked() == taken, 'given back'
    asyncio.run(job())

def test_a_picture_that_is_refused_early(monkeypatch):
    async def job():
        stage = Stage(monkeypatch, fault=JobError('no_person', 'a cat'))
        with pytest.raises(JobError, match='a cat'): await stage.early()
        assert stage.tracked == ['picture'] and not stage.renderer.locked()
    asyncio.run(job())

def test_until_a_video_is_complete_its_reading_is_told(monkeypatch):
    async def job():
        stage = Stage(monkeypatch)
        stage.goes_on.clear()
        early = asyncio.create_task(stage.early(whole=False))
        while 'video' not in stage.tracked: await asyncio.sleep(0)
        assert stage.stages == []
        stage.arriving.whole.set()
        stage.goes_on.set()
        assert await early == BOTH
        assert stage.stages == ['track']
    asyncio.run(job())

def test_a_video_that_stops_arriving_gives_the_renderer_back(monkeypatch):
    async def job():
        monkeypatch.setattr('wan_avatar.tracks.LATE_S', 0.05)
        stage = Stage(monkeypatch)
        stage.goes_on.clear()
        assert await stage.early(whole=False) == PICTURE
        assert stage.tracked == ['picture', 'video'] and not stage.renderer.locked()
    asyncio.run(job())

# the first failure counts

def takes(monkeypatch, video) -> SimpleNamespace: # a run
    monkeypatch.setattr('wan_avatar.inputs.take_image', lambda run, cancelled: Path('a.png'))
    monkeypatch.setattr('wan_avatar.inputs.take_video', video)
    return SimpleNamespace(folder=Path('job'), progress=lambda stage: None, job=SimpleNamespace(person=None))

def test_a_picture_that_is_refused_stops_the_video(monkeypatch):
    "And the picture is looked at while the video is on its way"
    on_its_way = threading.Event()
    stopped = []
    def video(run, progress, cancelled, begun):
        on_its_way.set()
        for _ in range(3000):
            if cancelled(): break
            threading.Event().wait(0.01)
        stopped.append(cancelled())
        raise JobError('cancelled', 'the video')
    async def look(arriving):
        picture = await arriving.picture
        assert await asyncio.to_thread(on_its_way.wait, 30)
        raise JobError('no_person', f'{picture} shows a cat')
    with pytest.raises(JobError, match='a.png shows a cat'): asyncio.run(fetch_inputs(takes(monkeypatch, video), look))
    assert stopped == [True]

@pytest.mark.parametrize('fault', [None, JobError('no_person', 'nobody in what there is'), JobError('internal', 'x')])
def test_a_video_that_breaks_off_says_so_whatever_was_tracked(monkeypatch, fault):
    tracked = threading.Event()
    async def job():
        stage = Stage(monkeypatch)
        async def track_file(run, source, kind, progress, expected):
            tracked.set()
            if fault: raise fault
        monkeypatch.setattr('wan_avatar.tracks.track_file', track_file)
        def video(run, progress, cancelled, begun):
            begun(SimpleNamespace(path=Path('v.y4m'), frames=24), 'digest')
            assert tracked.wait(30)
            threading.Event().wait(0.05) # the tracker's end arrives first
            raise JobError('input_unreadable', 'it breaks off')
        run = takes(monkeypatch, video)
        async def early(arriving): return await track_early(stage, arriving)
        with pytest.raises(JobError, match='it breaks off'): await fetch_inputs(run, early)
        assert not stage.renderer.locked()
    asyncio.run(job())

@pytest.mark.parametrize('done, expected, spent_s, soon', [
    (0, 240, 0.0, True), # nothing is known
    (0, 240, 0.1, False),
    (24, 240, 1.0, True), # nine more seconds
    (24, 14400, 1.0, False), # ten minutes
    (14000, 14400, 580.0, True),
    (240, 240, 500.0, True), # it is complete
])
def test_a_video_is_looked_at_early_when_it_will_be_complete_before_long(done, expected, spent_s, soon):
    assert is_soon_whole(done, expected, spent_s) is soon
