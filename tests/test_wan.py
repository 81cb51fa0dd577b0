"""The production graph on tiny random checkpoints, in the real ComfyUI: every node, link and shape"""
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audit import rules
from conftest import ROOT, Service, comfy_with_probe, cut

from wan_avatar import avatar
from wan_avatar.avatar import make_avatar
from wan_avatar.comfy import run
from wan_avatar.job import Job, JobError
from wan_avatar.media import read_frames
from wan_avatar.prompt import Embedding, check_embedding
from wan_avatar.track import load_track, parse_track
from wan_avatar.workflow import (
    PROFILES, REFERENCE, TINY, WAN, Weight, bind, check_weights, load_graph, loaders, needed_files, profile_graph, slots,
    track_graph, validate, vision_graph,
)

PYTHON = ROOT / '.comfy/env/bin/python'
FACE = replace(TINY, name='tiny-face', face=True, weights=tuple(replace(w, file='face.safetensors') if w.slot == 'dit' else w for w in TINY.weights), values={**TINY.values, 'steps': 1})
BODY = replace(TINY, name='tiny-body', tracker='wholebody-sam2', detectors=tuple(replace(w, bytes=None) for w in TINY.detectors))
BLIND = replace(BODY, name='tiny-blind', detectors=tuple(replace(w, file=f'blind/{w.file}') if w.folder == 'sam2' else w for w in BODY.detectors))
PROMPTED = replace(TINY, name='tiny-prompted', encoder=Weight('text_encoder', 'text_encoders', 'never-there.safetensors', 5))

@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    "What `wan-avatar tiny-weights` writes, detectors, and empty files under production's names, so that loaders offer them"
    folder, with_face = tmp_path_factory.mktemp('models'), tmp_path_factory.mktemp('face')
    makers = [([ROOT / '.venv/bin/wan-avatar', 'tiny-weights', folder]), ([ROOT / '.venv/bin/wan-avatar', 'tiny-weights', with_face, '--face']), ([PYTHON, ROOT / 'tests/tiny_detectors.py', folder])]
    for maker in makers: subprocess.run(maker, cwd=ROOT, check=True, capture_output=True)
    shutil.move(with_face / 'diffusion_models/tiny-dit.safetensors', folder / 'diffusion_models/face.safetensors')
    for w in (*WAN.weights, WAN.encoder):
        (folder / w.folder).mkdir(exist_ok=True)
        (folder / w.folder / w.file).touch()
    subprocess.run([PYTHON, '-c', MORE, folder, ROOT / '.comfy/ComfyUI', WAN.clip_vision.file], cwd=ROOT, check=True, capture_output=True)
    return folder

MORE = """
# a transformer whose image branch adds nothing, and CLIP ViT-H at its true size: zeros, which take no room on the disk
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
folder, comfy, clip = Path(sys.argv[1]), *sys.argv[2:]
sys.path.insert(0, comfy)
from comfy.cli_args import args
args.cpu = True
from wan_avatar.tiny import vision_shapes
dit = load_file(folder / 'diffusion_models/tiny-dit.safetensors')
save_file({k: v * 0 if '.v_img.' in k else v for k, v in dit.items()}, folder / 'diffusion_models/no-image.safetensors')
header, end = {}, 0
for name, shape in vision_shapes(32, 5120).items():
    size = 2
    for side in shape: size *= side
    header[name] = {'dtype': 'F16', 'shape': shape, 'data_offsets': [end, end + size]}
    end += size
text = json.dumps(header).encode()
with (folder / 'clip_vision' / clip).open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    f.truncate(8 + len(text) + end)
"""

@pytest.fixture(scope='module')
def wan(bucket, samples, weights, tmp_path_factory):
    work = tmp_path_factory.mktemp('wan')
    probed = comfy_with_probe(tmp_path_factory.mktemp('probed'))
    made = Service(bucket, work, MODELS_DIR=str(weights), PROFILE='wan22-animate-tiny', COMFY_DIR=str(probed))
    made.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
    made.store.upload(cut(samples / 'pexels.mp4', 14, tmp_path_factory.mktemp('short')), 'in/short.mp4', 'video/mp4')
    made.store.upload(cut(samples / 'pexels.mp4', 5, tmp_path_factory.mktemp('five')), 'in/five frames.mp4', 'video/mp4')
    more = (FACE, BODY, BLIND, PROMPTED)
    PROFILES.update({p.name: p for p in more})
    yield made
    for p in more: del PROFILES[p.name]
    made.close()

JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/short.mp4'}
BRIEF = JOB | {'driving_video_path': 'in/five frames.mp4'}

@pytest.fixture(scope='module')
def made(wan):
    answer = wan.run('tiny', **JOB, seed=7)
    assert 'error' not in answer, answer
    return answer

def rendered(wan, job_id: str) -> list[tuple[int, int]]:
    "Windows of a finished job: number and frames"
    return [(s['facts']['segment'], s['facts']['frames']) for s in wan.store.read_json(f'avatars/{job_id}.mp4.json')['timeline'] if s['name'] == 'render']

def test_several_windows_with_masks_tail_and_embedding(wan, made):
    assert (made['width'], made['height'], made['frames'], made['profile'], made['seed']) == (1280, 720, 14, 'wan22-animate-tiny', 7)
    manifest = wan.store.read_json('avatars/tiny.mp4.json')
    assert rendered(wan, 'tiny') == [(0, 9), (1, 9), (2, 9)]
    assert (manifest['rendered_with']['steps'], manifest['rendered_with']['tracker'], manifest['rendered_with']['prompt']) == (2, 'mediapipe-2', 'a person') and [s['facts']['from'] for s in manifest['timeline'] if s['name'] == 'prompt'] == ['here']

def test_the_manifest_says_what_computed_the_video(wan, made):
    manifest = wan.store.read_json('avatars/tiny.mp4.json')
    assert (manifest['rendered_with']['attention'], manifest['rendered_with']['fp8_products']) == ('default', 'default')
    said, calls = manifest['kernels'], 3 * 2 * 5 * 3 # windows, steps, blocks, attentions of a block
    assert (said['attention'], said['fp8_products']) == ('default', 'default') and sum(said['ran'].values()) == calls

def test_one_seed_one_video_another_seed_another(wan, made):
    assert wan.run('tiny-again', **JOB, seed=7)['sha256'] == made['sha256']
    assert wan.run('tiny-other', **JOB, seed=8)['sha256'] != made['sha256']

def test_models_stay_loaded_from_job_to_job(wan, made):
    "The prompts in between, which find the person, do not push them out"
    assert 'error' not in wan.run('warm', **JOB, seed=9)
    async def prompts() -> dict: return await wan.comfy._get('/history')
    said = [dict(p['status']['messages']) for p in wan.on_loop(prompts()).values() if 'sample' in p['prompt'][2]]
    assert set(loaders(TINY)) == {'dit', 'distill', 'relight', 'shift', 'kernels', 'vae', 'clip_vision'}
    assert len(said) > 5
    assert all(set(loaders(TINY)) - {'clip_vision'} <= set(s['execution_cached']['nodes']) for s in said[1:]), 'only the first window of all loaded anything'
    described = [dict(p['status']['messages']) for p in wan.on_loop(prompts()).values() if 'described' in p['prompt'][2]]
    assert len(described) > 1 and all('clip_vision' in s['execution_cached']['nodes'] for s in described[1:]), 'nor did any job load CLIP again'

def test_length_and_overlap_can_be_changed(wan):
    longer = TINY.changed(length=13, overlap=9)
    assert profile_graph(longer)['animate']['inputs']['continue_motion_max_frames'] == 9 and profile_graph(WAN)['animate']['inputs']['continue_motion_max_frames'] == 5
    PROFILES['longer'] = replace(longer, name='longer')
    try: answer = wan.run('longer', **JOB, profile='longer')
    finally: del PROFILES['longer']
    assert answer['frames'] == 14 and rendered(wan, 'longer') == [(0, 13), (1, 13)]

# what only the size of the weights tells apart

def differences(a: dict, b: dict) -> set[tuple[str, str]]:
    "(node, input) that two graphs of the same nodes give other values"
    assert a.keys() == b.keys()
    return {(n, k) for n in a for k in a[n]['inputs'] if a[n]['inputs'][k] != b[n]['inputs'].get(k)}

def test_tiny_differs_from_production_in_files_size_and_close_up_alone():
    files = {('dit', 'unet_name'), ('distill', 'lora_name'), ('relight', 'lora_name'), ('vae', 'vae_name')}
    size = {(n, k) for n in ('pictures', 'animate') for k in ('width', 'height')}
    assert differences(profile_graph(WAN), profile_graph(TINY)) == files | size | {('sample', 'steps'), ('animate', 'face_video')}
    assert differences(vision_graph(WAN), vision_graph(TINY)) == {('clip_vision', 'clip_name'), ('letterboxed', 'width'), ('letterboxed', 'height')}
    loader = {n: (vision_graph(WAN)[n]['class_type'], vision_graph(TINY)[n]['class_type']) for n in vision_graph(WAN)}
    assert {n for n, (a, b) in loader.items() if a != b} == {'clip_vision'}, 'its CLIP vision model has a loader of its own'

PRODUCTION_ALONE = { # what production has otherwise than its twin, and why
    'name': '', 'tracker': 'MediaPipe on a laptop', 'other_trackers': 'each can be run with the other', 'length': 'frames',
    'weights': 'size of weights', 'clip_vision': 'size of weights', 'vision_loader': 'one for two layers',
    'encoder': 'cannot be small', 'encoder_sha256': 'no encoder made its embeddings', 'face': 'seconds a frame on a CPU',
    'prompt': 'ASCII', 'negative_prompt': 'ASCII', 'values': 'size and steps, below'}

def test_every_value_in_which_tiny_differs_is_listed():
    from dataclasses import fields
    assert {f.name for f in fields(WAN) if getattr(WAN, f.name) != getattr(TINY, f.name)} == set(PRODUCTION_ALONE)
    assert {k for k in WAN.values if WAN.values[k] != TINY.values[k]} == {'width', 'height', 'steps'}

def test_reference_is_upstreams_sampling():
    values = {'steps': 20, 'sampler': 'dpmpp_2m', 'shift': 5.0, 'cfg': 1.0, 'mask_shape': 'rectangle'}
    assert {k: REFERENCE.values[k] for k in values} == values and REFERENCE.vision == 'clip' and REFERENCE.face
    graph = profile_graph(REFERENCE)
    assert 'distill' not in graph and graph['relight']['inputs']['model'] == ['dit', 0] and graph['shift']['inputs']['model'] == ['relight', 0]
    assert not [w for w in needed_files(REFERENCE) if 'distill' in w.slot]

@pytest.mark.parametrize('profile', [WAN, REFERENCE, TINY], ids=lambda p: p.name)
def test_negative_prompt_is_its_own_above_cfg_1(profile):
    assert profile_graph(profile)['animate']['inputs']['negative'] == ['prompt', 0] and set(profile.prompts) == {'embedding'}
    guided = profile.changed(cfg=3.5)
    assert profile_graph(guided)['animate']['inputs']['negative'] == ['negative', 0]
    assert guided.prompts == {'embedding': profile.prompt, 'negative_embedding': profile.negative_prompt}
    assert profile.negative_prompt and profile.negative_prompt != profile.prompt

SLOTS = {'vision': 'j/v.safetensors', 'frame_width': 1280, 'frame_height': 720,
         'reference': 'j/r.png', 'reference_track': 'j/r.track', 'video': 'j/d.mp4', 'track': 'j/d.track', 'tail': '', 'start': 0, 'length': 77, 'overlap': 0, 'new': 77,
         'frames': 'j/f.u8', 'seed': 2**63 - 1, 'embedding': 'embeddings/x.safetensors'}

def test_production_graphs_fit_this_comfyui(wan):
    for profile in (WAN, REFERENCE, WAN.changed(face=False), *(WAN.changed(vision=v, mask_shape='grid') for v in ('off', 'unconnected'))):
        graph = profile_graph(profile)
        assert validate(bind(graph, {k: v for k, v in SLOTS.items() if k in slots(graph)}), wan.comfy.object_info) == []
    guided = bind(profile_graph(WAN.changed(cfg=3.5)), SLOTS | {'negative_embedding': 'embeddings/n.safetensors'})
    assert validate(guided, wan.comfy.object_info) == []
    assert validate(bind(vision_graph(WAN), {'reference': 'j/r.png', 'vision': 'j/v.safetensors'}), wan.comfy.object_info) == []
    assert validate(bind(track_graph(WAN), {'source': 'j/d.mp4', 'kind': 'video', 'track': 'j/d.track'}), wan.comfy.object_info) == []
    assert validate(bind(load_graph('prompt'), {'text_encoder': WAN.encoder.file, 'prompt': 'p', 'encoder_sha256': 'e', 'path': 'e/x.safetensors'}), wan.comfy.object_info) == []

# inside a window

def probe(wan, graph: dict, **links: list) -> dict[str, tuple]:
    "Run a graph and look at these links: name -> (shapes, tensors)"
    looking = {f'probe_{name}': {'class_type': 'Probe', 'inputs': {'value': link, 'name': name}} for name, link in links.items()}
    wan.on_loop(run(wan.comfy, graph | looking))
    folder = wan.settings.work_dir / 'comfy/output/probes'
    return {name: (json.loads((folder / f'{name}.json').read_text()), dict(np.load(folder / f'{name}.npz'))) for name in links}

def window_values() -> dict:
    "Slots of the window of the fixture below"
    files = {'reference': 'reference.png', 'reference_track': 'reference.track', 'video': 'driving.mp4', 'track': 'driving.track',
             'tail': 'tail.u8', 'frames': 'frames.u8', 'vision': 'vision.safetensors'}
    embedding = f'embeddings/{Embedding(TINY.prompt, TINY.encoder_sha256).name}'
    return SLOTS | {k: f'jobs/by-hand/{v}' for k, v in files.items()} | {
        'start': 4, 'length': 9, 'overlap': 5, 'new': 4, 'seed': 3, 'embedding': embedding}

@pytest.fixture(scope='module')
def window(wan, made, tmp_path_factory):
    "A later window of the tiny profile with its inputs in the work tree, and what flows in it"
    folder = wan.settings.work_dir / 'jobs/by-hand'
    folder.mkdir(parents=True)
    from wan_avatar.media import normalise_video
    raw = folder / 'raw.mp4'
    wan.store.download('in/short.mp4', raw, 'x', 10**9)
    normalise_video(raw, folder / 'driving.mp4', folder / 'audio.m4a', 60)
    wan.store.download('in/astronaut.png', folder / 'reference.png', 'x', 10**9)
    key = next(k for k in wan.store.list('tracks/mediapipe') if len(parse_track(wan.store.read_bytes(k, 10**9))) == 14)
    wan.store.download(key, folder / 'driving.track', 'x', 10**9)
    shutil.copy(folder / 'driving.track', folder / 'reference.track') # the production graph does not read it
    tail = np.concatenate([f[None] for f in read_frames(folder / 'driving.mp4', 4, 5)])
    tail.tofile(folder / 'tail.u8')
    values = window_values()
    described = bind(vision_graph(TINY), {k: values[k] for k in ('reference', 'vision')})
    wan.on_loop(run(wan.comfy, described))
    graph = bind(profile_graph(TINY), values)
    # the seeds, then the scene: what the conditioning must hold
    graph['rest'] = {'class_type': 'ImageFromBatch', 'inputs': {'image': ['pictures', 3], 'batch_index': 5, 'length': 4}}
    graph['both'] = {'class_type': 'ImageBatch', 'inputs': {'image1': ['pictures', 5], 'image2': ['rest', 0]}}
    graph['scene'] = {'class_type': 'VAEEncode', 'inputs': {'pixels': ['both', 0], 'vae': ['vae', 0]}}
    found = probe(wan, graph, pictures=['pictures', 0], pose=['pictures', 1], face=['pictures', 2], background=['pictures', 3], mask=['pictures', 4], tail=['pictures', 5],
                  positive=['mask_rows', 0], negative=['mask_rows', 1], unfixed=['animate', 0], latent=['animate', 2], trim_latent=['animate', 3], trim_image=['animate', 4],
                  sampled=['sample', 0], trimmed=['trim', 0], decoded=['decode', 0], scene=['scene', 0])
    return folder, tail, found

def test_shapes_of_everything(window):
    shapes = {name: shape for name, (shape, _) in window[2].items()}
    assert {k: shapes[k] for k in ('pictures', 'pose', 'face', 'background', 'mask', 'tail', 'trim_latent', 'trim_image', 'decoded')} == {
        'pictures': [1, 48, 64, 3], 'pose': [9, 48, 64, 3], 'face': [9, 512, 512, 3], 'background': [9, 48, 64, 3], 'mask': [9, 48, 64], 'tail': [5, 48, 64, 3],
        'trim_latent': 1, 'trim_image': 5, 'decoded': [9, 48, 64, 3]}
    for name, frames in (('latent', 4), ('sampled', 4), ('trimmed', 3)): assert shapes[name]['samples'] == [1, 16, frames, 6, 8], name # one of them is the reference
    for name in ('positive', 'negative'):
        (embedding, said), = shapes[name]
        assert embedding == [1, 512, 4096]
        assert said.pop('clip_vision_output') == {'penultimate_hidden_states': [1, 257, 1280]}
        assert said == {'pose_video_latent': [1, 16, 3, 6, 8], 'concat_latent_image': [1, 16, 4, 6, 8], 'concat_mask': [1, 4, 4, 6, 8]}
    assert (window[0] / 'frames.u8').stat().st_size == 4 * 1280 * 720 * 3

def test_the_scene_outside_the_mask_goes_through(window):
    folder, _, found = window
    from wan_avatar.nodes import sized
    background, mask = found['background'][1]['value'], found['mask'][1]['value'].astype(bool)
    frames = np.stack([sized(f, (64, 48)) for f in read_frames(folder / 'driving.mp4', 4, 9)])
    assert not background[mask].any() and 0.05 < mask.mean() < 0.95
    assert np.abs(background[~mask] * 255 - frames[~mask]).max() < 0.51
    said = found['positive'][1]
    scene, given = found['scene'][1]['value.samples'], said['value.0.1.concat_latent_image']
    assert np.array_equal(scene, given[:, :, 1:]), 'behind the reference stand the seeds and the scene, nothing else'
    rows = said['value.0.1.concat_mask'][0]
    blocks = mask.reshape(9, 6, 8, 8, 8)[:, :, 0, :, 0] # what `nearest` picks of each latent pixel, as upstream does
    assert (rows[:, 0] == 0).all() and (rows[:, 1:3] == 0).all() and (rows[:, 3] == blocks[5:9]).all()

def test_the_tail_arrives_byte_for_byte(window):
    from wan_avatar.nodes import sized
    assert np.array_equal(np.round(window[2]['tail'][1]['value'] * 255).astype(np.uint8), np.stack([sized(f, (64, 48)) for f in window[1]]))

# the rows of the mask: frames of a window are numbered from 100 here

FIRST_WRONG, FIRST_RIGHT = [[100, 101, 102, 103], [104, 105, 106, 107], [108, 1, 1, 1]], [[100, 100, 100, 100], [101, 102, 103, 104], [105, 106, 107, 108]]
LATER_WRONG, LATER_RIGHT = [[0, 0, 0, 0], [0, 105, 106, 107], [108, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 0], [105, 106, 107, 108]]

@pytest.mark.parametrize('later, wrong, right', [(False, FIRST_WRONG, FIRST_RIGHT), (True, LATER_WRONG, LATER_RIGHT)], ids=['first', 'later'])
def test_mask_rows(wan, window, later, wrong, right):
    graph = {k: v for k, v in bind(profile_graph(TINY), SLOTS | {'length': 9}).items() if k in ('vae', 'animate', 'mask_rows')}
    graph['numbered'] = {'class_type': 'NumberedMask', 'inputs': {'length': 9, 'width': 64, 'height': 48}}
    graph['prompt'] = {'class_type': 'AvatarPrompt', 'inputs': {'embedding': f'embeddings/{Embedding(TINY.prompt, TINY.encoder_sha256).name}'}}
    graph['seeds'] = {'class_type': 'EmptyImage', 'inputs': {'width': 64, 'height': 48, 'batch_size': 5, 'color': 0}}
    kept = {k: v for k, v in graph['animate']['inputs'].items() if not (isinstance(v, list) and v[0] in ('pictures', 'vision'))}
    graph['animate'] = graph['animate'] | {'inputs': kept | {'character_mask': ['numbered', 0]} | ({'continue_motion': ['seeds', 0]} if later else {})}
    graph['mask_rows'] = graph['mask_rows'] | {'inputs': graph['mask_rows']['inputs'] | {'mask': ['numbered', 0]}}
    found = probe(wan, graph, before=['animate', 0], after=['mask_rows', 0], negative=['mask_rows', 1])
    def rows(name: str) -> list: # by latent frame, the reference's left out
        mask = found[name][1]['value.0.1.concat_mask'][0]
        assert (mask[:, 0] == 0).all() and all((mask[:, t, y, x] == mask[:, t, 0, 0]).all() for t in range(4) for y in range(6) for x in range(8))
        return mask[:, 1:, 0, 0].T.astype(int).tolist()
    assert rows('before') in (wrong, right), 'neither the rows of a ComfyUI without the repair nor those of one that has it'
    assert rows('after') == rows('negative') == right

# the picture as CLIP sees it

def sampled(wan, window, dit: str, vision: str) -> np.ndarray:
    "What comes out of one window of the tiny profile with this transformer"
    profile = replace(TINY, weights=tuple(replace(w, file=dit) if w.slot == 'dit' else w for w in TINY.weights)).changed(vision=vision)
    graph = profile_graph(profile)
    return probe(wan, bind(graph, {k: v for k, v in window_values().items() if k in slots(graph)}), sampled=['sample', 0])['sampled'][1]['value.samples']

@pytest.mark.parametrize('vision, depends', [('clip', True), ('off', False), ('unconnected', True)])
def test_the_image_branch(wan, window, vision, depends):
    "With `off` nothing of it is left; ComfyUI alone sends the text through it"
    whole, zeroed = (sampled(wan, window, dit, vision) for dit in ('tiny-dit.safetensors', 'no-image.safetensors'))
    assert (np.abs(whole - zeroed).max() > 1e-3) == depends

def test_one_description_for_all_windows_and_the_very_one_of_clip(wan, window, made):
    found = window[2]
    told = found['positive'][1]['value.0.1.clip_vision_output.penultimate_hidden_states']
    graph = bind(vision_graph(TINY), {k: window_values()[k] for k in ('reference', 'vision')})
    said = probe(wan, graph, described=['described', 0], letterboxed=['letterboxed', 0])
    assert np.array_equal(told, said['described'][1]['value.penultimate_hidden_states']), 'the file is what the encoder said'
    assert said['letterboxed'][0] == [1, 48, 64, 3] and np.array_equal(said['letterboxed'][1]['value'], found['pictures'][1]['value'])
    stages = [s['name'] for s in wan.store.read_json('avatars/tiny.mp4.json')['timeline']]
    assert stages.count('vision') == 1 and stages.count('render') == 3 and stages.index('vision') < stages.index('render')

def test_clip_at_its_true_size(wan, window):
    "ComfyUI's own loader and production's graph, on zeros: what Wan reads has the shape it must have"
    graph = bind(vision_graph(WAN), {k: window_values()[k] for k in ('reference', 'vision')} | {'vision': 'jobs/by-hand/large.safetensors'})
    said = probe(wan, graph, described=['described', 0], letterboxed=['letterboxed', 0])
    assert said['described'][0]['penultimate_hidden_states'] == [1, 257, 1280] and said['letterboxed'][0] == [1, 720, 1280, 3]
    assert 'missing clip vision' not in wan.comfy.process.log.since(0)

# the close-up of the face

def test_face_branch(wan):
    answer = wan.run('close-up', **BRIEF, profile='tiny-face', seed=1)
    assert 'error' not in answer and rendered(wan, 'close-up') == [(0, 5)]
    without = wan.run('no-close-up', **BRIEF, profile='wan22-animate-tiny', seed=1)
    assert answer['sha256'] != without['sha256'], 'the close-up changes the picture'

# kernels

def kernels_of(wan, seed: int, **values) -> dict:
    "A window of the tiny profile through these kernels: what AvatarRan says"
    graph = profile_graph(TINY.changed(steps=1, **values))
    graph = {node: given for node, given in graph.items() if node not in ('trim', 'decode', 'frames')}
    given = {k: v for k, v in (window_values() | {'seed': seed}).items() if k in slots(graph)}
    return wan.on_loop(run(wan.comfy, bind(graph, given)))['ran']['kernels'][0]

RAN = [('default', 'default', None), # what was asked for; in force; what ran, where it has a name of ours
       ('flash', 'flash', 'flash'),
       ('sage', 'default', None)] # not installed here

@pytest.mark.parametrize('asked, used, named', RAN, ids=[a for a, *_ in RAN])
def test_kernels_that_ran_are_said_even_of_a_result_from_the_cache(wan, window, asked, used, named):
    before = wan.comfy.process.log.end()
    said = kernels_of(wan, 20, attention=asked)
    assert (said['attention'], said['fp8_products']) == (used, 'default')
    (name, calls), = said['ran'].items() # weights are not fp8 here
    assert (name == named if named else name.startswith('attention_')), name
    assert calls == 3 * 5, 'of text, of the picture and of itself, in 5 blocks'
    assert ('sageattention cannot be imported' in wan.comfy.process.log.since(before)) == (asked == 'sage')
    assert kernels_of(wan, 20, attention=asked) == said
    assert kernels_of(wan, 22)['attention'] == 'default', 'the next prompt of the same weights sees nothing of it'

def test_the_setting_asks_for_sage_and_the_manifest_says_what_ran(wan, window, caplog):
    settings = wan.settings.model_copy(update={'use_sage_attention': True})
    job = Job(**BRIEF, seed=1)
    wan.background.submit(make_avatar('sage', job, replace(wan.studio, settings=settings))).result(timeout=180)
    manifest = wan.store.read_json('avatars/sage.mp4.json')
    asked, used = manifest['rendered_with']['attention'], manifest['kernels']['attention']
    assert (asked, used) == ('sage', 'default'), 'it is not installed'
    assert all(name.startswith('attention_') for name in manifest['kernels']['ran'])
    assert 'asks for attention "sage"; "default" ran' in caplog.text

@pytest.mark.parametrize('attention', ['cudnn', 'efficient'])
def test_a_kernel_that_cannot_run_says_so_and_no_other_steps_in(wan, window, attention):
    why = f'^comfy_failed: attention "{attention}" cannot run on cpu with torch.float32: .*take attention "default"'
    with pytest.raises(JobError, match=why): kernels_of(wan, 21, attention=attention)
    assert kernels_of(wan, 21)['attention'] == 'default'

@pytest.mark.parametrize('fp8_products, products', [('default', {'fp8 products': 1}), ('off', {})])
def test_products_in_fp8_are_switched_inside_the_forward_pass_of_one_model(wan, window, fp8_products, products):
    nodes = loaders(TINY.changed(fp8_products=fp8_products)).items()
    graph = {k: v for k, v in nodes if k not in ('vae', 'clip_vision')}
    graph['layer'] = {'class_type': 'Fp8Layer', 'inputs': {'model': ['kernels', 0], 'kernels': ['kernels', 1]}}
    said, = wan.on_loop(run(wan.comfy, graph))['layer']['said']
    assert said['inside'] == products and said['outside'] == {}, 'a layer of another model'
    assert (said['off'] < 0.1) == (fp8_products == 'off') and said['off'] < 2

# the audit: what the rules say, computed once and kept in tests/audit, against the nodes and the graph

@pytest.fixture(scope='module')
def audited(wan, window) -> tuple[dict, dict, dict]:
    "What must be, and what flows in a later window of the audit's clip and in its first one"
    folder = wan.settings.work_dir / 'jobs/audit'
    folder.mkdir()
    for name in ('driving.mp4', 'driving.track', 'reference.png'): shutil.copy(ROOT / 'tests/audit' / name, folder)
    shutil.copy(folder / 'driving.track', folder / 'reference.track')
    np.concatenate([f[None] for f in read_frames(folder / 'driving.mp4', rules.START, rules.SEEDS)]).tofile(folder / 'tail.u8')
    paths = {k: v.replace('by-hand', 'audit') for k, v in window_values().items() if str(v).startswith('jobs/by-hand')}
    values = window_values() | paths | {'start': rules.START, 'length': rules.LENGTH, 'overlap': 5, 'new': 4}
    profile = TINY.changed(width=rules.SAMPLED[0], height=rules.SAMPLED[1], face=True, vision='unconnected')
    graph = bind(profile_graph(profile), {k: v for k, v in values.items() if k in slots(profile_graph(profile))})
    graph = {k: v for k, v in graph.items() if k in ('vae', 'prompt', 'segment', 'pictures', 'animate', 'mask_rows')}
    graph['encoded_pose'] = {'class_type': 'VAEEncode', 'inputs': {'pixels': ['pictures', 1], 'vae': ['vae', 0]}}
    graph['whole'] = graph['pictures'] | {'inputs': graph['pictures']['inputs'] | {'width': 1280, 'height': 720}}
    links = {name: ['pictures', n] for n, name in enumerate(('reference', 'pose', 'face', 'background', 'mask', 'tail'))}
    later = probe(wan, graph, **links, whole_pose=['whole', 1], whole_mask=['whole', 4], positive=['mask_rows', 0], negative=['mask_rows', 1],
                  encoded=['encoded_pose', 0])
    first = disconnected_tail(graph)
    return dict(np.load(ROOT / 'tests/audit/expected.npz')), later, probe(wan, first, positive=['mask_rows', 0])

def disconnected_tail(graph: dict) -> dict:
    "The same window as if it were the first"
    segment = graph['segment'] | {'inputs': graph['segment']['inputs'] | {'tail': ''}}
    return {k: v for k, v in graph.items() if k not in ('whole', 'encoded_pose')} | {'segment': segment}

def test_the_rules_still_say_what_was_kept():
    "The kept tensors are those of rules.py; only a person who changes a rule changes both"
    kept = dict(np.load(ROOT / 'tests/audit/expected.npz'))
    assert all(np.array_equal(v, kept[k]) for k, v in rules.expected().items())

CLOSE = {'reference': 0.51, 'small_pose': 0.01, 'small_background': 8, 'face': 8, 'whole_pose': 0.01} # of 255; a codec lies before two of them

@pytest.mark.parametrize('name, link', [('reference', 'reference'), ('small_pose', 'pose'), ('small_background', 'background'),
                                        ('face', 'face'), ('whole_pose', 'whole_pose')])
def test_pictures_are_those_of_the_rules(audited, name, link):
    must, later, _ = audited
    shown = later[link][1]['value'][0 if name == 'reference' else rules.SHOWN]
    off = np.abs(shown * 255 - must[name])
    assert off.max() <= CLOSE[name], f'{name}: {off.max():.1f} of 255 at {np.unravel_index(off.argmax(), off.shape)}'

def test_masks_are_those_of_the_rules(audited):
    must, later, first = audited
    assert np.array_equal(later['mask'][1]['value'], must['small_mask'])
    assert np.array_equal(later['whole_mask'][1]['value'][rules.SHOWN], must['whole_mask'])
    for found, expected in ((later, 'later_rows'), (first, 'first_rows')):
        rows = found['positive'][1]['value.0.1.concat_mask'][0]
        assert not rows[:, 0].any() and np.array_equal(rows[:, 1:], must[expected]), expected

def test_ranges_and_order_of_what_the_model_gets(audited):
    _, later, first = audited
    positive, negative = (later[n][1] for n in ('positive', 'negative'))
    face = later['face'][1]['value']
    given = positive['value.0.1.face_video_pixels']
    assert given.shape == (1, 3, 9, 512, 512) and np.abs(given[0] - np.moveaxis(face, -1, 0) * 2 + 1).max() < 1e-3
    assert (negative['value.0.1.face_video_pixels'] == -1).all(), 'at cfg above 1 the negative side sees no face'
    assert np.array_equal(positive['value.0.1.pose_video_latent'], later['encoded'][1]['value.samples'])
    for name in ('pose', 'face', 'background', 'mask', 'tail'): assert later[name][1]['value'].min() >= 0 and later[name][1]['value'].max() <= 1
    latents = [found[n][1]['value.0.1.concat_latent_image'] for found, n in ((later, 'positive'), (first, 'positive'))]
    assert all(v.shape == (1, 16, 4, 18, 32) for v in latents) and np.array_equal(latents[0][:, :, 0], latents[1][:, :, 0]), 'the reference comes first'
    assert not np.array_equal(latents[0][:, :, 1:3], latents[1][:, :, 1:3]), 'then the frames that are given'

# memory

def short_of_memory(tmp_path: Path, most: int) -> str:
    "A profile whose decoder has room for so many frames; its name"
    graph = load_graph('wan22-animate')
    graph['frames']['inputs']['images'] = ['full', 0]
    graph['full'] = {'class_type': 'FullMemory', 'inputs': {'images': ['decode', 0], 'most': most}}
    (tmp_path / 'full.json').write_text(json.dumps(graph))
    PROFILES['full'] = replace(TINY, name='full', graph=tmp_path / 'full.json', length=17)
    return 'full'

def test_out_of_memory_is_tried_with_shorter_windows(wan, tmp_path):
    try: answer = wan.run('shorter', **JOB, profile=short_of_memory(tmp_path, 9))
    finally: del PROFILES['full']
    assert answer['frames'] == 14 and rendered(wan, 'shorter') == [(0, 17), (0, 9), (1, 9), (2, 9)]

def test_out_of_memory_for_good_says_so_with_figures(wan, tmp_path):
    try: answer = wan.run('no-room', **JOB, profile=short_of_memory(tmp_path, 1))
    finally: del PROFILES['full']
    assert answer['error'].startswith('out_of_memory: a window of 9 frames at 64x48') and 'Allocation on device' in answer['error']
    assert wan.store.stat('avatars/no-room.mp4') is None

# the prompt

def test_a_prompt_of_ones_own_needs_the_encoder_once(wan, weights, monkeypatch, tmp_path):
    answer = wan.run('own', **BRIEF, profile='tiny-prompted', prompt='a person waves')
    assert answer['error'].startswith('models_unavailable') and 'never-there.safetensors' in answer['error'] and '(5 bytes)' in answer['error']
    wanted = Embedding('a person waves', TINY.encoder_sha256)
    # umT5 is 5.7 B parameters and cannot be had here: a node that says something in its place, everything around it is real
    graph = load_graph('prompt')
    graph['encode'] = {'class_type': 'SayPrompt', 'inputs': {'text': '{{prompt}}', 'encoder': '{{text_encoder}}'}}
    del graph['encoder']
    monkeypatch.setattr(avatar, 'load_graph', lambda name: graph if name == 'prompt' else load_graph(name))
    (weights / 'text_encoders/never-there.safetensors').write_bytes(b'umT5?')
    for job_id, source in (('own-made', None), ('own-again', 'here')):
        assert 'error' not in wan.run(job_id, **BRIEF, profile='tiny-prompted', prompt='a person waves')
        prompt = next(s for s in wan.store.read_json(f'avatars/{job_id}.mp4.json')['timeline'] if s['name'] == 'prompt')
        assert prompt['facts']['from'] == source
    wan.store.download(f'embeddings/{wanted.name}', tmp_path / 'kept.safetensors', 'x', 10**9)
    check_embedding(tmp_path / 'kept.safetensors', wanted)
    (wan.settings.work_dir / 'embeddings' / wanted.name).unlink() # another worker
    (weights / 'text_encoders/never-there.safetensors').unlink()
    assert 'error' not in wan.run('own-elsewhere', **BRIEF, profile='tiny-prompted', prompt='a person waves')
    prompt = next(s for s in wan.store.read_json('avatars/own-elsewhere.mp4.json')['timeline'] if s['name'] == 'prompt')
    assert prompt['facts']['from'] == 'bucket'

# the production tracker, on networks of random weights

def test_wholebody_tracker_in_comfyui(wan, tmp_path):
    answer = wan.run('body', **BRIEF, profile='tiny-body', seed=1)
    assert 'error' not in answer, answer
    key, = wan.store.list('tracks/wholebody-sam2-3-')
    wan.store.download(key, tmp_path / 'five.track', 'x', 10**9)
    track = load_track(tmp_path / 'five.track')
    assert track.present.all() and len(track) == 5 and track.wholebody.shape == (5, 133, 3) and track.plate is None
    # the detector's box is (220, 60, 420, 620) of 640x640, the bumps lie on a 12 x 12 grid in its crop: both tremble by less than 2 pixels
    nose, corner = track.wholebody[0, 0, :2], track.wholebody[0, 132, :2]
    width, height = 400 * 1.25, 630 * 1.25
    wide = max(width, height * 192 / 256)
    left, top = 640 - wide / 2, 382.5 - height / 2
    assert np.abs(nose - [left + 8 * wide / 48, top + 6 * height / 64]).max() < 4
    assert np.abs(corner - [left + 8 * wide / 48, top + (6 + 52) * height / 64]).max() < 4
    assert wan.store.read_json('avatars/body.mp4.json')['track'] == {'frames': 5, 'present': 5, 'faces': 5, 'guessed_masks': 0}
    again = wan.run('body-again', **BRIEF, profile='tiny-body', seed=1)
    assert again['sha256'] == answer['sha256']
    assert [s['facts']['cached'] for s in wan.store.read_json('avatars/body-again.mp4.json')['timeline'] if s['name'] == 'track'] == [True]

def test_masks_that_are_lost_do_not_deliver_the_driver_himself(wan):
    "SAM2 says that nobody is there while the keypoints stand: with that in every frame, the job says so"
    answer = wan.run('blind', **BRIEF, profile='tiny-blind', seed=1)
    assert answer['error'].startswith("no_person: the person's outline was lost in 5 of the 5 frames")
    assert wan.store.stat('avatars/blind.mp4') is None

LACKS = [(WAN, {}, '9 files (22,784,663,858 bytes)', 'run: wan-avatar models fetch --profile wan22-animate'),
         (TINY, {}, '5 files (5 of unknown size)', 'run: wan-avatar tiny-weights MODELS_DIR'),
         (WAN, {w: w.bytes or 1 for w in needed_files(WAN) if w.folder != 'sam2'}, '2 files (323,482,001 bytes)', 'sam2/config.json'),
         (WAN, {w: (w.bytes or 1) - (w.slot == 'vae') for w in needed_files(WAN)}, '1 files (253,815,318 bytes)', 'vae/wan_2.1_vae.safetensors; run'),
         (replace(TINY, name='mine'), {}, '5 files', 'vae/tiny-vae.safetensors, clip_vision/tiny-clip_vision.safetensors; put them there')]

@pytest.mark.parametrize('profile, there, size, words', LACKS, ids=['nothing there', 'tiny', 'masks alone', 'one cut short', 'of ones own'])
def test_missing_files_are_named_with_their_bytes_and_what_to_run(tmp_path, profile, there, size, words):
    for w, length in there.items():
        (tmp_path / w.folder).mkdir(exist_ok=True)
        with (tmp_path / w.folder / w.file).open('wb') as f: f.truncate(length) # sparse: no disk
    with pytest.raises(JobError) as e: check_weights(profile, tmp_path)
    assert e.value.code == 'models_unavailable' and size in e.value.message and words in e.value.message, e.value

def test_slots_of_the_production_graph_are_what_windows_fill():
    assert slots(profile_graph(WAN)) == SLOTS.keys()
