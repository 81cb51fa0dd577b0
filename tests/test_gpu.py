"The bench of a GPU: its dry run on the real ComfyUI, and the formulas it goes by"
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from wan_avatar.cards import CARDS, measured, operations, read_run
from wan_avatar.gpu import cases, folder_of
from wan_avatar.prices import POOLS
from wan_avatar.probe import capped

WAN_AVATAR, PYTHON, COMFY = ROOT / '.venv/bin/wan-avatar', ROOT / '.comfy/env/bin/python', ROOT / '.comfy/ComfyUI'

# torch's own count on ComfyUI's own model, which on the meta device holds shapes and no numbers
COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import comfy.ldm.wan.model as wan, comfy.ldm.wan.model_animate as animate, comfy.ops, torch
from torch.utils.flop_counter import FlopCounterMode

def attention(q, k, v, heads, *more, **options):
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
wan.optimized_attention = animate.optimized_attention = attention
torch.set_grad_enabled(False)
torch.set_default_device('meta')
torch.set_default_dtype(torch.float16)
model = animate.AnimateWanModel(in_dim=36, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40,
                                operations=comfy.ops.disable_weight_init)
for width, height, length in json.loads(sys.argv[2]):
    latents = (length - 1) // 4 + 1
    cells = height // 8, width // 8
    pose, face = torch.empty(1, 16, latents, *cells), torch.empty(1, 3, length, 512, 512)
    noise, time = torch.empty(1, 36, latents + 1, *cells), torch.empty(1)
    text, vision = torch.empty(1, 512, 4096), torch.empty(1, 257, 1280)
    with FlopCounterMode(display=False) as counter:
        model(noise, time, text, vision, pose_latents=pose, face_pixel_values=face)
    counted = {str(name): count for name, count in counter.get_flop_counts()['Global'].items()}
    print(json.dumps([counter.get_total_flops() - counted['aten.convolution'], counted['aten.bmm']]))
"""
SIZES = [(1280, 720, 77), (1280, 720, 121), (640, 368, 65)]

def test_operations_are_those_torch_counts():
    command = [PYTHON, '-c', COUNT, COMFY, json.dumps(SIZES)]
    counted = subprocess.run(command, capture_output=True, text=True, check=True, cwd='/')
    for size, line in zip(SIZES, counted.stdout.splitlines(), strict=True):
        products, attention = json.loads(line)
        formula = operations(*size, image=257)
        assert formula.attention == pytest.approx(attention, rel=1e-3), size
        # without convolutions: those of the close-up's encoder take 0.003 PFLOP at any size
        assert formula.total == pytest.approx(products, rel=1e-3), size

def test_a_step_of_production_is_mostly_attention():
    whole = operations(1280, 720, 77)
    assert whole.total == pytest.approx(6.6e15, rel=0.01)
    assert whole.attention / whole.total == pytest.approx(0.72, abs=0.01)

CAPPED = [ # GB of the emulated card, of tensors, of all that torch keeps; GB free, of them in torch's own pool
    (24, 0, 0, 23.4, 0),
    (24, 10, 12, 13.4, 2),
    (24, 20, 23.4, 3.4, 3.4),
    (24, 20, 30, 10, 10), # torch kept more than such a card has: only its pool is left
    (80, 30, 35, 49.4, 5)]

@pytest.mark.parametrize('card, tensors, kept, free, pool', CAPPED)
def test_memory_of_an_emulated_card(card, tensors, kept, free, pool):
    found = capped(*(round(gb * 1e9) for gb in (card, tensors, kept)))
    assert [gb / 1e9 for gb in found] == pytest.approx([free, pool])

def test_cards_are_those_of_the_pools():
    of_pools = {(name, pool) for pool, found in POOLS.items() for name in found.gpus}
    assert {(card.name, card.pool) for card in CARDS.values()} == of_pools

def test_what_was_measured_lies_where_the_cards_say():
    for card, run in measured().items():
        folder = ROOT / 'runs/gpu' / folder_of(card)
        assert read_run(folder / 'gpu.json') == run
        for name in ('records.jsonl', 'table.md', 'window.png', 'memory.png'): assert (folder / name).is_file(), card
        assert run.commit not in ('', 'unknown'), card

def bench(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [WAN_AVATAR, 'bench', 'gpu', *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)

def test_without_a_gpu_it_says_so():
    found = bench(PATH='/nonexistent') # no nvidia-smi, wherever this runs
    assert found.returncode == 2
    assert 'no NVIDIA GPU' in found.stderr and '--small' in found.stderr



@pytest.fixture(scope='module')
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('gpu')
    first = bench('--small', '--seconds', '200', '--tracker-seconds', '0', '--out', str(out)) # test_networks has those
    assert first.returncode == 0, first.stderr
    return out / 'cpu', first

def test_the_dry_run_runs_the_cases(dry_run):
    folder, first = dry_run
    run = read_run(folder / 'gpu.json')
    made = {c.name: c for c in run.cases}
    on_gpu_alone = {c.name for c in cases() if c.cap_gb or c.compiled or c.unquantised or c.attention == 'sage'}
    assert set(made) == {c.name for c in cases()} - on_gpu_alone | {'CLIP, once a job'}
    assert not run.left_out
    assert run.card == 'cpu' and all(c.least_s is None for c in run.cases), 'a dry run says nothing of a card'


def test_a_case_that_fails_says_why_and_the_next_one_runs(dry_run):
    made = {c.name: c for c in read_run(dry_run[0] / 'gpu.json').cases}
    failed = {name for name, c in made.items() if c.failed}
    assert failed == {'attention cudnn', 'attention efficient'}
    assert all('cannot run on cpu' in made[name].failed for name in failed)
    assert made['second window, all steps'].window_s > 0

def test_every_phase_was_measured(dry_run):
    case = {c.name: c for c in read_run(dry_run[0] / 'gpu.json').cases}['first window']
    names = ('load_s', 'pictures_s', 'encode_s', 'decode_s', 'frames_s', 'step_s', 'total_s')
    seconds = {name: getattr(case, name) for name in names}
    assert all(value > 0 for value in seconds.values()), seconds
    assert set(case.peaks) == {'encode', 'forward', 'decode'} and case.ram_peak_gb > 0.1 and case.finite
    assert sum(v for name, v in seconds.items() if name not in ('step_s', 'total_s')) < case.total_s

def test_results_are_files(dry_run):
    assert all((dry_run[0] / name).stat().st_size for name in ('gpu.json', 'records.jsonl', 'table.md', 'comfy.log'))

def test_its_large_files_do_not_stay(dry_run):
    folder = re.search(r'^random weights into (\S+)$', dry_run[1].stderr, re.M)[1]
    assert 'wan_avatar_gpu-' in folder
    assert not Path(folder).exists()
