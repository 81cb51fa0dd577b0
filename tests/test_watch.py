"""`wan-avatar watch --once`, as cron runs it: real bucket, real webhook, a stand-in of RunPod over HTTP"""
import json
import shutil
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from control_plane import KEY, control_plane
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.config import load_settings
from wan_avatar.endpoint_file import DayLimits
from wan_avatar.manifest import BootReport, Manifest
from wan_avatar.retry import RetryPolicy
from wan_avatar.store import Store
from wan_avatar.timeline import Stage
from wan_avatar.watch import Day, WatchState, alerts_of, alone, count_failed, list_videos, load_state, state_of_day

IMAGE = 'dexsynccom/twin-avatar:wan-worker-20261124-8f3a1c2b4d5e'

# %% counting and limits
LIMITS = DayLimits(daily_usd=20, failed_share=0.2, least_jobs=5, cold_starts=40)
FINE = Day('2026-11-27', usd=0, videos=0, without_price=0, failed=0, cold_starts=0)
PASSED = [ # figures of the day; kinds of alerts
    ({}, []),
    ({'usd': 20.0, 'videos': 8, 'failed': 2, 'cold_starts': 40}, []), # at a limit is not beyond it
    ({'usd': 20.01}, ['cost']),
    ({'videos': 7, 'failed': 2}, ['failed']),
    ({'videos': 0, 'failed': 5}, ['failed']),
    ({'videos': 0, 'failed': 4}, []), # too few to say anything
    ({'cold_starts': 41}, ['cold starts']),
    ({'whole': False}, ['listing']),
    ({'usd': 21.0, 'failed': 9, 'cold_starts': 50}, ['cost', 'failed', 'cold starts']),
]

@pytest.mark.parametrize('figures, kinds', PASSED)
def test_what_passes_a_limit(figures, kinds):
    day = replace(FINE, **figures)
    assert [a.kind for a in alerts_of(day, LIMITS)] == kinds
    assert [a.kind for a in alerts_of(day, DayLimits())] == [k for k in kinds if k == 'listing'], 'no limit, no alert'

COUNTS = [ # (day, endpoint, RunPod's count) of each look; failed jobs of the last look's day
    ([('1', 'a', 7)], 0), # what was before the first look is of no known day
    ([('1', 'a', 7), ('1', 'a', 7)], 0),
    ([('1', 'a', 7), ('1', 'a', 9), ('1', 'a', 12)], 5),
    ([('1', 'a', 7), ('1', 'a', 2)], 2), # RunPod counts anew
    ([('1', 'a', 7), ('1', 'a', 9), ('2', 'a', 10)], 1),
    ([('1', 'a', 7), ('1', 'b', 8)], 8), # another endpoint
    ([('1', 'a', 7), ('1', 'b', 3), ('1', 'b', 4)], 4),
]

@pytest.mark.parametrize('looks, failed', COUNTS)
def test_failed_jobs_are_counted_once(looks, failed):
    state = WatchState()
    for day, endpoint_id, count in looks:
        state = state_of_day(state, day)
        count_failed(state, endpoint_id, count)
    assert state.failed == failed

# %% the command
class Hook(BaseHTTPRequestHandler):
    "A webhook: 200, or what is asked of it"
    def do_POST(self) -> None:
        self.server.heard.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
        self.send_response(self.server.answer)
        self.send_header('Content-Length', '0')
        self.end_headers()
    def log_message(self, *args: object) -> None: pass

@pytest.fixture
def hook():
    with ThreadingHTTPServer(('127.0.0.1', 0), Hook) as server:
        server.heard, server.answer = [], 200
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()

class Site:
    "An endpoint, its bucket, and a folder from which cron works; a moment of its own"
    def __init__(self, plane, bucket, folder, hook, prefix):
        self.plane, self.hook, self.folder, self.prefix = plane, hook, folder, prefix
        self.store = Store(load_settings(bucket.environment()))
        self.address = f'http://127.0.0.1:{hook.server_port}/services/T0SECRET'
        self.environ = bucket.environment() | {
            'RUNPOD_API_KEY': KEY, 'RUNPOD_API_BASE_URL': plane.url, 'RUNPOD_ENDPOINT_BASE_URL': f'{plane.url}/jobs',
            'COLUMNS': '160', 'ALERT_WEBHOOK': self.address}
        text = (ROOT / 'endpoint.toml').read_text()
        (folder / 'endpoint.toml').write_text(text.replace('"avatars/"', f'"{prefix}"'))
        self.state = folder / 'runs/watch/wan-avatar.json'
        self.now = datetime(2026, 11, 24, 12, tzinfo=UTC) # when the test begins, whatever the clock says
        self.ahead = self.now - datetime.now(UTC)

    def make(self, name: str, gpu: str = 'NVIDIA L40S', job_number: int = 2) -> None:
        "A video of 1000 s at work, on a worker that took 200 s to start: 0.53 USD, 0.64 with the start"
        key = f'{self.prefix}{name}.mp4'
        boot = BootReport(job_number=job_number, process_s=0, taken_s=200, stages=[Stage('models', 1, 190)])
        manifest = Manifest(
            minio_key=key, width=1280, height=720, fps=24, frames=24, duration_s=1.0, bytes=7, sha256='9f', seed=7,
            has_audio=False, profile='draft', timings={}, worker={'id': 'w1', 'gpu': gpu}, job_id=name,
            timeline=[Stage('render', 0, 1000)], boot=boot)
        self.store.write_json(f'{key}.json', manifest.record())
        self.store.write_bytes(key, b'a video', 'video/mp4')
        self.now = dict(self.listed(self.store, self.prefix)[0])[key]

    def listed(self, store, prefix):
        videos, whole = list_videos(store, prefix)
        return [(key, at + self.ahead) for key, at in videos], whole

    def watch(self, *args: str, **environ: str | None):
        done = CliRunner().invoke(app, ['watch', '--once', *args], env=self.environ | environ)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        kept = self.state.read_text() if self.state.exists() else ''
        hidden = (self.address, 'T0SECRET', KEY, self.environ['MINIO_SECRET_KEY'])
        assert not [h for h in hidden if h in done.output + kept]
        return done

    def endpoint(self, *args: str):
        return CliRunner().invoke(app, ['endpoint', *args, '--image', IMAGE], env=self.environ)

    @property
    def most(self) -> int: return next(iter(self.plane.endpoints.values()))['workers']['max']

    @property
    def heard(self) -> list[str]: return [h['text'] for h in self.hook.heard]

@pytest.fixture
def site(bucket, hook, tmp_path, monkeypatch, request):
    def once(policy: RetryPolicy) -> None: object.__setattr__(policy, 'attempts', 1)
    monkeypatch.setattr(RetryPolicy, '__post_init__', once) # what fails here fails at once
    monkeypatch.chdir(tmp_path)
    with control_plane() as plane:
        made = Site(plane, bucket, tmp_path, hook, f'{request.node.name}/')
        monkeypatch.setattr('wan_avatar.cli_watch.utc_now', lambda: made.now)
        monkeypatch.setattr('wan_avatar.watch.list_videos', made.listed)
        assert made.endpoint('apply').exit_code == 0
        yield made

def test_a_day_that_costs_too_much_ends_with_no_workers(site):
    site.make('a', job_number=1)
    site.make('b')
    fine = site.watch()
    assert fine.exit_code == 0, fine.stderr
    assert '1.17 USD' in fine.stdout # 1000 s and 1205 s of an L40S at 0.00053
    assert (site.most, site.heard) == (1, [])
    passed = site.watch('--daily-usd', '1.16')
    assert passed.exit_code == 1
    assert 'the most workers were set to 0' in passed.stdout
    assert site.most == 0
    (said,) = site.heard
    assert said.startswith('wan-avatar: ')
    assert 'has cost 1.17 USD, the limit is 1.16' in said
    writes = len(site.plane.writes())
    again = site.watch('--daily-usd', '1.16')
    assert (again.exit_code, len(site.heard)) == (1, 1), 'nothing is told twice'
    assert len(site.plane.writes()) == writes, 'or done twice'
    assert 'the most workers are 0' in again.stdout
    assert site.endpoint('apply').exit_code == 0
    assert site.most == 1, 'the file says what is right'
    assert site.watch('--daily-usd', '1.16').exit_code == 1
    assert site.most == 0, 'the day still costs too much'
    site.now += timedelta(days=1)
    assert site.watch('--daily-usd', '1.16').exit_code == 0
    assert site.most == 0, 'nothing sets them back by itself'
    assert load_state(site.state).jobs == {}

def test_failures_and_cold_starts_are_told_once_a_day(site):
    for name in 'abc': site.make(name, job_number=1)
    site.plane.health['jobs']['failed'] = 70
    assert site.watch('--cold-starts', '3').exit_code == 0
    site.plane.health['jobs']['failed'] = 72
    for told in (2, 2):
        done = site.watch('--cold-starts', '2', '--json')
        said = json.loads(done.stdout)
        assert (done.exit_code, len(site.heard)) == (1, told)
        assert [a['kind'] for a in said['alerts']] == ['failed', 'cold starts']
    assert said['figures'] == {'day': f'{site.now:%Y-%m-%d}', 'usd': pytest.approx(3 * 1205 * 0.00053), 'videos': 3,
                               'without_price': 0, 'failed': 2, 'cold_starts': 3, 'whole': True}
    assert '2 of 5 jobs' in site.heard[0]
    site.now += timedelta(days=1)
    site.plane.health['jobs']['failed'] = 80
    assert site.watch().exit_code == 1
    assert len(site.heard) == 3, 'another day'

def test_what_could_not_be_told_is_told_later(site):
    for name in 'ab': site.make(name, job_number=1)
    site.hook.answer = 500
    limit = ('--cold-starts', '1')
    lost = site.watch(*limit)
    assert (lost.exit_code, lost.stderr) == (3, 'ALERT_WEBHOOK did not take an alert, three times: HTTP 500\n')
    assert 'cold starts: 2 workers were started' in lost.stdout, 'what nobody was told is printed'
    assert site.watch(*limit, ALERT_WEBHOOK='T0SECRET').stderr == 'ALERT_WEBHOOK is no http(s) address\n'
    assert site.watch(*limit, ALERT_WEBHOOK=None).exit_code == 1
    site.hook.answer = 200
    site.hook.heard.clear()
    assert site.watch(*limit).exit_code == 1
    assert site.watch(*limit).exit_code == 1
    assert len(site.heard) == 1

def test_workers_that_cannot_be_stopped_are_an_alert_of_its_own(site):
    site.make('a')
    site.plane.faults.append(('PATCH', '503'))
    done = site.watch('--daily-usd', '0.5')
    assert (done.exit_code, site.most) == (1, 1)
    assert 'and the workers run on' in site.heard[0]
    assert site.watch('--daily-usd', '0.5').exit_code == 1
    assert (site.most, len(site.heard)) == (0, 2)

def test_a_watch_that_sees_nothing_says_so_once(site):
    gone = {'MINIO_ENDPOINT': 'http://127.0.0.1:9'} # nobody listens on this port
    for _ in range(2):
        done = site.watch(**gone)
        assert done.exit_code == 3
        assert 'did not answer' in done.stderr
    (said,) = site.heard
    assert 'could not be finished, and nothing was stopped: storage_failed' in said
    assert site.watch().exit_code == 0

def test_what_has_no_price_is_said(site):
    site.make('a', gpu='cpu')
    site.make('b')
    site.store.write_json(f'{site.prefix}b.mp4.json', {'half': 'a manifest'})
    site.store.write_bytes(f'{site.prefix}c.mp4', b'a video', 'video/mp4') # its manifest may be about to come
    assert '0.00 USD, 2 of 2 videos without a price' in site.watch().stdout

WRONG = [ # arguments; exit code; words
    (('--daily-usd', '0'), 2, '--daily-usd: Input should be greater than 0'),
    (('--failed-share', '1.5'), 2, '--failed-share: Input should be less than 1'),
    (('--state', 'endpoint.toml'), 2, 'endpoint.toml is no state of a watch'),
    (('--file', 'other.toml'), 3, 'RunPod has no endpoint called other'),
]

@pytest.mark.parametrize('args, code, words', WRONG)
def test_a_look_that_cannot_be_is_refused(site, args, code, words):
    shutil.copy('endpoint.toml', 'other.toml')
    text = (site.folder / 'other.toml').read_text()
    (site.folder / 'other.toml').write_text(text.replace('name = "wan-avatar"', 'name = "other"'))
    done = site.watch(*args)
    assert (done.exit_code, site.most) == (code, 1)
    assert words in done.stderr

def test_one_look_at_a_time(site):
    with alone(site.state) as first:
        assert first
        done = site.watch()
    assert done.exit_code == 2
    assert 'another watch is at work' in done.stderr
    assert site.watch().exit_code == 0
