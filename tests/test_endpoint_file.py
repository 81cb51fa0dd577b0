"""`wan-avatar endpoint` and `image`, as operators run them: over HTTP against a strict stand-in of RunPod's control
plane, and against a stand-in for the docker executable that writes down how it was called"""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
from conftest import ROOT
from control_plane import KEY, control_plane
from typer.testing import CliRunner

from wan_avatar.cards import CARDS, PRODUCTION, GpuRun, Measured, measured
from wan_avatar.cli import app
from wan_avatar.client import EndpointError
from wan_avatar.config import load_settings
from wan_avatar.endpoint import (
    Control,
    OutcomeUnknown,
    apply,
    create,
    delete,
    find,
    make_plan,
    model_references,
    request_body,
)
from wan_avatar.endpoint_file import FileError, check_file, read_file
from wan_avatar.forecast import render_time
from wan_avatar.prices import POOLS

IMAGE = 'dexsynccom/twin-avatar:wan-worker-20261124-8f3a1c2b4d5e'
OPERATOR = {
    'MINIO_ENDPOINT': 's3.hidden.example',
    'MINIO_ACCESS_KEY': 'hidden-access',
    'MINIO_SECRET_KEY': 'hidden-secret',
    'MINIO_BUCKET': 'hidden-bucket',
}

@pytest.fixture
def plane():
    with control_plane() as plane: yield plane

@pytest.fixture
def control(plane):
    return Control(KEY, plane.url, f'{plane.url}/jobs', hide=tuple(OPERATOR.values()), pause=lambda s: None)

def edited(folder: Path, *edits: tuple[str, str], image: str | None = IMAGE):
    "endpoint.toml of this repository with lines replaced (a regular expression per line) or added in front"
    text = (ROOT / 'endpoint.toml').read_text()
    for old, new in edits:
        text, n = (re.subn(old, new, text, count=1, flags=re.M)) if old else (new + '\n' + text, 1)
        assert n == 1, old
    (folder / 'endpoint.toml').write_text(text)
    return read_file(folder / 'endpoint.toml', image)

def settle(control, file) -> str: # endpoint id
    return apply(control, make_plan(control, file, OPERATOR), lambda q: pytest.fail(f'asked: {q}'))

def value_at(block: dict, path: str): # a dotted path
    for name in path.split('.'): block = block[name]
    return block

# %% every field of the file reaches RunPod
FIELDS = [ # the line that is replaced, or '': added; the new lines; what RunPod then has, the first of it in the plan
    (r'^profile = .*', 'profile = "draft"', {'env.PROFILE': 'draft'}),
    (r'^disk_gb = .*', 'disk_gb = 150', {'disk': 150}),
    (r'^execution_timeout_s = .*', 'execution_timeout_s = 1500', {'timeout': 1_500_000}),
    (r'^init_timeout_s = .*', 'init_timeout_s = 900', {'env.RUNPOD_INIT_TIMEOUT': '900'}),
    (r'^flashboot = .*', 'flashboot = false', {'flashboot': 'OFF'}),
    ('', 'registry = "cred1"', {'registry': 'cred1'}),
    ('', 'data_centers = ["EU-RO-1"]', {'dataCenterIds': ['EU-RO-1']}),
    (r'^order = .*', 'order = ["AMPERE_80", "ADA_48_PRO"]', {'gpu.pools': ['AMPERE_80', 'ADA_48_PRO']}),
    (r'^excluded_types = .*', 'excluded_types = ["NVIDIA L40"]', {'gpu.excludedTypes': ['NVIDIA L40']}),
    (r'^min_cuda = .*', 'min_cuda = "12.9"\ncount = 2', {'gpu.count': 2, 'gpu.minCudaVersion': '12.9'}),
    (r'^min_cuda = .*', '', {'gpu.minCudaVersion': None}),
    (r'^min = .*', 'min = 1', {'workers.min': 1}),
    (r'^max = .*', 'max = 4\nmax_why = "two customers at once"', {'workers.max': 4}),
    (r'^idle_s = .*', 'idle_s = 60', {'workers.idleTimeout': 60}),
    (r'^queue_delay_s = .*', 'queue_delay_s = 9.5', {'scaling.queueDelay': 9.5, 'scaling.type': 'QUEUE_DELAY'}),
    (r'^OUTPUT_PREFIX = .*', 'OUTPUT_PREFIX = "a/"\nMINIO_REGION = "eu"',
     {'env.MINIO_REGION': 'eu', 'env.OUTPUT_PREFIX': 'a/'}),
    (r'^from_environment = \[', 'from_environment = ["HF_TOKEN", ', {'env.HF_TOKEN': 'hidden-token'}),
]
WATCHED = {'daily_usd', 'failed_share', 'least_jobs', 'cold_starts'} # RunPod never sees these
ELSEWHERE = {'name', 'type', 'image', 'max_seconds', 'job_ttl_s', *WATCHED} # fields in other tests

def test_every_field_of_the_file_is_applied_once_and_undone(control, plane, tmp_path, monkeypatch):
    monkeypatch.setitem(OPERATOR, 'HF_TOKEN', 'hidden-token')
    usual = edited(tmp_path)
    id = settle(control, usual)
    first = json.dumps(plane.endpoints[id], sort_keys=True)
    for old, new, values in FIELDS:
        field = next(iter(values))
        file = edited(tmp_path, (old, new))
        plan = make_plan(control, file, OPERATOR)
        assert plan.action == 'update', (field, plan.differences)
        assert field in [d.field for d in plan.differences], (field, plan.differences)
        assert settle(control, file) == id, field
        assert {path: value_at(plane.endpoints[id], path) for path in values} == values
        writes = len(plane.writes())
        assert make_plan(control, file, OPERATOR).action == 'nothing', f'{field} is applied twice'
        assert settle(control, file) == id, f'{field} is applied twice'
        assert len(plane.writes()) == writes, f'{field} is applied twice'
        settle(control, usual)
        assert json.dumps(plane.endpoints[id], sort_keys=True) == first, f'{field} is not undone'
    settle(control, edited(tmp_path, image=IMAGE.replace('8f3a', '9999')))
    assert plane.endpoints[id]['image'].endswith('99991c2b4d5e')
    assert len(plane.endpoints) == 1
    covered = {re.match(r'\^?(\w+)', old or new)[1] for old, new, _ in FIELDS} | ELSEWHERE
    assert set(re.findall(r'^(\w+) = ', (ROOT / 'endpoint.toml').read_text(), re.M)) <= covered | {'model', 'revision'}

# %% the worker's own deadline
DEADLINES = [ # execution_timeout_s, JOB_SECONDS of the file, what the workers get; None: refused
    (1200, None, '1140'),
    (300, None, '240'),
    (100, None, '80'),
    (5, None, '4'),
    (1200, '900', '900'),
    (1200, '1140', '1140'),
    (1200, '0.5', '0.5'),
    (1200, '1141', None),
    (1200, '1200', None),
    (1200, '3600', None),
    (1200, '0', None),
    (1200, '-5', None),
    (1200, 'nan', None),
    (1200, 'inf', None),
    (1200, 'long', None),
    (1200, '', None),
]

@pytest.mark.parametrize('timeout, said, expected', DEADLINES)
def test_a_worker_gives_up_before_runpod_does(control, tmp_path, timeout, said, expected):
    edits = {r'^profile = .*': 'profile = "draft"', r'^execution_timeout_s = .*': f'execution_timeout_s = {timeout}'}
    if said is not None: edits[r'^OUTPUT_PREFIX = .*'] = f'JOB_SECONDS = "{said}"'
    file = edited(tmp_path, *edits.items())
    if expected is None:
        with pytest.raises(FileError, match=f'JOB_SECONDS is .*up to {timeout - 60}, .*TIMED_OUT'):
            make_plan(control, file, OPERATOR)
    else:
        plan = make_plan(control, file, OPERATOR)
        assert plan.body['env']['JOB_SECONDS'] == expected
        assert 0 < float(expected) < timeout
        assert load_settings({k: v for k, v in plan.body['env'].items()}).job_seconds == float(expected)

def test_a_worker_stops_a_job_before_the_file_would(control, plane, tmp_path):
    id = settle(control, edited(tmp_path))
    settle(control, edited(tmp_path, (r'^execution_timeout_s = .*', 'execution_timeout_s = 1500')))
    assert plane.endpoints[id]['env']['JOB_SECONDS'] == '1440'
    assert plane.endpoints[id]['timeout'] == 1_500_000

def test_a_name_is_an_endpoint(control, plane, tmp_path):
    one = settle(control, edited(tmp_path))
    two = settle(control, edited(tmp_path, (r'^name = .*', 'name = "staging"')))
    assert one != two
    assert find(control, 'staging')['id'] == two
    plane.endpoints[two]['name'] = 'wan-avatar'
    with pytest.raises(EndpointError, match=f'2 endpoints are called wan-avatar: {one}, {two}'):
        make_plan(control, edited(tmp_path), OPERATOR)

def test_changing_one_gpu_setting_keeps_the_exclusions(control, plane, tmp_path):
    excluded = (r'^excluded_types = .*', 'excluded_types = ["NVIDIA L40"]')
    id = settle(control, edited(tmp_path, excluded))
    settle(control, edited(tmp_path, excluded, (r'^order = .*', 'order = ["ADA_48_PRO"]')))
    assert plane.endpoints[id]['gpu'] == {
        'pools': ['ADA_48_PRO'],
        'excludedTypes': ['NVIDIA L40'],
        'count': 1,
        'allowedCudaVersions': [],
        'minCudaVersion': '12.8',
    }

def test_what_others_set_by_hand_is_found(control, plane, tmp_path):
    id = settle(control, edited(tmp_path))
    plane.endpoints[id] |= {'args': '--debug', 'networkVolumes': ['v1']}
    plane.endpoints[id]['env'] |= {'BY_HAND': 'x'}
    plane.endpoints[id]['gpu'] |= {'allowedCudaVersions': ['12.4'], 'minCudaVersion': None}
    plane.endpoints[id]['gpu']['pools'].reverse() # the same set: v2 knows no order
    plan = make_plan(control, edited(tmp_path), OPERATOR)
    assert sorted(d.field for d in plan.differences) == [
        'args',
        'env.BY_HAND',
        'gpu.allowedCudaVersions',
        'gpu.minCudaVersion',
        'networkVolumes',
    ]
    settle(control, edited(tmp_path))
    assert make_plan(control, edited(tmp_path), OPERATOR).action == 'nothing'

# %% the cached model
CACHED = (r'^# \[cached_model\]\n# model = .*\n# revision = .*',
          '[cached_model]\nmodel = "dexsync/bundle"\nrevision = "v2"')
SWAPPED = (r'^order = .*', 'order = ["AMPERE_80", "ADA_80_PRO", "ADA_48_PRO", "AMPERE_48"]')

@pytest.mark.parametrize('forgetful', [False, True])
def test_cached_model_is_set_kept_and_removed(control, plane, tmp_path, forgetful):
    plane.forgetful = forgetful
    file = edited(tmp_path, CACHED)
    id = settle(control, file)
    assert plane.models[id] == ['https://huggingface.co/dexsync/bundle:v2'] == model_references(file)
    assert plane.order[id] == 'ADA_80_PRO,AMPERE_80,ADA_48_PRO,AMPERE_48'
    assert make_plan(control, file, OPERATOR).action == 'nothing'
    before = {k: v for k, v in plane.endpoints[id].items() if k != 'workers'}
    settle(control, edited(tmp_path, CACHED, (r'^idle_s = .*', 'idle_s = 60')))
    assert plane.models[id] == model_references(file)
    assert {k: v for k, v in plane.endpoints[id].items() if k != 'workers'} == before
    swapped = edited(tmp_path, CACHED, SWAPPED)
    assert [d.field for d in make_plan(control, swapped, OPERATOR).by_graphql] == ['order of pools']
    assert settle(control, swapped) == id
    assert plane.order[id].startswith('AMPERE_80,ADA_80')
    assert make_plan(control, swapped, OPERATOR).action == 'nothing'
    plane.models[id] = ['https://huggingface.co/somebody/else:main']
    settle(control, file)
    assert plane.models[id] == model_references(file)
    settle(control, edited(tmp_path))
    assert plane.models[id] == []

def test_a_plan_is_possible_when_graphql_is_gone(control, plane, tmp_path, monkeypatch):
    settle(control, edited(tmp_path, CACHED))
    def gone(body): return 200, {'errors': [{'message': 'GraphQL is retired'}]}
    monkeypatch.setattr(plane, 'graphql', gone)
    plan = make_plan(control, edited(tmp_path, CACHED), OPERATOR)
    assert plan.models is None
    assert plan.action == 'update'
    assert any('GraphQL is retired' in n for n in plan.notes)
    action = make_plan(control, edited(tmp_path), OPERATOR).action
    assert action == 'nothing', 'a file without a cached model does without GraphQL'

# %% faults
@pytest.mark.parametrize('faults, made', [
    ([], 1),
    ([('POST', 'lost')], 1),
    ([('POST', '503 done')], 1),
    ([('POST', '503')], 0),
    ([('POST', '429')], 1),
    ([('GET', '503')] * 4, 1),
    ([('GET', 'lost'), ('GET', '429')], 1),
    ([('POST', 'lost'), ('GET', '503')], 1),
], ids=lambda v: str(v))
def test_never_created_twice(control, plane, tmp_path, faults, made):
    plane.faults += faults
    body = request_body(edited(tmp_path), OPERATOR)
    if made: assert create(control, body)['id'] in plane.endpoints
    else:
        with pytest.raises(EndpointError, match='It may still: look at `wan-avatar endpoint plan`'):
            create(control, body)
    assert len(plane.endpoints) == made
    assert len([p for p in plane.writes() if p[0] == 'POST']) == (2 if ('POST', '429') in faults else 1)
    assert not plane.faults

def test_changes_and_deletions_are_repeated(control, plane, tmp_path):
    id = settle(control, edited(tmp_path))
    plane.faults += [('PATCH', 'lost'), ('PATCH', '503')]
    settle(control, edited(tmp_path, (r'^idle_s = .*', 'idle_s = 60')))
    plane.faults += [('DELETE', 'lost')]
    delete(control, id)
    assert not plane.endpoints
    assert not plane.faults

def test_gives_up_in_the_end(plane, tmp_path):
    paused = []
    control = Control(KEY, plane.url, pause=paused.append)
    plane.faults += [('GET', '503')] * 9
    with pytest.raises(EndpointError, match='503 Service Unavailable: upstream unavailable, 5 times'):
        find(control, 'x')
    assert len(plane.faults) == 4
    assert 0 < sum(paused) < 30
    absent = Control(KEY, 'http://127.0.0.1:9', pause=paused.append)
    with pytest.raises(EndpointError, match='ConnectError'): find(absent, 'x')
    with pytest.raises(EndpointError, match='ConnectError') as e: absent.call('POST', '/v2/serverless', {})
    assert not isinstance(e.value, OutcomeUnknown), 'a connection that never was has created nothing'

def test_who_may_ask(plane, control, tmp_path):
    bearer = {'Authorization': f'Bearer {KEY}'}
    usual = httpx2.get(f'{plane.url}/v2/serverless', headers=bearer, trust_env=False)
    assert usual.status_code == 403, 'the stand-in takes a default User-Agent'
    with pytest.raises(EndpointError, match='401 Unauthorized: invalid bearer token'):
        find(Control('rpa_other', plane.url), 'x')
    assert find(control, 'x') is None

def test_detail_of_a_refusal_is_shown_and_secrets_are_not(control, tmp_path):
    body = request_body(edited(tmp_path), OPERATOR) | {'cachedModel': 'x', 'disk': OPERATOR['MINIO_SECRET_KEY']}
    with pytest.raises(EndpointError) as e: control.call('POST', '/v2/serverless', body)
    said = str(e.value)
    assert "400 Bad Request: request body is not valid\n" in said
    assert "additional properties 'cachedModel' not allowed" in said
    assert '••••' in said
    assert not [v for v in (*OPERATOR.values(), KEY) if v in said]

# %% what can't work is refused before RunPod is asked
@pytest.mark.parametrize('edits, image, words', [
    ([], None, 'image is not set'),
    ([], 'dexsynccom/twin-avatar:latest', 'can mean other content'),
    ([], IMAGE + '-dirty', 'can mean other content'),
    ([], 'dexsynccom/twin-avatar', 'can mean other content'),
    ([(r'^disk_gb = .*', 'disk_gb = 33')], IMAGE,
     'the weights of wan22-animate with the text encoder (29.5 GB), 20 % and the frames of 2 videos need 36'),
    ([(r'^init_timeout_s = .*\n', '')], IMAGE, None),
    ([(r'^init_timeout_s = .*', 'init_timeout_s = 277')], IMAGE, 'fetches 29.5 GB, which take 295 s at 100 MB/s'),
    ([(r'^execution_timeout_s = .*', 'execution_timeout_s = 840')], IMAGE, 'take at least 789 s on AMPERE_48'),
    ([(r'^max_seconds = .*', 'max_seconds = 60')], IMAGE, 'take at least 2540 s on AMPERE_80'),
    ([(r'^job_ttl_s = .*', 'job_ttl_s = 600')], IMAGE, 'RunPod drops a job then even while it runs'),
    ([(r'^max = .*', 'max = 2')], IMAGE, 'workers.max is 2; say why'),
    ([(r'^min = .*', 'min = 2')], IMAGE, 'workers.min is 2'),
    ([(r'^order = .*', 'order = ["H100"]')], IMAGE, "'H100'; pools are ADA_80_PRO"),
    ([(r'^excluded_types = .*', 'excluded_types = ["NVIDIA H200"]')], IMAGE, 'in none of these pools'),
    ([(r'^profile = .*', 'profile = "wan"')], IMAGE, "profile 'wan' does not exist"),
    ([(r'^OUTPUT_PREFIX', 'MINIO_SECRET_KEY')], IMAGE, 'env.MINIO_SECRET_KEY looks like a secret'),
    ([(r'^OUTPUT_PREFIX', 'PROFILE')], IMAGE, 'env.PROFILE is set by profile'),
    ([(r'"MINIO_BUCKET"', '"MINIO_BUCKED"')], IMAGE, 'no worker starts without MINIO_BUCKET'),
    ([(r'"MINIO_BUCKET"', '"MINIO_BUCKET", "HF_TOKEN"')], IMAGE, 'HF_TOKEN of secrets.from_environment not set'),
])
def test_checks_before_any_call(control, plane, tmp_path, edits, image, words):
    file = edited(tmp_path, *edits, image=image)
    problems = check_file(file, OPERATOR, runs={})[0]
    if words is None:
        assert problems == []
        assert file.init_timeout_s == 420, 'RunPod\'s own'
    else:
        assert any(words in p for p in problems), problems
        with pytest.raises(ValueError, match='cannot be applied'): make_plan(control, file, OPERATOR, runs={})
        assert plane.asked == []

@pytest.mark.parametrize('edit, words', [
    (('', 'disks = 3'), 'disks is not a key of this file'),
    ((r'^disk_gb = .*', 'disk_gb = "big"'), "disk_gb is 'big'"),
    ((r'^name = .*', 'name = "wa"'), "name is 'wa'"),
    ((r'^type = .*', 'type = "LOAD_BALANCER"'), 'type is'),
    ((r'^profile = .*', ''), 'profile is missing'),
    ((r'^min_cuda = .*', 'min_cuda = "12"'), "gpu.min_cuda is '12'"),
    ((r'^name = .*', 'name ='), 'Invalid value'),
    ((r'^max_seconds = .*', 'max_seconds = 0'), 'max_seconds is 0'),
])
def test_a_file_with_a_mistake_names_it(tmp_path, edit, words):
    with pytest.raises(ValueError, match=re.escape(words)): edited(tmp_path, edit)

NUMBERS = ['disk_gb', 'execution_timeout_s', 'job_ttl_s', 'init_timeout_s', 'min', 'max', 'idle_s']
NOT_A_NUMBER = ['"1"', '1.0', 'true', '[1]', '{}', '2026-01-02']
MISTYPED = [ # key, value
    *((key, value) for key in NUMBERS for value in NOT_A_NUMBER),
    *((key, value) for key in ('max_seconds', 'queue_delay_s') for value in ('"1"', 'true', 'inf', 'nan', '[1]')),
    *((key, value) for key in ('name', 'type', 'profile', 'min_cuda') for value in ('12.8', '1', 'true', '["a"]')),
    *(('flashboot', value) for value in ('"true"', '1', '0', '"on"')),
    *((key, value) for key in ('order', 'excluded_types', 'from_environment') for value in ('"A"', '[1]', '1', '{}')),
    *(('OUTPUT_PREFIX', value) for value in ('1', 'true', '["a"]')),
]

@pytest.mark.parametrize('key, value', MISTYPED)
def test_a_value_of_another_type_is_refused(tmp_path, key, value):
    with pytest.raises(FileError) as e: edited(tmp_path, (rf'^{key} = .*', f'{key} = {value}'))
    assert re.search(rf'\b{key}\b', str(e.value)), e.value

def test_the_file_of_this_repository(tmp_path):
    file = edited(tmp_path)
    assert check_file(file, OPERATOR, runs={})[0] == []
    base = re.search(r'cu(\d\d)(\d)', (ROOT / 'Dockerfile').read_text())
    assert file.gpu.min_cuda == f'{base[1]}.{base[2]}', 'the image was built for another CUDA'
    body = request_body(file, OPERATOR)
    assert body['timeout'] == 1_200_000
    assert body['workers'] == {'min': 0, 'max': 1, 'idleTimeout': 5}
    assert body['flashboot'] == 'FLASHBOOT'
    assert body['disk'] == 120
    assert body['type'] == 'QUEUE'
    assert body['gpu']['pools'] == ['ADA_80_PRO', 'AMPERE_80', 'ADA_48_PRO', 'AMPERE_48']
    assert body['env']['RUNPOD_INIT_TIMEOUT'] == '1800'
    assert file.job_ttl_s == 3600

# %% how long a card renders: measured, or at least; never both
H100, H100_PCIE, H200, A6000 = 'NVIDIA H100 80GB HBM3', 'NVIDIA H100 PCIe', 'NVIDIA H200', 'NVIDIA RTX A6000'
WHOLE = dict(name=PRODUCTION, frames=77, steps=6, width=1280, height=720, attention='default', fp8_products='default',
             steps_s=(10.0,) * 6, pictures_s=1, encode_s=3, decode_s=4, frames_s=0.5)

def run_of(card: str, **changed) -> dict[str, GpuRun]:
    "Made up: a card on which a whole window took 68.5 s"
    case = Measured(**WHOLE | changed)
    return {card: GpuRun(card=card, capability=(9, 0), memory_gb=80, at='2026-01-02T03:04:05Z', commit='made up',
                         versions={}, cases=(case,))}

TIMES = [ # seconds of video, types, profile, runs, seconds, the card that says so, measured
    (77 / 24, POOLS['ADA_80_PRO'].gpus, 'wan22-animate', run_of(H100), 68.5, H100, True), # one whole window
    (77 / 24, [H100], 'wan22-animate-reference', run_of(H100), 208.5, H100, True), # its step, twenty times
    (149 / 24, [H100], 'wan22-animate', run_of(H100), 137.0, H100, True), # two windows
    (10, [H100], 'wan22-animate', run_of(H100, steps_s=(10.0,) * 3), 213.6, H100, True), # four windows of 65
    (77 / 24, [H100, H100_PCIE], 'wan22-animate', run_of(H100) | run_of(H100_PCIE, decode_s=9), 73.5, H100_PCIE, True),
    (77 / 24, POOLS['HOPPER_141'].gpus, 'wan22-animate', run_of(H100), 34.4, H200, False), # another pool's run
    (77 / 24, POOLS['ADA_80_PRO'].gpus, 'wan22-animate', {}, 34.4, H100, False), # the fastest of three
    (77 / 24, [H100_PCIE], 'wan22-animate', {}, 45.0, H100_PCIE, False),
    (77 / 24, POOLS['AMPERE_48'].gpus, 'wan22-animate', {}, 256.0, A6000, False), # no products in fp8
    (77 / 24, [H100], 'wan22-animate', run_of(H100, failed='out of memory'), 34.4, H100, False),
    (77 / 24, [H100], 'wan22-animate', run_of(H100, name='as production runs it'), 34.4, H100, False), # no whole window
    (77 / 24, [H100], 'wan22-animate', run_of(H100, decode_s=0), 34.4, H100, False), # nor this
    (77 / 24, [H100], 'wan22-animate', run_of(H100, cap_gb=48.0), 34.4, H100, False), # an emulated card's speed
    (77 / 24, [H100], 'wan22-animate', run_of(H100, width=64, height=48), 34.4, H100, False), # a dry run
    (77 / 24, ['NVIDIA B200'], 'wan22-animate', {}, None, '', False), # no datasheet here
    (77 / 24, [], 'wan22-animate', run_of(H100), None, '', False), # all its types are excluded
    (77 / 24, [H100], 'draft', run_of(H100), None, '', False),
    (77 / 24, [H100], 'wan22-animate-tiny', run_of(H100), None, '', False)]

@pytest.mark.parametrize('video_s, gpus, profile, runs, seconds, card, is_measured', TIMES)
def test_a_time_is_measured_or_at_least(video_s, gpus, profile, runs, seconds, card, is_measured):
    found = render_time(video_s, gpus, profile, runs)
    if seconds is None: assert found is None
    else:
        assert (found.seconds, found.card, bool(found.at)) == (pytest.approx(seconds, abs=0.06), card, is_measured)
        assert str(found).startswith('at least ') != is_measured
        assert card in found.source
        assert ('measured on' in found.source and '2026-01-02' in found.source) == is_measured

def test_no_card_of_a_pool_is_faster_than_its_at_least():
    for name, pool in POOLS.items():
        known = [t for t in pool.gpus if t in CARDS]
        least = render_time(10, pool.gpus, runs={})
        assert known, 'datasheets and pools name the same cards'
        assert all(CARDS[t].pool == name for t in known), 'datasheets and pools name the same cards'
        assert all(least.seconds <= render_time(10, [t], runs={}).seconds for t in known)

DEADLINES_OF_POOLS = [ # order, excluded types, runs, JOB_SECONDS + 60, what is refused, what is noted
    (['AMPERE_48'], [], {}, 840, '10 s of video (max_seconds) take at least 789 s on AMPERE_48 for rendering alone '
     '(limit by the datasheet of NVIDIA RTX A6000), and a worker stops a job after 780 s', None),
    (['AMPERE_48'], [], {}, 1200, None, 'AMPERE_48 (at least 789 s, 69 %); a worker stops a job after 1140 s'),
    (['AMPERE_48'], ['NVIDIA RTX A6000'], {}, 840, 'take at least 816 s on AMPERE_48', None),
    (['AMPERE_48'], ['NVIDIA RTX A6000', 'NVIDIA A40'], {}, 840, None, None), # nothing is left to be too slow
    (['ADA_80_PRO'], [], run_of(H100), 265, 'take 214 s on ADA_80_PRO for rendering alone (measured on NVIDIA H100 '
     '80GB HBM3, 2026-01-02)', None),
    (['ADA_80_PRO'], [], run_of(H100), 300, None, None), # measured: nothing is left to say
    (['ADA_80_PRO'], [H100], run_of(H100), 300, None, 'ADA_80_PRO (at least 123 s, 51 %)'), # that card is excluded
    (['ADA_80_PRO', 'HOPPER_141'], [], run_of(H200), 300, None, 'ADA_80_PRO (at least 104 s, 43 %); a worker')]

@pytest.mark.parametrize('order, excluded, runs, timeout, problem, note', DEADLINES_OF_POOLS)
def test_a_timeout_is_held_against_what_is_known(tmp_path, order, excluded, runs, timeout, problem, note):
    file = edited(tmp_path, (r'^order = .*', f'order = {json.dumps(order)}'),
                  (r'^excluded_types = .*', f'excluded_types = {json.dumps(excluded)}'),
                  (r'^execution_timeout_s = .*', f'execution_timeout_s = {timeout}'))
    problems, notes = check_file(file, OPERATOR, runs)
    assert [problem is not None, note is not None] == [bool(problems), bool(notes)], (problems, notes)
    if problem: assert problem in problems[0]
    if note:
        assert note in notes[0]
        assert notes[0].startswith('not measured: rendering 10 s of video')

# %% the commands
@pytest.fixture
def operator(plane, tmp_path, monkeypatch):
    "Run `wan-avatar endpoint ...` in a folder with endpoint.toml; checks that no output ever holds a secret"
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / 'endpoint.toml', tmp_path)
    env = OPERATOR | {
        'RUNPOD_API_KEY': KEY,
        'RUNPOD_API_BASE_URL': plane.url,
        'RUNPOD_ENDPOINT_BASE_URL': f'{plane.url}/jobs',
        'COLUMNS': '160',
    }
    def run(*args: str, answer: str = '', **more: str):
        done = CliRunner().invoke(app, ['endpoint', *args], env={**env, **more}, input=answer)
        assert not [v for v in (*OPERATOR.values(), KEY) if v in done.output + done.stderr], 'a secret was printed'
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done
    return run

def test_from_plan_to_destroy(operator, plane):
    plan = operator('plan', '--image', IMAGE, '--exit-code')
    assert plan.exit_code == 1
    assert 'wan-avatar will be created' in plan.stdout
    assert 'MINIO_SECRET_KEY' in plan.stdout
    assert '••••' in plan.stdout
    assert plane.writes() == []
    made = operator('apply', '--image', IMAGE)
    (id,) = plane.endpoints
    assert made.exit_code == 0
    assert made.stdout.strip() == id
    assert 'REST v2 takes whichever has capacity' in made.stderr.replace('\n', ' ')
    assert operator('plan', '--image', IMAGE, '--exit-code').exit_code == 0
    assert operator('apply', '--image', IMAGE).stdout.strip() == id
    assert len(plane.writes()) == 1
    worker = {'id': 'w1', 'status': 'UNHEALTHY', 'isStale': True, 'gpuCount': 1, 'gpuTypeId': 'NVIDIA L40S'}
    plane.workers[id] = [worker | {'uptimeSeconds': 80, 'image': IMAGE}]
    trouble = '[error] [/x] this worker is not configured: '
    plane.logs['w1'] = [
        {'source': 'container', 'line': 'fine'},
        {'source': 'container', 'line': trouble + OPERATOR['MINIO_SECRET_KEY']},
    ]
    plane.health['jobs']['inQueue'] = 7
    status = operator('status')
    for text in ('UNHEALTHY (of an older release)', 'NVIDIA L40S', 'inQueue', '7', trouble + '••••'):
        assert text in status.stdout
    assert 'fine' not in status.stdout
    assert json.loads(operator('status', '--json').stdout)['errors'] == [['w1', trouble + '••••']]
    kept = operator('destroy', answer='n\n')
    assert kept.exit_code == 3
    assert 'nothing was deleted' in kept.stderr
    assert plane.endpoints
    assert operator('destroy', answer='y\n').stdout.endswith(f'{id} deleted\n')
    assert not plane.endpoints
    assert operator('destroy', '--yes').exit_code == 3
    assert 'RunPod has no endpoint called wan-avatar' in operator('status').stderr

ROWS = [ # profile, what `plan` says of the pool ADA_80_PRO with an H100 measured, and of AMPERE_48 with none
    ('wan22-animate', r'ADA_80_PRO +214 s +0\.25 USD +measured on NVIDIA H100 80GB HBM3, 2026-01-02',
     r'AMPERE_48 +at least 789 s +at least 0\.27 USD +limit by the datasheet of NVIDIA RTX A6000'),
    ('draft', 'ADA_80_PRO +not measured', 'AMPERE_48 +not measured')]

@pytest.mark.parametrize('profile, measured_row, limit_row', ROWS)
def test_plan_says_what_a_video_takes_and_costs(operator, monkeypatch, tmp_path, profile, measured_row, limit_row):
    monkeypatch.setattr('wan_avatar.endpoint_file.measured', lambda: run_of(H100))
    path = tmp_path / 'endpoint.toml'
    path.write_text(path.read_text().replace('profile = "wan22-animate"', f'profile = "{profile}"'))
    said = operator('plan', '--image', IMAGE).stdout
    assert re.search(measured_row, said), said
    assert re.search(limit_row, said), said
    assert 'rendering 10 s of video' in said, said

def test_a_damaged_run_is_a_line_with_a_remedy(operator, monkeypatch, tmp_path):
    (tmp_path / 'gpu/h100').mkdir(parents=True)
    (tmp_path / 'gpu/h100/gpu.json').write_text('{"card": 5}')
    monkeypatch.setattr('wan_avatar.endpoint_file.measured', lambda: measured(tmp_path / 'gpu'))
    said = operator('plan', '--image', IMAGE)
    assert said.exit_code == 2
    assert 'run `wan-avatar bench gpu` again' in said.stderr

def test_replacing_asks_first(operator, plane):
    id = operator('apply', '--image', IMAGE).stdout.strip()
    plane.endpoints[id]['type'] = 'LOAD_BALANCER'
    assert 'DELETED' in operator('plan', '--image', IMAGE).stdout
    assert operator('apply', '--image', IMAGE, answer='n\n').exit_code == 3
    assert list(plane.endpoints) == [id]
    assert operator('apply', '--image', IMAGE).exit_code != 0
    assert list(plane.endpoints) == [id], 'nobody there to ask'
    another = operator('apply', '--image', IMAGE, '--yes').stdout.strip()
    assert list(plane.endpoints) == [another]
    assert another != id

@pytest.mark.parametrize('args, more, code, words', [
    (['plan', '--image', IMAGE], {'RUNPOD_API_KEY': ''}, 3, 'RUNPOD_API_KEY is not set'),
    (['plan', '--image', IMAGE], {'RUNPOD_API_KEY': 'rpa_wrong'}, 3, '401 Unauthorized'),
    (['plan'], {}, 2, 'image is not set'),
    (['plan', '--file', 'none.toml'], {}, 2, 'there is no none.toml'),
    (['apply', '--image', IMAGE], {'MINIO_BUCKET': ''}, 2, 'MINIO_BUCKET of secrets.from_environment not set'),
    (['plan', '--image', IMAGE], {'RUNPOD_API_BASE_URL': 'http://127.0.0.1:9'}, 3, 'ConnectError'),
])
def test_exit_codes(operator, monkeypatch, args, more, code, words):
    defaults = Control.__init__.__defaults__
    monkeypatch.setattr(Control.__init__, '__defaults__', (*defaults[:-1], lambda s: None)) # no pauses
    done = operator(*args, **more)
    assert done.exit_code == code, done.output
    assert words in done.output, done.output

# %% without a key, a network or a secret
BARE = {'RUNPOD_API_KEY': '', 'RUNPOD_API_BASE_URL': 'http://127.0.0.1:9', **dict.fromkeys(OPERATOR, '')}

OFFLINE = [ # lines of the file; image; exit code; what is said
    ([], (), 0, ['wan22-animate', 'from your environment', 'rendering 10 s of video', 'flex prices of']),
    ([], (), 0, ['`apply` will want this: image is not set', 'will want this: MINIO_ENDPOINT, MINIO_ACCESS_KEY']),
    ([], ('--image', IMAGE), 0, [IMAGE, '0.']),
    ([], ('--image', 'me/worker:latest'), 2, ['me/worker:latest can mean other content']),
    ([('disk_gb = 120', 'disk_gb = 3'), ('max = 1 ', 'max = 4 '), ('"ADA_80_PRO"', '"H100"')], (), 2,
     ['disk_gb is 3', 'workers.max is 4', "gpu.order has 'H100'"]),
    ([('"wan22-animate"', '"wan23"'), ('max = 1 ', 'max = 4 '), ('[env]', '[env]\nHF_TOKEN = "x"')], (), 2,
     ["profile 'wan23' does not exist", 'workers.max is 4', 'env.HF_TOKEN looks like a secret']),
    ([('disk_gb = 120', 'disk_gb = "120"'), ('min = 0', 'mim = 0')], (), 2,
     ["disk_gb is '120'", 'workers.mim is not a key of this file']),
]

@pytest.mark.parametrize('edits, image, code, said', OFFLINE)
def test_plan_offline_needs_nobody(operator, plane, edits, image, code, said):
    text = Path('endpoint.toml').read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path('endpoint.toml').write_text(text)
    done = operator('plan', '--offline', *image, **BARE)
    assert done.exit_code == code, done.output
    assert [words for words in said if words not in done.output] == []
    assert plane.asked == []

DIFFERS = [ # lines of the second file; what the rows say
    ([], []),
    ([('max_seconds = 10', 'max_seconds = 5')], ['max_seconds 10.0 5.0']),
    ([('min = 0', 'min = 1'), ('idle_s = 5', 'idle_s = 60')], ['workers.min 0 1', 'workers.idle_s 5 60']),
    ([('[env]', '[env]\nHF_TOKEN = "hidden-token"')], ['env.HF_TOKEN - ••••']),
    ([('excluded_types = []', 'excluded_types = ["NVIDIA L40"]')], ['gpu.excluded_types - NVIDIA L40']),
    ([('[env]', '[cached_model]\nmodel = "a/b"\n[env]')],
     ['cached_model.model - a/b', 'cached_model.revision - main']),
]

@pytest.mark.parametrize('edits, rows', DIFFERS)
def test_two_environments_are_compared(operator, plane, edits, rows):
    text = Path('endpoint.toml').read_text()
    Path('endpoint.staging.toml').write_text(text)
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path('endpoint.prod.toml').write_text(text)
    done = operator('diff', 'staging', 'endpoint.prod.toml', '--exit-code', **BARE)
    assert done.exit_code == int(bool(rows)), done.output
    note, _, *said = [' '.join(line.split()) for line in done.stdout.splitlines()]
    assert note.startswith('note: both are called wan-avatar')
    assert said == rows
    assert 'hidden-token' not in done.output
    assert plane.asked == []

# %% image
STUB = '''#!/bin/sh
# stands in for docker: writes down how it was called, answers what is asked about images; REMOTE: what the registry has
echo "$@" >> "$STUB_LOG"
case "$1 $2" in
  "image inspect") echo '[{"Id": "sha256:1d", "Size": 17000000000, "RepoDigests": ["'"${3%%:*}"'@sha256:d1"]}]';;
  "buildx imagetools") [ -z "$DENIED" ] || { echo "ERROR: insufficient_scope: authorization failed" >&2; exit 1; }
    [ -n "$REMOTE" ] && echo "$REMOTE" || { echo "ERROR: $6: not found" >&2; exit 1; };;
  "build "*) [ -z "$BROKEN" ] || { echo "failed to solve" >&2; exit 17; };;
esac
'''

BUILT_FROM = (
    'settings.ini',
    'Dockerfile',
    'wan_avatar/models.lock.json',
    'nbs/tools/requirements-worker.txt',
    'nbs/tools/requirements-comfy.txt',
)
COMMIT = ('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '-m', 'all')

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A committed checkout of what an image is built from, and the stand-in for docker on PATH"
    root = tmp_path / 'checkout'
    for name in BUILT_FROM:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for args in (('init', '-q'), ('add', '.'), COMMIT): subprocess.run(['git', '-C', str(root), *args], check=True)
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/docker').write_text(STUB)
    (tmp_path / 'bin/docker').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    monkeypatch.setenv('STUB_LOG', str(tmp_path / 'docker.log'))
    monkeypatch.chdir(root)
    return root

def image(*args): return CliRunner().invoke(app, ['image', *args])
def called(checkout) -> list[str]:
    log = checkout.parent / 'docker.log'
    return log.read_text().splitlines() if log.exists() else []

def test_tag_build_push(checkout, monkeypatch):
    tag = image('tag').stdout.strip()
    sha = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(rf'dexsynccom/twin-avatar:wan-worker-20\d{{6}}-{sha[:12]}', tag)
    assert image('build').stdout.split('\n')[:3] == [tag, 'sha256:d1', '17.00 GB']
    lock = json.loads((checkout / 'wan_avatar/models.lock.json').read_text())
    build, _ = called(checkout)
    assert build.startswith(f'build --platform linux/amd64 --tag {tag} ')
    assert f'COMFYUI_COMMIT={lock["comfyui"]["commit"]}' in build
    assert f'GIT_SHA={sha} ' in build
    assert image('push').exit_code == 0
    assert f'push {tag}' in called(checkout)
    monkeypatch.setenv('REMOTE', 'sha256:d1')
    assert image('push').exit_code == 0, 'pushing what is there already'
    monkeypatch.setenv('REMOTE', 'sha256:0ther')
    taken = image('push')
    before = len(called(checkout))
    monkeypatch.setenv('DENIED', '1')
    assert 'authorization failed' in (denied := image('push')).output
    assert denied.exit_code == 2, 'not logged in is not the same as not there'
    assert taken.exit_code == 2
    assert 'a tag keeps its content' in taken.output
    assert 'push' not in ' '.join(called(checkout)[before - 1:])

REPOSITORIES = { # named; taken?
    'me/worker': True,
    'worker': True,
    'registry.example.org:5000/team/avatar_worker': True,
    'me/worker:latest': False,
    'me/worker@sha256:d1': False,
    'Me/Worker': False,
    'https://registry.example.org/me': False,
    'me//worker': False,
    '-v': False,
    '': False,
}

@pytest.mark.parametrize('name, taken', REPOSITORIES.items())
def test_another_repository_can_be_named(checkout, name, taken):
    done = {command: image(command, f'--repository={name}') for command in ('tag', 'build', 'push')}
    assert {d.exit_code for d in done.values()} == {0 if taken else 2}, [d.output for d in done.values()]
    tag = done['tag'].stdout.strip()
    if not taken: assert called(checkout) == []
    else:
        assert tag.startswith(f'{name}:wan-worker-20')
        assert any(f'--tag {tag} ' in line for line in called(checkout))
        assert f'push {tag}' in called(checkout)

def test_uncommitted_files_need_a_word(checkout):
    (checkout / 'new.py').write_text('')
    for command in ('tag', 'build', 'push'):
        done = image(command)
        assert done.exit_code == 2
        assert '1 files are not committed (new.py)' in done.output
    assert called(checkout) == []
    assert image('tag', '--dirty').stdout.strip().endswith('-dirty')

def test_build_that_fails_and_settings_that_moved_on(checkout, monkeypatch):
    monkeypatch.setenv('BROKEN', '1')
    done = image('build')
    assert done.exit_code == 2
    assert '`docker build` ended with 17' in done.output
    settings = (checkout / 'settings.ini').read_text()
    (checkout / 'settings.ini').write_text(settings.replace('minio==7.2.20', 'minio==7.2.19'))
    done = image('build', '--dirty')
    assert done.exit_code == 2
    assert 'requirements-worker.txt were compiled; run: wan-avatar image lock' in done.output
    monkeypatch.setenv('PATH', str(Path('/usr/bin')))
    monkeypatch.chdir(checkout.parent)
    assert image('tag').exit_code == 2
