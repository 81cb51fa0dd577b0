"Figures people decide by: what is cold, what a start waited for, percentiles that admit how little they know, money"
import inspect
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from wan_avatar.bundle import own_lock
from wan_avatar.canvas import Canvas
from wan_avatar.cards import PRODUCTION, GpuRun, Measured
from wan_avatar.charts import (
    draw_cold_starts,
    draw_costs,
    draw_distribution,
    draw_download,
    draw_full_size,
    draw_gantt,
    draw_jobs,
    draw_months,
    draw_percentiles,
    full_size_bars,
)
from wan_avatar.cli_weights import models_plan
from wan_avatar.client import Status
from wan_avatar.forecast import start_bytes
from wan_avatar.metrics import (
    FullSize,
    JobRecord,
    RecordsError,
    billed_s,
    billing_figures,
    by_kind,
    cold_parts,
    cold_share,
    cold_share_at,
    compare_runs,
    costs,
    difference,
    download_speed,
    estimates,
    full_size_start,
    full_weights,
    measured_job,
    months,
    percentiles,
    read_records,
    start_of,
    summarise,
    waited_for,
    what_is_saved,
    without_price,
    write_records,
)
from wan_avatar.models import LINK_MB_S, load_lock, plan_table
from wan_avatar.prices import POOLS, GpuPool, PricesError, load_prices, pool_of
from wan_avatar.reports import report_parameters, report_path
from wan_avatar.timeline import Stage
from wan_avatar.workflow import WAN


def stage(name, begin_s, end_s, **facts) -> Stage: return Stage(name, begin_s, end_s, facts)

def record(job_id='j1', number=1, taken_s=5.0, delay_s=6.0, **more) -> JobRecord:
    boot = {
        'job_number': number,
        'process_s': 0.5,
        'taken_s': taken_s,
        'stages': more.pop('boot_stages', [stage('comfy', 0.1, 4.8), stage('sdk', 0.1, 2.0)]),
    }
    return JobRecord(**{
        'job_id': job_id,
        'group': 'B',
        'at': '2026-01-01T00:00:00+00:00',
        'submitted_s': 0,
        'done_s': 9,
        'state': 'COMPLETED',
        'delay_s': delay_s,
        'execution_s': 3.0,
        'duration_s': 2.0,
        'boot': boot,
        'stages': [stage('download', 0, 0.5), stage('render', 0.5, 2.0)],
        **more,
    })

@pytest.mark.parametrize('number, taken_s, delay_s, start', [
    (1, 5.0, 6.0, 'cold'),
    (1, 900.0, 0.1, 'cold'), # waited long or not: the worker was started for it
    (2, 8.0, 8.5, 'shared'),
    (2, 8.0, 3.1, 'warm'), # submitted before, or after, the worker was ready at 4.8
    (2, 8.0, 3.3, 'shared'),
    (7, 4000.0, 600.0, 'warm'),
])
def test_cold_is_what_the_worker_says(number, taken_s, delay_s, start):
    assert start_of(record(number=number, taken_s=taken_s, delay_s=delay_s)) == start

def test_a_job_without_a_report_is_not_guessed():
    silent = record(boot=None, delay_s=500.0)
    assert start_of(silent) == 'unknown'
    assert cold_share([silent, record()]) == (1, 1, 1.0)
    made = summarise([silent])
    assert made['cold_share'] is None
    assert made['cold_start_parts_s'] == {}

@pytest.mark.parametrize('kept', [
    None, # it is gone
    b'',
    b'{"half": "a manif',
    b'{"frames": 24}',
])
def test_a_damaged_manifest_does_not_end_a_run_of_jobs(kept):
    "What the client and the platform saw is recorded; the gate says what is wrong with the manifest"
    over = Status('j1', 'COMPLETED', {'minio_key': 'avatars/j1.mp4'}, delay_s=6, execution_s=3)
    client = SimpleNamespace(submit=lambda job: Status('j1', 'IN_QUEUE'), follow=lambda job_id, interval_s: [over])
    store = SimpleNamespace(read_bytes=lambda key, most: kept)
    found, status = measured_job(client, store, {}, 'B', lambda: 1.0)
    assert status == over
    assert (found.state, found.execution_s, found.boot, start_of(found)) == ('COMPLETED', 3, None, 'unknown')

@pytest.mark.parametrize('stages, begin, end, wanted', [
    ([], 0, 2, {None: 2}),
    ([stage('a', 0, 5)], 0, 6, {0: 5, None: 1}),
    ([stage('a', 0, 5), stage('b', 1, 3)], 0, 5, {0: 5}),
    ([stage('a', 0, 2), stage('b', 1, 5)], 0, 5, {0: 1, 1: 4}),
    ([stage('a', 0, 2), stage('b', 3, 4)], 0, 4, {0: 2, None: 1, 1: 1}),
    ([stage('a', 0, 3), stage('b', 0, 3)], 0, 3, {0: 3}),
    ([stage('a', 0, 4), stage('a/b', 1, 3)], 0, 4, {0: 2, 1: 2}),
    ([stage('a', 0, 9)], 1, 3, {0: 2}),
    ([stage('a', 1, 1)], 0, 2, {None: 2}),
])
def test_each_moment_waits_for_one_stage(stages, begin, end, wanted):
    assert dict(waited_for(stages, begin, end)) == wanted

def test_parts_add_up_to_the_wait_for_the_first_segment():
    files = [
        stage('weights', 0.1, 8.4, files=3),
        stage('weights/a', 0.1, 7.0, file='loras/a.safetensors', fetched=70),
        stage('weights/b', 0.1, 8.0, file='vae/b.safetensors', fetched=80),
        stage('weights/c', 8.0, 8.4, file='vae/c.safetensors', fetched=0),
        stage('warm-up', 8.4, 9.0),
    ]
    cold = record(taken_s=9.2, delay_s=10.0, boot_stages=[stage('comfy', 0.1, 4.8), *files])
    parts = cold_parts(cold)
    assert sum(p.seconds for p in parts) == pytest.approx(10.0 + 2.0, abs=0.002)
    waited_for_files = [p.name for p in parts if p.kind == 'weights']
    assert waited_for_files == ['b.safetensors'], 'the start waited for the file that came last'
    assert by_kind(parts) == pytest.approx({
        'queue': 0.3,
        'process': 0.5,
        'weights': 7.9,
        'verify': 0.4,
        'warm-up': 0.6,
        'other boot': 0.1,
        'hand-over': 0.2,
        'inputs': 0.5,
        'first segment': 1.5,
    })
    assert 'weights' not in by_kind(cold_parts(record())), 'a part that did not occur is not invented'

@pytest.mark.parametrize('facts, kind', [
    ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'hub', 'fetched': 100}, 'weights'),
    ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'hub', 'fetched': 40}, 'weights'),
    ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'cache', 'fetched': 0}, 'verify'),
    ({'files': 0, 'bytes': 0, 'fetched': 0}, 'other boot'),
])
def test_only_what_travelled_is_a_download(facts, kind):
    boot_stages = [stage('weights/vae', 0, 2, **facts)]
    assert bool(download_speed(boot_stages)) == (kind == 'weights')
    assert kind in by_kind(cold_parts(record(boot_stages=boot_stages)))

def test_percentiles_are_numpys_and_the_same_every_time():
    values = np.random.default_rng(5).lognormal(1, 0.4, 40)
    found = percentiles(values)
    assert [p.value for p in found[:3]] == pytest.approx(list(np.percentile(values, (50, 90, 95))))
    assert found == percentiles(values)
    assert all(p.low <= p.value <= p.high and p.n == 40 for p in found[:3])
    assert [p.enough for p in found] == [True, True, True, False]
    assert (found[3].value, found[3].low, found[3].high) == (None, None, None)
    assert found[3].why == 'p99 needs 100 jobs, the sample has 40'

@pytest.mark.parametrize('n, enough', [
    (1, []),
    (2, []), # the middle of two is no job's
    (3, [50]),
    (9, [50]),
    (10, [50, 90]),
    (20, [50, 90, 95]),
    (99, [50, 90, 95]),
    (100, [50, 90, 95, 99]),
])
def test_few_jobs_carry_few_percentiles(n, enough):
    assert [p.q for p in percentiles(range(n)) if p.enough] == enough

def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = sum(
        p.low <= 10 <= p.high
        for p in (percentiles(rng.normal(10, 2, 30), (50,), draws=400)[0] for _ in range(200))
    )
    assert 178 <= hits <= 200

@pytest.mark.parametrize('line, words', [
    ('{"job_id": "j"}', 'group: Field required'),
    ('{', 'line 2'),
    ('[]', 'line 2'),
    ('{"job_id": "j", "weather": 1}', 'line 2'),
])
def test_half_a_records_file_is_refused(tmp_path, line, words):
    path = write_records(tmp_path / 'r.jsonl', [record()])
    assert read_records(path) == [record()]
    path.write_text(path.read_text() + line + '\n')
    with pytest.raises(RecordsError, match='line 2') as e: read_records(path)
    assert words in str(e.value)

@pytest.mark.parametrize('text', [
    '',
    '{"pool": 1}',
    '[]',
    '[{"pool": "X", "gpus": [], "usd_per_s": 0}]',
    '[{"pool": "X", "usd_per_s": 1}]',
    '[{"pool": "X", "gpus": [], "usd_per_s": "dear"}]',
])
def test_price_files_that_are_none(tmp_path, text):
    (tmp_path / 'p.json').write_text(text)
    with pytest.raises(PricesError, match='prices'): load_prices(str(tmp_path / 'p.json'))

def test_what_is_billed(tmp_path):
    (tmp_path / 'p.json').write_text(json.dumps([{'pool': 'X', 'gpus': ['NVIDIA X'], 'usd_per_s': 0.01}]))
    prices = load_prices(str(tmp_path / 'p.json'))
    assert billed_s(record()) == 0.5 + 5.0 + 5 + 3.0
    assert billed_s(record(number=3, taken_s=50.0, delay_s=0.0)) == 3.0
    jobs = [record(), record(number=2, taken_s=50.0, delay_s=0.0), record(state='FAILED')]
    assert costs(jobs, prices) == [], 'jobs that do not say where they ran'
    cold, warm = costs([r.model_copy(update={'gpu': 'NVIDIA X'}) for r in jobs], prices)
    assert (cold.start, cold.n, cold.per_job) == ('cold', 1, pytest.approx(0.135))
    assert (warm.start, warm.per_job, warm.per_video_s) == ('warm', pytest.approx(0.03), pytest.approx(0.015))
    assert pool_of('NVIDIA X', prices).name == 'X'
    assert pool_of('NVIDIA X') is None
    assert len({g for p in POOLS.values() for g in p.gpus}) == sum(len(p.gpus) for p in POOLS.values())

# %% a job is priced on its own card, every other pool by a run of its own or at least
H100 = 'NVIDIA H100 80GB HBM3'
PCIE = 'NVIDIA H100 PCIe'
H200 = 'NVIDIA H200'
A40 = 'NVIDIA A40'
WARM = dict(number=2, taken_s=50.0, delay_s=0.0)
PRICED_JOBS = [ # devices of a cold and a warm job, costs as (card, pool, start, US dollars), what is said of the rest
    (('cpu', 'cpu'), [], 'no price: made on a CPU'),
    ((None, None), [], 'no price: made on an unknown device, which is in none of the pools'),
    (
        ('NVIDIA GeForce RTX 4090', 'cpu'),
        [],
        'no price: made on NVIDIA GeForce RTX 4090 and a CPU, which is in none of the pools',
    ),
    ((H100, H100), [(H100, 'ADA_80_PRO', 'cold', 13.5 * 0.00116), (H100, 'ADA_80_PRO', 'warm', 3 * 0.00116)], ''),
    ((H100, 'cpu'), [(H100, 'ADA_80_PRO', 'cold', 13.5 * 0.00116)], '1 of 2 jobs have no price: made on a CPU'),
    ((A40, H100), [(A40, 'AMPERE_48', 'cold', 13.5 * 0.00034), (H100, 'ADA_80_PRO', 'warm', 3 * 0.00116)], ''),
    ((H100, PCIE), [(H100, 'ADA_80_PRO', 'cold', 13.5 * 0.00116), (PCIE, 'ADA_80_PRO', 'warm', 3 * 0.00116)], ''),
]

@pytest.mark.parametrize('gpus, wanted, said', PRICED_JOBS)
def test_seconds_of_one_device_never_meet_the_pool_of_another(gpus, wanted, said):
    jobs = [record(gpu=gpus[0]), record(gpu=gpus[1], **WARM)]
    found = costs(jobs)
    assert [(c.card, c.pool, c.start) for c in found] == [w[:3] for w in wanted]
    assert [c.per_job for c in found] == pytest.approx([w[3] for w in wanted])
    assert without_price(jobs) == said

SILENT = [ # what a job does not say, costs
    (dict(state='FAILED'), 0),
    (dict(boot=None), 0), # cold or warm is unknown
    (dict(execution_s=None), 0),
    (dict(duration_s=None), 1),
]

@pytest.mark.parametrize('lacks, n', SILENT)
def test_what_a_job_does_not_say_costs_nothing(lacks, n):
    found = costs([record(gpu=H100, **lacks)])
    assert len(found) == n
    assert all(c.per_video_s is None for c in found)

def test_nothing_completed_is_nothing_measured():
    said = 'not measured: no job was completed'
    assert without_price([]) == without_price([record(state='FAILED', gpu='cpu')]) == said

WINDOW_OF = {'steps_s': (10.0,) * 6, 'pictures_s': 1, 'encode_s': 3, 'decode_s': 4, 'frames_s': 0.5}

def run_of(card: str) -> dict[str, GpuRun]:
    "Made up: a card on which a whole window took 68.5 s"
    case = Measured(name=PRODUCTION, frames=77, steps=6, width=1280, height=720, attention='default',
                    fp8_products='default', **WINDOW_OF)
    return {card: GpuRun(card=card, capability=(9, 0), memory_gb=80, at='2026-01-02T03:04:05Z', commit='made up',
                         versions={}, cases=(case,))}

@pytest.mark.parametrize('jobs_on, runs, shown', [ # each pool: jobs, measured, at least
    ('cpu', {}, {'at least': {'ADA_80_PRO', 'AMPERE_80', 'ADA_48_PRO', 'AMPERE_48', 'HOPPER_141'}}),
    (
        'cpu',
        run_of(H200),
        {'measured': {'HOPPER_141'}, 'at least': {'ADA_80_PRO', 'AMPERE_80', 'ADA_48_PRO', 'AMPERE_48'}},
    ),
    (
        H100,
        run_of(H200),
        {'jobs': {'ADA_80_PRO'}, 'measured': {'HOPPER_141'}, 'at least': {'AMPERE_80', 'ADA_48_PRO', 'AMPERE_48'}},
    ),
    (
        H100,
        run_of(H100),
        {
            'jobs': {'ADA_80_PRO'}, # jobs say more than a window does
            'at least': {'AMPERE_80', 'ADA_48_PRO', 'AMPERE_48', 'HOPPER_141'},
        },
    ),
])
def test_every_pool_has_one_kind_of_figure(jobs_on, runs, shown):
    found = costs([record(gpu=jobs_on)])
    guessed = estimates(77 / 24, found, runs=runs)
    kinds: dict[str, set] = {}
    for c in found: kinds.setdefault('jobs', set()).add(c.pool)
    for e in guessed: kinds.setdefault('measured' if e.render.at else 'at least', set()).add(e.pool)
    assert kinds == shown
    assert len(guessed) + len({c.pool for c in found}) == len(POOLS)
    own = {e.pool: e for e in guessed}
    if 'measured' in shown: assert own['HOPPER_141'].usd == pytest.approx(68.5 * 0.00155)
    assert own['AMPERE_48'].usd == pytest.approx(256.0 * 0.00034, rel=0.001)

def test_a_pool_of_unknown_cards_is_not_measured():
    (e,) = estimates(10, prices=(GpuPool('MINE', ('NVIDIA B200',), 0.003),), runs={})
    assert e.render is None
    assert e.usd is None

def test_a_month_needs_cold_and_warm_jobs_of_one_card():
    both = costs([record(gpu=H100), record(gpu=H100, **WARM), record(gpu=A40)])
    found = months(both, 10)
    assert set(found) == {H100}
    assert months(both[:1], 10) == {}
    usd, share = found[H100]
    assert share == cold_share_at(10, 3.0)
    assert usd == pytest.approx(300 * 0.00116 * (share * 13.5 + (1 - share) * 3))

@pytest.mark.parametrize('jobs_on', [None, 'cpu', H100])
def test_pictures_of_money_say_what_their_bars_are(tmp_path, monkeypatch, jobs_on):
    drawn = []
    monkeypatch.setattr(Canvas, 'save', lambda self, path: drawn.append(self.figure) or path)
    jobs = [record(gpu=jobs_on), record(gpu=jobs_on, **WARM)] if jobs_on else []
    found = costs(jobs)
    said = without_price(jobs)
    guessed = estimates(10, found, runs=run_of(H200))
    draw_costs(found, guessed, 10, said, tmp_path / 'c.png')
    draw_months(found, guessed, 10, said, tmp_path / 'm.png')
    for figure in drawn:
        bars = [(p.get_hatch(), p.get_width()) for a in figure.axes for p in a.patches]
        words = [t.get_text() for a in figure.axes for t in a.texts]
        least = [w for w in words if w.startswith('at least')]
        assert len(least) == sum(bool(hatch) for hatch, _ in bars) == (3 if jobs_on == H100 else 4) * len(figure.axes)
        assert said in ' '.join(t.get_text() for t in figure.texts)
        assert len(bars) == len(words)
        assert all(width > 0 for _, width in bars)

# %% how many bytes a start fetches, and how fast, is said once
def test_the_model_of_a_full_size_start():
    def total(cached=False, **speeds): return sum(p.seconds for p in full_size_start(FullSize(**speeds), cached))
    size = sum(size for _, size in full_weights()) / 1e6
    assert size == start_bytes() / 1e6
    assert 20_000 < size < 25_000
    assert total(link=100) - total(link=200) == pytest.approx(size / 200, rel=0.01), 'the link decides'
    assert total(link=5000, disk_write=300) == pytest.approx(total(link=300), rel=0.001), 'unless the disk is slower'
    assert total(cached=True) == total(cached=True, link=1), 'what RunPod cached does not use the link'
    without = sum(p.seconds for p in full_size_start(FullSize(), False, ()))
    assert without == 1.0 + 10.0, 'without weights ComfyUI is what is left'

def test_one_function_counts_and_one_link_is_assumed(tmp_path):
    lock = load_lock()
    encoder = lock.files['text_encoder'].bytes
    assert start_bytes(text_encoder=True) == start_bytes() + encoder
    assert start_bytes('draft', True) == 0
    assert sum(size for _, size in full_weights(text_encoder=True)) == start_bytes(text_encoder=True)
    for with_encoder in (False, True):
        own = own_lock(lock, WAN, with_encoder)
        size = sum(f.bytes for f in own.files.values())
        assert size == start_bytes(text_encoder=with_encoder), 'a bundle is what a start fetches'
    by_link = full_size_bars((LINK_MB_S,), FullSize())
    assert sum(p.bytes or 0 for p in by_link[f'B, link {LINK_MB_S} MB/s']) == start_bytes()
    defaults = [inspect.signature(f).parameters[p].default for f, p in ((plan_table, 'speed'), (models_plan, 'speed'))]
    assert [*defaults, FullSize().link] == [LINK_MB_S] * 3
    assert LINK_MB_S in inspect.signature(draw_full_size).parameters['links'].default
    assert report_parameters(report_path('cold-start'))['link_mb_s'] == 0, 'the report assumes what all others do'

FIGURE = re.compile(r'(\d+(?:\.\d+)?) ?(GB|MB)(/s)?\b')
TIMES = re.compile(r'(\d+) s at (?:an assumed )?(\d+) MB/s')
SUBJECT = re.compile(r'weights|checkpoints|bundle|download|fetches|text encoder|assumed|\blink\b')
OTHERS = { # clauses that name other bytes than those of a start -> where
    'after 21 GB of weights were read': 'nbs/04_memory.ipynb', # a made-up machine
}

def stated_wrong(text: str) -> list[str]:
    "Clauses about weights with a figure that the lock or the assumed link does not give"
    lock = load_lock()
    sizes = [start_bytes(text_encoder=e) for e in (False, True)]
    files = [lock.files[n].bytes for n in ('text_encoder', 'clip_vision', 'dit')]
    right = {f'{n / 1e9:.1f} GB' for n in (*sizes, *files)} | {f'{LINK_MB_S} MB/s'}
    wrong = []
    for clause in re.split(r'[.;:|,()\n](?:\s|$)', text):
        figures = {f'{number} {unit}{rate or ""}' for number, unit, rate in FIGURE.findall(clause)}
        about = SUBJECT.search(clause) and not any(o in clause for o in OTHERS)
        if about and figures - right: wrong.append(clause.strip())
    pairs = {(f'{n / LINK_MB_S / 1e6:.0f}', str(LINK_MB_S)) for n in sizes}
    return wrong + [f'{s} s at {link} MB/s' for s, link in TIMES.findall(text) if (s, link) not in pairs]

SAID = [ # text, is it wrong
    ('A start fetches 22.8 GB of weights', False),
    ('29.5 GB with the text encoder', False),
    ('A start fetches 21 GB of weights', True),
    ('the worker downloads 27.8 GB', True),
    ('a bundle of 23 GB', True),
    ('a text encoder of 6.7 GB', False),
    ('a text encoder of 7 GB', True),
    ('Docker with 60 GB free', False),
    ('(228 s at an assumed 100 MB/s)', False),
    ('295 s at 100 MB/s', False),
    ('91 s at 250 MB/s', True),
    ('a link of 250 MB/s', True),
    ('at 40 MB/s a connection', False),
]

@pytest.mark.parametrize('text, wrong', SAID)
def test_a_wrong_figure_is_found(text, wrong): assert bool(stated_wrong(text)) == wrong

def document(path: Path) -> str:
    "What a file tells people: of a notebook its prose, its comments and the tables it shows; else all of it"
    if path.suffix != '.ipynb': return path.read_text()
    cells = json.loads(path.read_text())['cells']
    prose = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    notes = [n for c in cells if c['cell_type'] == 'code' for n in re.findall(r'#\s(.*)', ''.join(c['source']))]
    made = [o.get('data', {}) for c in cells for o in c.get('outputs', ())]
    shown = [''.join(d['text/markdown']) for d in made if 'text/markdown' in d]
    return '\n'.join([*prose, *notes, *shown])

NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb'))
DOCUMENTS = ['README.md', 'endpoint.toml', 'Dockerfile', 'Makefile', *NOTEBOOKS]

@pytest.mark.parametrize('name', DOCUMENTS)
def test_documents_state_the_bytes_of_the_lock(name):
    text = document(ROOT / name)
    assert stated_wrong(text) == []
    assert all(clause in text for clause, where in OTHERS.items() if where == name), 'an exception nobody needs'

@pytest.mark.parametrize('name', ['README.md', 'nbs/guide_deploy.ipynb'])
def test_readme_and_guide_say_what_a_start_fetches(name):
    text = document(ROOT / name)
    normal, first = (f'{start_bytes(text_encoder=e) / 1e9:.1f} GB' for e in (False, True))
    assert f'fetches {normal} (' in text
    assert first in text
    assert 'text encoder' in text
    assert 'at least' in text
    assert 'arithmetic from public timings' not in text

@pytest.mark.parametrize('a, b, verdict', [
    ([2.0, 2.1, 2.2, 2.1, 2.0], [3.0, 3.1, 3.0, 3.2, 3.1], 'slower'),
    ([3.0, 3.1, 3.0, 3.2, 3.1], [2.0, 2.1, 2.2, 2.1, 2.0], 'faster'),
    ([2.0, 3.0, 2.5, 2.2, 2.9], [2.1, 2.9, 2.6, 2.3, 3.0], 'within the noise'),
    ([2.0] * 4, [9.0] * 50, 'too few jobs to tell (4 and 50; 5 each are needed)'),
])
def test_a_difference_counts_when_it_exceeds_the_noise(a, b, verdict): assert difference('x', a, b).verdict == verdict

def test_runs_are_compared_by_what_both_have():
    b = [record(f'j{n}', done_s=9 + n / 100) for n in range(6)]
    a = [record(f'k{n}', group='A') for n in range(6)]
    assert compare_runs(b, a) == []
    shared = {d.what for d in compare_runs(b, b + a)}
    assert shared >= {'B, cold: total', 'B, cold: start: ComfyUI', 'B, cold: job: render'}
    assert all(d.ratio == 1 for d in compare_runs(b, b + a))
    assert compare_runs([record(state='FAILED')], b) == []

@pytest.mark.parametrize('parts, fetched, words', [
    (
        {'B': {'weights': 8.0, 'ComfyUI': 2.0}, 'A': {'ComfyUI': 5.0}},
        9e6,
        'saves 5.0 s of 10.0 s (50 %): waiting for 9 MB of weights falls from 8.0 s to 0.0 s',
    ),
    ({'B': {'weights': 8.0, 'ComfyUI': 2.0}, 'A': {'ComfyUI': 12.0}}, 9e6, 'loses 2.0 s of 10.0 s'),
    ({'B': {'weights': 0.1, 'ComfyUI': 5.0}, 'A': {'ComfyUI': 4.0}}, 9e6, 'nobody waited for them'),
    ({'B': {'ComfyUI': 5.0}, 'A': {'ComfyUI': 4.0}}, 0, 'says nothing about cached models'),
    ({'B': {'weights': 8.0}}, 9e6, 'Only one phase'),
    ({'B': {'weights': 8.0}, 'A': {}}, 9e6, 'Only one phase'),
])
def test_what_is_said_about_phase_a(parts, fetched, words): assert words in what_is_saved(parts, fetched)

def test_runpods_bill():
    asked = []
    class Billing(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers['Authorization'], self.headers['User-Agent']))
            self.send_response(200 if self.headers['Authorization'] == 'Bearer right' else 401)
            self.end_headers()
            bill = {'startTime': '2026-10-07T15:00:00Z', 'totalAmount': 0.25, 'serverlessId': 'ep1'}
            self.wfile.write(json.dumps({'records': [bill], 'metadata': {}}).encode())
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Billing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{server.server_port}'
    try:
        (found,) = billing_figures('ep1', 'right', hours=3, base=base)
        with pytest.raises(RecordsError, match='HTTP 401'): billing_figures('ep1', 'wrong', base=base)
    finally:
        server.shutdown()
        server.server_close()
    assert (found.value, found.unit, found.source) == (0.25, 'USD', '/v2/billing/serverless')
    assert asked[0] == ('/v2/billing/serverless?serverlessId=ep1&bucketSize=hour&lastN=3', 'Bearer right', 'wan-avatar')

@pytest.mark.parametrize('records', [
    [],
    [record()],
    [record(boot=None, delay_s=None, execution_s=None, stages=[])],
    [record(state='FAILED', boot=None, stages=[])],
    [record(boot_stages=[]), record('j2', number=2, stages=[])],
])
def test_charts_take_whatever_there_is(tmp_path, records):
    for draw in (draw_jobs, draw_cold_starts, draw_percentiles, draw_distribution, draw_download):
        assert draw(records, tmp_path / 'c.png').stat().st_size > 3000
    found = costs(records)
    draw_costs(found, estimates(10, found, runs={}), 10, without_price(records), tmp_path / 'c.png')
    for r in records: draw_gantt(r, tmp_path / 'c.png')
