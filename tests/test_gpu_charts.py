"""What a GPU said, as table and pictures: every figure here is made up"""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from wan_avatar import gpu_charts
from wan_avatar.cards import CARDS, PRODUCTION, GpuRun, Measured, Peak, measured, write_run
from wan_avatar.gpu_charts import (
    UNMEASURED,
    cards_section,
    fits,
    pool_sizes,
    shown_case,
    table_of,
    whole_windows,
    write_report,
)

H100 = 'NVIDIA H100 80GB HBM3'

def made(name='a case', **values) -> Measured:
    usual = {'frames': 77, 'steps': 2, 'width': 1280, 'height': 720, 'attention': 'default', 'fp8_products': 'default'}
    return Measured(name=name, **usual | values)

def whole(name='a window', n=6, **values) -> Measured:
    peaks = {'encode': Peak(allocated_gb=9, reserved_gb=12.25), 'forward': Peak(allocated_gb=38.5, reserved_gb=43.5)}
    usual = {'steps': n, 'steps_s': (12.0,) * n, 'least_s': 6.0, 'decode_s': 5.0, 'petaflop': 6.0, 'peaks': peaks,
             'smi_gb': 55.75}
    return made(name, **usual | values)

def run(*cases, card=H100, **more) -> GpuRun:
    facts = {'capability': (9, 0), 'memory_gb': 80, 'at': '2000-01-02T03:04:05+00:00', 'commit': '0000000',
             'versions': {'torch': '2.11'}}
    return GpuRun(card=card, cases=cases, **facts | more)

CAPPED = made('held to 24 GB', cap_gb=24, steps_s=(31.4159,), load_s=2.71828,
              failed='Allocation on device 0 (out of memory)')
BAD_NAME = made('a|b\nc', failed='Error: 1|2\n3')
RUNS = {'nothing': run(),
        'all failed': run(BAD_NAME),
        'capped alone': run(CAPPED),
        'steps alone': run(whole(decode_s=0)),
        'a window': run(whole()),
        'a card without a datasheet': run(whole(least_s=None, peaks={}, smi_gb=None)),
        'no steps': run(made(peaks=whole().peaks)),
        'windows of unlike sizes': run(whole(load_s=90.0), whole('long', frames=121, width=640)),
        'a cap without a peak': run(whole(), made('held to 80 GB', cap_gb=80, failed='TimeoutError'))}

@pytest.mark.parametrize('given', RUNS.values(), ids=RUNS)
def test_table_and_pictures_of_whatever_there_is(given, tmp_path):
    folder = tmp_path / 'gpu/card'
    names = ['table.md', 'window.png', 'memory.png']
    assert write_report(given, folder) == [folder / name for name in names]
    assert {p.name for p in folder.iterdir()} == set(names) # nothing half
    for name in ('window', 'memory'):
        with Image.open(folder / f'{name}.png') as picture:
            assert picture.format == 'PNG'
            assert min(picture.size) > 150
    assert (folder / 'table.md').read_text() == table_of(given)

def rows(text: str) -> list[list[str]]: # cells
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]

def test_a_case_is_a_line_with_its_figures():
    head, _, line = rows(table_of(run(whole(load_s=90.0, watts=640.0, ran='cudnn', commit='89abcdef0123'))))
    found = dict(zip(head, line, strict=True))
    assert found == {
        'case': 'a window', 'frames': '77', 'size': '1280x720', 'kernels': 'cudnn', 's/step': '12.00', 'TFLOP/s': '500',
        '% of datasheet': '50', 'load s': '90.0', 'encode s': '–', 'decode s': '5.0', 'window s (steps)': '77.0 (6)',
        'encode GB': '9.0', 'forward GB': '38.5', 'decode GB': '–', 'reserved GB': '43.5', 'nvidia-smi GB': '55.8',
        'host RAM GB': '–', 'W': '640', 'commit': '89abcde'}

def test_every_reason_is_told_and_breaks_no_table():
    tracker = {'masks': {'what': 'SAM 2', 'times': {}, 'failed': 'RuntimeError: no'},
               'person': {'what': 'YOLOX', 'times': {}, 'left_out': 'no time'}}
    text = table_of(run(whole(finite=False), BAD_NAME, left_out={'torch.compile': '3 s remained'}, tracker=tracker))
    assert [line for line in text.splitlines() if line.startswith('* ')] == [
        '* a/b c: failed: Error: 1/2 3',
        '* a window: its answers are not finite numbers',
        '* torch.compile: left out: 3 s remained',
        '* tracker, masks: failed: RuntimeError: no',
        '* tracker, person: left out: no time']
    assert len({len(row) for row in rows(text)}) == 1

@pytest.mark.parametrize('cap, told', [
    (48, '| 48 | fits, the VAE in tiles |'),
    (None, '* a window: the VAE went on in tiles, for want of memory'),
])
def test_a_decode_in_tiles_is_told(cap, told):
    assert told in table_of(run(whole(cap_gb=cap, tiled=True)))
    assert told not in table_of(run(whole(cap_gb=cap)))

def test_an_emulated_card_has_no_seconds():
    text = table_of(run(whole(), CAPPED))
    line, = [r for r in rows(text) if r[0] == '24']
    assert line[:2] == ['24', 'does not fit']
    assert 'never how fast' in text
    assert not [figure for figure in ('31.4', '2.71', '2.72', '31.41') if figure in text]
    assert CAPPED.name not in [r[0] for r in rows(text)]

FAILURES = {'OutOfMemoryError: Allocation on device 0 would exceed allowed memory': False,
            'CUDA out of memory. Tried to allocate 2 GiB': False,
            'out_of_memory: node sample: Allocation on device': False,
            'comfy_failed: CUDNN_STATUS_ALLOC_FAILED': False,
            'comfy_failed: CUDA error: an illegal memory access was encountered': None,
            'was interrupted after 41 s': None,
            'ImportError: no sageattention': None,
            None: True}
@pytest.mark.parametrize('failed, verdict', FAILURES.items())
def test_only_memory_that_ran_out_is_a_card_that_does_not_fit(failed, verdict):
    assert fits(made(cap_gb=24, failed=failed)) is verdict

def test_which_cases_are_shown():
    cold, window, long = whole('cold', 2), whole(PRODUCTION), whole('121 frames', frames=121)
    cut = whole('cut off', failed='Interrupted')
    given = run(cold, cut, whole('capped', cap_gb=48), window, long)
    assert [c.name for c in whole_windows(given)] == [PRODUCTION, '121 frames']
    assert shown_case(given) == window
    assert shown_case(run(cold, cut)) == cold
    assert shown_case(run(cut, CAPPED)) is None

def test_a_pool_has_as_much_memory_as_its_smallest_card():
    sizes = {pool: gb for gb, pools in pool_sizes().items() for pool in pools}
    assert sizes.keys() == {c.pool for c in CARDS.values()}
    for pool, gb in sizes.items(): assert gb == min(c.memory_gb for c in CARDS.values() if c.pool == pool)

def test_a_card_is_unmeasured_until_its_folder_is_there(tmp_path):
    before = cards_section(measured(tmp_path), tmp_path)
    assert [r[0] for r in rows(before)[2:]] == list(CARDS)
    assert before.count(UNMEASURED) == 2 * len(CARDS)
    assert 'runs/gpu' not in before
    (folder := tmp_path / 'h100').mkdir()
    write_run(given := run(whole(PRODUCTION), CAPPED), folder / 'gpu.json')
    told = cards_section(measured(tmp_path), tmp_path)
    line, = [r for r in rows(told) if r[0] == H100]
    assert line == [H100, '`ADA_80_PRO`', '12.0 s', '6.0 s', '50 %', '77 s', '56 GB', '2000-01-02']
    assert told.count(UNMEASURED) == 2 * (len(CARDS) - 1)
    assert '24 GB: does not fit' in told
    assert 'runs/gpu' not in told
    write_report(given, folder)
    links = re.findall(r'\]\((.*)\)', cards_section(measured(tmp_path), tmp_path))
    assert links == [f'../runs/gpu/h100/{name}' for name in ('table.md', 'window.png', 'memory.png')]

def test_a_card_that_finished_nothing_and_one_without_a_datasheet(tmp_path):
    told = rows(cards_section({H100: run(BAD_NAME), 'Another': run(whole(least_s=None), card='Another')}, tmp_path))
    line, = [r for r in told if r[0] == H100]
    assert line == [H100, '`ADA_80_PRO`', UNMEASURED, '5.7 s', '–', '–', '–', '2000-01-02, in vain']
    assert told[-1] == ['Another', '–', '12.0 s', '–', '–', '77 s', '56 GB', '2000-01-02']

def test_readme_and_guides_say_what_was_measured():
    told = cards_section(measured())
    assert told.replace('](../runs/', '](runs/') in (ROOT / 'README.md').read_text(), 'run `make sync`'
    for name in ('index', 'guide_deploy', 'guide_research'):
        cells = json.loads((ROOT / f'nbs/{name}.ipynb').read_text())['cells']
        cells = [c for c in cells if 'cards_section(measured())' in ''.join(c['source'])]
        shown = [''.join(c['outputs'][0]['data']['text/markdown']) for c in cells]
        assert shown == [told], f'{name}: run `make sync`'

def test_a_machine_with_a_gpu_needs_neither_matplotlib_nor_the_worker_s_packages(tmp_path, monkeypatch):
    absent = {'matplotlib', 'urllib3', 'runpod', 'typer'}
    code = f'import sys, wan_avatar.gpu_charts; print(sorted({absent} & sys.modules.keys()))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
    monkeypatch.setattr(gpu_charts, 'find_spec', lambda name: None)
    assert write_report(run(whole()), tmp_path) == [tmp_path / 'table.md'] == list(tmp_path.iterdir())
