"What a job takes, said before it is sent"
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import pytest
from conftest import SAMPLES
from typer.testing import CliRunner

from wan_avatar import cli_estimate
from wan_avatar.cards import measured
from wan_avatar.cli import app
from wan_avatar.cli_estimate import estimate_job, length_at, length_in_bucket
from wan_avatar.config import load_settings
from wan_avatar.job import JobError
from wan_avatar.prices import POOLS
from wan_avatar.store import Store, read_part

H200 = [POOLS['HOPPER_141']]

def run(*arguments):
    "The command, with its exit code"
    return CliRunner().invoke(app, ['estimate', *map(str, arguments)])

SAID = [ # arguments, exit code, what stands there
    ((SAMPLES / 'pexels.mp4', '--json'), 1, '"frames": 472'), # of one pool the limit alone is longer than the timeout
    ((SAMPLES / 'pexels.mp4', '--start', 2, '--duration', 5, '--json'), 0, '"frames": 120'),
    ((5,), 0, '120 frames in 2 windows of 65'),
    ((5, '--profile', 'draft'), 0, 'not measured'),
    ((300, '--quality', 'best'), 1, 'longer than execution_timeout_s'),
    ((5, '--start', 9), 1, 'start_seconds 9: the driving video lasts 5.00 s'),
    ((5, '--start', -1), 1, 'start_seconds'),
    ((5, '--duration', 0), 1, 'duration_seconds'),
    ((5, '--quality', 'perfect'), 1, "quality 'perfect'"),
    ((5, '--profile', 'draft', '--quality', 'best'), 1, 'profile draft has none'),
    ((5, '--profile', 'oil'), 1, "profile 'oil' does not exist"),
    (('none.mp4',), 1, 'neither a file here nor a number of seconds'),
    ((SAMPLES / 'astronaut.png',), 1, 'input_unreadable'),
    ((5, '--file', 'none.toml'), 2, 'none.toml'),
]

@pytest.mark.parametrize('arguments, code, says', [pytest.param(*c, id=' '.join(map(str, c[0]))[-50:]) for c in SAID])
def test_the_command(arguments, code, says):
    said = run(*arguments)
    assert said.exit_code == code and says in ' '.join((said.stdout + said.stderr).split())

def test_json_is_alone_on_stdout(): assert json.loads(run(5, '--json').stdout)['windows'] == 2

def test_more_steps_take_longer_and_a_measured_card_says_so():
    found = [estimate_job(10, 'wan22-animate', H200, quality) for quality in ('fast', None, 'best')]
    seconds = [estimate.pools[0].render.seconds for estimate in found]
    assert seconds == sorted(seconds) and seconds[2] > 2.5 * seconds[1]
    at = estimate_job(10, 'wan22-animate', H200).pools[0].render.at
    assert at == measured()['NVIDIA H200'].at

@pytest.mark.parametrize('timeout_s, fits', [(None, None), (1, False), (10**5, True)])
def test_whether_it_is_done_in_time(timeout_s, fits):
    assert estimate_job(10, 'wan22-animate', H200, timeout_s=timeout_s).pools[0].fits is fits

def test_a_limit_never_says_that_it_is_in_time():
    limit = estimate_job(10, 'wan22-animate', [POOLS['ADA_48_PRO']], timeout_s=10**5, runs={}).pools[0]
    assert limit.fits is None and limit.render.least

# a video that is elsewhere

def rewrapped(path, **options):
    "The sample in another container, as it is"
    with av.open(str(SAMPLES / 'pexels.mp4')) as source, av.open(str(path), 'w', options=options) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None: continue
            packet.stream = copy
            out.mux(packet)
    return path

@pytest.fixture(scope='module')
def shelf(bucket, tmp_path_factory):
    "A store with the sample in it: index first, index last, in fragments, as other kinds, cut off, and no video"
    folder = tmp_path_factory.mktemp('shelf')
    kinds = {'first.mp4': {'movflags': 'faststart'}, 'last.mp4': {}, 'fragments.mp4': {'movflags': 'frag_keyframe'},
             'a.mkv': {}, 'a.ts': {}}
    files = [rewrapped(folder / name, **options) for name, options in kinds.items()]
    whole = files[1].read_bytes()
    (folder / 'cut.mp4').write_bytes(whole[:len(whole) // 2])
    (folder / 'page.mp4').write_text('<html>' * 10_000)
    store = Store(load_settings(bucket.environment()))
    for path in folder.iterdir(): store.upload(path, f'shelf/{path.name}', 'video/mp4')
    return store

PLACES = [ # object, seconds, is it fetched whole
    ('first.mp4', 19.68, False), ('last.mp4', 19.68, False), ('a.mkv', 19.69, False),
    ('fragments.mp4', 19.68, True), ('a.ts', 19.68, True)]

@pytest.mark.parametrize('name, seconds, whole', PLACES)
def test_a_key_is_measured_by_its_ends(shelf, monkeypatch, name, seconds, whole):
    parts, files = [], []
    download = shelf.download
    monkeypatch.setattr(cli_estimate, 'read_part', lambda *a: parts.append(a[3]) or read_part(*a))
    monkeypatch.setattr(shelf, 'download', lambda *a: files.append(a) or download(*a))
    assert length_in_bucket(shelf, f'shelf/{name}', look=100_000) == pytest.approx(seconds, abs=0.1)
    assert sum(parts) == 200_000 and len(files) == whole

def test_what_is_small_is_fetched_at_once(shelf):
    assert length_in_bucket(shelf, 'shelf/first.mp4') == pytest.approx(19.68, abs=0.1)

BAD = [('shelf/cut.mp4', 'input_unreadable'), ('shelf/page.mp4', 'input_unreadable')]

@pytest.mark.parametrize('key, code', BAD)
def test_a_bad_object_is_named(shelf, key, code):
    with pytest.raises(JobError) as e: length_in_bucket(shelf, key, look=1000)
    assert e.value.code == code

KEYS = [ # arguments, exit code, what stands there
    (('shelf/last.mp4', '--duration', 5), 0, '120 frames in 2 windows'),
    (('shelf/none.mp4',), 1, 'nor a key in the bucket "media"'),
    (('../secret.mp4',), 1, 'a key has no leading or trailing'),
    (('http://169.254.169.254/latest/meta-data/',), 1, 'driving_video_url'),
    (('http://127.0.0.1:8188/a.mp4',), 1, 'bad_input'),
    (('http://ana:pw@example.org/a.mp4',), 1, 'must not carry a user name'),
]

@pytest.mark.parametrize('arguments, code, says', KEYS, ids=[str(k[0][0]) for k in KEYS])
def test_the_command_takes_keys_and_addresses(shelf, bucket, monkeypatch, tmp_path, arguments, code, says):
    for name, value in bucket.environment().items(): monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path) # no endpoint runs here, and no endpoint.toml lies here
    said = run(*arguments)
    text = ' '.join((said.stdout + said.stderr).split())
    assert said.exit_code == code and says in text and 'pw@' not in text

def test_without_a_bucket_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv('MINIO_ENDPOINT', raising=False)
    monkeypatch.chdir(tmp_path)
    said = run('templates/wave.mp4')
    assert said.exit_code == 1 and 'MINIO_ENDPOINT' in said.stderr and 'neither a file here nor' in said.stderr

def test_an_address_is_measured(bucket):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(SAMPLES))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        may = {'ALLOW_PRIVATE_URLS': 'true', 'URL_PORTS': str(port)}
        store = Store(load_settings(bucket.environment() | may))
        assert length_at(f'http://127.0.0.1:{port}/pexels.mp4', store) == pytest.approx(19.68, abs=0.1)
        with pytest.raises(JobError, match='driving_video_url'): length_at(f'http://127.0.0.1:{port}/pexels.mp4')
        server.shutdown()
