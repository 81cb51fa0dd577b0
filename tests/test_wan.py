"""The production graph on tiny random checkpoints, in the real ComfyUI: every node, link and shape"""
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Service, cut

from wan_avatar.workflow import WAN

PYTHON = ROOT / '.comfy/env/bin/python'

@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    "What `wan-avatar tiny-weights` writes, and empty files under production's names, so that loaders offer them"
    folder = tmp_path_factory.mktemp('models')
    subprocess.run([ROOT / '.venv/bin/wan-avatar', 'tiny-weights', folder], cwd=ROOT, check=True, capture_output=True)
    for w in (*WAN.weights, WAN.encoder):
        (folder / w.folder).mkdir(exist_ok=True)
        (folder / w.folder / w.file).touch()
    return folder

@pytest.fixture(scope='module')
def wan(bucket, samples, weights, tmp_path_factory):
    made = Service(bucket, tmp_path_factory.mktemp('wan'), MODELS_DIR=str(weights), PROFILE='wan22-animate-tiny')
    made.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
    made.store.upload(cut(samples / 'pexels.mp4', 20, tmp_path_factory.mktemp('short')), 'in/short.mp4', 'video/mp4')
    yield made
    made.close()

JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/short.mp4'}

@pytest.fixture(scope='module')
def made(wan):
    answer = wan.run('tiny', **JOB, seed=7)
    assert 'error' not in answer, answer
    return answer

def test_several_windows_with_masks_tail_and_embedding(wan, made):
    assert (made['width'], made['height'], made['frames'], made['profile'], made['seed']) == (1280, 720, 20, 'wan22-animate-tiny', 7)
    manifest = wan.store.read_json('avatars/tiny.mp4.json')
    assert [(s['facts']['segment'], s['facts']['frames']) for s in manifest['timeline'] if s['name'] == 'render'] == [(0, 9), (1, 9), (2, 9), (3, 9)]
    assert manifest['profile_values']['steps'] == 2 and [s['facts']['from'] for s in manifest['timeline'] if s['name'] == 'prompt'] == ['here']

def test_one_seed_one_video_another_seed_another(wan, made):
    assert wan.run('tiny-again', **JOB, seed=7)['sha256'] == made['sha256']
    assert wan.run('tiny-other', **JOB, seed=8)['sha256'] != made['sha256']
