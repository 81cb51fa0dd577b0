"""The scene of a delivered video, through the real ComfyUI with tiny weights: only the person is made

The driving video is drawn and so is its track, which a job takes from the cache: somebody walks through six windows,
is gone for a second, and comes back for a few frames."""
import hashlib
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from conftest import sparing_service

from wan_avatar import render
from wan_avatar.assembly import Assembly
from wan_avatar.frames import FPS, SIZE, RawFrames, Rectangle, read_frames
from wan_avatar.mp4 import Encoder
from wan_avatar.normalise import normalise_video
from wan_avatar.segments import grow_mask
from wan_avatar.track import GROUPS, KEYPOINTS, STILL, TRACKERS, Track, dump_track, pack_mask, track_key
from wan_avatar.workflow import TINY, loaders

WALK, GONE, BACK = 29, 28, 5 # frames: six windows of 9 with 5 shared, nobody, one window of 5
FRAMES = WALK + GONE + BACK
PRESENT = np.array([True] * WALK + [False] * GONE + [True] * BACK)

def place(i: int) -> Rectangle: return Rectangle(100 + 30 * (i % 40), 200, 120, 300)

def frame(i: int) -> np.ndarray: # (720, 1280, 3)
    "A textured wall that changes its light, and a figure in front of it"
    y, x = np.mgrid[:720, :1280]
    out = np.stack([(x * 3 + y) % 97 + i, (y * 2) % 120 + 40, (x + 2 * y) % 83 + 60], -1).astype(np.uint8)
    if PRESENT[i]:
        p = place(i)
        out[p.top:p.bottom, p.left:p.right] = 200, 90, 60
    return out

def mask(i: int) -> np.ndarray:
    out = np.zeros((360, 640), bool)
    p = place(i)
    if PRESENT[i]: out[p.top // 2:p.bottom // 2, p.left // 2:p.right // 2] = True
    return out

def track() -> Track:
    "Of MediaPipe's form: a face and a body in the upper part of the figure"
    random = np.random.default_rng(0)
    points = {}
    for group in GROUPS:
        spread = random.uniform(20, 100, (KEYPOINTS[group], 2))
        where = np.stack([spread + [place(i).left, place(i).top] for i in range(FRAMES)])
        points[group] = np.concatenate([where, np.full((*where.shape[:2], 1), 0.9)], -1).astype(np.float32)
        points[group][~PRESENT] = np.nan
    camera = np.tile(STILL.astype(np.float32), (FRAMES, 1, 1))
    masks = tuple(pack_mask(mask(i)) for i in range(FRAMES))
    return Track(SIZE, PRESENT, points, (640, 360), masks, TRACKERS['mediapipe'], camera=camera,
                 skin=np.full(3, 120, np.float32), plate=frame(WALK))

class Kept:
    "What a job handed to its encoder, and the tails its windows went on from"
    def __init__(self):
        self.frames: list[np.ndarray] = []
        self.tails: list[tuple[int, np.ndarray]] = [] # frame behind the tail, (5, h, w, 3)

@pytest.fixture(scope='module')
def scene(bucket, samples, tiny, tmp_path_factory):
    "A service with the drawn video in its bucket and its track in the cache"
    work = tmp_path_factory.mktemp('scene')
    made = sparing_service(bucket, work, MODELS_DIR=str(tiny()), PROFILE=TINY.name)
    video = work / 'walk.mp4'
    with Encoder(video) as encoder:
        for i in range(FRAMES): encoder.write(frame(i))
    digest = hashlib.sha256(video.read_bytes()).hexdigest()
    made.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
    made.store.upload(video, 'in/walk.mp4', 'video/mp4')
    made.store.write_bytes(track_key(digest, SIZE, FPS), dump_track(track()), 'application/octet-stream')
    clip = normalise_video(video, work / 'driving.y4m', work / 'none.m4a', 60)
    made.driver = list(read_frames(clip.path))
    yield made
    made.close()

def run(scene, monkeypatch, job_id: str, **job) -> tuple[dict, Kept]:
    "A job: its manifest, and what it handed on"
    kept = Kept()
    class Keeping(Encoder):
        def write(self, frame):
            kept.frames.append(frame.copy())
            super().write(frame)
    class Noting(Assembly):
        def close_window(self, window, made):
            found = super().close_window(window, made)
            if self.tail: kept.tails.append((window.stop, np.array(RawFrames(self.tail, SIZE).pixels())))
            return found
    monkeypatch.setattr(render, 'Encoder', Keeping)
    monkeypatch.setattr(render, 'Assembly', Noting)
    inputs = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/walk.mp4'}
    answer = scene.run(job_id, **inputs, seed=3, **job)
    assert 'error' not in answer, answer
    return scene.store.read_json(f'avatars/{job_id}.mp4.json'), kept

@pytest.fixture(scope='module')
def made(scene):
    with pytest.MonkeyPatch.context() as monkeypatch: return run(scene, monkeypatch, 'walk')

def test_outside_the_mask_every_frame_is_the_drivers_byte_for_byte(scene, made):
    _, kept = made
    assert len(kept.frames) == FRAMES
    drawn = track()
    for i, (ours, theirs) in enumerate(zip(kept.frames, scene.driver, strict=True)):
        grown = grow_mask(drawn.mask(i)) if PRESENT[i] else np.zeros(SIZE[::-1], bool)
        assert np.array_equal(ours[~grown], theirs[~grown]), i
        assert PRESENT[i] != np.array_equal(ours, theirs), i

def test_windows_follow_the_person_and_are_said_in_the_manifest(made):
    manifest, _ = made
    said = manifest['scene']
    windows = said['windows']
    assert [(w['start'], w['frames'], w['overlap']) for w in windows] == [
        *((4 * k, 9, 5 if k else 0) for k in range(6)), (WALK + GONE, 5, 0)]
    assert [w['left'] for w in windows[:6]] == sorted({w['left'] for w in windows[:6]}), 'six positions, to the right'
    for w in windows:
        for i in range(w['start'], min(w['start'] + w['frames'], FRAMES)):
            p = place(i)
            assert w['left'] <= p.left and p.right <= w['left'] + said['width']
    assert (said['width'], said['height'], said['sampled']) == (512, 480, [32, 32])
    assert said['made'] == WALK + BACK and said['share'] == pytest.approx(512 * 480 / (1280 * 720), abs=1e-4)
    assert said['saved'] > 2, 'of six windows on a quarter of the frame, and of one that was not made'
    assert not any(w['drift'] or w['changed'] for w in windows), 'noise of tiny weights is no drift of colours'
    assert all(w['ring'] for w in windows)

def test_nobody_sends_no_prompt_and_models_are_loaded_once(scene, made):
    manifest, _ = made
    assert len([s for s in manifest['timeline'] if s['name'] == 'render']) == 7
    async def history() -> dict: return await scene.comfy.get('/history')
    prompts = [p for p in scene.on_loop(history()).values() if 'segment' in p['prompt'][2]]
    assert len(prompts) == 7
    cached = [set(dict(p['status']['messages'])['execution_cached']['nodes']) for p in prompts]
    assert all(set(loaders(TINY)) - {'clip_vision'} <= nodes for nodes in cached)

def test_a_window_goes_on_from_the_frames_as_they_are_delivered(made):
    _, kept = made
    assert [stop for stop, _ in kept.tails] == [9, 13, 17, 21, 25, 29, FRAMES]
    for stop, tail in kept.tails:
        count = min(5, stop)
        assert np.array_equal(tail[-count:], np.stack(kept.frames[stop - count:stop])), stop

def test_the_node_cuts_its_rectangle_out_of_the_tail(scene, made):
    "Seen inside ComfyUI at the scale 1"
    folder = scene.settings.work_dir / 'jobs/tail'
    folder.mkdir()
    tail = np.stack(scene.driver[:5])
    RawFrames(folder / 'tail.u8', SIZE).write(tail)
    code = f'''
import numpy as np
from pathlib import Path
from wan_avatar.frames import Rectangle
from wan_avatar.nodes import WindowInputs, _tail
inputs = WindowInputs(*[Path()] * 2, Path({str(folder.parent.parent / "driving.y4m")!r}), Path(), 0, 9,
                      Rectangle(240, 112, 480, 560), Path({str(folder / "tail.u8")!r}))
np.save({str(folder / "seen.npy")!r}, _tail(inputs, (480, 560)).numpy())
'''
    python = scene.settings.comfy_dir / 'env/bin/python'
    subprocess.run([python, '-c', code], check=True, capture_output=True, timeout=60)
    seen = np.round(np.load(folder / 'seen.npy') * 255).astype(np.uint8)
    assert np.array_equal(seen, tail[:, 112:672, 240:720])

def test_a_switched_off_scene_is_made_whole(scene, monkeypatch):
    "As before: every frame, all of it, as the model gave it"
    off = TINY.changed(rectangle=False, composite=False, match_drift=False, presence=False, steps=1, length=29)
    scene.profiles['all'] = replace(off, name='all')
    manifest, kept = run(scene, monkeypatch, 'all', profile='all')
    said = manifest['scene']
    assert (said['width'], said['height'], said['made'], said['saved']) == (1280, 720, FRAMES, 1.0)
    assert not any(np.array_equal(a, b) for a, b in zip(kept.frames, scene.driver, strict=True))
    assert not any(w['changed'] for w in said['windows'])
