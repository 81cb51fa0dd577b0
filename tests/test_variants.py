"A job's own changes of its profile: what may change, what is refused before anything is fetched, what a worker makes"
import copy
import json

import pytest

from wan_avatar.job import JobError, Variant, VariantNode, parse_job
from wan_avatar.run import profile_here
from wan_avatar.variants import NODES, graph_faults, with_variant
from wan_avatar.workflow import PROFILES, TINY, WAN, load_graph, profile_graph, slots

DRAFT = PROFILES['draft']
JOB = {'input_image_minio_path': 'in/face.png', 'driving_video_path': 'in/brief.mp4', 'seed': 1}

FORMS = [ # field of the job, what is said
    ({'values': {'steps': float('inf')}}, 'variant.values.steps inf: must be true, false, a number below 2**63'),
    ({'values': {'steps': float('nan')}}, 'variant.values.steps nan'),
    ({'values': {'steps': 10**400}}, 'variant.values.steps a number of more than 60 digits'),
    ({'values': {'steps': [1]}}, 'variant.values.steps [1]'),
    ({'values': {'steps': None}}, 'variant.values.steps None'),
    ({'values': {'prompt': 'x' * 2001}}, 'variant.values.prompt'),
    ({'values': {f'v{i}': 1 for i in range(65)}}, 'at most 64 items'),
    ({'values': {'../x': 1}}, 'should match pattern'),
    ({'values': []}, 'should be a valid dictionary'),
    ({'steps': 4}, 'variant.steps 4'),
    ({'tracker': '../sam2'}, 'variant.tracker'),
    ({'graph': {}}, 'at least 1 item'),
    ({'graph': {f'n{i}': {'class_type': 'A', 'inputs': {}} for i in range(101)}}, 'at most 100 items'),
    ({'graph': {'a': {'class_type': 'A', 'inputs': {f'i{i}': 1 for i in range(65)}}}}, 'at most 64 items'),
    ({'graph': {'a': {'class_type': 'A', 'inputs': {'x': ['b', 0, 1]}}}}, 'a link is [node id, number of its output]'),
    ({'graph': {'a': {'class_type': 'A', 'inputs': {'x': ['b', -1]}}}}, 'a link is'),
    ({'graph': {'a': {'class_type': 'A', 'inputs': {'x': ['b', True]}}}}, 'a link is'),
    ({'graph': {'a': {'class_type': 'A', 'inputs': {'x': {'deep': {}}}}}}, 'variant.graph.a.inputs.x'),
    ({'graph': {'a': {'class_type': 'A' * 65, 'inputs': {}}}}, 'variant.graph.a.class_type'),
    ({'graph': {'a': {'class_type': 'A'}}}, 'variant.graph.a.inputs'),
    ({'graph': {'a/b': {'class_type': 'A', 'inputs': {}}}}, 'should match pattern'),
    ({'graph': 'wan22-animate'}, 'should be a valid dictionary'),
    (['steps'], 'should be a valid dictionary'),
]

@pytest.mark.parametrize('variant, says', [pytest.param(*c, id=str(i)) for i, c in enumerate(FORMS)])
def test_its_form_is_checked(variant, says):
    with pytest.raises(JobError) as e: parse_job(JOB | {'variant': variant})
    assert e.value.code == 'bad_input' and says in e.value.message

VALUES = [ # profile, values, what is said
    (WAN, {'steps': 4.5}, 'variant.values.steps 4.5: must be a whole number, as 6 is'),
    (WAN, {'steps': True}, 'must be a whole number'),
    (WAN, {'steps': '4'}, 'must be a whole number'),
    (WAN, {'relight_strength': 'half'}, 'must be a number'),
    (WAN, {'relight_strength': False}, 'must be a number'),
    (WAN, {'sampler': 4}, 'must be a text'),
    (WAN, {'face': 'yes'}, 'must be true or false'),
    (WAN, {'step': 4}, "no value is called 'step'"),
    (WAN, {'name': 'mine'}, "no value is called 'name'"),
    (WAN, {'tracker': 'mediapipe'}, "no value is called 'tracker'"),
    (DRAFT, {'steps': 4}, "no value is called 'steps'"),
    (WAN, {'length': 78}, 'length 78 must be 4k + 1'),
    (WAN, {'length': 245}, 'length 245 must be 4k + 1, 5 to 241'),
    (DRAFT, {'length': 1}, 'length 1 must be 4k + 1'),
    (WAN, {'length': -3}, 'length -3'),
    (WAN, {'overlap': 4}, 'overlap 4 must be 4k + 1'),
    (WAN, {'overlap': 77}, 'overlap 77'),
    (DRAFT, {'overlap': -1}, 'overlap -1'),
    (WAN, {'vision': 'eyes'}, "vision 'eyes' does not exist"),
    (WAN, {'mask_shape': 'round'}, "mask shape 'round' does not exist"),
    (WAN, {'mask_dilation': -1}, 'mask dilation -1'),
    (WAN, {'mask_dilation': 10**9}, 'mask dilation 1000000000'),
    (WAN, {'mask_block': 0}, 'block 0'),
    (WAN, {'scale': 5}, 'scale 5'),
    (WAN, {'attention': 'magic'}, "attention 'magic' does not exist"),
]

@pytest.mark.parametrize('profile, values, says', [pytest.param(*c, id=f'{c[0].name} {c[1]}') for c in VALUES])
def test_values_that_a_profile_cannot_have(profile, values, says):
    with pytest.raises(JobError) as e: with_variant(profile, Variant(values=values))
    assert e.value.code == 'bad_input' and says in e.value.message

def test_values_switches_and_tracker_that_it_can_have():
    values = {'steps': 4, 'relight_strength': 1, 'length': 41, 'vision': 'off', 'mask_dilation': 21, 'feather': 4}
    made = with_variant(WAN, Variant(values=values, tracker='mediapipe'), 'wholebody-sam2')
    assert (made.values['steps'], made.length, made.vision, made.tracker) == (4, 41, 'off', 'mediapipe')
    assert profile_graph(made)['sample']['inputs']['steps'] == 4 and WAN.values['steps'] == 6
    assert with_variant(WAN, None, 'mediapipe').tracker == 'mediapipe' and with_variant(WAN, None) is WAN

def node(class_type, **inputs): return {'class_type': class_type, 'inputs': inputs}

def production(**nodes): return load_graph(WAN.graph) | nodes

def without(graph, *ids): return {i: n for i, n in graph.items() if i not in ids}

def given(name, **inputs):
    "Production's graph with other inputs of one node"
    graph = production()
    graph[name]['inputs'] |= inputs
    return graph

GRAPHS = [ # what is wrong, the graph, what is said
    ('a file by its path', given('dit', unet_name='/etc/passwd'), 'unet_name names a file and must be {{dit}}'),
    ('another file', given('vae', vae_name='wan2.2_vae.safetensors'), 'vae_name names a file'),
    ('the slot of another file', given('vae', vae_name='{{dit}}'), 'must be {{vae}}'),
    ('a link for a file', given('vae', vae_name=['dit', 0]), 'must be {{vae}}'),
    ('a LoRA of one\'s own', given('relight', lora_name='mine.safetensors'), '{{distill_lora}} or {{relight_lora}}'),
    ('another job\'s picture', given('segment', reference='jobs/other/reference.png'), 'must be {{reference}}'),
    ('another job\'s video', given('segment', video='../driving.mp4'), 'must be {{video}}'),
    ('frames elsewhere', given('frames', path='../../x.u8'), 'must be {{frames}}'),
    ('frames over the video', given('frames', path='{{video}}'), 'must be {{frames}}'),
    ('another prompt\'s file', given('prompt', embedding='embeddings/x'), 'must be {{embedding}}'),
    ('no path at all', production(frames=node('AvatarFrames', images=['decode', 0])), '{{frames}} (it is None)'),
    ('a loader beside', production(more=node('UNETLoader', unet_name='x', weight_dtype='default')), 'node more'),
    ('a node that saves', production(save=node('SaveImage', images=['decode', 0])), "'SaveImage' is not allowed"),
    ('a node that reads', production(load=node('LoadImage', image='x.png')), "the class 'LoadImage'"),
    ('a node of the tracker', production(t=node('AvatarTrack', source='x', kind='image', track='y')), "'AvatarTrack'"),
    ('a node of nobody', production(x=node('os.system', c='ls')), "the class 'os.system'"),
    ('a slot that nobody fills', given('sample', cfg='{{strength}}'), 'nobody fills the slots strength'),
    ('a link to nowhere', given('sample', model=['other', 0]), "model links to 'other'"),
    ('a link to itself', given('shift', model=['shift', 0]), 'in a circle'),
    ('a circle', given('shift', model=['kernels', 0]), 'in a circle'),
    ('no frames', without(production(), 'frames'), '0 nodes of class AvatarFrames'),
    ('frames twice', production(f=load_graph(WAN.graph)['frames']), '2 nodes of class AvatarFrames'),
    ('no window', without(production(), 'segment', 'pictures', 'animate', 'mask_rows', 'sample'), 'it lacks the slots'),
    ('a start of its own', given('segment', start=0), 'it lacks the slots start'),
]

@pytest.mark.parametrize('graph, says', [pytest.param(g, says, id=what) for what, g, says in GRAPHS])
def test_a_graph_may_change_what_is_computed_and_no_file(graph, says):
    assert any(says in fault for fault in graph_faults(graph, WAN))
    with pytest.raises(JobError) as e: with_variant(WAN, Variant(graph={i: VariantNode(**n) for i, n in graph.items()}))
    assert e.value.code == 'bad_input' and 'variant.graph' in e.value.message

@pytest.mark.parametrize('profile', PROFILES.values(), ids=PROFILES)
def test_a_profiles_own_graph_is_one_that_may_run(profile):
    own = with_variant(profile, Variant(graph={i: VariantNode(**n) for i, n in load_graph(profile.graph).items()}))
    def bare(graph): return {i: (n['class_type'], n['inputs']) for i, n in graph.items()}
    assert bare(profile_graph(own)) == bare(profile_graph(profile))
    assert own.graph_name != profile.graph_name and own.graph_name.startswith('own ')

def test_a_value_that_the_graph_cannot_hear_is_refused():
    graph = given('sample', steps=3)
    fixed = {i: VariantNode(**n) for i, n in graph.items()}
    assert profile_graph(with_variant(WAN, Variant(graph=fixed)))['sample']['inputs']['steps'] == 3
    with pytest.raises(JobError, match='no slots for steps'):
        with_variant(WAN, Variant(graph=fixed, values={'steps': 4, 'feather': 3}))

def test_a_switch_needs_the_node_that_it_changes():
    graph = production()
    graph['once_more'] = graph.pop('sample')
    graph['ran']['inputs']['samples'] = ['once_more', 0]
    fixed = {i: VariantNode(**n) for i, n in graph.items()}
    with pytest.raises(JobError, match="no 'sample', which a switch of wan22-animate changes"):
        with_variant(WAN, Variant(graph=fixed, values={'vision': 'off'}))

def test_a_worker_takes_variants_only_where_that_is_allowed(service):
    answer = service.run('not-allowed', **JOB, variant={'values': {'feather': 4}})
    assert answer['error'].startswith('bad_input: variant: this worker takes none; ALLOW_VARIANTS=true')

@pytest.fixture
def research(service):
    "The service, with variants allowed for the length of a test"
    settings = service.context.settings
    object.__setattr__(service.context, 'settings', settings.model_copy(update={'allow_variants': True}))
    yield service
    object.__setattr__(service.context, 'settings', settings)

def test_the_nodes_named_read_no_file_and_write_none(service):
    known = service.comfy.object_info
    assert sorted(NODES - set(known)) == []
    folders = ('.safetensors', '.png', '.ckpt', '.pt', '.mp4')
    for name in NODES:
        taken = known[name]['input']
        texts = json.dumps([taken.get('required', {}), taken.get('optional', {})])
        assert not known[name]['output_node'], name
        assert not any(ending in texts for ending in folders) and '_upload' not in texts, name

def test_variants_of_one_worker(research):
    "The same job three times: as it is, with another value, with a graph of one's own that has this value in it"
    graph = copy.deepcopy(load_graph('draft'))
    graph['draft']['inputs']['relight_strength'] = 0.25
    made = {name: research.run(f'variant-{name}', **JOB, **({'variant': v} if v else {})) for name, v in {
        'plain': None, 'value': {'values': {'relight_strength': 0.25}}, 'graph': {'graph': graph},
        'length': {'values': {'length': 13, 'feather': 6}}}.items()}
    assert not [a['error'] for a in made.values() if 'error' in a]
    assert made['value']['sha256'] == made['graph']['sha256'] != made['plain']['sha256']
    told = {n: json.loads(research.store.read_bytes(f'{a["minio_key"]}.json', 10**6)) for n, a in made.items()}
    said = {n: t['rendered_with'] for n, t in told.items()}
    assert [said[n]['relight_strength'] for n in ('plain', 'value')] == [1.0, 0.25]
    assert (said['length']['length'], said['length']['feather']) == (13, 6)
    assert said['graph']['graph'].startswith('own ') and said['value']['graph'] == 'draft'

def drawn(**inputs): return {'graph': load_graph('draft') | {'draft': node('AvatarDraft', **inputs)}}

REFUSED = [ # values that only ComfyUI's nodes know to be wrong
    ({'values': {'relight_strength': 7}}, 'it takes 0.0 to 1.0'),
    (drawn(segment=['frames', 0], relight_strength=1.0), 'circle'),
    (drawn(segment=['segment', 5], relight_strength=1.0), 'links to output 5'),
    (drawn(segment=['segment', 0]), 'is missing'),
]

@pytest.mark.parametrize('variant, says', [pytest.param(*c, id=c[1]) for c in REFUSED])
def test_what_nodes_do_not_take_is_refused_before_anything_is_fetched(research, variant, says):
    job = JOB | {'input_image_minio_path': 'in/not-there.png', 'variant': variant}
    answer = research.run(f'refused-{says.split()[-1]}', **job)
    assert answer['error'].startswith('bad_input: variant') and says in answer['error']

def test_the_workers_own_tracker_gives_way_to_the_variants(service):
    research = {'allow_variants': True, 'tracker': 'mediapipe', 'profile': TINY.name}
    settings = service.settings.model_copy(update=research)
    assert profile_here(settings, variant=Variant(tracker='wholebody-sam2')).tracker == 'wholebody-sam2'
    assert profile_here(settings).tracker == 'mediapipe' and slots(load_graph(TINY.graph))
