"Pictures of figures: whatever the data, nothing is cut or covered, and each says what it shows and where it was made"
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from test_experiment_report import MEASURES
from test_gpu_charts import RUNS, run, whole
from test_metrics import H100, WARM, record, stage

from wan_avatar.canvas import LOOKS, Canvas, broken, shortened
from wan_avatar.cards import PRODUCTION
from wan_avatar.charts import (
    draw_cold_starts,
    draw_compare,
    draw_costs,
    draw_distribution,
    draw_download,
    draw_full_size,
    draw_gantt,
    draw_jobs,
    draw_months,
    draw_percentiles,
    lane,
)
from wan_avatar.comparison import Point, TradeOff, corrected, paired_difference
from wan_avatar.experiment_charts import draw_differences, pareto_chart
from wan_avatar.gpu_charts import PARTS, draw_memory, draw_window
from wan_avatar.metrics import (
    RunFacts,
    cold_parts,
    compare_runs,
    conditions,
    conditions_of,
    costs,
    estimates,
    what_differs,
    without_price,
)

FACTS = RunFacts('lesson', '0123abc', 0.5)
LONG = 'Wide-names-of-everything_' * 4

def job(n=1, group='B', cold=True, slow=1.0, **more):
    "Made up: a job of the tiny profile on a CPU"
    fetched = [stage('weights/dit', 0.1, 4 * slow, file='dit/tiny.safetensors', fetched=10**7)] if group == 'B' else []
    booted = [stage('comfy', 0.1, 4.8 * slow), stage('warm-up', 4.8 * slow, 4.9 * slow), *fetched]
    usual = {'job_id': f'j{n}', 'group': group, 'gpu': 'cpu', 'profile': 'wan22-animate-tiny', 'submitted_s': 10 * n,
             'done_s': 10 * n + (9 * slow if cold else 4), 'boot_stages': booted}
    start = {'taken_s': 5.0 * slow, 'delay_s': 6.0 * slow} if cold else WARM
    return record(**usual | start | more)

def longer_names():
    files = [stage('weights/dit', 0.1, 4, file=f'dit/{LONG}.safetensors', fetched=10**7)]
    return [job(n, LONG, n == 1, gpu=LONG, profile=LONG, boot_stages=files, stages=[stage(LONG, 0, 1)]) for n in (1, 2)]

nothing = [stage('download', 0, 0), stage('render', 0, 0)]
JOBS = {
    'none': [],
    'one': [job()],
    'two': [job(1), job(2, cold=False)],
    'one failed': [job(1, state='FAILED', boot=None, stages=[], done_s=11)],
    'long names': longer_names(),
    'phases of no length': [job(n, boot_stages=[stage('comfy', 0, 0)], taken_s=0.0, delay_s=0.0, stages=nothing,
                                done_s=10 * n, execution_s=0.0) for n in (1, 2)],
    '40 minutes': [job(n, 'BA'[n % 2], slow=480) for n in range(4)],
    'many groups': [job(n, f'group {n % 7}', n < 7) for n in range(21)],
    '200': [job(n, 'BA'[n % 2], n % 20 < 2, state='FAILED' if n % 9 == 4 else 'COMPLETED') for n in range(200)],
}
OF_RECORDS = {'jobs': draw_jobs, 'cold starts': draw_cold_starts, 'percentiles': draw_percentiles,
              'distribution': draw_distribution, 'download': draw_download,
              'gantt': lambda jobs, path, facts: draw_gantt(jobs[0], path, facts=facts) if jobs else None}

@pytest.fixture
def drawn(monkeypatch, tmp_path):
    "Draws without writing a picture; gives its figure"
    kept = []
    def save(self, path):
        self.figure.draw_without_rendering()
        kept.append(self)
        return path
    monkeypatch.setattr(Canvas, 'save', save)
    def draw(chart, *args, **more):
        chart(*args, tmp_path / 'c.png', **more)
        return kept.pop()
    return draw

def ticks_of(figure):
    "Tick labels that stand outside their axis, which are not drawn"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = (high - low) * 1e-6
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                out = not axes.axison or not low - room <= tick.get_loc() <= high + room
                yield from ((label, out) for label in (tick.label1, tick.label2))
            if not axes.axison: yield axis.label, True

def words_of(canvas):
    "Every word that is drawn, with its place in dots"
    hidden = {text for text, out in ticks_of(canvas.figure) if out}
    texts = [t for t in canvas.figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    return [(t.get_text(), t.get_window_extent(canvas.renderer)) for t in texts]

def misplaced(canvas):
    "Words that are cut, or cover each other"
    whole = canvas.figure.bbox
    found = words_of(canvas)
    cut = [text for text, box in found if box.x0 < -1 or box.y0 < -1 or box.x1 > whole.x1 + 1 or box.y1 > whole.y1 + 1]
    def covers(a, b): return min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5
    return cut, [(one, other) for (one, a), (other, b) in combinations(found, 2) if covers(a, b)]

def said(canvas) -> str: return ' '.join(' '.join(text.split()) for text, _ in words_of(canvas))

def fills(artists):
    return {tuple(np.round(np.ravel(a.get_facecolor())[:3], 3)) for a in artists}

def legend_is_complete(canvas):
    "Its colours and marks are those that are drawn, no more and no fewer"
    legend = canvas.figure.legends[0].legend_handles if canvas.figure.legends else []
    drawn = [c for a in canvas.figure.axes for c in (*a.collections, *a.patches)]
    shown = [c for c in drawn if len(np.ravel(c.get_facecolor())) >= 3]
    patches = [h for h in legend if hasattr(h, 'get_hatch')]
    marks = {line.get_marker() for a in canvas.figure.axes for line in a.lines} - {'None', None, ''}
    named = {h.get_marker() for h in legend if hasattr(h, 'get_marker')} - {'None', None, ''}
    assert fills(shown) == fills(patches)
    assert marks == named

def fine(canvas):
    assert misplaced(canvas) == ([], [])
    legend_is_complete(canvas)
    width, height = canvas.figure.get_size_inches()
    assert width < 10 and height < 20

@pytest.mark.parametrize('jobs', JOBS.values(), ids=JOBS)
def test_pictures_of_jobs_whatever_they_are(drawn, jobs):
    for name, chart in OF_RECORDS.items():
        if name == 'gantt' and not jobs: continue
        canvas = drawn(chart, jobs, facts=FACTS) if name != 'gantt' else drawn(draw_gantt, jobs[0], facts=FACTS)
        fine(canvas)
        for words in ('lesson', 'commit 0123abc', 'throttled to 0.5 MB/s'): assert words in said(canvas), name
        if jobs and jobs[0].gpu == 'cpu' and jobs[0].state == 'COMPLETED':
            assert 'made on a CPU' in said(canvas) and 'tiny weights' in said(canvas), name

def on(card): return [job(1, gpu=card), job(2, cold=False, gpu=card)]

@pytest.mark.parametrize('card', ['cpu', H100, LONG])
@pytest.mark.parametrize('chart', [draw_costs, draw_months])
def test_money_is_of_gpus_alone(drawn, chart, card):
    jobs = on(card)
    found = costs(jobs)
    canvas = drawn(lambda path: chart(found, estimates(10, found, runs={}), 10, without_price(jobs), path,
                                      where=conditions(jobs, FACTS)))
    fine(canvas)
    assert ('no price: made on' in said(canvas)) == (card != H100)
    assert ('no bar is of this run' in said(canvas)) == (card != H100)
    assert 'Flex prices' in said(canvas)

def test_the_model_says_that_it_is_one(drawn):
    canvas = drawn(draw_full_size)
    fine(canvas)
    assert 'MODEL, not measured' in said(canvas) and 'assumed' in said(canvas)

MARKS = [(1, ''), (2, ''), (3, 'p50'), (9, 'p50'), (10, 'p50 p90'), (20, 'p50 p90 p95'), (100, 'p50 p90 p95 p99')]
@pytest.mark.parametrize('n, wanted', MARKS)
def test_a_percentile_is_drawn_only_for_enough_jobs(drawn, n, wanted):
    canvas = drawn(draw_percentiles, [job(n, cold=False) for n in range(n)])
    labels = [t.get_text() for t in canvas.figure.legends[0].get_texts()]
    assert [x for x in labels if x[0] == 'p'] == wanted.split()
    assert len(canvas.axes[1].lines[0].get_xdata()) == n, 'every job is drawn'

PAIRS = {'a job a side': (1, 1.0), 'few': (4, 1.5), 'faster': (8, 0.4), 'slower': (8, 3.0), 'the same': (8, 1.0),
         'out of all bounds': (8, 4000.0)}
@pytest.mark.parametrize('n, times', PAIRS.values(), ids=PAIRS)
def test_a_comparison_is_labelled_where_its_points_lie(drawn, n, times):
    a = [job(i, cold=i % 2, execution_s=3.0 + i / 50) for i in range(2 * n)]
    b = [r.model_copy(update={'execution_s': r.execution_s * times}) for r in a]
    found = compare_runs(a, b)
    canvas = drawn(lambda path: draw_compare(found, (LONG, 'after'), path, 'first: made up\nsecond: made up'))
    fine(canvas)
    whole = [d for d in found if d.what.endswith(': execution')]
    for d in whole:
        interval = '' if d.n_a < 5 else f' ({d.low:.2f} to {d.high:.2f})'
        assert f'x {d.ratio:.2f}{interval}: ' in said(canvas)
    wanted = 'too few' if n < 5 else {0.4: 'faster', 1.0: 'within the noise'}.get(times, 'slower')
    assert f': {wanted}' in said(canvas)
    assert 'after is faster in' in said(canvas)

def test_what_differs_between_two_runs_is_named():
    tiny, real = conditions_of([job()], FACTS), conditions_of(on(H100), RunFacts('other', '0123abc'))
    assert what_differs(tiny, tiny) == ''
    assert what_differs(tiny, real) == (f'made on a CPU → made on {H100}; '
                                        'weights over a link throttled to 0.5 MB/s → network not said')

@pytest.mark.parametrize('given', [*RUNS.values(), run(whole(PRODUCTION, load_s=9), whole(LONG), card=LONG)],
                         ids=[*RUNS, 'long names'])
def test_pictures_of_a_card(drawn, given):
    for chart in (draw_window, draw_memory):
        canvas = drawn(chart, given)
        fine(canvas)
        assert 'weights of random numbers' in said(canvas)
        assert given.commit in said(canvas)

def differing(variants, names, cases):
    def sides(shift): return {c: [0.5 + shift * (c + 1)] for c in range(cases)}
    return [d for v in variants for d in corrected([
        paired_difference((m, v, LONG), sides(0), sides((-1) ** n * 0.01 * (n + 1)), MEASURES[m].better)
        for n, m in enumerate(names)])]

EXPERIMENTS = {'one of each': (['plain'], list(MEASURES)[:1], 1), 'all': (['a', 'b', LONG], list(MEASURES), 4),
               'two': (['a', LONG], list(MEASURES)[:2], 2)}
@pytest.mark.parametrize('variants, names, cases', EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_pictures_of_an_experiment(drawn, variants, names, cases):
    found = differing(variants, names, cases)
    where = f'profile draft · made on a CPU · {LONG}'
    fine(drawn(lambda path: draw_differences(found, MEASURES, path, {names[0]: variants}, where)))
    points = tuple(Point(v, 10.0 + n, 0.5 + n / 10, 0.4, 0.7) for n, v in enumerate(variants))
    trade = TradeOff(points, 'render_s', 'ghost', 'lower', 1, cases, (LONG,))
    fine(drawn(lambda path: pareto_chart(trade, path, where)))

def test_an_experiment_without_numbers_says_so(drawn):
    for canvas in (drawn(lambda path: draw_differences([], MEASURES, path)),
                   drawn(lambda path: pareto_chart(TradeOff((), 'render_s', '', 'higher', 0, 0, ()), path))):
        assert misplaced(canvas) == ([], [])

# colours as people see them who lack the red, green or blue receptors: Machado, Oliveira and Fernandes, 2009
EYES = {
    'all three': np.eye(3),
    'no red': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    'no green': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    'no blue': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}

def seen(colour: str, eye) -> np.ndarray: # CIE L*a*b*
    rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(np.asarray(eye) @ np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ linear / (0.9505, 1.0, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

@pytest.mark.parametrize('looks', [LOOKS, PARTS], ids=['kinds of time', 'parts of a window'])
@pytest.mark.parametrize('eye', EYES.values(), ids=EYES)
def test_everybody_can_tell_the_colours_apart(looks, eye):
    "By colour, six times what can just be noticed, or by a texture"
    for (one, a), (other, b) in combinations(looks.items(), 2):
        if {one, other} == {'first segment', 'render'}: continue # of different pictures
        far = float(np.linalg.norm(seen(a.colour, eye) - seen(b.colour, eye)))
        assert far > 15 or a.hatch != b.hatch, (one, other, far)

def test_greys_have_textures_of_their_own():
    greys = {k: look for k, look in LOOKS.items() if len({look.colour[i:i + 2] for i in (1, 3, 5)}) == 1}
    assert len(greys) == 4
    assert len({look.hatch for look in greys.values()}) == 4

def test_a_lane_has_no_gaps_and_no_overlaps():
    for r in (job(), job(2, 'A'), job(3, cold=False), job(4, number=2, taken_s=8.0, delay_s=8.5)):
        found = lane(r)
        assert found[0][1] == 0.0
        assert all(a[2] == pytest.approx(b[1]) for a, b in zip(found, found[1:], strict=False))
        assert found[-1][2] == pytest.approx(r.delay_s + max(s.ended_s for s in r.stages))
    kinds = {k: b - a for k, a, b in lane(job())}
    parts = {p.kind: p.seconds for p in cold_parts(job())}
    assert {k: round(v, 3) for k, v in kinds.items() if k in ('queue', 'process', 'ComfyUI')} == {
        k: parts[k] for k in ('queue', 'process', 'ComfyUI')}

@pytest.mark.parametrize('text, width, wanted', [
    ('short', 9, 'short'),
    ('two words', 5, 'two\nwords'),
    ('letters', 3, 'let\nter\ns'),
    ('a b · c d · e', 7, 'a b\nc d · e'),
    ('x\ny', 9, 'x\ny'),
    ('', 9, ''),
])
def test_lines_break_where_they_must(text, width, wanted): assert broken(text, width, len) == wanted

def test_a_long_name_keeps_its_ends():
    assert shortened('a name') == 'a name'
    assert shortened(LONG, 10) == 'Wide-n…ng_' or len(shortened(LONG, 10)) == 10
