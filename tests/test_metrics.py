"Figures people decide by: what is cold, what a start waited for, percentiles that admit how little they know, money"
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from wan_avatar.charts import draw_costs, draw_distribution, draw_download, draw_gantt, draw_jobs, draw_percentiles, draw_cold_starts
from wan_avatar.metrics import (PRICES, FullSize, JobRecord, PricesError, RecordsError, billed_s, billing_figures, by_kind, cold_parts, cold_share, compare_runs, costs, difference,
                                download_speed, full_size_start, full_weights, load_prices, percentiles, price_of, read_records, start_of, summarise, waited_for, what_is_saved,
                                write_records)

def stage(name, begin_s, end_s, **facts) -> dict: return {'name': name, 'begin_s': begin_s, 'end_s': end_s, 'facts': facts}

def record(job_id='j1', number=1, taken_s=5.0, delay_s=6.0, **more) -> JobRecord:
    boot = {'job_number': number, 'process_s': 0.5, 'taken_s': taken_s, 'stages': more.pop('boot_stages', [stage('comfy', 0.1, 4.8), stage('sdk', 0.1, 2.0)])}
    return JobRecord(**{'job_id': job_id, 'group': 'B', 'at': '2026-01-01T00:00:00+00:00', 'submitted_s': 0, 'done_s': 9, 'state': 'COMPLETED', 'delay_s': delay_s, 'execution_s': 3.0,
                        'duration_s': 2.0, 'boot': boot, 'stages': [stage('download', 0, 0.5), stage('render', 0.5, 2.0)], **more})

@pytest.mark.parametrize('number, taken_s, delay_s, start', [
    (1, 5.0, 6.0, 'cold'), (1, 900.0, 0.1, 'cold'), # waited long or not: the worker was started for it
    (2, 8.0, 8.5, 'shared'), (2, 8.0, 3.1, 'warm'), # submitted before, or after, the worker was ready at 4.8
    (2, 8.0, 3.3, 'shared'), (7, 4000.0, 600.0, 'warm')]) # a long queue is not a cold start
def test_cold_is_what_the_worker_says(number, taken_s, delay_s, start):
    assert start_of(record(number=number, taken_s=taken_s, delay_s=delay_s)) == start

def test_a_job_without_a_report_is_not_guessed():
    silent = record(boot=None, delay_s=500.0)
    assert start_of(silent) == 'unknown' and cold_share([silent, record()]) == (1, 1, 1.0)
    made = summarise([silent])
    assert made['cold_share'] is None and made['cold_start_parts_s'] == {}

@pytest.mark.parametrize('stages, begin, end, wanted', [
    ([], 0, 2, {None: 2}), ([stage('a', 0, 5)], 0, 6, {0: 5, None: 1}), ([stage('a', 0, 5), stage('b', 1, 3)], 0, 5, {0: 5}),
    ([stage('a', 0, 2), stage('b', 1, 5)], 0, 5, {0: 1, 1: 4}), ([stage('a', 0, 2), stage('b', 3, 4)], 0, 4, {0: 2, None: 1, 1: 1}),
    ([stage('a', 0, 3), stage('b', 0, 3)], 0, 3, {0: 3}), ([stage('a', 0, 4), stage('a/b', 1, 3)], 0, 4, {0: 2, 1: 2}), ([stage('a', 0, 9)], 1, 3, {0: 2}), ([stage('a', 1, 1)], 0, 2, {None: 2})])
def test_each_moment_waits_for_one_stage(stages, begin, end, wanted):
    assert dict(waited_for(stages, begin, end)) == wanted

def test_parts_add_up_to_the_wait_for_the_first_segment():
    files = [stage('weights', 0.1, 8.4, files=3), stage('weights/a', 0.1, 7.0, file='loras/a.safetensors', fetched=70), stage('weights/b', 0.1, 8.0, file='vae/b.safetensors', fetched=80),
             stage('weights/c', 8.0, 8.4, file='vae/c.safetensors', fetched=0), stage('warm-up', 8.4, 9.0)]
    cold = record(taken_s=9.2, delay_s=10.0, boot_stages=[stage('comfy', 0.1, 4.8), *files])
    parts = cold_parts(cold)
    assert sum(p.seconds for p in parts) == pytest.approx(10.0 + 2.0, abs=0.002)
    assert [p.name for p in parts if p.kind == 'weights'] == ['b.safetensors'], 'the start waited for the file that came last'
    assert by_kind(parts) == pytest.approx({'queue': 0.3, 'process': 0.5, 'weights': 7.9, 'verify': 0.4, 'warm-up': 0.6, 'other boot': 0.1, 'hand-over': 0.2, 'inputs': 0.5, 'first segment': 1.5})
    assert 'weights' not in by_kind(cold_parts(record())), 'a part that did not occur is not invented'

@pytest.mark.parametrize('facts, kind', [
    ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'hub', 'fetched': 100}, 'weights'), ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'hub', 'fetched': 40}, 'weights'),
    ({'file': 'vae/b.safetensors', 'bytes': 100, 'from': 'cache', 'fetched': 0}, 'verify'), ({'files': 0, 'bytes': 0, 'fetched': 0}, 'other boot')])
def test_only_what_travelled_is_a_download(facts, kind):
    boot_stages = [stage('weights/vae', 0, 2, **facts)]
    assert bool(download_speed(boot_stages)) == (kind == 'weights') and kind in by_kind(cold_parts(record(boot_stages=boot_stages)))

def test_percentiles_are_numpys_and_the_same_every_time():
    values = np.random.default_rng(5).lognormal(1, 0.4, 40)
    found = percentiles(values)
    assert [p.value for p in found] == pytest.approx(list(np.percentile(values, (50, 90, 95, 99)))) and found == percentiles(values)
    assert all(p.low <= p.value <= p.high and p.n == 40 for p in found) and [p.enough for p in found] == [True, True, True, False]

@pytest.mark.parametrize('n, enough', [(1, []), (2, [50]), (9, [50]), (10, [50, 90]), (20, [50, 90, 95]), (99, [50, 90, 95]), (100, [50, 90, 95, 99])])
def test_few_jobs_carry_few_percentiles(n, enough):
    assert [p.q for p in percentiles(range(n)) if p.enough] == enough

def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = sum(p.low <= 10 <= p.high for p in (percentiles(rng.normal(10, 2, 30), (50,), draws=400)[0] for _ in range(200)))
    assert 178 <= hits <= 200

@pytest.mark.parametrize('line, words', [('{"job_id": "j"}', 'group: Field required'), ('{', 'line 2'), ('[]', 'line 2'), ('{"job_id": "j", "weather": 1}', 'line 2')])
def test_half_a_records_file_is_refused(tmp_path, line, words):
    path = write_records(tmp_path / 'r.jsonl', [record()])
    assert read_records(path) == [record()]
    path.write_text(path.read_text() + line + '\n')
    with pytest.raises(RecordsError, match='line 2') as e: read_records(path)
    assert words in str(e.value)

@pytest.mark.parametrize('text', ['', '{"pool": 1}', '[]', '[{"pool": "X", "gpus": [], "usd_per_s": 0}]', '[{"pool": "X", "usd_per_s": 1}]', '[{"pool": "X", "gpus": [], "usd_per_s": "dear"}]'])
def test_price_files_that_are_none(tmp_path, text):
    (tmp_path / 'p.json').write_text(text)
    with pytest.raises(PricesError, match='prices'): load_prices(str(tmp_path / 'p.json'))

def test_what_is_billed(tmp_path):
    (tmp_path / 'p.json').write_text(json.dumps([{'pool': 'X', 'gpus': ['NVIDIA X'], 'usd_per_s': 0.01}]))
    prices = load_prices(str(tmp_path / 'p.json'))
    assert billed_s(record()) == 0.5 + 5.0 + 5 + 3.0 and billed_s(record(number=3, taken_s=50.0, delay_s=0.0)) == 3.0
    cold, warm = costs([record(), record(number=2, taken_s=50.0, delay_s=0.0), record(state='FAILED')], prices)
    assert (cold.start, cold.n, cold.per_job) == ('cold', 1, pytest.approx(0.135)) and (warm.start, warm.per_job, warm.per_video_s) == ('warm', pytest.approx(0.03), pytest.approx(0.015))
    assert price_of('NVIDIA X', prices).pool == 'X' and price_of('NVIDIA X') is None and len({g for p in PRICES for g in p.gpus}) == sum(len(p.gpus) for p in PRICES)

def test_the_model_of_a_full_size_start():
    def total(cached=False, **speeds): return sum(p.seconds for p in full_size_start(FullSize(**speeds), cached))
    size = sum(size for _, size in full_weights()) / 1e6
    assert 25_000 < size < 35_000
    assert total(link=100) - total(link=200) == pytest.approx(size / 200, rel=0.01), 'the link decides'
    assert total(link=5000, disk_write=300) == pytest.approx(total(link=300), rel=0.001), 'unless the disk is slower'
    assert total(cached=True) == total(cached=True, link=1), 'what RunPod cached does not use the link'
    assert sum(p.seconds for p in full_size_start(FullSize(), False, ())) == 1.0 + 10.0, 'without weights ComfyUI is what is left'

@pytest.mark.parametrize('a, b, verdict', [
    ([2.0, 2.1, 2.2, 2.1, 2.0], [3.0, 3.1, 3.0, 3.2, 3.1], 'slower'), ([3.0, 3.1, 3.0, 3.2, 3.1], [2.0, 2.1, 2.2, 2.1, 2.0], 'faster'),
    ([2.0, 3.0, 2.5, 2.2, 2.9], [2.1, 2.9, 2.6, 2.3, 3.0], 'within the noise'), ([2.0] * 4, [9.0] * 50, 'too few jobs to tell (4 and 50; 5 each are needed)')])
def test_a_difference_counts_when_it_exceeds_the_noise(a, b, verdict): assert difference('x', a, b).verdict == verdict

def test_runs_are_compared_by_what_both_have():
    b, a = [record(f'j{n}', done_s=9 + n / 100) for n in range(6)], [record(f'k{n}', group='A') for n in range(6)]
    assert compare_runs(b, a) == [] and {d.what for d in compare_runs(b, b + a)} >= {'B, cold: total', 'B, cold: start: ComfyUI', 'B, cold: job: render'}
    assert all(d.ratio == 1 for d in compare_runs(b, b + a)) and compare_runs([record(state='FAILED')], b) == []

@pytest.mark.parametrize('parts, fetched, words', [
    ({'B': {'weights': 8.0, 'ComfyUI': 2.0}, 'A': {'ComfyUI': 5.0}}, 9e6, 'saves 5.0 s of 10.0 s (50 %): waiting for 9 MB of weights falls from 8.0 s to 0.0 s'),
    ({'B': {'weights': 8.0, 'ComfyUI': 2.0}, 'A': {'ComfyUI': 12.0}}, 9e6, 'loses 2.0 s of 10.0 s'), ({'B': {'weights': 0.1, 'ComfyUI': 5.0}, 'A': {'ComfyUI': 4.0}}, 9e6, 'nobody waited for them'),
    ({'B': {'ComfyUI': 5.0}, 'A': {'ComfyUI': 4.0}}, 0, 'says nothing about cached models'), ({'B': {'weights': 8.0}}, 9e6, 'Only one phase'), ({'B': {'weights': 8.0}, 'A': {}}, 9e6, 'Only one phase')])
def test_what_is_said_about_phase_a(parts, fetched, words): assert words in what_is_saved(parts, fetched)

def test_runpods_bill():
    asked = []
    class Billing(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers['Authorization'], self.headers['User-Agent']))
            self.send_response(200 if self.headers['Authorization'] == 'Bearer right' else 401)
            self.end_headers()
            self.wfile.write(json.dumps({'records': [{'startTime': '2026-10-07T15:00:00Z', 'totalAmount': 0.25, 'serverlessId': 'ep1'}], 'metadata': {}}).encode())
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Billing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{server.server_port}'
    try:
        (found,) = billing_figures('ep1', 'right', hours=3, base=base)
        with pytest.raises(RecordsError, match='HTTP 401'): billing_figures('ep1', 'wrong', base=base)
    finally: server.shutdown(); server.server_close()
    assert (found.value, found.unit, found.source) == (0.25, 'USD', '/v2/billing/serverless')
    assert asked[0] == ('/v2/billing/serverless?serverlessId=ep1&bucketSize=hour&lastN=3', 'Bearer right', 'wan-avatar')

@pytest.mark.parametrize('records', [[], [record()], [record(boot=None, delay_s=None, execution_s=None, stages=[])], [record(state='FAILED', boot=None, stages=[])],
                                     [record(boot_stages=[]), record('j2', number=2, stages=[])]])
def test_charts_take_whatever_there_is(tmp_path, records):
    for draw in (draw_jobs, draw_cold_starts, draw_percentiles, draw_distribution, draw_download): assert draw(records, tmp_path / 'c.png').stat().st_size > 3000
    draw_costs(costs(records), [], tmp_path / 'c.png')
    for r in records: draw_gantt(r, tmp_path / 'c.png')
