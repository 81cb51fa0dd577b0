"""A worker gets its weights from a local hub while ComfyUI starts, warms up and renders: the production graph on tiny checkpoints"""
import asyncio
import functools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Service, cut, make_settings
from test_bundle import embedding_bytes

import wan_avatar.fetch as fetching
from wan_avatar.fetch import Hub
from wan_avatar.hub import ModelHub, model_hub
from wan_avatar.job import JobError
from wan_avatar.launch import ComfyPlace, launch
from wan_avatar.models import Lock, Needs, dump_lock, load_lock
from wan_avatar.prompt import Embedding
from wan_avatar.timeline import Timeline
from wan_avatar.worker import Background, boot, check_fit, shut_down, warm_up
from wan_avatar.workflow import TINY, WAN, Profile, needed_files, with_tracker

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
    files = [put(w.slot, w.place, weights / w.place) for w in needed_files(TINY)]
    files += [put('keypoints', 'detection/keypoints.onnx', b'a tracker'), put('text_encoder', TINY.encoder.place, bytes(3_000_000))]
    needs = Needs(renderer=tuple(w.slot for w in needed_files(TINY)), tracker=('keypoints',), text_encoder='text_encoder', prompt=TINY.prompt)
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
        assert order[0] == 'weights/keypoints' and set(order[1:]) == {f'weights/{w.slot}' for w in needed_files(TINY)}
        assert stages['weights']['facts'] | {'files': 6} == stages['weights']['facts'] and stages['weights']['facts']['fetched'] == stages['weights']['facts']['bytes'] > 10**6
        assert stages['weights']['begin_s'] < stages['comfy']['end_s'] and stages['warm-up']['begin_s'] >= max(stages['comfy']['end_s'], stages['weights']['end_s'])
        assert asked(hub, TINY.encoder.file) == [], 'an embedding is in the bucket: no text encoder'
        service.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
        service.store.upload(cut(samples / 'pexels.mp4', 9, tmp_path), 'in/short.mp4', 'video/mp4')
        answer = service.run('cold', **JOB, seed=7)
        assert answer.get('frames') == 9, answer
        own = service.run('own-prompt', **JOB, seed=7, prompt='a person who waves')
        assert 'comfy_failed' in own['error'], 'the encoder of this test is zeros'
        assert asked(hub, TINY.encoder.file) and (tmp_path / 'models/text_encoders' / TINY.encoder.file).stat().st_size == 3_000_000
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

def test_a_poisoned_default_embedding_does_not_keep_a_worker_from_booting(hub, bucket, environment, lock, tmp_path, monkeypatch):
    "Wherever one may lie there is one with no offsets in its header; the encoder is fetched and asked anew, and the bucket's is replaced"
    poison = json.dumps({'__metadata__': EMBEDDING.metadata(), 'embedding': {'dtype': 'F16', 'shape': EMBEDDING.shape}}).encode()
    poison = len(poison).to_bytes(8, 'little') + poison + bytes(4_194_304)
    snapshot = Path(environment['MODELS_CACHE']) / 'models--me--bundle/snapshots/c0ffee/embeddings'
    for folder in (snapshot, tmp_path / 'models/embeddings', tmp_path / 'work/embeddings'):
        folder.mkdir(parents=True)
        (folder / EMBEDDING.name).write_bytes(poison)
    fetching.Store(make_settings(bucket, tmp_path)).write_bytes(f'embeddings/{EMBEDDING.name}', poison, 'application/octet-stream')
    async def ask(wanted, target, *rest) -> None: # the encoder is 5.7 B parameters and cannot be had here
        assert wanted == EMBEDDING and not target.exists()
        target.write_bytes(embedding_bytes(wanted))
    monkeypatch.setattr('wan_avatar.avatar.make_embedding', ask)
    service = Service(bucket, tmp_path / 'work', **environment)
    try: assert service.store.read_bytes(f'embeddings/{EMBEDDING.name}', 10**8) == embedding_bytes(EMBEDDING) and asked(hub, TINY.encoder.file)
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

@pytest.mark.parametrize('turns', [0, 1, 3, 10, 100])
def test_a_worker_that_is_stopped_while_it_boots_leaves_no_comfyui(bucket, tmp_path, turns):
    "Stopped when its loop has turned so often, while a ComfyUI that was started early does not answer yet"
    (python := tmp_path / 'comfy/env/bin/python').parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nexec sleep 600\n')
    python.chmod(0o755)
    settings = make_settings(bucket, tmp_path / 'work', COMFY_DIR=str(tmp_path / 'comfy'))
    launched, background = launch(ComfyPlace(settings.comfy_dir, settings.work_dir, settings.models_dir)), Background()
    async def turn() -> None:
        for _ in range(turns): await asyncio.sleep(0)
    booted = background.submit(boot(settings, Timeline(), launched))
    background.submit(turn()).result(timeout=30)
    shut_down(background, booted)
    assert booted.cancelled() and launched.process.poll() is not None and not background.thread.is_alive()

# weights that do not fit

EDIT = """
import sys
from safetensors.torch import load_file, save_file
source, target, gone, new = sys.argv[1:]
tensors = load_file(source)
if gone: del tensors[gone]
if new: tensors[new] = next(iter(tensors.values())).clone()
save_file(tensors, target)
"""

def edited(models: Path, slot: str, gone: str = '', new: str = '') -> Profile:
    "The tiny profile with one tensor of one of its files left out or added"
    weight = next(w for w in TINY.weights if w.slot == slot)
    mine = replace(weight, file=f'edited-{weight.file}')
    places = [models / w.folder / w.file for w in (weight, mine)]
    subprocess.run([ROOT / '.comfy/env/bin/python', '-c', EDIT, *places, gone, new], check=True, capture_output=True)
    return replace(TINY, weights=tuple(mine if w is weight else w for w in TINY.weights))

@pytest.fixture(scope='module')
def cold(bucket, weights, tmp_path_factory):
    "A worker that has loaded nothing"
    service = Service(bucket, tmp_path_factory.mktemp('cold'), MODELS_DIR=str(weights), PROFILE=TINY.name, WARMUP='false')
    yield service
    service.close()

FILES = [('distill_lora', {'new': 'base_model.q.lora_A.weight'}, 'LoRA: 1 (base_model.q.lora_A.weight)'),
         ('relight_lora', {'new': 'blocks.0.self_attn.nobody.lora_up.weight'}, 'LoRA: 1 (blocks.0.self_attn.nobody.lora_up.weight)'),
         ('dit', {'gone': 'blocks.4.self_attn.v.weight'}, 'diffusion model: 1 (blocks.4.self_attn.v.weight)'),
         ('vae', {'gone': 'decoder.head.2.bias'}, 'VAE: 1 (decoder.head.2.bias)')]

@pytest.mark.parametrize('slot, edit, words', FILES, ids=[f[0] for f in FILES])
def test_a_file_that_does_not_fit_fails_the_warm_up(cold, weights, slot, edit, words):
    with pytest.raises(JobError) as e: cold.on_loop(warm_up(cold.studio, edited(weights, slot, **edit), Timeline()))
    assert e.value.code == 'models_unavailable' and e.value.worker_unfit and words in e.value.message

def test_files_that_fit_pass_it_after_others_did_not(cold):
    cold.on_loop(warm_up(cold.studio, TINY, Timeline()))

def test_a_worker_whose_weights_do_not_fit_does_not_get_ready(bucket, weights, tmp_path):
    copy = shutil.copytree(weights, tmp_path / 'models')
    edited(copy, 'distill_lora', new='base_model.q.lora_A.weight')
    (copy / 'loras/edited-tiny-distill_lora.safetensors').replace(copy / 'loras/tiny-distill_lora.safetensors')
    settings, background = make_settings(bucket, tmp_path / 'work', MODELS_DIR=str(copy), PROFILE=TINY.name), Background()
    try:
        with pytest.raises(JobError, match='do not fit.*LoRA: 1'): background.submit(boot(settings, Timeline())).result(timeout=60)
    finally: background.close()

LOGS = [("unet missing: ['face_encoder.a', 'head.x.scale_weight', 'head.x.scale_input']", TINY, ''), ("unet missing: ['face_encoder.a']", WAN, 'diffusion model: 1 (face_encoder.a)'),
        ('lora key not loaded: a.lora_up.weight\nNOT LOADED b.weight\nlora key not loaded: a.lora_up.weight', WAN, 'LoRA: 2 (a.lora_up.weight, b.weight)'),
        ('WARNING SHAPE MISMATCH a.weight WEIGHT NOT MERGED torch.Size([2]) != torch.Size([3])', WAN, 'LoRA: 1 (a.weight)'),
        ("ERROR lora a.weight shape '[2, 2]' is invalid for input of size 3", WAN, 'LoRA: 1 (a.weight)'), ("missing clip vision: ['a']", WAN, 'CLIP vision: 1 (a)'),
        ("  0%|      | 0/1 [00:00<?, ?it/s]Missing VAE keys ['a', 'b', 'c', 'd']", WAN, 'VAE: 4 (a, b, c, …)'), ("unet unexpected: ['a']\nclip missing: ['b']\ngot prompt", WAN, '')]

@pytest.mark.parametrize('text, profile, words', LOGS)
def test_what_the_log_says_of_weights(text, profile, words):
    try: check_fit(text, profile)
    except JobError as e: assert words and words in e.message
    else: assert not words

# boot and job ask for the same files

def test_production_with_the_other_tracker_boots_without_sam2(bucket, tmp_path):
    "TRACKER=mediapipe PROFILE=wan22-animate: nobody fetches networks that no job loads"
    with model_hub(tmp_path / 'hub') as hub:
        def put(w): return replace(hub.put('org/wan', w.place, w.place.encode()), name=w.slot, folder=w.folder, file=w.file)
        lock = replace(load_lock(), files={f.name: f for f in map(put, needed_files(WAN))}, profiles={WAN.name: Needs(prompt=WAN.prompt)})
        (tmp_path / 'lock.json').write_text(dump_lock(lock))
        embedding = Embedding(WAN.prompt, WAN.encoder_sha256)
        (tmp_path / 'models/embeddings').mkdir(parents=True)
        (tmp_path / 'models/embeddings' / embedding.name).write_bytes(embedding_bytes())
        settings = {'PROFILE': WAN.name, 'TRACKER': 'mediapipe', 'MODELS_LOCK': str(tmp_path / 'lock.json'), 'MODELS_DIR': str(tmp_path / 'models'),
                    'HF_TOKEN': hub.token, 'MODELS_CACHE': str(tmp_path / 'none'), 'WARMUP': 'false'}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fetching, 'Hub', functools.partial(Hub, endpoint=hub.endpoint))
            service = Service(bucket, tmp_path / 'work', **settings)
        try: fetched = {w.place for w in needed_files(WAN) if (tmp_path / 'models' / w.place).exists()}
        finally: service.close()
        assert fetched == {w.place for w in needed_files(with_tracker(WAN, 'mediapipe'))} and not [p for p in fetched if 'sam2' in p or 'onnx' in p]
