"""RunPod Hub's files by the tables of its publishing guide, and their facts by endpoint.toml and the settings.

The guide (docs.runpod.io/hub/publishing-guide) has no schema file, so its tables stand here as models."""
import ast
import json
from typing import Annotated, Any, Literal

import pytest
from conftest import ROOT
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan_avatar.config import Settings
from wan_avatar.endpoint_file import job_seconds, read_file
from wan_avatar.job import parse_job
from wan_avatar.prices import POOLS
from wan_avatar.workflow import PROFILES


class Table(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True)

class Option(Table):
    label: str
    value: str

class Input(Table):
    name: str
    type: Literal['string', 'number', 'boolean', 'huggingface']
    description: str
    default: str | bool | float | None = None
    advanced: bool = False
    options: list[Option] | None = None
    min: float | None = None
    max: float | None = None
    trueValue: str | None = None
    falseValue: str | None = None

class Static(Table):
    key: Annotated[str, Field(pattern=r'^[A-Z][A-Z0-9_]*$')]
    value: str

class Asked(Table):
    key: Annotated[str, Field(pattern=r'^[A-Z][A-Z0-9_]*$')]
    input: Input

Cuda = Annotated[str, Field(pattern=r'^\d+\.\d+$')]

class HubConfig(Table):
    runsOn: Literal['GPU']
    containerDiskInGb: Annotated[int, Field(ge=1)]
    gpuCount: Annotated[int, Field(ge=1)]
    gpuIds: str
    allowedCudaVersions: list[Cuda]
    env: list[Static | Asked]

class Hub(Table):
    title: str
    description: str
    type: Literal['serverless']
    category: Literal['audio', 'embedding', 'language', 'video', 'image']
    iconUrl: str | None = None
    config: HubConfig

class Case(Table):
    name: str
    input: dict[str, Any]
    timeout: Annotated[int, Field(ge=1)] # ms

class TestMachine(Table):
    __test__ = False
    gpuTypeId: str
    gpuCount: Annotated[int, Field(ge=1)]
    allowedCudaVersions: list[Cuda]
    env: list[Static]

class HubTests(Table):
    __test__ = False
    tests: Annotated[list[Case], Field(min_length=1)]
    config: TestMachine

FILE = read_file(ROOT / 'endpoint.toml')
HUB = Hub.model_validate_json((ROOT / '.runpod/hub.json').read_text())
TESTS = HubTests.model_validate_json((ROOT / '.runpod/tests.json').read_text())
NOT_ASKED = { # settings that whoever deploys from the Hub does not get to choose
    'MODELS_DIR', 'MODELS_CACHE', 'COMFY_DIR', 'WORK_DIR', # places in the image
    'TRACKER', 'MODELS_LOCK', 'MODELS_MIRROR', 'FETCH_CONNECTIONS', 'ALLOW_VARIANTS', # of whoever develops it
    'MINIO_USE_SSL', # the address says it
    'USE_SAGE_ATTENTION', # not in the image
    'ALLOW_PRIVATE_URLS', 'ALLOW_SDK_DEBUG', 'RUNPOD_LOG_LEVEL', 'RUNPOD_DEBUG_LEVEL', # not in production
    'COMFY_START_SECONDS',
}

def test_the_hub_asks_for_the_settings_of_a_worker():
    asked = {row.key: row.input for row in HUB.config.env if isinstance(row, Asked)}
    static = {row.key: row.value for row in HUB.config.env if isinstance(row, Static)}
    assert len(asked) + len(static) == len(HUB.config.env)
    known = {n.upper() for n in Settings.model_fields} | {'RUNPOD_INIT_TIMEOUT'}
    assert asked.keys() | static.keys() | NOT_ASKED == known
    assert not NOT_ASKED & (asked.keys() | static.keys())
    assert static == {'JOB_SECONDS': str(job_seconds(FILE)), 'RUNPOD_INIT_TIMEOUT': str(FILE.init_timeout_s)}
    kinds = {bool: 'boolean', int: 'number', float: 'number'}
    for key, row in asked.items():
        field = Settings.model_fields[key.lower()]
        default = '' if field.is_required() or field.default in (None, ()) else field.default
        if key == 'PROFILE': default = FILE.profile
        assert (row.default, row.type) == (default, kinds.get(field.annotation, 'string')), key
        assert row.description == (field.description or row.description), key
        if row.type == 'boolean': assert (row.trueValue, row.falseValue) == ('true', 'false'), key
    assert not any(asked[key].advanced for key in FILE.secrets.from_environment)
    assert {o.value for o in asked['PROFILE'].options} == set(PROFILES) - {'wan22-animate-tiny'} # for tests alone

def test_the_machine_is_that_of_the_endpoints_file():
    config = HUB.config
    assert config.gpuIds.split(',') == [*FILE.gpu.order, *(f'-{t}' for t in FILE.gpu.excluded_types)]
    assert (config.containerDiskInGb, config.gpuCount) == (FILE.disk_gb, FILE.gpu.count)
    assert (TESTS.config.gpuCount, TESTS.config.allowedCudaVersions) == (1, config.allowedCudaVersions)
    def number(version: str) -> list[int]: return [int(part) for part in version.split('.')]
    assert min(config.allowedCudaVersions, key=number) == FILE.gpu.min_cuda
    assert TESTS.config.gpuTypeId in [t for pool in FILE.gpu.order for t in POOLS[pool].gpus]
    assert TESTS.config.gpuTypeId not in FILE.gpu.excluded_types

def test_the_jobs_of_the_hub_are_jobs():
    known = {n.upper() for n in Settings.model_fields}
    values = {row.key: row.value for row in TESTS.config.env}
    assert values.keys() <= known
    assert {n for n, f in Settings.model_fields.items() if f.is_required()} <= {k.lower() for k in values}
    for name in FILE.secrets.from_environment: # whose values are no file's
        assert values[name] == f'{{{{ RUNPOD_SECRET_WAN_AVATAR_{name} }}}}'
    for case in TESTS.tests:
        assert parse_job(case.input)
        assert case.timeout == FILE.execution_timeout_s * 1000

def test_what_the_hub_wants_beside_them_is_there():
    assert (ROOT / 'Dockerfile').is_file()
    assert (ROOT / 'README.md').is_file()
    (run,) = [n for n in ast.walk(ast.parse((ROOT / '.runpod/handler.py').read_text())) if isinstance(n, ast.Call)]
    command = (ROOT / 'Dockerfile').read_text().splitlines()[-1]
    assert json.loads(command.removeprefix('CMD '))[-1] == run.args[0].value

WRONG = [ # what is taken out of, or put into, hub.json
    {'type': 'pod'},
    {'category': 'movies'},
    {'licence': 'apache2'},
    {'title': None},
]

@pytest.mark.parametrize('change', WRONG, ids=json.dumps)
def test_a_file_that_the_guide_refuses_is_refused(change):
    data = json.loads((ROOT / '.runpod/hub.json').read_text()) | change
    with pytest.raises(ValidationError): Hub.model_validate({k: v for k, v in data.items() if v is not None})
