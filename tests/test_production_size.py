"""Production's own profile at its own size, from job to MP4

Only the weights are small, the steps one and the windows short."""
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import cut, sparing_service

from wan_avatar.frames import read_frames
from wan_avatar.mp4 import check_mp4
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

def test_two_windows_at_1280x720(production, tmp_path):
    inputs = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/thirteen.mp4'}
    answer = production.submit('size', **inputs, seed=1, profile=SMALL.name).result(timeout=1500)
    assert 'error' not in answer, answer
    manifest = production.store.read_json('avatars/size.mp4.json')
    facts = [s['facts'] for s in manifest['timeline'] if s['name'] == 'render']
    assert [(f['segment'], f['frames']) for f in facts] == [(0, 9), (1, 9)]
    settings = {'width': 1280, 'height': 720, 'vision': 'clip', 'face': True}
    assert {k: manifest['rendered_with'][k] for k in settings} == settings
    production.store.download(answer['minio_key'], tmp_path / 'made.mp4', 'x', 10**9)
    check_mp4(tmp_path / 'made.mp4', FRAMES, has_audio=True)
    frames = np.stack(list(read_frames(tmp_path / 'made.mp4')))
    assert frames.shape == (FRAMES, 720, 1280, 3)
    assert all(f.std() > 1 for f in frames), 'a frame without a picture'
