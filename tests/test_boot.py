"""A worker gets its weights from a local hub while ComfyUI starts, warms up and renders: the production graph on tiny checkpoints"""
import functools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Service, cut, make_settings

import wan_avatar.fetch as fetching
from wan_avatar.fetch import Hub
from wan_avatar.hub import ModelHub, model_hub
from wan_avatar.job import JobError
from wan_avatar.models import Lock, Needs, dump_lock, load_lock
from wan_avatar.prompt import Embedding
from wan_avatar.timeline import Timeline
from wan_avatar.worker import Background, boot
from wan_avatar.workflow import ENCODER, TINY

EMBEDDING = Embedding(TINY.prompt, TINY.encoder_sha256)
JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/short.mp4'}

@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    "What `wan-avatar tiny-weights` writes"
    folder = tmp_path_factory.mktemp('tiny')
    subprocess.run([ROOT / '.venv/bin/wan-avatar', 'tiny-weights', folder], cwd=ROOT, check=True, capture_output=True)
    return folder

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    with model_hub(tmp_path_factory.mktemp('hub')) as served: yield served

@pytest.fixture(scope='module')
def lock(hub: ModelHub, weights) -> Lock:
    "The tiny profile as production's is pinned: a tracker's file, the renderer's, and a text encoder nobody should fetch"
    def put(name: str, place: str, data: Path | bytes):
        return replace(hub.put('org/tiny', f'weights/{place}', data), name=name, folder=place.split('/')[0], file=place.split('/')[1])
    files = [put(w.slot, f'{w.folder}/{w.file}', weights / w.folder / w.file) for w in TINY.weights]
    files += [put('keypoints', 'detection/keypoints.onnx', b'a tracker'), put('text_encoder', 'text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors', bytes(3_000_000))]
    needs = Needs(renderer=tuple(w.slot for w in TINY.weights), tracker=('keypoints',), text_encoder='text_encoder', prompt=TINY.prompt)
    return replace(load_lock(), profiles={TINY.name: needs}, files={f.name: f for f in files})

@pytest.fixture
def environment(hub, lock, tmp_path, monkeypatch) -> dict[str, str]:
    (tmp_path / 'lock.json').write_text(dump_lock(lock))
    monkeypatch.setattr(fetching, 'Hub', functools.partial(Hub, endpoint=hub.endpoint))
    hub.requests.clear()
    return {'PROFILE': TINY.name, 'MODELS_LOCK': str(tmp_path / 'lock.json'), 'MODELS_DIR': str(tmp_path / 'models'), 'HF_TOKEN': hub.token, 'MODELS_CACHE': str(tmp_path / 'mount')}

def asked(hub: ModelHub, file: str) -> list: return [r for r in hub.requests if file in r.path]

def test_a_cold_worker_fetches_warms_up_and_renders(hub, bucket, samples, weights, environment, lock, tmp_path, caplog):
    caplog.set_level('INFO')
    store_before = fetching.Store(make_settings(bucket, tmp_path))
    store_before.upload(weights / 'embeddings' / EMBEDDING.name, f'embeddings/{EMBEDDING.name}', 'application/octet-stream')
    service = Service(bucket, tmp_path / 'work', **environment)
    try:
        stages = {s['name']: s for s in json.loads((tmp_path / 'work/boot.json').read_text())['stages']}
        order = [s for s in stages if s.startswith('weights/')]
        assert order[0] == 'weights/keypoints' and set(order[1:]) == {f'weights/{w.slot}' for w in TINY.weights}
        assert stages['weights']['facts'] | {'files': 5} == stages['weights']['facts'] and stages['weights']['facts']['fetched'] == stages['weights']['facts']['bytes'] > 10**6
        assert stages['weights']['begin_s'] < stages['comfy']['end_s'] and stages['warm-up']['begin_s'] >= max(stages['comfy']['end_s'], stages['weights']['end_s'])
        assert asked(hub, ENCODER.file) == [], 'an embedding is in the bucket: no text encoder'
        service.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
        service.store.upload(cut(samples / 'pexels.mp4', 9, tmp_path), 'in/short.mp4', 'video/mp4')
        answer = service.run('cold', **JOB, seed=7)
        assert answer.get('frames') == 9, answer
        own = service.run('own-prompt', **JOB, seed=7, prompt='a person who waves')
        assert 'comfy_failed' in own['error'], 'the encoder of this test is zeros'
        assert asked(hub, ENCODER.file) and (tmp_path / 'models/text_encoders' / ENCODER.file).stat().st_size == 3_000_000
    finally: service.close()

def test_a_worker_with_everything_in_a_cached_mount_asks_nobody(hub, bucket, weights, environment, lock, tmp_path):
    snapshot = Path(environment['MODELS_CACHE']) / 'models--me--bundle/snapshots/c0ffee'
    places = {**{f.place: hub.blob(f.sha256) for f in lock.files.values() if f.name != 'text_encoder'}, f'embeddings/{EMBEDDING.name}': weights / 'embeddings' / EMBEDDING.name}
    for place, blob in places.items():
        (snapshot / place).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / place).symlink_to(blob)
    service = Service(bucket, tmp_path / 'work', **environment)
    try: assert hub.requests == [] and all((tmp_path / 'models' / place).resolve() == blob.resolve() for place, blob in places.items())
    finally: service.close()

def test_weights_that_can_not_be_had_end_the_boot_and_comfyui(hub, bucket, environment, lock, tmp_path):
    Path(environment['MODELS_LOCK']).write_text(dump_lock(replace(lock, files={n: replace(f, revision='e' * 40) for n, f in lock.files.items()})))
    background = Background()
    try:
        with pytest.raises(JobError, match='there is no revision e{40}; correct the lock') as e:
            background.submit(boot(make_settings(bucket, tmp_path / 'work', **environment), Timeline())).result(timeout=60)
        assert e.value.worker_unfit
    finally: background.close()
    assert not [p for p in psutil.Process().children(recursive=True) if str(tmp_path) in ' '.join(p.cmdline())]
