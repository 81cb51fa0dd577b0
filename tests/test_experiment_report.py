"What an experiment says: statistics against values computed by hand, sheets read back frame by frame, the report once"
import json
import math
from itertools import product

import av
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_reports import pictures, report
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.comparison import (
    Point,
    TradeOff,
    circular_of,
    compare_experiments,
    corrected,
    differences_of,
    figures_of_trial,
    holm,
    measure_mean,
    open_experiment,
    paired_difference,
    paired_p,
    share_beaten,
    summarise_experiment,
    t_interval,
    trade_off,
)
from wan_avatar.experiment import Experiment, ExperimentError, Trial
from wan_avatar.experiment_charts import (
    draw_differences,
    means_table,
    pareto_chart,
    time_table,
    verdicts_table,
    what_stands_out,
)
from wan_avatar.frames import read_frames
from wan_avatar.manifest import BootReport
from wan_avatar.mark import COMPOSED
from wan_avatar.metrics import JobRecord
from wan_avatar.mp4 import Encoder, check_mp4, pictures_at
from wan_avatar.quality import MEASURES, Measure
from wan_avatar.reports import report_parameters, report_path
from wan_avatar.samples import draw_test_picture, read_test_picture
from wan_avatar.sheets import (
    NOT_RUN,
    Grid,
    GridRow,
    contact_sheet,
    grid_of,
    sheet_layout,
    side_by_side,
    video_layout,
)
from wan_avatar.timeline import Stage


# %% An experiment that no worker ran
def trial(place, seconds=5.0, quality=None, error=None, **values) -> Trial:
    picture, driving, variant, seed = place
    state = {'state': 'FAILED', 'error': error} if error else {'state': 'COMPLETED', 'execution_s': seconds + 1}
    record = JobRecord(job_id='-'.join(map(str, place)), group=variant, at='2026-01-01T00:00:00+00:00', submitted_s=0,
                       done_s=seconds + 2, stages=[] if error else [Stage('render', 1, 1 + seconds)],
                       **{'gpu': 'cpu'} | state | values.pop('record', {}))
    return Trial(picture=picture, driving=driving, variant=variant, seed=seed, digest='0', record=record,
                 quality=quality or {}, **values)

def keep(folder, experiment, trials):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'experiment.json').write_text(Experiment.model_validate(experiment).model_dump_json())
    (folder / 'trials.jsonl').write_text(''.join(t.model_dump_json() + '\n' for t in trials))
    return open_experiment(folder)

def plan(name='lesson', drivings=('dance',), variants=('plain', 'strong'), **more):
    return {'name': name, 'pictures': {'ana': 'ana.png'}, 'driving': {d: f'{d}.mp4' for d in drivings},
            'variants': {v: {} for v in variants}, **more}

def deliver(frames, path, change):
    path.parent.mkdir(exist_ok=True)
    with Encoder(path, frames[0].shape[1::-1]) as encoder:
        for n, frame in enumerate(frames): encoder.write(change(frame, n))
    return path

CHANGES = {
    'relight 1.0': lambda frame, n: frame,
    'relight 0.5': lambda frame, n: (frame * 0.75).astype(np.uint8),
    '4 steps': lambda frame, n: np.roll(frame, 4 * (n % 2), axis=0),
}

def figures(variant, n):
    "Plausible numbers; what cannot be measured is null"
    better = {'relight 1.0': 0, 'relight 0.5': 0.1, '4 steps': -0.06}[variant]
    return {'id_distance': 0.5 - better + 0.03 * n, 'driver_distance': 0.7 + 0.02 * n, 'face_found': 1.0,
            'lip_correlation': 0.9 - 0.01 * n * (1 + better), 'pose_error': 4.8 - 3 * better * (1 + 0.2 * n),
            'ghost': max(0.12 - better, 0) + 0.004 * n * n, 'sharpness': 0.9 + better + 0.05 * n,
            'flicker': 0.6 - better * n, 'background_psnr': 36.0 - n - 9 * better * better, 'seam': None}

def make_experiment(folder, samples, clips=2, variants=tuple(CHANGES), seeds=(1,), frames=24, size=(640, 360)):
    "The folder that `wan-avatar experiment` leaves, without a worker: one job fails, one was not measured"
    inputs = folder / 'inputs'
    inputs.mkdir(parents=True)
    Image.open(samples / 'astronaut.png').convert('RGB').resize((360, 360)).save(inputs / 'ana.png')
    names = ['talk', 'dance', 'turn', 'dark', 'two people', 'hands', 'whole body', 'shaky'][:clips]
    for n, name in enumerate(names):
        shown = pictures_at(samples / 'pexels.mp4', [(40 * n + i + 0.5) / 24 for i in range(frames)], size)
        deliver(shown, inputs / f'{name}.mp4', lambda frame, n: frame)
        for v in variants: deliver(shown, folder / f'videos/{name}-{v}.mp4', CHANGES[v])
    places = [('ana', name, v, seed) for name in names for v in variants for seed in seeds]
    def made(place, n):
        _, name, v, seed = place
        gone = (name, v) == (names[-1], variants[-1])
        seconds = {'relight 1.0': 9.0, 'relight 0.5': 9.2, '4 steps': 5.5}[v] + 0.7 * n + 0.1 * seed
        if gone: return trial(place, 1.0, error='out_of_memory: 3 GB were missing')
        return trial(place, seconds, figures(v, n) | {'pose_error': figures(v, n)['pose_error'] + 0.1 * seed},
                     circular=['pose_error'], video=f'videos/{name}-{v}.mp4')
    trials = [made(p, names.index(p[1])) for p in places]
    return keep(folder, plan('fixture', names, variants, seeds=list(seeds)), trials)

# %% Statistics
T = {2: 12.7062, 3: 4.3027, 4: 3.1824} # Student's t, 97.5 %, by number of cases

@pytest.mark.parametrize('values, mean, sd', [
    ([1, 2, 3], 2, 1),
    ([0.5, 0.7], 0.6, 0.141421),
    ([1, 1, 1, 5], 2, 2),
    ([2, 2, 2], 2, 0),
])
def test_an_interval_is_students_t(values, mean, sd):
    reach = T[len(values)] * sd / math.sqrt(len(values))
    assert t_interval(values) == pytest.approx((mean - reach, mean + reach), abs=1e-4)

@pytest.mark.parametrize('differences, p', [
    ([], None),
    ([0.3], None),
    ([1, 2, 3], 0.0742), # t = 3.4641, 2 degrees of freedom
    ([-1, -2, -3], 0.0742),
    ([1, -1], 1.0),
    ([0, 0, 0], 1.0),
    ([0.1, 0.1, 0.1], 0.25), # no scatter: three equal signs of 8 outcomes, twice
    ([-0.2] * 6, 0.03125),
])
def test_chance_of_a_difference(differences, p):
    assert paired_p(differences) == (None if p is None else pytest.approx(p, abs=1e-4))

@pytest.mark.parametrize('chances, wanted', [
    ([], []),
    ([0.04], [0.04]),
    ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]), # 3 x 0.01, 2 x 0.03, 1 x 0.04 but not below the one before
    ([0.5, 0.6], [1.0, 1.0]),
    ([0.02, 0.02], [0.04, 0.04]),
])
def test_holm(chances, wanted):
    assert holm(chances) == pytest.approx(wanted)

@pytest.mark.parametrize('cases, wanted', [
    ({}, None),
    ({'a': []}, None),
    ({'a': [0.5]}, (0.5, '', 1, 1, None)),
    ({'a': [0.5, 0.7]}, (0.6, 'seeds', 1, 2, 0.1414)),
    ({'a': [1, 1, 1, 1], 'b': [3]}, (2, 'cases', 2, 5, 0)), # a clip with more seeds does not count more
    ({'a': [1, 3], 'b': [5, 7]}, (4, 'cases', 2, 4, 1.4142)),
])
def test_means_of_cases(cases, wanted):
    mean = measure_mean(cases)
    if wanted is None: assert mean is None
    else:
        value, over, n_cases, n_trials, sd = wanted
        assert (mean.over, mean.n_cases, mean.n_trials) == (over, n_cases, n_trials)
        assert mean.value == pytest.approx(value)
        assert mean.seed_sd == (None if sd is None else pytest.approx(sd, abs=1e-4))
        assert (mean.low is None) == (over == '')

BY = {'a': [0.50], 'b': [0.60], 'c': [0.70]}
def plus(*changes): return {case: [v + x for v in BY[case]] for case, x in zip(BY, changes, strict=False)}

@pytest.mark.parametrize('before, after, better, value, n, verdict', [
    (BY, plus(0.1, 0.11, 0.12), 'higher', 0.11, 3, 'better'),
    (BY, plus(0.1, 0.11, 0.12), 'lower', 0.11, 3, 'worse'),
    (BY, plus(0.1, 0.11, 0.12), '1', -0.11, 3, 'better'), # nearer to 1
    (BY, plus(0.1, 0.11, 0.12), '0.5', 0.11, 3, 'worse'),
    (BY, plus(0.1, 0.11, 0.12), '', 0.11, 3, 'another'), # nobody knows the direction
    (BY, plus(0.1, -0.2, 0.05), 'higher', -0.016667, 3, 'within the noise'),
    (BY, BY, 'higher', 0, 3, 'within the noise'),
    (BY, plus(0.1, 0.1, 0.1), 'higher', 0.1, 3, 'within the noise'), # three equal signs are luck
    (BY, plus(0.2), 'higher', 0.2, 1, 'too few cases'),
    ({'a': [0.5, 1.5]}, {'a': [1.0, 1.0]}, '1', -0.5, 1, 'too few cases'), # the mean of seeds is no good 1
    ({'a': [1, 3], 'b': [1]}, {'a': [2], 'b': [3, 5], 'c': [9]}, 'higher', 1.5, 2, 'within the noise'),
    (BY, {'d': [1.0]}, 'higher', None, 0, None),
    (BY, {'a': []}, 'higher', None, 0, None),
])
def test_a_difference_is_paired_over_cases(before, after, better, value, n, verdict):
    found = paired_difference(('m', 'new', 'old'), before, after, better)
    if value is None: assert found is None
    else:
        assert found.value == pytest.approx(value, abs=1e-5)
        assert (found.n, found.verdict) == (n, verdict)
        assert found.before == pytest.approx(np.mean([np.mean(before[c]) for c in before if c in after]))

def test_the_interval_of_a_difference_is_of_its_cases_alone():
    found = paired_difference(('m', 'new', 'old'), {'a': [1], 'b': [50], 'c': [900]}, {'a': [2], 'b': [52], 'c': [903]},
                              'higher')
    assert (found.low, found.high) == pytest.approx((2 - T[3] / math.sqrt(3), 2 + T[3] / math.sqrt(3)), abs=1e-4)

def test_measures_are_corrected_together_and_times_alone():
    values = {'old': {c: {'ghost': v, 'id_distance': v, 'render_s': v} for c, v in BY.items()}}
    values['new'] = {c: {name: [x + d for x in BY[c]] for name in ('ghost', 'id_distance', 'render_s')}
                     for c, d in zip(BY, (0.1, 0.13, 0.17), strict=True)}
    known = {name: Measure('', 'lower', '', '') for name in ('ghost', 'id_distance', 'render_s', 'nothing')}
    found = {d.measure: d for d in differences_of(values, 'old', known)}
    p = found['render_s'].p
    assert list(found) == ['ghost', 'id_distance', 'render_s']
    assert [d.p_holm for d in found.values()] == pytest.approx([2 * p, 2 * p, p])
    assert corrected([]) == []

@pytest.mark.parametrize('value, kept', [
    (0.5, True), (0.0, True), (None, False), (math.nan, False), (math.inf, False),
])
def test_only_finite_numbers_count(value, kept):
    assert ('ghost' in figures_of_trial(trial(('ana', 'dance', 'plain', 1), quality={'ghost': value}))) == kept

def test_a_failed_job_gives_no_number():
    assert figures_of_trial(trial(('ana', 'dance', 'plain', 1), quality={'ghost': 1}, error='internal: x')) == {}

# %% Quality against seconds
def one_case(**by_variant): return {v: {'a': {k: [x] for k, x in m.items()}} for v, m in by_variant.items()}

KNOWN = {'ghost': Measure('', 'lower', '', ''), 'sharpness': Measure('', '1', '', ''),
         'lip': Measure('', 'higher', '', ''), 'odd': Measure('', '', '', '')}

@pytest.mark.parametrize('values, wanted, n', [
    (one_case(a={'ghost': 1}, b={'ghost': 2}), {'a': 1, 'b': 0}, 1),
    (one_case(a={'lip': 1}, b={'lip': 2}, c={'lip': 2}), {'a': 0, 'b': 0.75, 'c': 0.75}, 1), # a tie counts half
    (one_case(a={'sharpness': 0.9}, b={'sharpness': 1.3}), {'a': 1, 'b': 0}, 1),
    (one_case(a={'lip': 1, 'ghost': 1}, b={'lip': 2, 'ghost': 2}), {'a': 0.5, 'b': 0.5}, 2),
    (one_case(a={'odd': 1}, b={'odd': 2}), {}, 0), # no direction
    (one_case(a={'lip': 1}, b={'ghost': 2}), {}, 0), # nothing in common
    (one_case(a={'lip': 1}), {}, 0),
])
def test_share_beaten(values, wanted, n):
    shares, measures = share_beaten(values, KNOWN)
    assert measures == n
    assert shares == pytest.approx(wanted)

@pytest.mark.parametrize('better, points, front', [
    ('higher', [('a', 1, 1), ('b', 2, 2), ('c', 3, 1.5)], ['a', 'b']),
    ('lower', [('a', 1, 1), ('b', 2, 2), ('c', 3, 0.5)], ['a', 'c']),
    ('1', [('a', 1, 1.5), ('b', 2, 0.9), ('c', 3, 1.2)], ['a', 'b']),
    ('higher', [('a', 1, 1), ('b', 1, 1)], ['a', 'b']), # equals do not beat each other
    ('higher', [('a', 2, 1), ('b', 1, 1)], ['b']),
])
def test_the_front(better, points, front):
    chart = TradeOff(tuple(Point(*p) for p in points), 'render_s', 'm', better, 1, 1)
    assert [p.variant for p in chart.front] == front

def test_seconds_and_quality_are_of_the_same_cases():
    values = one_case(a={'ghost': 1, 'render_s': 5}, b={'ghost': 2, 'render_s': 3}, c={'render_s': 1})
    values['a']['hard'] = {'ghost': [9], 'render_s': [50]} # the other failed here
    known = KNOWN | {'render_s': Measure('s', 'lower', '', '')}
    chart = trade_off(values, known, quality='ghost')
    assert [(p.variant, p.seconds, p.quality) for p in chart.points] == [('a', 5, 1), ('b', 3, 2)]
    assert chart.left_out == ('c',)
    assert trade_off(values, known, circular=['ghost']).points == (), 'circular numbers do not count'
    with pytest.raises(ExperimentError, match='beauty'): trade_off(values, known, quality='beauty')

# %% The folder and its summary
def test_the_newest_line_counts_and_variants_that_are_gone_do_not(tmp_path):
    places = [('ana', 'dance', v, 1) for v in ('plain', 'old')]
    run = keep(tmp_path / 'x', plan(), [trial(places[0], error='internal: x'), trial(places[1]), trial(places[0], 7.0)])
    assert list(run.trials) == [places[0]]
    assert run.trials[places[0]].record.state == 'COMPLETED'
    assert [c[2] for c in run.cells] == ['plain', 'strong']
    assert summarise_experiment(run)['not_run'] == [
        {'picture': 'ana', 'driving': 'dance', 'variant': 'strong', 'seed': 1}]

def test_a_line_that_was_being_written_is_not_counted(tmp_path):
    keep(tmp_path, plan(), [trial(('ana', 'dance', v, 1)) for v in ('plain', 'strong')])
    whole = (tmp_path / 'trials.jsonl').read_text()
    for end in (whole, whole[:-1], whole[:-40]):
        (tmp_path / 'trials.jsonl').write_text(end)
        assert len(open_experiment(tmp_path).trials) == (2 if end == whole else 1)

def test_a_variant_with_its_own_seed_has_one_job_a_case(tmp_path):
    variants = {'plain': {}, 'other': {'seed': 9}}
    run = keep(tmp_path / 'x', plan(seeds=[1, 2]) | {'variants': variants}, [])
    assert [c[2:] for c in run.cells] == [('plain', 1), ('plain', 2), ('other', 9)]

@pytest.mark.parametrize('name, text, words', [
    ('trials.jsonl', '{"picture": "ana"}\n', 'trials.jsonl, line 1'),
    ('trials.jsonl', '{half\n', 'trials.jsonl, line 1'),
    ('experiment.json', '{"name": 3}', 'experiment.json'),
])
def test_a_folder_that_is_no_experiment_is_named(tmp_path, name, text, words):
    keep(tmp_path, plan(), [])
    (tmp_path / name).write_text(text)
    with pytest.raises(ExperimentError, match=words): open_experiment(tmp_path)

@pytest.mark.parametrize('trials', [
    [],
    [trial(('ana', 'dance', 'plain', 1), quality={'ghost': math.nan, 'seam': None, 'new one': 1.0})],
    [trial(('ana', 'dance', v, 1), error='no_person: nobody') for v in ('plain', 'strong')],
    [trial(('ana', 'dance', v, 1), quality={'ghost': 0.1}) for v in ('plain', 'strong')],
    [trial(('ana', 'dance', v, 1), note='no network') for v in ('plain', 'strong')],
], ids=['nothing', 'nan', 'all failed', 'one case', 'not measured'])
def test_a_summary_of_whatever_there_is_is_plain_json_and_can_be_drawn(tmp_path, trials):
    run = keep(tmp_path / 'x', plan(), trials)
    summary = summarise_experiment(run)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    found = differences_of({}, 'plain', {}) or []
    assert {d['verdict'] for d in summary['differences']} <= {'too few cases'}
    head, lines = means_table(summary)
    assert all(len(line) == len(head) for line in lines)
    assert len(time_table(summary)[1]) == 2
    chart = trade_off({v: {} for v in ('plain', 'strong')}, {})
    assert draw_differences(found, MEASURES, tmp_path / 'd.png').stat().st_size > 1000
    assert pareto_chart(chart, tmp_path / 'p.png').stat().st_size > 1000
    assert len(summary['failures']) + len(summary['not_run']) + sum(
        v['completed'] for v in summary['variants'].values()) == 2

BOOT = BootReport(job_number=2, process_s=1, taken_s=20, stages=[])

@pytest.mark.parametrize('gpu, boot, cost, said', [
    ('cpu', BOOT, None, 'no price: made on a CPU'),
    ('NVIDIA H200', BOOT, 0.00155 * 6, ''),
    ('NVIDIA H200', None, None, 'not known whether a worker was started'),
    ('My GPU', BOOT, None, 'none of the pools'),
])
def test_money_is_that_of_the_very_card(tmp_path, gpu, boot, cost, said):
    jobs = [trial(('ana', 'dance', 'plain', 1), record={'gpu': gpu, 'boot': boot, 'delay_s': 0.1})]
    money = summarise_experiment(keep(tmp_path / 'x', plan(), jobs))['variants']['plain']['money']
    assert [c['per_job'] for c in money['costs']] == ([] if cost is None else [pytest.approx(cost)])
    assert said in money['said']

# %% Sheets
CLIPS = {'long': 48, 'short': 12} # frames

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Videos with numbered frames, those of column c from 100 c on (the driver is column 0), and a picture"
    folder = tmp_path_factory.mktemp('clips')
    Image.fromarray(draw_test_picture(7, (120, 160))).save(folder / 'ana.png')
    for column, (name, frames) in product(range(7), CLIPS.items()):
        with Encoder(folder / f'{name}-{column}.mp4', (320, 180)) as encoder:
            for n in range(frames): encoder.write(draw_test_picture(100 * column + n, (320, 180)))
    return folder

def grid(clips, cases, columns, words=()):
    "Every cell is a video of its column, but those that hold a word: (row, column) -> word"
    def row(n):
        driving, *videos = [clips / f'{[*CLIPS][n % 2]}-{c}.mp4' for c in range(columns + 1)]
        cells = tuple(dict(words).get((n, c), video) for c, video in enumerate(videos))
        return GridRow(f'ana / clip {n}', clips / 'ana.png', driving, cells)
    return Grid(tuple(f'variant {c}' for c in range(columns)), tuple(map(row, range(cases))))

def number_at(image, place, size):
    left, top = place
    return read_test_picture(np.asarray(image)[top:top + size[1], left:left + size[0]])

@pytest.mark.parametrize('columns, cases', [(1, 1), (1, 3), (2, 3), (3, 1), (6, 2)])
def test_the_right_frame_is_in_the_right_cell(clips, tmp_path, columns, cases):
    failed = {(cases - 1, columns - 1): 'out_of_memory'}
    (page,) = contact_sheet(grid(clips, cases, columns, failed), tmp_path / 'sheet.png')
    layout = sheet_layout(columns + 1, cases)
    with Image.open(page) as image:
        assert image.size == layout.size(cases)
        for row in range(cases):
            wanted = [[8, 24, 40], [2, 6, 10]][row % 2]
            for column in range(columns + 1):
                if (row, column - 1) in failed: continue
                found = [number_at(image, layout.place(row, column, m), layout.tile) for m in range(3)]
                assert found == [100 * column + n for n in wanted]
        left, top = layout.place(cases - 1, columns, 0)
        word = np.asarray(image)[top:top + layout.cell[1], left:left + layout.cell[0]]
    ink = np.argwhere(word.max(2) > 150)
    assert len(ink), 'the word is there'
    assert (ink.min(0) > 3).all(), 'and not cut'
    assert (ink.max(0) < np.array(word.shape[:2]) - 3).all()

@pytest.mark.parametrize('columns, cases, moments, pages', [
    (2, 1, 3, 1), (3, 3, 3, 1), (3, 8, 3, 3), (7, 8, 3, 2), (3, 14, 1, 2), (3, 500, 1, 4), (13, 2, 3, 1),
])
def test_a_sheet_is_as_large_as_somebody_looks_at(columns, cases, moments, pages):
    layout = sheet_layout(columns, cases)
    assert layout.moments == moments
    assert min(-(-cases // layout.per_page), 4) == pages
    width, height = layout.size(layout.per_page)
    assert width <= 2450
    assert height <= 2450
    assert layout.tile[0] >= 160

def test_many_cases_go_to_pages_and_what_is_left_out_is_said(clips, tmp_path):
    pages = contact_sheet(grid(clips, 8, 2), tmp_path / 'sheet.png')
    assert [p.name for p in pages] == ['sheet.png', 'sheet-2.png', 'sheet-3.png']
    layout = sheet_layout(3, 8)
    with Image.open(pages[1]) as image: # its first row is case 3
        assert number_at(image, layout.place(0, 2, 1), layout.tile) == 200 + (24 if layout.per_page % 2 == 0 else 6)

@pytest.mark.parametrize('tiles', range(1, 16))
def test_tiles_fit_into_a_video_and_do_not_overlap(tiles):
    layout = video_layout(tiles)
    width, height = layout.size
    assert width <= 1920
    assert height <= 1080
    assert width % 2 == height % 2 == layout.tile[0] % 2 == layout.tile[1] % 2 == 0
    taken = np.zeros((height, width), int)
    for n in range(tiles):
        left, top = layout.place(n)
        taken[top:top + layout.tile[1], left:left + layout.tile[0]] += 1
    assert taken.max() == 1
    assert taken.sum() == tiles * layout.tile[0] * layout.tile[1]

def test_variants_play_in_step_and_no_longer_than_asked(clips, tmp_path):
    told = []
    def tell(done, total): told.append((done, total))
    made = side_by_side(grid(clips, 2, 2, {(0, 1): NOT_RUN}), tmp_path / 'v.mp4', 2.4, tell)
    layout = video_layout(4)
    figures = check_mp4(made, frames=28 + 12, size=layout.size, has_audio=False, source_type=COMPOSED)
    assert figures.fps == 24 # half of the time each, at most
    assert told == [(n, 40) for n in range(1, 41)]
    frames = list(read_frames(made))
    def numbers(tile): return [number_at(f, layout.place(tile), layout.tile) for f in frames]
    wanted = [*range(28), *range(12)]
    assert numbers(1) == wanted
    assert numbers(2) == [100 + n for n in wanted]
    assert numbers(3)[28:] == [200 + n for n in wanted[28:]]
    left, top = layout.place(3)
    still = np.stack([f[top:top + layout.tile[1], left:left + layout.tile[0]] for f in frames[:28]]).astype(int)
    assert np.abs(still - still[0]).max() < 12, 'a word stands still'

def test_a_cell_without_a_video_has_a_word(tmp_path):
    places = [('ana', 'dance', v, s) for v in ('plain', 'strong') for s in (1, 2)]
    kept = {places[1]: 'v.mp4', places[2]: 'gone.mp4'}
    trials = [trial(places[0], error='no_person: nobody'), *(trial(p, video=v) for p, v in kept.items())]
    run = keep(tmp_path, plan(seeds=[1, 2], variants=('plain', 'strong', 'third')), trials)
    (tmp_path / 'v.mp4').write_bytes(b'x')
    (row,) = grid_of(run).rows
    assert row.cells == (tmp_path / 'v.mp4', 'no video', NOT_RUN)
    assert grid_of(keep(tmp_path, plan(variants=('plain',)), trials[:1])).rows[0].cells == ('no_person',)

# %% The report
@pytest.fixture(scope='module')
def experiment(samples, tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp('experiment') / 'fixture', samples)

@pytest.fixture(scope='module')
def shown(experiment):
    return report(experiment.folder.parent, 'experiment', '-p', 'folder=fixture')

def test_the_report_shows_everything_and_fails_at_its_end(experiment, shown):
    assert shown.returncode == 1, shown.stderr
    assert 'ana / dance, 4 steps, seed 1: failed: out_of_memory: 3 GB were missing' in shown.stderr
    assert 'Traceback' not in shown.stderr
    assert pictures(experiment.folder) == {'sheet', 'differences', 'pareto'}
    summary = json.loads((experiment.folder / 'summary.json').read_text())
    assert summary['report'] == 'experiment'
    assert summary['circular'] == circular_of(experiment.trials.values())
    with av.open(str(experiment.folder / 'side_by_side.mp4')) as video: assert video.streams.video[0].frames == 48
    page = (experiment.folder / 'experiment.html').read_text()
    assert 'data:video/mp4;base64' in page
    assert page.count('data:image/png;base64') >= 3
    for words in ('out_of_memory', 'relight 0.5, against relight 1.0', 'p after Holm', 'Circular:', 'cannot see',
                  'no price: made on a CPU'): assert words in page

def test_one_variant_has_a_report_and_nothing_to_compare(clips, tmp_path):
    inputs = tmp_path / 'one/inputs'
    inputs.mkdir(parents=True)
    for source, name in (('short-0.mp4', 'dance.mp4'), ('ana.png', 'ana.png')):
        (inputs / name).write_bytes((clips / source).read_bytes())
    keep(tmp_path / 'one', plan(variants=('plain',)),
         [trial(('ana', 'dance', 'plain', 1), note='no network', video='inputs/dance.mp4')])
    done = report(tmp_path, 'experiment', '-p', 'folder=one', '-p', 'out=shown')
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'shown/experiment.html').read_text()
    assert 'There is nothing to compare' in page
    assert 'no network' in page
    assert 'summary.json' not in {p.name for p in (tmp_path / 'one').iterdir()}

def test_the_notebook_reads_well_un_run():
    notebook = nbformat.read(report_path('experiment'), 4)
    assert list(report_parameters(report_path('experiment'))) == ['folder', 'out', 'quality', 'seconds']
    assert all(not c.get('outputs') for c in notebook.cells)
    assert sum(c.cell_type == 'markdown' for c in notebook.cells) >= 5

def test_a_report_without_an_experiment_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ['report', 'experiment', '-p', 'folder=nowhere'])
    assert done.exit_code == 2
    assert 'there is no experiment' in done.output
    assert list(tmp_path.iterdir()) == []

def test_two_experiments_side_by_side(tmp_path):
    def made(name, shift, variants):
        names = ['a', 'b', 'c', 'd']
        places = [('ana', d, v, 1) for d in names for v in variants]
        trials = [trial(p, quality={'ghost': 0.3 + 0.05 * n + shift * (1 + 0.01 * n)}) for p in places
                  for n in [names.index(p[1])]]
        return keep(tmp_path / name, plan(name, names, variants), trials)
    before, after = made('monday', 0.1, ('plain', 'strong')), made('tuesday', 0.0, ('plain', 'third'))
    found = compare_experiments(summarise_experiment(before), summarise_experiment(after))
    assert {(d.variant, d.measure): d.verdict for d in found} == {
        ('plain', 'ghost'): 'better', ('plain', 'render_s'): 'within the noise',
        ('plain', 'execution_s'): 'within the noise'}
    assert what_stands_out(found)[0].startswith('plain, against monday: better in ghost')
    (tmp_path / 'tuesday/summary.json').write_text(json.dumps(summarise_experiment(after)))
    out = tmp_path / 'compared'
    done = CliRunner().invoke(app, ['report', 'compare', str(before.folder), str(tmp_path / 'tuesday/summary.json'),
                                    '--out', str(out), '--json'])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)['not_compared'] == ['strong', 'third']
    kept = json.loads(done.stdout)['differences'][0]
    assert (kept['variant'], kept['measure'], round(kept['value'], 4), kept['n']) == ('plain', 'ghost', -0.1015, 4)
    assert pictures(out) == {'compare'}
    assert verdicts_table(found)[1][0][-1] == 'better'

@pytest.mark.parametrize('other', ['nowhere', 'runs'])
def test_an_experiment_is_not_compared_with_something_else(tmp_path, other):
    keep(tmp_path / 'x', plan(), [])
    done = CliRunner().invoke(app, ['report', 'compare', str(tmp_path / 'x'), str(ROOT / other)])
    assert done.exit_code == 2
