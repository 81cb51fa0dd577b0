"The reports as CI runs them: real endpoint, real worker, the draft profile on a second of video"
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict

import nbformat
import numpy as np
import pytest
import yaml
from conftest import ROOT, cut
from PIL import Image
from typer.testing import CliRunner

from wan_avatar.cards import code_commit
from wan_avatar.cli import app
from wan_avatar.forecast import render_time
from wan_avatar.metrics import JobRecord, costs, estimates, read_records, start_of, without_price, write_records
from wan_avatar.prices import POOLS
from wan_avatar.quality import MEASURES
from wan_avatar.reports import Phase, ReportError, read_phases, report_parameters, report_path

ENV = (
    {k: v for k, v in os.environ.items() if not k.startswith(('MINIO_', 'RUNPOD_'))}
    | {'COMFY_DIR': str(ROOT / '.comfy'), 'IPYTHONDIR': '/nonexistent'}
)

def report(folder, *args, timeout=400) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / '.venv/bin/wan-avatar', 'report', *map(str, args)], cwd=folder, env=ENV, capture_output=True, text=True,
        timeout=timeout
    )

@pytest.fixture(scope='module')
def place(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp('reports')
    (folder / 'ana.png').write_bytes((samples / 'astronaut.png').read_bytes())
    cut(samples / 'pexels.mp4', 12, folder).rename(folder / 'brief.mp4')
    cut(samples / 'pexels.mp4', 24, folder)
    return folder

CI_KEEPS = ('smoke.html', 'summary.json', 'records.jsonl', 'jobs.png')
INPUTS = ('-p', 'image=ana.png', '-p', 'driving=cut.mp4')
BRIEF = ('-p', 'image=ana.png', '-p', 'driving=brief.mp4') # nobody looks at what is in these videos

@pytest.fixture(scope='module')
def smoke(place):
    done = report(place, 'smoke', *INPUTS, '-p', 'out=smoke')
    assert done.returncode == 0, done.stderr
    return place / 'smoke'

@pytest.fixture(scope='module')
def cold_start(place):
    done = report(place, 'cold-start', *BRIEF, '-p', 'out=cold', '-p', 'cold=1', '-p', 'warm=1')
    assert done.returncode == 0, done.stderr
    return place / 'cold'

def pictures(folder) -> set[str]:
    "PNGs that hold a picture, not an empty sheet"
    return {
        p.stem
        for p in folder.glob('*.png') if len(Image.open(p).convert('RGB').resize((200, 100)).getcolors(20000)) > 20
    }

def below_the_head(path) -> np.ndarray:
    "A chart without its title and conditions, which name the run and count its jobs"
    return np.asarray(Image.open(path).convert('RGB'), float)[120:]

def test_smoke(smoke):
    summary = json.loads((smoke / 'summary.json').read_text())
    (record,) = read_records(smoke / 'records.jsonl')
    assert summary['ok']
    form = [c for c in summary['checks'] if not c['name'].startswith('quality:')]
    assert len(form) == 13
    measured = {f'quality: {name}' for name in MEASURES} | {'quality: worst second'}
    assert {c['name'] for c in summary['checks'] if c not in form} == measured
    assert all(c['ok'] for c in summary['checks'])
    assert pictures(smoke) == {'filmstrip', 'gantt-1', 'jobs', 'worst_second'}
    assert start_of(record) == 'cold'
    assert record.gpu == 'cpu'
    assert record.frames == 24
    page = (smoke / 'smoke.html').read_text()
    assert 'data:video/mp4;base64' in page
    assert page.count('data:image/png;base64') >= 3
    assert 'Traceback' not in page

def test_cold_start(cold_start):
    records = read_records(cold_start / 'records.jsonl')
    summary = json.loads((cold_start / 'summary.json').read_text())
    assert [(r.group, start_of(r)) for r in records] == [('B', 'cold'), ('B', 'warm'), ('A', 'cold'), ('A', 'warm')]
    assert len({r.worker for r in records}) == 2
    tracked = [s.facts for r in records for s in r.stages if s.name == 'track']
    assert all(facts == {'cached': True} for facts in tracked), 'tracking is no part of a start'
    always = {'jobs', 'cold_starts', 'gantt', 'percentiles', 'distribution', 'costs', 'months', 'full_size_model'}
    assert pictures(cold_start) - {'download'} == always
    assert summary['conditions'] == {'run': 'cold', 'commit': code_commit(), 'link_mb_s': None}
    spreads = [p for kinds in summary['percentiles'].values() for found in kinds.values() for p in found]
    assert all(p['value'] is None and p['why'] for p in spreads), 'one job of a kind carries no percentile'
    assert summary['cold_starts'] == 2
    assert summary['cold_start_parts_s']['B']['ComfyUI'] > 0.5
    assert 'Model, not measured' in summary['sentences'][2]
    assert summary['costs'] == []
    assert summary['without_price'] == 'no price: made on a CPU'
    cold = records[0]
    assert sum(summary['cold_start_parts_s']['B'].values()) == pytest.approx(
        cold.delay_s + next(s.ended_s for s in cold.stages if s.name == 'render'), abs=0.05
    )
    assert {f['name'] for f in summary['endpoint_figures']} >= {'jobs: completed', 'workers: idle'}
    assert all(f['source'].startswith('/health') for f in summary['endpoint_figures'])

def test_a_recorded_run_is_drawn_again_and_a_failed_assert_is_exit_code_1(cold_start, place):
    failed = JobRecord(
        job_id='j1', group='B', at='2026-01-01T00:00:00+00:00', submitted_s=0, done_s=9, state='FAILED',
        error='no_person: nobody'
    )
    write_records(place / 'more.jsonl', [*read_records(cold_start / 'records.jsonl'), failed])
    done = report(place, 'cold-start', '-p', 'records=more.jsonl', '-p', 'out=again')
    assert done.returncode == 1
    assert 'job j1 is FAILED: no_person: nobody' in done.stderr
    assert 'Traceback' not in done.stderr
    page = (place / 'again/cold_start.html').read_text()
    assert 'AssertionError' in page, 'a report that failed is kept to be looked at'
    first, again = (json.loads((folder / 'summary.json').read_text()) for folder in (cold_start, place / 'again'))
    changed = {k for k in first if first[k] != again[k]}
    elsewhere = {'endpoint_figures', 'conditions'} # of the summary beside the records: here is none
    assert changed == {'jobs', *elsewhere}, 'a failed job is counted, and changes nothing else'
    for name in ('cold_starts', 'percentiles', 'costs'):
        one, other = (below_the_head(folder / f'{name}.png') for folder in (cold_start, place / 'again'))
        rows = min(len(one), len(other))
        assert np.abs(one[-rows:] - other[-rows:]).mean() < 1, name

@pytest.mark.parametrize('args, words', [
    (('smoke', '-p', 'jobz=2'), "no parameter 'jobz'; it takes endpoint, image, driving, jobs, profile, out"),
    (('cold-start', '-p', 'cold=many'), 'must be a whole number'),
    (('smoke', '-p', 'jobs'), 'name=value'),
    (('compare', 'nowhere', 'nowhere'), 'cannot be read'),
])
def test_nothing_runs_when_a_name_is_wrong(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ['report', *args])
    assert done.exit_code == 2
    assert words in ' '.join(done.output.split())
    assert list(tmp_path.iterdir()) == []

def test_two_runs_side_by_side(place):
    base = dict(group='smoke', at='2026-01-01T00:00:00+00:00', submitted_s=0, state='COMPLETED')
    def run(name, execution_s):
        times = [execution_s + n / 40 for n in range(8)]
        jobs = [JobRecord(job_id=f'j{n}', done_s=s, execution_s=s, **base) for n, s in enumerate(times)]
        return write_records(place / f'{name}.jsonl', jobs)
    done = CliRunner().invoke(app, [
        'report', 'compare', str(run('main', 3.0)), str(run('branch', 2.0)), '--out', str(place / 'compared'), '--json',
    ])
    assert done.exit_code == 0, done.output
    assert (
        {d['what']: (round(d['ratio'], 2), d['verdict']) for d in json.loads(done.stdout)['differences']}
        == {'smoke, unknown: total': (0.68, 'faster'), 'smoke, unknown: execution': (0.68, 'faster')}
    )
    assert pictures(place / 'compared') == {'compare'}

@pytest.mark.parametrize('name, parameters', [
    ('smoke', {'endpoint', 'image', 'driving', 'jobs', 'profile', 'out'}),
    ('cold-start', {'endpoint', 'cold', 'warm', 'phases', 'prices', 'out', 'records'}),
])
def test_report_notebooks_read_well_un_run(name, parameters):
    notebook = nbformat.read(report_path(name), 4)
    assert parameters <= set(report_parameters(report_path(name)))
    assert all(not c.get('outputs') for c in notebook.cells)
    assert notebook.cells[0].source.startswith('# ')
    assert sum(c.cell_type == 'markdown' for c in notebook.cells) >= 5

HERE = {'B': Phase('B'), 'A': Phase('A')}

@pytest.mark.parametrize('phases, endpoint, wanted', [
    ('B,A', '', [HERE['B'], HERE['A']]),
    ('A', '', [HERE['A']]),
    ('B', 'abc123', [Phase('B', 'abc123')]),
    (' B , A ', 'B=x,A=http://h/v2/y', [Phase('B', 'x'), Phase('A', 'http://h/v2/y')]),
    ('C', '', 'phase C'),
    ('B,A', 'B=x', 'phase A'),
    ('B', 'B=x,A=y', 'phase A'),
])
def test_phases_and_their_endpoints(phases, endpoint, wanted):
    if not isinstance(wanted, str): assert read_phases(phases, endpoint, HERE) == wanted
    else:
        with pytest.raises(ReportError, match=wanted): read_phases(phases, endpoint, HERE)

def test_the_workflow_runs_make_test_pinned_and_without_secrets():
    text = (ROOT / '.github/workflows/test.yml').read_text()
    steps = yaml.safe_load(text)['jobs']['test']['steps']
    assert any(str(s.get('run', '')).startswith('make test') for s in steps)
    assert 'secrets.' not in text
    assert all(re.fullmatch(r'actions/[\w-]+@v\d+\.\d+\.\d+', s['uses']) for s in steps if 'uses' in s)

def test_the_workflow_keeps_what_the_reports_made(smoke, tmp_path, tmp_path_factory):
    "One process puts its files into --basetemp, several put them into folders of their own below it"
    jobs = yaml.safe_load((ROOT / '.github/workflows/test.yml').read_text())['jobs']
    (kept,) = [s['with']['path'].split() for s in jobs['test']['steps'] if s.get('name') == 'reports']
    (ran,) = [s['run'] for s in jobs['test']['steps'] if str(s.get('run', '')).startswith('make test')]
    place = re.search(r'--basetemp=([^"\s]+)', ran)[1]
    base = tmp_path_factory.getbasetemp()
    shutil.copytree(smoke, tmp_path / 'popen-gw1' / smoke.relative_to(base))
    for top, below in ((base, ''), (tmp_path, 'popen-gw1')):
        found = {file for path in kept for file in top.glob(path.removeprefix(f'{place}/'))}
        made = {top / below / smoke.relative_to(base) / name for name in CI_KEEPS}
        assert made <= found, (top, made - found)

@pytest.mark.parametrize('name', ['smoke', 'cold_start'])
def test_the_recorded_example_is_whole(name):
    folder = ROOT / 'runs' / name
    assert json.loads((folder / 'summary.json').read_text())['report'] == name
    assert all(r.state == 'COMPLETED' for r in read_records(folder / 'records.jsonl'))
    assert pictures(folder)
    command = ['git', 'ls-files', '--', f'runs/{name}']
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert tracked
    assert all(p.endswith(('.png', '.json', '.jsonl')) for p in tracked)

def test_recorded_money_is_what_is_known_today():
    "A card that was measured since shows in `runs/gpu`, and then no picture may still say at least"
    folder = ROOT / 'runs/cold_start'
    summary = json.loads((folder / 'summary.json').read_text())
    records = read_records(folder / 'records.jsonl')
    found = costs(records)
    assert (summary['costs'], summary['without_price']) == ([asdict(c) for c in found], without_price(records))
    now = [asdict(e) | {'usd': e.usd} for e in estimates(summary['estimates']['video_s'], found)]
    again = 'draw it again: wan-avatar report cold-start -p records=runs/cold_start/records.jsonl'
    assert summary['estimates']['pools'] == json.loads(json.dumps(now)), again

def test_the_guides_table_is_what_is_known_today():
    cells = nbformat.read(ROOT / 'nbs/guide_deploy.ipynb', 4).cells
    made = [o.get('data', {}) for c in cells for o in c.get('outputs', ())]
    shown = [data['text/markdown'] for data in made if 'text/markdown' in data]
    (table,) = [text for text in shown if 'Cold start' in text]
    rows = {line.split(' | ')[0].strip('| '): line for line in table.splitlines() if line.startswith('| ')}
    again = 'make it again: .venv/bin/python nbs/tools/refresh.py nbs/guide_deploy.ipynb'
    for name, pool in POOLS.items():
        for seconds in (3, 10):
            render = render_time(seconds, pool.gpus)
            cost = f'{render.least}{render.seconds * pool.usd_per_s:.2f} USD'
            assert f'{render}, {cost} |' in rows[name], again
            assert render.source in rows[name], again
