"""A worker gets its weights from a local hub while ComfyUI starts, warms up and renders

The production graph on tiny checkpoints."""
import asyncio
import functools
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import SPARING, Service, cut, make_settings
from test_bundle import embedding_bytes

from wan_avatar import sources
from wan_avatar.hub import ModelHub, model_hub
from wan_avatar.job import JobError
from wan_avatar.launch import ComfyPlace, launch
from wan_avatar.models import Lock, LockedFile, Needs, dump_lock, load_lock
from wan_avatar.prompt import Embedding
from wan_avatar.store import Store
from wan_avatar.tasks import Background
from wan_avatar.timeline import Timeline
from wan_avatar.worker import boot, check_fit, shut_down, warm_up
from wan_avatar.workflow import TINY, WAN, Profile, Weight, needed_files, with_tracker

EMBEDDING = Embedding(TINY.prompt, TINY.encoder_sha256)
JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/short.mp4'}

@pytest.fixture(scope='module', autouse=True)
def sparing():
    "Every ComfyUI of this file renders on a CPU"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SPARING.items(): patched.setenv(name, value)
        yield

@pytest.fixture(scope='module')
def weights(tiny) -> Path:
    "The files of `wan-avatar tiny-weights`"
    return tiny()

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    with model_hub(tmp_path_factory.mktemp('hub')) as served: yield served

@pytest.fixture(scope='module')
def lock(hub: ModelHub, weights) -> Lock:
    "The tiny profile, pinned like production's: a tracker's file, the renderer's, and a text encoder"
    def put(name: str, place: str, data: Path | bytes) -> LockedFile:
        folder, file = place.split('/')
        return replace(hub.put('org/tiny', f'weights/{place}', data), name=name, folder=folder, file=file)
    files = [put(w.slot, w.place, weights / w.place) for w in needed_files(TINY)]
    files.append(put('keypoints', 'detection/keypoints.onnx', b'a tracker'))
    files.append(put('text_encoder', TINY.encoder.place, bytes(3_000_000)))
    renderer = tuple(w.slot for w in needed_files(TINY))
    needs = Needs(renderer=renderer, tracker=('keypoints',), text_encoder='text_encoder', prompt=TINY.prompt)
    return replace(load_lock(), profiles={TINY.name: needs}, files={f.name: f for f in files})

@pytest.fixture
def environment(hub, lock, tmp_path, monkeypatch) -> dict[str, str]:
    (tmp_path / 'lock.json').write_text(dump_lock(lock))
    monkeypatch.setattr(sources, 'Hub', functools.partial(sources.Hub, endpoint=hub.endpoint))
    hub.requests.clear()
    return {
        'PROFILE': TINY.name,
        'MODELS_LOCK': str(tmp_path / 'lock.json'),
        'MODELS_DIR': str(tmp_path / 'models'),
        'MODELS_CACHE': str(tmp_path / 'mount'),
        'HF_TOKEN': hub.token,
    }

def asked(hub: ModelHub, file: str) -> list: return [r for r in hub.requests if file in r.path]

EMBEDDING_KEY = f'embeddings/{EMBEDDING.name}'
BINARY = 'application/octet-stream'

def test_a_cold_worker_fetches_warms_up_and_renders(hub, bucket, samples, weights, environment, lock, tmp_path, caplog):
    caplog.set_level('INFO')
    store_before = Store(make_settings(bucket, tmp_path))
    store_before.upload(weights / EMBEDDING_KEY, EMBEDDING_KEY, BINARY)
    service = Service(bucket, tmp_path / 'work', **environment)
    try:
        stages = {s['name']: s for s in json.loads((tmp_path / 'work/boot.json').read_text())['stages']}
        order = [s for s in stages if s.startswith('weights/')]
        assert order[0] == 'weights/keypoints'
        assert set(order[1:]) == {f'weights/{w.slot}' for w in needed_files(TINY)}
        facts = stages['weights']['facts']
        assert facts['files'] == 6
        assert facts['fetched'] == facts['bytes'] > 10**6
        assert stages['weights']['begin_s'] < stages['comfy']['end_s']
        assert stages['warm-up']['begin_s'] >= stages['comfy']['end_s']
        assert stages['warm-up']['begin_s'] >= stages['weights']['end_s']
        assert asked(hub, TINY.encoder.file) == [], 'an embedding is in the bucket: no text encoder'
        service.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
        service.store.upload(cut(samples / 'pexels.mp4', 9, tmp_path), 'in/short.mp4', 'video/mp4')
        answer = service.run('cold', **JOB, seed=7)
        assert answer.get('frames') == 9, answer
        own = service.run('own-prompt', **JOB, seed=7, prompt='a person who waves')
        assert 'comfy_failed' in own['error'], 'the encoder of this test is zeros'
        assert asked(hub, TINY.encoder.file)
        assert (tmp_path / 'models' / TINY.encoder.place).stat().st_size == 3_000_000
    finally: service.close()

def test_a_worker_with_everything_in_a_cached_mount_asks_nobody(hub, bucket, weights, environment, lock, tmp_path):
    snapshot = Path(environment['MODELS_CACHE']) / 'models--me--bundle/snapshots/c0ffee'
    places = {f.place: hub.blob(f.sha256) for f in lock.files.values() if f.name != 'text_encoder'}
    places[EMBEDDING_KEY] = weights / EMBEDDING_KEY
    for place, blob in places.items():
        (snapshot / place).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / place).symlink_to(blob)
    service = Service(bucket, tmp_path / 'work', **environment)
    service.close()
    assert hub.requests == []
    for place, blob in places.items(): assert (tmp_path / 'models' / place).resolve() == blob.resolve()

def test_a_worker_boots_in_spite_of_a_poisoned_default_embedding(hub, bucket, environment, tmp_path, monkeypatch):
    "Every place has one without offsets; the encoder is fetched and run anew, and the bucket's embedding is replaced"
    tensor = {'dtype': 'F16', 'shape': EMBEDDING.shape}
    header = json.dumps({'__metadata__': EMBEDDING.metadata(), 'embedding': tensor}).encode()
    poison = len(header).to_bytes(8, 'little') + header + bytes(4_194_304)
    snapshot = Path(environment['MODELS_CACHE']) / 'models--me--bundle/snapshots/c0ffee/embeddings'
    for folder in (snapshot, tmp_path / 'models/embeddings', tmp_path / 'work/embeddings'):
        folder.mkdir(parents=True)
        (folder / EMBEDDING.name).write_bytes(poison)
    Store(make_settings(bucket, tmp_path)).write_bytes(EMBEDDING_KEY, poison, BINARY)
    async def ask(run, wanted, target) -> None: # the encoder is 5.7 B parameters and cannot be had here
        assert wanted == EMBEDDING
        assert not target.exists()
        target.write_bytes(embedding_bytes(wanted))
    monkeypatch.setattr('wan_avatar.embeddings.make_embedding', ask)
    service = Service(bucket, tmp_path / 'work', **environment)
    service.close()
    assert service.store.read_bytes(EMBEDDING_KEY, 10**8) == embedding_bytes(EMBEDDING)
    assert asked(hub, TINY.encoder.file)

def test_weights_that_cannot_be_had_end_the_boot_and_comfyui(hub, bucket, environment, lock, tmp_path):
    moved = {name: replace(file, revision='e' * 40) for name, file in lock.files.items()}
    Path(environment['MODELS_LOCK']).write_text(dump_lock(replace(lock, files=moved)))
    settings = make_settings(bucket, tmp_path / 'work', **environment)
    background = Background()
    try:
        with pytest.raises(JobError, match='there is no revision e{40}; correct the lock') as e:
            background.submit(boot(settings, Timeline())).result(timeout=60)
        assert e.value.worker_unfit
    finally: background.close()
    assert not [p for p in psutil.Process().children(recursive=True) if str(tmp_path) in ' '.join(p.cmdline())]

@pytest.mark.parametrize('turns', [0, 1, 3, 10, 100])
def test_a_worker_that_is_stopped_while_it_boots_leaves_no_comfyui(bucket, tmp_path, turns):
    "Stopped when its loop has turned so often, while a ComfyUI that was started early does not answer yet"
    (python := tmp_path / 'comfy/env/bin/python').parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nexec sleep 600\n')
    python.chmod(0o755)
    settings = make_settings(bucket, tmp_path / 'work', COMFY_DIR=str(tmp_path / 'comfy'))
    launched = launch(ComfyPlace(settings.comfy_dir, settings.work_dir, settings.models_dir))
    background = Background()
    async def turn() -> None:
        for _ in range(turns): await asyncio.sleep(0)
    booted = background.submit(boot(settings, Timeline(), launched))
    background.submit(turn()).result(timeout=30)
    shut_down(background, booted)
    assert booted.cancelled()
    assert launched.process.poll() is not None
    assert not background.thread.is_alive()

# weights that do not fit

def edited(models: Path, slot: str, gone: str = '', new: str = '') -> Profile:
    "The tiny profile with one tensor of one of its files left out or added"
    weight = next(w for w in TINY.weights if w.slot == slot)
    mine = replace(weight, file=f'edited-{weight.file}')
    places = [models / w.folder / w.file for w in (weight, mine)]
    tensors = read_safetensors(places[0])
    if gone: del tensors[gone]
    if new: tensors[new] = next(iter(tensors.values()))
    write_safetensors(places[1], tensors)
    return replace(TINY, weights=tuple(mine if w is weight else w for w in TINY.weights))

def read_safetensors(path: Path) -> dict[str, tuple[dict, bytes]]: # tensor -> its type and shape, its bytes
    "Without torch, whose import takes longer than the test"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    header.pop('__metadata__', None)
    places = {name: [start + at for at in told.pop('data_offsets')] for name, told in header.items()}
    return {name: (told, data[slice(*places[name])]) for name, told in header.items()}

def write_safetensors(path: Path, tensors: dict[str, tuple[dict, bytes]]) -> None:
    ends = [0, *itertools.accumulate(len(data) for _, data in tensors.values())]
    spans = itertools.pairwise(ends)
    header = {k: told | {'data_offsets': span} for (k, (told, _)), span in zip(tensors.items(), spans, strict=True)}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    path.write_bytes(b''.join([len(text).to_bytes(8, 'little'), text, *(data for _, data in tensors.values())]))

@pytest.fixture(scope='module')
def cold(bucket, weights, tmp_path_factory):
    "A worker that has loaded nothing"
    settings = {'MODELS_DIR': str(weights), 'PROFILE': TINY.name, 'WARMUP': 'false'}
    service = Service(bucket, tmp_path_factory.mktemp('cold'), **settings)
    yield service
    service.close()

FILES = [ # slot; edit; tensor; kind of file
    ('distill_lora', 'new', 'base_model.q.lora_A.weight', 'LoRA'),
    ('relight_lora', 'new', 'blocks.0.self_attn.nobody.lora_up.weight', 'LoRA'),
    ('dit', 'gone', 'blocks.4.self_attn.v.weight', 'diffusion model'),
    ('vae', 'gone', 'decoder.head.2.bias', 'VAE')]

@pytest.mark.parametrize('slot, edit, tensor, kind', FILES, ids=[f[0] for f in FILES])
def test_a_file_that_does_not_fit_fails_the_warm_up(cold, weights, slot, edit, tensor, kind):
    profile = edited(weights, slot, **{edit: tensor})
    with pytest.raises(JobError) as e: cold.on_loop(warm_up(cold.context, profile, Timeline()))
    assert e.value.code == 'models_unavailable'
    assert e.value.worker_unfit
    assert f'{kind}: 1 ({tensor})' in e.value.message

def test_files_that_fit_pass_it_after_others_did_not(cold):
    cold.on_loop(warm_up(cold.context, TINY, Timeline()))

def test_a_worker_whose_weights_do_not_fit_does_not_get_ready(bucket, weights, tmp_path):
    copy = shutil.copytree(weights, tmp_path / 'models')
    edited(copy, 'distill_lora', new='base_model.q.lora_A.weight')
    (copy / 'loras/edited-tiny-distill_lora.safetensors').replace(copy / 'loras/tiny-distill_lora.safetensors')
    settings = make_settings(bucket, tmp_path / 'work', MODELS_DIR=str(copy), PROFILE=TINY.name)
    background = Background()
    try:
        with pytest.raises(JobError, match='do not fit.*LoRA: 1'):
            background.submit(boot(settings, Timeline())).result(timeout=60)
    finally: background.close()

TWICE = """lora key not loaded: a.lora_up.weight
NOT LOADED b.weight
lora key not loaded: a.lora_up.weight"""
MISMATCH = 'WARNING SHAPE MISMATCH a.weight WEIGHT NOT MERGED torch.Size([2]) != torch.Size([3])'
HARMLESS = "unet unexpected: ['a']\nclip missing: ['b']\ngot prompt"
MANY = "  0%|      | 0/1 [00:00<?, ?it/s]Missing VAE keys ['a', 'b', 'c', 'd']"

LOGS = [ # log; profile; words of the error, empty: there is none
    ("unet missing: ['face_encoder.a', 'head.x.scale_weight', 'head.x.scale_input']", TINY, ''),
    ("unet missing: ['face_encoder.a']", WAN, 'diffusion model: 1 (face_encoder.a)'),
    (TWICE, WAN, 'LoRA: 2 (a.lora_up.weight, b.weight)'),
    (MISMATCH, WAN, 'LoRA: 1 (a.weight)'),
    ("ERROR lora a.weight shape '[2, 2]' is invalid for input of size 3", WAN, 'LoRA: 1 (a.weight)'),
    ("missing clip vision: ['a']", WAN, 'CLIP vision: 1 (a)'),
    (MANY, WAN, 'VAE: 4 (a, b, c, …)'),
    (HARMLESS, WAN, '')]

@pytest.mark.parametrize('text, profile, words', LOGS)
def test_what_the_log_says_of_weights(text, profile, words):
    if not words: return check_fit(text, profile)
    with pytest.raises(JobError) as e: check_fit(text, profile)
    assert words in e.value.message

# boot and job ask for the same files

def test_production_with_the_other_tracker_boots_without_sam2(bucket, tmp_path):
    "TRACKER=mediapipe PROFILE=wan22-animate: networks that no job loads are not fetched"
    with model_hub(tmp_path / 'hub') as hub:
        def put(w: Weight) -> LockedFile:
            return replace(hub.put('org/wan', w.place, w.place.encode()), name=w.slot, folder=w.folder, file=w.file)
        files = {f.name: f for f in map(put, needed_files(WAN))}
        lock = replace(load_lock(), files=files, profiles={WAN.name: Needs(prompt=WAN.prompt)})
        (tmp_path / 'lock.json').write_text(dump_lock(lock))
        embedding = Embedding(WAN.prompt, WAN.encoder_sha256)
        (tmp_path / 'models/embeddings').mkdir(parents=True)
        (tmp_path / 'models/embeddings' / embedding.name).write_bytes(embedding_bytes())
        settings = {
            'PROFILE': WAN.name,
            'TRACKER': 'mediapipe',
            'MODELS_LOCK': str(tmp_path / 'lock.json'),
            'MODELS_DIR': str(tmp_path / 'models'),
            'MODELS_CACHE': str(tmp_path / 'none'),
            'HF_TOKEN': hub.token,
            'WARMUP': 'false',
        }
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sources, 'Hub', functools.partial(sources.Hub, endpoint=hub.endpoint))
            service = Service(bucket, tmp_path / 'work', **settings)
        try: fetched = {w.place for w in needed_files(WAN) if (tmp_path / 'models' / w.place).exists()}
        finally: service.close()
        assert fetched == {w.place for w in needed_files(with_tracker(WAN, 'mediapipe'))}
        assert not [p for p in fetched if 'sam2' in p or 'onnx' in p]
