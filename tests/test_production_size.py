"""Production's own profile at its own size, from job to MP4

Only the weights are small, the steps one and the windows short. What is sampled is the rectangle around the person, as
in production; the frame is 1280x720."""
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import cut, sparing_service

from wan_avatar import render
from wan_avatar.frames import read_frames
from wan_avatar.mp4 import Encoder, check_mp4
from wan_avatar.normalise import normalise_video
from wan_avatar.segments import grow_mask
from wan_avatar.track import parse_track
from wan_avatar.workflow import TINY, WAN, profile_graph, vision_graph

FRAMES = 13 # two windows of 9, of which the second goes on from 5

# what makes it possible on a CPU; everything else is WAN's, as the first test says
SMALL = replace(
    WAN, name='production-small', length=9, values={**WAN.values, 'steps': 1},
    weights=TINY.weights, clip_vision=TINY.clip_vision, vision_loader=TINY.vision_loader,
    detectors=tuple(replace(w, bytes=None) for w in WAN.detectors),
    encoder=TINY.encoder, encoder_sha256=TINY.encoder_sha256,
    prompt=TINY.prompt, negative_prompt=TINY.negative_prompt)

def test_only_weights_steps_and_frames_are_small():
    changed = {f.name for f in fields(WAN) if getattr(WAN, f.name) != getattr(SMALL, f.name)}
    files = {'weights', 'clip_vision', 'vision_loader', 'detectors', 'encoder', 'encoder_sha256'}
    assert changed == files | {'name', 'length', 'prompt', 'negative_prompt', 'values'}
    assert {k for k in WAN.values if WAN.values[k] != SMALL.values[k]} == {'steps'}
    assert profile_graph(WAN).keys() == profile_graph(SMALL).keys()
    assert SMALL.face
    assert vision_graph(SMALL)

@pytest.fixture(scope='module')
def production(bucket, samples, tiny, detectors, tmp_path_factory):
    models = shutil.copytree(detectors, tiny('--face'), dirs_exist_ok=True)
    work = tmp_path_factory.mktemp('production')
    clip = cut(samples / 'pexels.mp4', FRAMES, tmp_path_factory.mktemp('clip'))
    made = sparing_service(bucket, work, [SMALL], MODELS_DIR=str(models), PROFILE=TINY.name, WARMUP='false')
    made.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
    made.store.upload(clip, 'in/thirteen.mp4', 'video/mp4')
    yield made
    made.close()

def test_two_windows_at_1280x720(production, tmp_path, monkeypatch):
    delivered = []
    class Keeping(Encoder):
        def write(self, frame):
            delivered.append(frame.copy())
            super().write(frame)
    monkeypatch.setattr(render, 'Encoder', Keeping)
    inputs = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/thirteen.mp4'}
    answer = production.submit('size', **inputs, seed=1, profile=SMALL.name).result(timeout=1500)
    assert 'error' not in answer, answer
    manifest = production.store.read_json('avatars/size.mp4.json')
    facts = [s['facts'] for s in manifest['timeline'] if s['name'] == 'render']
    assert [(f['segment'], f['frames']) for f in facts] == [(0, 9), (1, 9)]
    settings = {'width': 560, 'height': 720, 'vision': 'clip', 'face': True} # the drawn detector's person, and a margin
    assert {k: manifest['rendered_with'][k] for k in settings} == settings
    assert (manifest['scene']['width'], manifest['scene']['sampled']) == (560, [560, 720]), 'sampled as it is delivered'
    assert manifest['scene']['saved'] > 2
    production.store.download(answer['minio_key'], tmp_path / 'made.mp4', 'x', 10**9)
    check_mp4(tmp_path / 'made.mp4', FRAMES, has_audio=True, source_type='trainedAlgorithmicMedia')
    frames = np.stack(list(read_frames(tmp_path / 'made.mp4')))
    assert frames.shape == (FRAMES, 720, 1280, 3)
    assert all(f.std() > 1 for f in frames), 'a frame without a picture'
    only_the_person_is_made(production, delivered, tmp_path)

def only_the_person_is_made(production, delivered: list[np.ndarray], folder: Path) -> None:
    keys = production.store.list('tracks/wholebody-sam2')
    tracks = [parse_track(production.store.read_bytes(k, 10**9)) for k in keys]
    track = next(t for t in tracks if len(t) == FRAMES)
    production.store.download('in/thirteen.mp4', folder / 'in.mp4', 'x', 10**9)
    clip = normalise_video(folder / 'in.mp4', folder / 'driving.y4m', folder / 'sound.m4a', 60)
    for i, (ours, theirs) in enumerate(zip(delivered, read_frames(clip.path), strict=True)):
        grown = grow_mask(track.mask(i), SMALL.mask_shape)
        assert np.array_equal(ours[~grown], theirs[~grown]), i
        assert not np.array_equal(ours, theirs), i
