"""The production graph on tiny random checkpoints, in the real ComfyUI: every node, link and shape"""
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from audit import rules
from conftest import ROOT, comfy_with_probe, cut, sparing_service

from wan_avatar import embeddings
from wan_avatar.avatar import make_avatar
from wan_avatar.comfy import run
from wan_avatar.frames import SIZE, RawFrames, read_frames
from wan_avatar.job import Job, JobError
from wan_avatar.normalise import normalise_video
from wan_avatar.plan import PlanRules
from wan_avatar.prompt import Embedding, check_embedding
from wan_avatar.segments import sized
from wan_avatar.track import TRACKERS, load_track, parse_track
from wan_avatar.workflow import (
    REFERENCE,
    TINY,
    WAN,
    Profile,
    Weight,
    bind,
    check_weights,
    load_graph,
    loaders,
    needed_files,
    profile_graph,
    slots,
    track_graph,
    validate,
    vision_graph,
)

PYTHON = ROOT / '.comfy/env/bin/python'

def with_dit(file: str) -> tuple[Weight, ...]:
    "The tiny profile's weights with another transformer"
    return tuple(replace(w, file=file) if w.slot == 'dit' else w for w in TINY.weights)

def of_unknown_size(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    return tuple(replace(w, bytes=None) for w in weights)

def with_blind_sam2(detectors: tuple[Weight, ...]) -> tuple[Weight, ...]:
    return tuple(replace(w, file=f'blind/{w.file}') if w.folder == 'sam2' else w for w in detectors)

NEVER_THERE = Weight('text_encoder', 'text_encoders', 'never-there.safetensors', 5)
FACE = replace(TINY, name='tiny-face', face=True, weights=with_dit('face.safetensors'),
               values={**TINY.values, 'steps': 1})
BODY = replace(TINY, name='tiny-body', tracker='wholebody-sam2', detectors=of_unknown_size(TINY.detectors))
BLIND = replace(BODY, name='tiny-blind', detectors=with_blind_sam2(BODY.detectors))
PROMPTED = replace(TINY, name='tiny-prompted', encoder=NEVER_THERE)

@pytest.fixture(scope='module')
def weights(tiny, detectors) -> Path:
    "The files of `wan-avatar tiny-weights`, detectors, and empty files under production's names for the loaders"
    folder = shutil.copytree(detectors, tiny(), dirs_exist_ok=True)
    shutil.move(tiny('--face') / 'diffusion_models/tiny-dit.safetensors', folder / 'diffusion_models/face.safetensors')
    for w in (*WAN.weights, WAN.encoder):
        (folder / w.folder).mkdir(exist_ok=True)
        (folder / w.folder / w.file).touch()
    more = [PYTHON, '-c', MORE, folder, ROOT / '.comfy/ComfyUI', WAN.clip_vision.file]
    subprocess.run(more, cwd=ROOT, check=True, capture_output=True)
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
    made = sparing_service(bucket, work, [FACE, BODY, BLIND, PROMPTED], MODELS_DIR=str(weights),
                           PROFILE='wan22-animate-tiny', COMFY_DIR=str(probed))
    made.store.upload(samples / 'astronaut.png', 'in/astronaut.png', 'image/png')
    for name, frames in (('short', 14), ('five frames', 5)):
        clip = cut(samples / 'pexels.mp4', frames, tmp_path_factory.mktemp('clip'))
        made.store.upload(clip, f'in/{name}.mp4', 'video/mp4')
    yield made
    made.close()

@contextmanager
def known(wan, profile: Profile) -> Iterator[None]:
    "A profile that jobs can name for the length of a block"
    wan.profiles[profile.name] = profile
    yield
    del wan.profiles[profile.name]

JOB = {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/short.mp4'}
BRIEF = JOB | {'driving_video_path': 'in/five frames.mp4'}

@pytest.fixture(scope='module')
def made(wan):
    answer = wan.run('tiny', **JOB, seed=7)
    assert 'error' not in answer, answer
    return answer

def rendered(wan, job_id: str) -> list[tuple[int, int]]:
    "Windows of a finished job: number and frames"
    return [(s['facts']['segment'], s['facts']['frames']) for s in stages(wan, job_id, 'render')]

def stages(wan, job_id: str, name: str) -> list[dict]:
    "Stages of this name in a finished job's manifest"
    timeline = wan.store.read_json(f'avatars/{job_id}.mp4.json')['timeline']
    return [s for s in timeline if s['name'] == name]

def test_several_windows_with_masks_tail_and_embedding(wan, made):
    result = {'width': 1280, 'height': 720, 'frames': 14, 'profile': 'wan22-animate-tiny', 'seed': 7}
    assert {k: made[k] for k in result} == result
    assert rendered(wan, 'tiny') == [(0, 9), (1, 9), (2, 9)]
    settings = {'steps': 2, 'tracker': TRACKERS['mediapipe'], 'prompt': 'a person'}
    rendered_with = wan.store.read_json('avatars/tiny.mp4.json')['rendered_with']
    assert {k: rendered_with[k] for k in settings} == settings
    assert [s['facts']['from'] for s in stages(wan, 'tiny', 'prompt')] == ['here']

def test_the_manifest_says_what_computed_the_video(wan, made):
    manifest = wan.store.read_json('avatars/tiny.mp4.json')
    kernels = manifest['kernels']
    for settings in (manifest['rendered_with'], kernels):
        assert (settings['attention'], settings['fp8_products']) == ('default', 'default')
    assert sum(kernels['ran'].values()) == 3 * 2 * 5 * 3, 'windows, steps, blocks, attentions of a block'

def test_one_seed_one_video_another_seed_another(wan, made):
    assert wan.run('tiny-again', **JOB, seed=7)['sha256'] == made['sha256']
    assert wan.run('tiny-other', **JOB, seed=8)['sha256'] != made['sha256']

def test_models_stay_loaded_from_job_to_job(wan, made):
    "The prompts in between, which find the person, do not push them out"
    assert 'error' not in wan.run('warm', **JOB, seed=9)
    async def history() -> dict: return await wan.comfy.get('/history')
    def cached(node: str) -> list[set[str]]: # nodes that were not run anew, of each prompt that has this node
        prompts = [p for p in wan.on_loop(history()).values() if node in p['prompt'][2]]
        return [set(dict(p['status']['messages'])['execution_cached']['nodes']) for p in prompts]
    assert set(loaders(TINY)) == {'dit', 'distill', 'relight', 'shift', 'kernels', 'vae', 'clip_vision'}
    windows = cached('sample')
    assert len(windows) > 5
    renderer = set(loaders(TINY)) - {'clip_vision'}
    assert all(renderer <= nodes for nodes in windows[1:]), 'only the first window of all loaded anything'
    described = cached('described')
    assert len(described) > 1
    assert all('clip_vision' in nodes for nodes in described[1:]), 'no job loaded CLIP again'

def test_length_and_overlap_can_be_changed(wan):
    longer = TINY.changed(length=13, overlap=9)
    for profile, carried in ((longer, 9), (WAN, 5)):
        assert profile_graph(profile)['animate']['inputs']['continue_motion_max_frames'] == carried
    with known(wan, replace(longer, name='longer')): answer = wan.run('longer', **JOB, profile='longer')
    assert answer['frames'] == 14
    assert rendered(wan, 'longer') == [(0, 13), (1, 13)]

# what only the size of the weights tells apart

def differences(a: dict, b: dict) -> set[tuple[str, str]]:
    "(node, input) that two graphs of the same nodes give other values"
    assert a.keys() == b.keys()
    return {(n, k) for n in a for k in a[n]['inputs'] if a[n]['inputs'][k] != b[n]['inputs'].get(k)}

def test_tiny_differs_from_production_in_files_size_and_close_up_alone():
    files = {('dit', 'unet_name'), ('distill', 'lora_name'), ('relight', 'lora_name'), ('vae', 'vae_name')}
    more = {('sample', 'steps'), ('animate', 'face_video')}
    assert differences(profile_graph(WAN), profile_graph(TINY)) == files | more
    whole, small = vision_graph(WAN), vision_graph(TINY)
    assert differences(whole, small) == {('clip_vision', 'clip_name')}
    loaded_otherwise = {n for n in whole if whole[n]['class_type'] != small[n]['class_type']}
    assert loaded_otherwise == {'clip_vision'}, 'its CLIP vision model has a loader of its own'

PRODUCTION_ALONE = { # fields in which production differs from the tiny profile, and why
    'name': '',
    'tracker': 'MediaPipe on a laptop',
    'other_trackers': 'each can be run with the other',
    'length': 'frames',
    'weights': 'size of weights',
    'clip_vision': 'size of weights',
    'vision_loader': 'one for two layers',
    'encoder': 'cannot be small',
    'encoder_sha256': 'no encoder made its embeddings',
    'face': 'seconds a frame on a CPU',
    'prompt': 'ASCII',
    'negative_prompt': 'ASCII',
    'gates': 'it paints noise',
    'values': 'size and steps, below'}

def test_every_value_in_which_tiny_differs_is_listed():
    assert {f.name for f in fields(WAN) if getattr(WAN, f.name) != getattr(TINY, f.name)} == set(PRODUCTION_ALONE)
    assert {k for k in WAN.values if WAN.values[k] != TINY.values[k]} == {'scale', 'steps'}
    assert TINY.rules(PlanRules).sampled(SIZE) == (64, 48)

def test_reference_is_upstreams_sampling():
    values = {'steps': 20, 'sampler': 'dpmpp_2m', 'shift': 5.0, 'cfg': 1.0, 'mask_shape': 'rectangle'}
    assert {k: REFERENCE.values[k] for k in values} == values
    assert REFERENCE.vision == 'clip'
    assert REFERENCE.face
    graph = profile_graph(REFERENCE)
    assert 'distill' not in graph
    assert graph['relight']['inputs']['model'] == ['dit', 0]
    assert graph['shift']['inputs']['model'] == ['relight', 0]
    assert not [w for w in needed_files(REFERENCE) if 'distill' in w.slot]

@pytest.mark.parametrize('profile', [WAN, REFERENCE, TINY], ids=lambda p: p.name)
def test_negative_prompt_is_its_own_above_cfg_1(profile):
    assert profile_graph(profile)['animate']['inputs']['negative'] == ['prompt', 0]
    assert set(profile.prompts) == {'embedding'}
    guided = profile.changed(cfg=3.5)
    assert profile_graph(guided)['animate']['inputs']['negative'] == ['negative', 0]
    assert guided.prompts == {'embedding': profile.prompt, 'negative_embedding': profile.negative_prompt}
    assert profile.negative_prompt
    assert profile.negative_prompt != profile.prompt

SLOTS = {
    'reference': 'j/r.png', 'reference_track': 'j/r.track',
    'video': 'j/d.mp4', 'track': 'j/d.track', 'tail': '', 'frames': 'j/f.u8',
    'start': 0, 'length': 77, 'left': 0, 'top': 0, 'area_width': 1280, 'area_height': 720, 'skip': 0, 'count': 77,
    'width': 1280, 'height': 720,
    'seed': 2**63 - 1, 'embedding': 'embeddings/x.safetensors', 'vision': 'j/v.safetensors',
}
WRITTEN_PROMPT = {'text_encoder': WAN.encoder.file, 'prompt': 'p', 'encoder_sha256': 'e', 'path': 'e/x.safetensors'}

GRAPHS = { # graph, the values of its slots; a window's graph takes of SLOTS those it has
    'production': (profile_graph(WAN), SLOTS),
    'reference': (profile_graph(REFERENCE), SLOTS),
    'without the face': (profile_graph(WAN.changed(face=False)), SLOTS),
    'vision off': (profile_graph(WAN.changed(vision='off', mask_shape='grid')), SLOTS),
    'vision unconnected': (profile_graph(WAN.changed(vision='unconnected', mask_shape='grid')), SLOTS),
    'cfg above 1': (profile_graph(WAN.changed(cfg=3.5)), SLOTS | {'negative_embedding': 'embeddings/n.safetensors'}),
    'the picture': (vision_graph(WAN), SLOTS),
    'a track': (track_graph(WAN), {'source': 'j/d.mp4', 'kind': 'video', 'track': 'j/d.track'}),
    'a prompt': (load_graph('prompt'), WRITTEN_PROMPT)}

@pytest.mark.parametrize('graph, values', GRAPHS.values(), ids=GRAPHS)
def test_production_graphs_fit_this_comfyui(wan, graph, values):
    bound = bind(graph, {k: v for k, v in values.items() if k in slots(graph)})
    assert validate(bound, wan.comfy.object_info) == []

# inside a window

def probe(wan, graph: dict, **links: list) -> dict[str, tuple]:
    "Run a graph and look at these links: name -> (shapes, tensors)"
    def probe_of(name: str) -> dict: return {'class_type': 'Probe', 'inputs': {'value': links[name], 'name': name}}
    wan.on_loop(run(wan.comfy, graph | {f'probe_{name}': probe_of(name) for name in links}))
    folder = wan.settings.work_dir / 'comfy/output/probes'
    def shapes(name: str) -> list: return json.loads((folder / f'{name}.json').read_text())
    return {name: (shapes(name), dict(np.load(folder / f'{name}.npz'))) for name in links}

def window_values(video: str = 'driving.y4m') -> dict:
    "Slots of the window of the fixture below"
    files = {
        'reference': 'reference.png', 'reference_track': 'reference.track',
        'video': video, 'track': 'driving.track', 'tail': 'tail.u8',
        'frames': 'frames.u8', 'vision': 'vision.safetensors'}
    embedding = f'embeddings/{Embedding(TINY.prompt, TINY.encoder_sha256).name}'
    return SLOTS | {k: f'jobs/by-hand/{v}' for k, v in files.items()} | {
        'start': 4, 'length': 9, 'count': 9, 'width': 64, 'height': 48, 'seed': 3, 'embedding': embedding}

@pytest.fixture(scope='module')
def window(wan, made, tmp_path_factory):
    "A later window of the tiny profile with its inputs in the work tree, and what flows in it"
    folder = wan.settings.work_dir / 'jobs/by-hand'
    folder.mkdir(parents=True)
    raw = folder / 'raw.mp4'
    wan.store.download('in/short.mp4', raw, 'x', 10**9)
    normalise_video(raw, folder / 'driving.y4m', folder / 'audio.m4a', 60)
    wan.store.download('in/astronaut.png', folder / 'reference.png', 'x', 10**9)
    key = next(k for k in wan.store.list('tracks/mediapipe') if len(parse_track(wan.store.read_bytes(k, 10**9))) == 14)
    wan.store.download(key, folder / 'driving.track', 'x', 10**9)
    shutil.copy(folder / 'driving.track', folder / 'reference.track') # the production graph does not read it
    tail = np.concatenate([f[None] for f in read_frames(folder / 'driving.y4m', 4, 5)])
    RawFrames(folder / 'tail.u8', SIZE).write(tail)
    values = window_values()
    described = bind(vision_graph(TINY), {k: values[k] for k in slots(vision_graph(TINY))})
    wan.on_loop(run(wan.comfy, described))
    graph = bind(profile_graph(TINY), values)
    # the seeds, then the scene: what the conditioning must hold
    background = {'image': ['pictures', 3], 'batch_index': 5, 'length': 4}
    graph['rest'] = {'class_type': 'ImageFromBatch', 'inputs': background}
    graph['both'] = {'class_type': 'ImageBatch', 'inputs': {'image1': ['pictures', 5], 'image2': ['rest', 0]}}
    graph['scene'] = {'class_type': 'VAEEncode', 'inputs': {'pixels': ['both', 0], 'vae': ['vae', 0]}}
    return folder, tail, probe(wan, graph, **LINKS)

LINKS = {
    'pictures': ['pictures', 0],
    'pose': ['pictures', 1],
    'face': ['pictures', 2],
    'background': ['pictures', 3],
    'mask': ['pictures', 4],
    'tail': ['pictures', 5],
    'area_mask': ['pictures', 6],
    'positive': ['mask_rows', 0],
    'negative': ['mask_rows', 1],
    'unfixed': ['animate', 0],
    'latent': ['animate', 2],
    'trim_latent': ['animate', 3],
    'trim_image': ['animate', 4],
    'sampled': ['sample', 0],
    'trimmed': ['trim', 0],
    'decoded': ['decode', 0],
    'scene': ['scene', 0]}

SHAPES = {
    'pictures': [1, 48, 64, 3],
    'pose': [9, 48, 64, 3],
    'face': [9, 512, 512, 3],
    'background': [9, 48, 64, 3],
    'mask': [9, 48, 64],
    'tail': [5, 48, 64, 3],
    'area_mask': [9, 720, 1280],
    'trim_latent': 1,
    'trim_image': 5,
    'decoded': [9, 48, 64, 3]}

def test_shapes_of_everything(window):
    shapes = {name: shape for name, (shape, _) in window[2].items()}
    assert {k: shapes[k] for k in SHAPES} == SHAPES
    for name, frames in (('latent', 4), ('sampled', 4), ('trimmed', 3)): # one of the first two is the reference
        assert shapes[name]['samples'] == [1, 16, frames, 6, 8], name
    for name in ('positive', 'negative'):
        (embedding, said), = shapes[name]
        assert embedding == [1, 512, 4096]
        assert said.pop('clip_vision_output') == {'penultimate_hidden_states': [1, 257, 1280]}
        assert said == {
            'pose_video_latent': [1, 16, 3, 6, 8],
            'concat_latent_image': [1, 16, 4, 6, 8],
            'concat_mask': [1, 4, 4, 6, 8]}
    made = RawFrames(window[0] / 'frames.u8', SIZE, channels=4).pixels()
    assert made.shape == (9, 720, 1280, 4), 'the seeds too'
    mask = window[2]['area_mask'][1]['value']
    assert np.array_equal(made[..., 3], mask * 255), 'the mask of the frame is kept with what was made'
    assert np.array_equal(window[2]['mask'][1]['value'], np.stack([sized(m, (64, 48), nearest=True) for m in mask]))

def test_the_scene_outside_the_mask_goes_through(window):
    folder, _, found = window
    background, mask = found['background'][1]['value'], found['mask'][1]['value'].astype(bool)
    frames = np.stack([sized(f, (64, 48)) for f in read_frames(folder / 'driving.y4m', 4, 9)])
    assert not background[mask].any()
    assert 0.05 < mask.mean() < 0.95
    assert np.abs(background[~mask] * 255 - frames[~mask]).max() < 0.51
    said = found['positive'][1]
    scene, given = found['scene'][1]['value.samples'], said['value.0.1.concat_latent_image']
    assert np.array_equal(scene, given[:, :, 1:]), 'behind the reference stand the seeds and the scene, nothing else'
    rows = said['value.0.1.concat_mask'][0]
    blocks = mask.reshape(9, 6, 8, 8, 8)[:, :, 0, :, 0] # what `nearest` picks of each latent pixel, as upstream does
    assert not rows[:, 0].any()
    assert not rows[:, 1:3].any()
    assert (rows[:, 3] == blocks[5:9]).all()

def test_the_tail_arrives_byte_for_byte(window):
    _, tail, found = window
    arrived = np.round(found['tail'][1]['value'] * 255).astype(np.uint8)
    assert np.array_equal(arrived, np.stack([sized(f, (64, 48)) for f in tail]))

# the rows of the mask: frames of a window are numbered from 100 here

ROWS = { # is it a later window; rows of a ComfyUI without the repair; right rows
    'first': (False, [[100, 101, 102, 103], [104, 105, 106, 107], [108, 1, 1, 1]],
              [[100, 100, 100, 100], [101, 102, 103, 104], [105, 106, 107, 108]]),
    'later': (True, [[0, 0, 0, 0], [0, 105, 106, 107], [108, 1, 1, 1]],
              [[0, 0, 0, 0], [0, 0, 0, 0], [105, 106, 107, 108]])}

@pytest.mark.parametrize('later, wrong, right', ROWS.values(), ids=ROWS)
def test_mask_rows(wan, window, later, wrong, right):
    whole = bind(profile_graph(TINY), SLOTS | {'length': 9, 'width': 64, 'height': 48})
    graph = {k: whole[k] for k in whole if k in ('vae', 'animate', 'mask_rows')}
    graph['numbered'] = {'class_type': 'NumberedMask', 'inputs': {'length': 9, 'width': 64, 'height': 48}}
    graph['prompt'] = {'class_type': 'AvatarPrompt', 'inputs': {'embedding': window_values()['embedding']}}
    graph['seeds'] = {'class_type': 'EmptyImage', 'inputs': {'width': 64, 'height': 48, 'batch_size': 5, 'color': 0}}
    def is_gone(value) -> bool: return isinstance(value, list) and value[0] in ('pictures', 'vision')
    inputs = {k: v for k, v in graph['animate']['inputs'].items() if not is_gone(v)}
    inputs |= {'character_mask': ['numbered', 0]} | ({'continue_motion': ['seeds', 0]} if later else {})
    graph['animate'] = graph['animate'] | {'inputs': inputs}
    graph['mask_rows'] = graph['mask_rows'] | {'inputs': graph['mask_rows']['inputs'] | {'mask': ['numbered', 0]}}
    found = probe(wan, graph, before=['animate', 0], after=['mask_rows', 0], negative=['mask_rows', 1])
    def rows(name: str) -> list: # by latent frame, the reference's left out
        mask = found[name][1]['value.0.1.concat_mask'][0]
        assert not mask[:, 0].any()
        assert (mask[:, :, :6, :8] == mask[:, :, :1, :1]).all(), 'a row has one number'
        return mask[:, 1:, 0, 0].T.astype(int).tolist()
    assert rows('before') in (wrong, right), 'a ComfyUI without the repair, or one that has it'
    assert rows('after') == rows('negative') == right

# the picture as CLIP sees it

def sampled(wan, window, dit: str, vision: str) -> np.ndarray:
    "What comes out of one window of the tiny profile with this transformer"
    graph = profile_graph(replace(TINY, weights=with_dit(dit)).changed(vision=vision))
    bound = bind(graph, {k: v for k, v in window_values().items() if k in slots(graph)})
    return probe(wan, bound, sampled=['sample', 0])['sampled'][1]['value.samples']

@pytest.mark.parametrize('vision, depends', [('clip', True), ('off', False), ('unconnected', True)])
def test_the_image_branch(wan, window, vision, depends):
    "With `off` nothing of it is left; ComfyUI alone sends the text through it"
    whole, zeroed = (sampled(wan, window, dit, vision) for dit in ('tiny-dit.safetensors', 'no-image.safetensors'))
    assert (np.abs(whole - zeroed).max() > 1e-3) == depends

def test_one_description_for_all_windows_and_the_very_one_of_clip(wan, window, made):
    found = window[2]
    told = found['positive'][1]['value.0.1.clip_vision_output.penultimate_hidden_states']
    graph = bind(vision_graph(TINY), {k: window_values()[k] for k in slots(vision_graph(TINY))})
    said = probe(wan, graph, described=['described', 0], letterboxed=['letterboxed', 0])
    encoded = said['described'][1]['value.penultimate_hidden_states']
    assert np.array_equal(told, encoded), "the file holds the encoder's result"
    assert said['letterboxed'][0] == [1, 48, 64, 3]
    assert np.array_equal(said['letterboxed'][1]['value'], found['pictures'][1]['value'])
    names = [s['name'] for s in wan.store.read_json('avatars/tiny.mp4.json')['timeline']]
    assert names.count('vision') == 1
    assert names.count('render') == 3
    assert names.index('vision') < names.index('render')

def test_clip_at_its_true_size(wan, window):
    "ComfyUI's own loader and production's graph, on zeros: what Wan reads has the shape it must have"
    paths = {'reference': window_values()['reference'], 'vision': 'jobs/by-hand/large.safetensors'}
    paths |= {'width': 1280, 'height': 720}
    said = probe(wan, bind(vision_graph(WAN), paths), described=['described', 0], letterboxed=['letterboxed', 0])
    assert said['described'][0]['penultimate_hidden_states'] == [1, 257, 1280]
    assert said['letterboxed'][0] == [1, 720, 1280, 3]
    assert 'missing clip vision' not in wan.comfy.process.log.since(0)

# the close-up of the face

def test_face_branch(wan):
    answer = wan.run('close-up', **BRIEF, profile='tiny-face', seed=1)
    assert 'error' not in answer
    assert rendered(wan, 'close-up') == [(0, 5)]
    without = wan.run('no-close-up', **BRIEF, profile='wan22-animate-tiny', seed=1)
    assert answer['sha256'] != without['sha256'], 'the close-up changes the picture'

@pytest.mark.parametrize('cfg, once, always', [(1.0, 1, 2), (4.0, 2, 4)], ids=['one prompt', 'with a negative one'])
def test_close_ups_are_encoded_once_a_window(wan, window, cfg, once, always):
    graph = profile_graph(FACE)
    given = window_values() | {'length': 5, 'count': 5, 'seed': 1}
    graph = bind(graph, {k: v for k, v in given.items() if k in slots(graph)})
    sampled = graph['sample']['inputs']
    links = {k: sampled[k] for k in ('positive', 'negative')} | {'latent': sampled['latent_image']}
    models = {'hooked': ['kernels', 0], 'plain': graph['kernels']['inputs']['model']}
    graph['calls'] = {'class_type': 'MotionCalls', 'inputs': models | links | {'steps': 2, 'cfg': cfg}}
    graph = {k: v for k, v in graph.items() if k not in ('sample', 'ran', 'trim', 'decode', 'frames')}
    said, = wan.on_loop(run(wan.comfy, graph))['calls']['said']
    assert said == {'calls': [once, always], 'equal': True, 'left': False}

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
    wan.background.submit(make_avatar('sage', job, replace(wan.context, settings=settings))).result(timeout=180)
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
    seeds = np.stack(list(read_frames(folder / 'driving.mp4', rules.START, rules.SEEDS)))
    RawFrames(folder / 'tail.u8', SIZE).write(seeds)
    values = window_values('driving.mp4')
    paths = {k: v.replace('by-hand', 'audit') for k, v in values.items() if str(v).startswith('jobs/by-hand')}
    values |= paths | {'start': rules.START, 'length': rules.LENGTH}
    values |= {'width': rules.SAMPLED[0], 'height': rules.SAMPLED[1]}
    profile = TINY.changed(face=True, vision='unconnected')
    graph = bind(profile_graph(profile), {k: v for k, v in values.items() if k in slots(profile_graph(profile))})
    graph = {k: v for k, v in graph.items() if k in ('vae', 'prompt', 'segment', 'pictures', 'animate', 'mask_rows')}
    graph['encoded_pose'] = {'class_type': 'VAEEncode', 'inputs': {'pixels': ['pictures', 1], 'vae': ['vae', 0]}}
    graph['whole'] = graph['pictures'] | {'inputs': graph['pictures']['inputs'] | {'width': 1280, 'height': 720}}
    pictures = 'reference', 'pose', 'face', 'background', 'mask', 'tail'
    links = {name: ['pictures', n] for n, name in enumerate(pictures)}
    links |= {'whole_pose': ['whole', 1], 'whole_mask': ['whole', 4], 'encoded': ['encoded_pose', 0]}
    links |= {'positive': ['mask_rows', 0], 'negative': ['mask_rows', 1]}
    later = probe(wan, graph, **links)
    first = probe(wan, disconnected_tail(graph), positive=['mask_rows', 0])
    return dict(np.load(ROOT / 'tests/audit/expected.npz')), later, first

def disconnected_tail(graph: dict) -> dict:
    "The same window as if it were the first"
    segment = graph['segment'] | {'inputs': graph['segment']['inputs'] | {'tail': ''}}
    return {k: v for k, v in graph.items() if k not in ('whole', 'encoded_pose')} | {'segment': segment}

def test_the_rules_still_say_what_was_kept():
    "The kept tensors are those of rules.py; only a person who changes a rule changes both"
    kept = dict(np.load(ROOT / 'tests/audit/expected.npz'))
    assert all(np.array_equal(v, kept[k]) for k, v in rules.expected().items())

PICTURES = [ # name in the rules; link; how far off it may be, of 255
    ('reference', 'reference', 0.51),
    ('small_pose', 'pose', 0.01),
    ('small_background', 'background', 8), # it went through a codec
    ('face', 'face', 8), # likewise
    ('whole_pose', 'whole_pose', 0.01)]

@pytest.mark.parametrize('name, link, most', PICTURES, ids=[p[0] for p in PICTURES])
def test_pictures_are_those_of_the_rules(audited, name, link, most):
    must, later, _ = audited
    shown = later[link][1]['value'][0 if name == 'reference' else rules.SHOWN]
    off = np.abs(shown * 255 - must[name])
    assert off.max() <= most, f'{name}: {off.max():.1f} of 255 at {np.unravel_index(off.argmax(), off.shape)}'

def test_masks_are_those_of_the_rules(audited):
    must, later, first = audited
    assert np.array_equal(later['mask'][1]['value'], must['small_mask'])
    assert np.array_equal(later['whole_mask'][1]['value'][rules.SHOWN], must['whole_mask'])
    for found, expected in ((later, 'later_rows'), (first, 'first_rows')):
        rows = found['positive'][1]['value.0.1.concat_mask'][0]
        assert not rows[:, 0].any(), expected
        assert np.array_equal(rows[:, 1:], must[expected]), expected

def test_ranges_and_order_of_what_the_model_gets(audited):
    _, later, first = audited
    positive, negative = (later[n][1] for n in ('positive', 'negative'))
    face = later['face'][1]['value']
    given = positive['value.0.1.face_video_pixels']
    assert given.shape == (1, 3, 9, 512, 512)
    assert np.abs(given[0] - np.moveaxis(face, -1, 0) * 2 + 1).max() < 1e-3
    assert (negative['value.0.1.face_video_pixels'] == -1).all(), 'at cfg above 1 the negative side sees no face'
    assert np.array_equal(positive['value.0.1.pose_video_latent'], later['encoded'][1]['value.samples'])
    for name in ('pose', 'face', 'background', 'mask', 'tail'):
        picture = later[name][1]['value']
        assert picture.min() >= 0, name
        assert picture.max() <= 1, name
    of_later, of_first = (found['positive'][1]['value.0.1.concat_latent_image'] for found in (later, first))
    assert of_later.shape == of_first.shape == (1, 16, 4, 18, 32)
    assert np.array_equal(of_later[:, :, 0], of_first[:, :, 0]), 'the reference comes first'
    assert not np.array_equal(of_later[:, :, 1:3], of_first[:, :, 1:3]), 'then the frames that are given'

# memory

def short_of_memory(tmp_path: Path, most: int) -> Profile:
    "A profile whose decoder has room for so many frames"
    graph = load_graph('wan22-animate')
    graph['frames']['inputs']['images'] = ['full', 0]
    graph['full'] = {'class_type': 'FullMemory', 'inputs': {'images': ['decode', 0], 'most': most}}
    (tmp_path / 'full.json').write_text(json.dumps(graph))
    return replace(TINY, name='full', graph=tmp_path / 'full.json', length=17)

def test_out_of_memory_is_tried_with_shorter_windows(wan, tmp_path):
    with known(wan, short_of_memory(tmp_path, 9)): answer = wan.run('shorter', **JOB, profile='full')
    assert answer['frames'] == 14
    assert rendered(wan, 'shorter') == [(0, 17), (0, 9), (1, 9), (2, 9)]

def test_out_of_memory_for_good_says_so_with_figures(wan, tmp_path):
    with known(wan, short_of_memory(tmp_path, 1)): answer = wan.run('no-room', **JOB, profile='full')
    assert answer['error'].startswith('out_of_memory: a window of 9 frames at 48x48')
    assert 'Allocation on device' in answer['error']
    assert wan.store.stat('avatars/no-room.mp4') is None

# the prompt

def test_a_prompt_of_ones_own_needs_the_encoder_once(wan, weights, monkeypatch, tmp_path):
    answer = wan.run('own', **BRIEF, profile='tiny-prompted', prompt='a person waves')
    assert answer['error'].startswith('models_unavailable')
    assert 'never-there.safetensors' in answer['error']
    assert '(5 bytes)' in answer['error']
    wanted = Embedding('a person waves', TINY.encoder_sha256)
    # umT5 is 5.7 B parameters and cannot be had here: a node stands in for it, everything around it is real
    graph = load_graph('prompt')
    graph['encode'] = {'class_type': 'SayPrompt', 'inputs': {'text': '{{prompt}}', 'encoder': '{{text_encoder}}'}}
    del graph['encoder']
    monkeypatch.setattr(embeddings, 'load_graph', lambda name: graph if name == 'prompt' else load_graph(name))
    (weights / 'text_encoders/never-there.safetensors').write_bytes(b'umT5?')
    for job_id, source in (('own-made', None), ('own-again', 'here')):
        assert 'error' not in wan.run(job_id, **BRIEF, profile='tiny-prompted', prompt='a person waves')
        assert stages(wan, job_id, 'prompt')[0]['facts']['from'] == source
    wan.store.download(f'embeddings/{wanted.name}', tmp_path / 'kept.safetensors', 'x', 10**9)
    check_embedding(tmp_path / 'kept.safetensors', wanted)
    (wan.settings.work_dir / 'embeddings' / wanted.name).unlink() # another worker
    (weights / 'text_encoders/never-there.safetensors').unlink()
    assert 'error' not in wan.run('own-elsewhere', **BRIEF, profile='tiny-prompted', prompt='a person waves')
    assert stages(wan, 'own-elsewhere', 'prompt')[0]['facts']['from'] == 'bucket'

# the production tracker, on networks of random weights

def test_it_says_when_a_jobs_point_is_on_nobody(wan):
    said = wan.run('body-nobody', **BRIEF, profile='tiny-body', seed=1, person=[0.1, 0.1])['error']
    assert said.startswith('no_person: person [0.1, 0.1] is on nobody in frame 0')
    assert said.endswith('people are at [0.50, 0.53]')

def test_wholebody_tracker_in_comfyui(wan, tmp_path):
    before = set(wan.store.list('tracks/wholebody-sam2-3-')) # other files of tests share the bucket
    answer = wan.run('body', **BRIEF, profile='tiny-body', seed=1)
    assert 'error' not in answer, answer
    key, = set(wan.store.list('tracks/wholebody-sam2-3-')) - before
    wan.store.download(key, tmp_path / 'five.track', 'x', 10**9)
    track = load_track(tmp_path / 'five.track')
    assert track.present.all()
    assert len(track) == 5
    assert track.wholebody.shape == (5, 133, 3)
    assert track.plate is None
    # the detector's box is (220, 60, 420, 620) of 640x640, the bumps lie on a 12 x 12 grid in its crop:
    # both tremble by less than 2 pixels
    nose, corner = track.wholebody[0, 0, :2], track.wholebody[0, 132, :2]
    width, height = 400 * 1.25, 630 * 1.25
    wide = max(width, height * 192 / 256)
    left, top = 640 - wide / 2, 382.5 - height / 2
    assert np.abs(nose - [left + 8 * wide / 48, top + 6 * height / 64]).max() < 4
    assert np.abs(corner - [left + 8 * wide / 48, top + (6 + 52) * height / 64]).max() < 4
    facts = {'frames': 5, 'present': 5, 'faces': 5, 'guessed_masks': 0}
    assert wan.store.read_json('avatars/body.mp4.json')['track'] == facts
    again = wan.run('body-again', **BRIEF, profile='tiny-body', seed=1)
    assert again['sha256'] == answer['sha256']
    assert [s['facts']['cached'] for s in stages(wan, 'body-again', 'track')] == [True]

def test_masks_that_are_lost_do_not_deliver_the_driver_himself(wan):
    "SAM2 finds no person while the keypoints stay: when that is so in every frame, the job fails"
    answer = wan.run('blind', **BRIEF, profile='tiny-blind', seed=1)
    assert answer['error'].startswith("no_person: the person's outline was lost in 5 of the 5 frames")
    assert wan.store.stat('avatars/blind.mp4') is None

ALL = {w: w.bytes or 1 for w in needed_files(WAN)} # file -> its bytes
NO_SAM2 = {w: size for w, size in ALL.items() if w.folder != 'sam2'}
ONE_CUT = {w: size - (w.slot == 'vae') for w, size in ALL.items()}
MINE = replace(TINY, name='mine')

LACKS = { # profile; files that are there; size of the rest; words
    'nothing there': (WAN, {}, '9 files (22,784,663,858 bytes)', f'run: wan-avatar models fetch --profile {WAN.name}'),
    'tiny': (TINY, {}, '5 files (5 of unknown size)', 'run: wan-avatar tiny-weights FOLDER'),
    'masks alone': (WAN, NO_SAM2, '2 files (323,482,001 bytes)', 'sam2/config.json'),
    'one cut short': (WAN, ONE_CUT, '1 files (253,815,318 bytes)', 'vae/wan_2.1_vae.safetensors; run'),
    'of ones own': (MINE, {}, '5 files',
                    'vae/tiny-vae.safetensors, clip_vision/tiny-clip_vision.safetensors; put them there')}

@pytest.mark.parametrize('profile, there, size, words', LACKS.values(), ids=LACKS)
def test_missing_files_are_named_with_their_bytes_and_what_to_run(tmp_path, profile, there, size, words):
    for w, length in there.items():
        (tmp_path / w.folder).mkdir(exist_ok=True)
        with (tmp_path / w.folder / w.file).open('wb') as f: f.truncate(length) # sparse: no disk
    with pytest.raises(JobError) as e: check_weights(profile, tmp_path)
    assert e.value.code == 'models_unavailable'
    assert size in e.value.message
    assert words.replace('FOLDER', str(tmp_path)) in e.value.message

def test_slots_of_the_production_graph_are_what_windows_fill():
    assert slots(profile_graph(WAN)) == SLOTS.keys()
