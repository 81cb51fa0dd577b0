"The two tables production takes from measurements: kernels by the card's capability, memory by profile"
import asyncio
import subprocess

import pytest
from conftest import ROOT, comfy_dir, make_settings

from wan_avatar.cards import PRODUCTION, GpuRun, Measured, runs_by_folder, unfounded
from wan_avatar.config import load_settings
from wan_avatar.job import JobError
from wan_avatar.kernels import ATTENTIONS, FP8_PRODUCTS, KERNELS, NEEDED_GB, Choice, Need
from wan_avatar.nodes import Kernels, kernels_for
from wan_avatar.run import profile_here
from wan_avatar.timeline import Timeline
from wan_avatar.worker import boot, check_card
from wan_avatar.workflow import PROFILES, WAN

H100 = {(9, 0): Choice('cudnn', 'off', 'h100')}
SAGE = {(9, 0): Choice('sage', 'default', 'h100')}
def installed(*given, **more): raise AssertionError('nothing is computed here')

CHOSEN = [ # attention and fp8 products of a profile; capability; table; is SageAttention there; what is in force
    ('default', 'default', (9, 0), H100, False, ('cudnn', 'off')),
    ('default', 'default', (9, 0), {}, True, ('default', 'default')),
    ('default', 'default', (8, 9), H100, True, ('default', 'default')),
    ('default', 'default', None, H100, True, ('default', 'default')),
    ('flash', 'default', (9, 0), H100, False, ('flash', 'off')),
    ('default', 'off', (9, 0), SAGE, True, ('sage', 'off')),
    ('default', 'default', (9, 0), SAGE, False, ('default', 'default')),
    ('sage', 'default', (9, 0), H100, True, ('sage', 'off')),
    ('sage', 'default', (9, 0), H100, False, ('default', 'off'))]

@pytest.mark.parametrize('attention, fp8_products, capability, table, sage, expected', CHOSEN)
def test_what_is_in_force(monkeypatch, caplog, attention, fp8_products, capability, table, sage, expected):
    for row in list(KERNELS): monkeypatch.delitem(KERNELS, row)
    for row, choice in table.items(): monkeypatch.setitem(KERNELS, row, choice)
    found = kernels_for(attention, fp8_products, capability, installed if sage else None)
    assert found == Kernels(*expected)
    wanted = table.get(capability, Choice()).attention if attention == 'default' else attention
    assert ('sageattention cannot be imported' in caplog.text) == (wanted == 'sage' and not sage)

def test_every_row_of_production_rests_on_a_run_of_such_a_card():
    assert unfounded(runs_by_folder()) == []
    assert {c.attention for c in KERNELS.values()} <= set(ATTENTIONS)
    assert {c.fp8_products for c in KERNELS.values()} <= set(FP8_PRODUCTS)
    assert set(NEEDED_GB) <= set(PROFILES)

def run_of(capability: tuple[int, int], failed: str | None = None) -> GpuRun:
    asked = {'attention': 'default', 'fp8_products': 'default'}
    case = Measured(name=PRODUCTION, frames=77, steps=6, width=1280, height=720, failed=failed, **asked)
    held = case.model_copy(update={'name': 'card of 80 GB', 'cap_gb': 80.0})
    about = {'card': 'a card', 'memory_gb': 141, 'at': '', 'commit': '', 'versions': {}}
    return GpuRun(capability=capability, cases=(case, held), **about)

H100_RUN = {'h100': run_of((9, 0))}
UNFINISHED = {'h100': run_of((9, 0), 'out of memory')}

FOUNDED = [ # runs; rows of kernels; rows of memory; finding
    (H100_RUN, H100, {'wan22-animate': Need(80, 'h100')}, ''),
    ({}, H100, {}, 'kernels of 9.0: there is no runs/gpu/h100'),
    ({'h100': run_of((8, 9))}, H100, {}, 'kernels of 9.0: a card has 8.9'),
    (UNFINISHED, H100, {}, f'kernels of 9.0: a card did not finish "{PRODUCTION}"'),
    ({}, {}, {'wan22-animate': Need(30, 'h100')}, 'memory of wan22-animate: there is no runs/gpu/h100'),
    (H100_RUN, {}, {'draft': Need(81, 'h100')},
     'memory of draft: a card was not held to 81 GB, or did not finish so')]

@pytest.mark.parametrize('runs, kernels, needs, finding', FOUNDED, ids=[f or 'founded' for *_, f in FOUNDED])
def test_a_row_that_no_run_bears_out_is_found(runs, kernels, needs, finding):
    assert unfounded(runs, kernels, needs) == ([finding] if finding else [])

# a card that is too small

NEEDS = {'wan22-animate': Need(36, 'h100')}
CARDS = [ # memory in bytes; ALLOW_SMALL_GPU; table; refused
    (25_300_000_000, False, NEEDS, True),
    (25_300_000_000, True, NEEDS, False),
    (35_999_999_999, False, NEEDS, True),
    (36_000_000_000, False, NEEDS, False),
    (84_900_000_000, False, NEEDS, False),
    (None, False, NEEDS, False), # a CPU
    (1, False, {}, False), # nobody has measured
    (1, False, {'wan22-animate-reference': Need(36, 'h100')}, False)]

@pytest.mark.parametrize('memory, allowed, needs, is_refused', CARDS)
def test_a_card_that_is_too_small_is_refused_with_both_numbers(caplog, memory, allowed, needs, is_refused):
    if is_refused:
        with pytest.raises(JobError) as e: check_card(WAN, 'NVIDIA A10', memory, allowed, needs)
        assert (e.value.code, e.value.worker_unfit) == ('out_of_memory', True)
        numbers = f'NVIDIA A10 has {memory / 1e9:.1f} GB', 'wan22-animate was measured to need 36.0 GB (runs/gpu/h100)'
        for words in (*numbers, 'ALLOW_SMALL_GPU=true'): assert words in e.value.message, words
    else: assert check_card(WAN, 'NVIDIA A10', memory, allowed, needs) is None
    assert ('going on, as ALLOW_SMALL_GPU says' in caplog.text) == (allowed and memory is not None)

def test_a_worker_does_not_start_on_it(bucket, tmp_path, monkeypatch):
    "ComfyUI is real; that it computes on a card of 24 GB is said in its place"
    monkeypatch.setattr('wan_avatar.comfy.device_memory', lambda stats: 24 * 10**9)
    monkeypatch.setitem(NEEDED_GB, 'draft', Need(36, 'h100'))
    with pytest.raises(JobError, match='24.0 GB .* 36.0 GB') as e:
        asyncio.run(boot(make_settings(bucket, tmp_path), Timeline()))
    assert e.value.worker_unfit

# SageAttention

MINIO = {'MINIO_ENDPOINT': 'h', 'MINIO_ACCESS_KEY': 'a', 'MINIO_SECRET_KEY': 's', 'MINIO_BUCKET': 'b'}

SET = [('wan22-animate', '1', 'sage'), ('wan22-animate', '0', 'default'), ('draft', '1', None)]

@pytest.mark.parametrize('name, said, attention', SET)
def test_the_setting_stands_above_the_profile(name, said, attention):
    settings = load_settings(MINIO | {'USE_SAGE_ATTENTION': said, 'PROFILE': name})
    for profile in (profile_here(settings), profile_here(settings, name)):
        assert profile.values.get('attention') == attention

LAYOUTS = """
# SageAttention needs a GPU; what goes to it and comes back is compared with torch's attention, in both layouts of each
import sys
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import torch
from comfy.ldm.modules.attention import attention_pytorch
from wan_avatar.job import JobError
from wan_avatar.nodes import _through_sage
def sageattn(q, k, v, tensor_layout, is_causal):
    q, k, v = (t if tensor_layout == 'HND' else t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out if tensor_layout == 'HND' else out.transpose(1, 2)
work = _through_sage(sageattn)
for reshaped in (False, True):
    shapes = [(2, 3, n, 8) if reshaped else (2, n, 24) for n in (5, 7, 7)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    for kept in (False, True):
        options = {'skip_reshape': reshaped, 'skip_output_reshape': kept}
        expected, out = attention_pytorch(q, k, v, 3, **options), work(q, k, v, 3, transformer_options={}, **options)
        assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-6), options
try: work(q, k, v, 3, mask=torch.zeros(5, 7))
except JobError as e: print(e)
"""

def test_sage_gets_and_gives_what_comfyui_means():
    command = [ROOT / '.comfy/env/bin/python', '-c', LAYOUTS, comfy_dir() / 'ComfyUI']
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert 'comfy_failed: attention "sage" takes no mask' in said.stdout
