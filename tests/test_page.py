"""The page of `wan-avatar up`: its rules by HTTP, and the page itself in a real Chromium. Jobs go through the endpoint
of this machine to the suite's running service, so that no second worker boots"""
import asyncio
import base64
import http.client
import json
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path

import httpx2
import pytest
from conftest import find_browser

from wan_avatar.access import EndpointAccess
from wan_avatar.handler import Handler
from wan_avatar.local import LocalEndpoint
from wan_avatar.page import serve_page
from wan_avatar.page_jobs import Desk, JobBook, PageJob, PageRefused, Part
from wan_avatar.quality import MEASURES, Judgement
from wan_avatar.queue import FINAL
from wan_avatar.terminal import BootClock


class Bridge:
    "The worker of an endpoint that starts none: it takes jobs from the queue and gives them to the running service"
    def __init__(self, endpoint: LocalEndpoint, service):
        self.endpoint = endpoint
        self.service = service
        self.queue = endpoint.pool.queue
        self.handler = Handler(service.context, self.report)
        self.working = asyncio.run_coroutine_threadsafe(self.work(), endpoint.loop)

    async def report(self, event: dict, update: dict) -> None: # on the service's loop
        self.endpoint.loop.call_soon_threadsafe(self.queue.progress, 'bridge', event['id'], update)

    async def work(self) -> None:
        tasks = set()
        while True:
            taken = await self.endpoint.pool.changed.wait_for(lambda: self.queue.take('bridge', 1), 600)
            for job in taken: tasks.add(asyncio.create_task(self.handle(job)))

    async def handle(self, job) -> None:
        handled = self.service.background.submit(self.handler({'id': job.id, 'input': job.request.input}))
        stopped = asyncio.create_task(self.endpoint.pool.changed.wait_for(lambda: job.state in FINAL, 600))
        answered = asyncio.wrap_future(handled)
        await asyncio.wait({answered, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not answered.done(): handled.cancel()
        else:
            answer = answered.result()
            self.queue.done('bridge', job.id, answer if 'error' in answer else {'output': answer})
        self.queue.seen('bridge', set())
        self.endpoint.pool.changed.notify()

@pytest.fixture(scope='module')
def access(service, bucket, tmp_path_factory):
    "An endpoint whose jobs the service makes"
    logs = tmp_path_factory.mktemp('page-logs')
    with LocalEndpoint(['nothing'], {}, logs, max_workers=0) as endpoint:
        bridge = Bridge(endpoint, service)
        yield EndpointAccess(endpoint.address, endpoint.api_key, bucket.environment())
        bridge.working.cancel()

MADE = {'width': 1280, 'height': 720, 'fps': 24, 'frames': 48, 'duration_s': 2.0, 'bytes': 1000, 'sha256': '9f',
        'has_audio': True, 'seed': 7, 'profile': 'draft', 'timings': {'total': 3.0}, 'worker': {'id': 'w1'},
        'notes': ['<b>a note</b>'], 'timeline': [{'name': 'render', 'begin_s': 0.5, 'end_s': 2.0}]}
OWN = {'input_image_minio_path': 'uploads/ana.png', 'driving_video_path': 'uploads/wave.mp4', 'seed': 7}
BYTES = bytes(range(250)) * 4

@pytest.fixture(scope='module')
def remembered(service, tmp_path_factory) -> Path:
    "The folder of a page that knows a finished job, a failed one and a cancelled one"
    folder = tmp_path_factory.mktemp('page')
    folder.chmod(0o700)
    book = JobBook(folder / 'page.jsonl')
    names = {'fields': OWN, 'picture': 'ana.png', 'driving': '<i>wave</i>.mp4'}
    book.put(PageJob('off', '2026-11-27T09:00:00Z', state='CANCELLED', **names))
    error = 'no_person: a body in 0 of 48 frames'
    book.put(PageJob('bad', '2026-11-27T10:00:00Z', state='FAILED', stage='track', error=error, **names))
    book.put(PageJob('known', '2026-11-27T11:00:00Z', state='COMPLETED', key='avatars/known.mp4', seconds=3.2, **names))
    for key in ('avatars/known.mp4', 'secret.mp4'): service.store.write_bytes(key, BYTES, 'video/mp4')
    service.store.write_json('avatars/known.mp4.json', MADE | {'minio_key': 'avatars/known.mp4', 'job_id': 'known'})
    figures = {name: 0.5 for name in MEASURES} | {'lpips': None}
    (folder / 'known').mkdir()
    said = json.dumps(Judgement(figures, {'lpips': 'no weights'}, (), {}).record())
    (folder / 'known/judgement.json').write_text(said)
    return folder

@pytest.fixture(scope='module')
def address(access, remembered, samples):
    "The printed address of a page"
    with serve_page(access, remembered, samples=samples) as address: yield address

class Visitor:
    "Somebody with the page's cookie, and no browser around it"
    def __init__(self, address: str):
        self.origin = address.partition('/?')[0]
        self.http = httpx2.Client(trust_env=False, headers={'Origin': self.origin})
        self.base = re.search(r'url=(/\w+/)', self.http.get(address).text)[1]

    def ask(self, method: str, path: str, **more) -> httpx2.Response:
        return self.http.request(method, f'{self.origin}{self.base}{path}', **more)

@pytest.fixture(scope='module')
def visitor(address): return Visitor(address)

# who may come in

EVIL = 'http://evil.example'
@pytest.mark.hostile('requests to the page')
@pytest.mark.parametrize('method, path, headers, status', [
    ('GET', 'api/jobs', {}, 200),
    ('GET', 'api/jobs', {'Sec-Fetch-Site': 'same-origin'}, 200),
    ('GET', 'api/jobs', {'Sec-Fetch-Site': 'cross-site'}, 403),
    ('GET', 'api/jobs', {'Sec-Fetch-Site': 'same-site'}, 403), # another port of this machine
    ('GET', 'api/jobs', {'Host': 'evil.example'}, 403), # whose name leads here
    ('GET', 'api/jobs', {'Host': 'localhost:1'}, 403),
    ('GET', 'api/jobs', {'Cookie': 'none=1'}, 401),
    ('GET', '', {'Cookie': 'none=1'}, 401),
    ('GET', 'app.js', {'Cookie': 'none=1'}, 401),
    ('GET', 'api/jobs/known/video', {'Cookie': 'none=1'}, 401),
    ('POST', 'api/sample', {'Origin': EVIL}, 403),
    ('POST', 'api/sample', {'Origin': 'null'}, 403),
    ('POST', 'api/sample', {'Origin': ''}, 403),
    ('POST', 'api/jobs', {'Origin': EVIL}, 403),
    ('POST', 'api/jobs/known/cancel', {'Origin': EVIL, 'Sec-Fetch-Site': 'cross-site'}, 403),
    ('POST', 'api/files/picture?name=a.png', {'Origin': EVIL}, 403),
    ('DELETE', 'api/jobs', {}, 405),
    ('GET', '../', {}, 401), # outside of the page's folder its cookie is not sent
    ('GET', '../elsewhere', {}, 401),
    ('GET', 'nothing.js', {}, 404),
    ('GET', '..%2f..%2fetc%2fpasswd', {}, 404),
    ('GET', 'page.css', {}, 200),
])
def test_who_may_come_in(visitor, method, path, headers, status):
    answer = visitor.ask(method, path, headers=headers)
    assert answer.status_code == status, answer.text
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers['content-security-policy']
    assert "frame-ancestors 'none'" in answer.headers['content-security-policy']
    assert answer.headers['x-content-type-options'] == 'nosniff'
    assert answer.headers['referrer-policy'] == 'no-referrer'
    assert answer.headers['cache-control'] == 'no-store'

@pytest.mark.parametrize('token, status', [('', 401), ('guess', 401), ('é', 401), (None, 200)])
def test_the_token_opens_the_page_once_for_all(address, token, status):
    with httpx2.Client(trust_env=False) as http:
        answer = http.get(address if token is None else address.partition('=')[0] + f'={token}')
        assert answer.status_code == status
        if status != 200: return
        (cookie,) = answer.headers.get_list('set-cookie')
        assert {'HttpOnly', 'SameSite=strict'} <= set(cookie.split('; '))
        assert re.fullmatch(r'wan_avatar_\d+=[\w-]{43}', cookie.split('; ')[0])
        assert re.search(r'Path=/[0-9a-f]{16}/', cookie) # not for servers on other ports of this host
        assert address.partition('=')[2] not in cookie + answer.text

# what it sends

@pytest.mark.parametrize('asked, status, span', [
    (None, 200, (0, 1000)),
    ('bytes=0-', 200, (0, 1000)),
    ('bytes=0-99', 206, (0, 100)),
    ('bytes=100-', 206, (100, 1000)),
    ('bytes=-100', 206, (900, 1000)),
    ('bytes=990-2000', 206, (990, 1000)),
    ('bytes=999-999', 206, (999, 1000)),
    ('bytes=1000-', 416, None),
    ('bytes=5-1', 416, None),
    ('bytes=-0', 416, None),
    ('bytes=0-1,5-6', 200, (0, 1000)), # several ranges are not given
    ('frames=0-1', 200, (0, 1000)),
    ('bytes=' + '9' * 500, 200, (0, 1000)),
])
def test_a_video_comes_in_ranges(visitor, asked, status, span):
    answer = visitor.ask('GET', 'api/jobs/known/video', headers={'Range': asked} if asked else {})
    assert answer.status_code == status
    if span is None:
        assert answer.headers['content-range'] == 'bytes */1000'
        return
    assert answer.content == BYTES[slice(*span)]
    assert answer.headers['content-type'] == 'video/mp4'
    assert answer.headers['accept-ranges'] == 'bytes'
    if status == 206: assert answer.headers['content-range'] == f'bytes {span[0]}-{span[1] - 1}/1000'

def test_a_download_has_a_name(visitor):
    for part, name in (('video', 'avatar-known.mp4'), ('manifest', 'avatar-known.json')):
        answer = visitor.ask('GET', f'api/jobs/known/{part}?download=1')
        assert answer.headers['content-disposition'] == f"attachment; filename*=UTF-8''{name}"

@pytest.mark.hostile('requests to the page')
@pytest.mark.parametrize('path, status, words', [
    ('api/jobs/nobody', 404, 'the page knows no job'),
    ('api/jobs/known/driving', 404, 'no longer in the bucket'),
    ('api/jobs/known/preview', 404, 'has no'),
    ('api/jobs/known/fields', 404, 'has no'),
    ('api/jobs/secret/video', 404, 'the page knows no job'), # an object beside the output prefix
    ('api/jobs/..%2fsecret/video', 404, ''),
    ('api/jobs/known/..%2f..%2fsecret.mp4', 404, ''),
    ('api/jobs/bad/video', 404, 'has no'),
    ('api/sample/..', 404, ''),
    ('api/sample/other', 404, 'no such sample'),
])
def test_only_files_of_known_jobs_are_sent(visitor, path, status, words):
    answer = visitor.ask('GET', path)
    assert answer.status_code == status
    assert words in answer.text

# what it takes

LIMIT = 20 * 10**6
@pytest.mark.hostile('requests to the page')
@pytest.mark.parametrize('path, body, status, words', [
    ('files/picture?name=ana.png', b'x', 200, 'uploads/'),
    ('files/picture?name=..%2f..%2fana.png', b'y', 200, '"name":"ana.png"'),
    ('files/picture?name=ana.html', b'x', 415, 'must end in .jpg'),
    ('files/picture?name=ana.svg', b'x', 415, 'must end in .jpg'),
    ('files/picture?name=ana.mp4', b'x', 415, 'must end in .jpg'),
    ('files/driving?name=ana.png', b'x', 415, 'must end in .mp4'),
    ('files/picture?name=', b'x', 415, 'must end in'),
    ('files/picture', b'x', 415, 'must end in'),
    ('files/other?name=ana.png', b'x', 404, 'picture or a driving video'),
    ('files/picture?name=ana.png', b'', 400, 'is empty'),
    ('files/picture?name=ana.png', bytes(LIMIT + 1), 413, 'more than 20 MB'),
    ('jobs', b'{', 400, 'JSON'),
    ('jobs', b'[]', 400, 'JSON object'),
    ('jobs', b'{}', 400, 'fields and files'),
    ('jobs', b'{"fields": {}, "files": {}}', 400, 'choose the picture and the video again'),
    ('jobs', b' ' * 200_000, 413, 'at most'),
])
def test_what_is_sent_is_checked(visitor, remembered, path, body, status, words):
    answer = visitor.ask('POST', f'api/{path}', content=body)
    assert answer.status_code == status, answer.text
    assert words in answer.text
    assert not list(remembered.glob('upload-*'))

@pytest.mark.hostile('requests to the page')
def test_a_body_of_unknown_length_is_counted(visitor):
    "Chunked, so nothing is announced; the answer comes before the rest is sent"
    host = visitor.origin.removeprefix('http://')
    connection = http.client.HTTPConnection(host, timeout=30)
    cookie = '; '.join(f'{k}={v}' for k, v in visitor.http.cookies.items())
    headers = {'Origin': visitor.origin, 'Cookie': cookie}
    body = (bytes(10**6) for _ in range(21))
    try: connection.request('POST', f'{visitor.base}api/files/picture?name=a.png', body, headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError): pass # it was refused meanwhile
    assert connection.getresponse().status == 413

KEYS = {'picture': 'uploads/ana.png', 'driving': 'uploads/wave.mp4'}
@pytest.mark.parametrize('fields, files, words, field', [
    ({}, KEYS | {'picture': 'secret.mp4'}, 'choose the picture and the video again', ''),
    ({}, KEYS | {'driving': ['uploads/wave.mp4']}, 'choose the picture and the video again', ''),
    ({'variant': {'values': {}}}, KEYS, "'variant' is not in the form", ''),
    ({'user_id': 'u1'}, KEYS, "'user_id' is not in the form", ''),
    ({'input_image_url': 'http://127.0.0.1/'}, KEYS, "'input_image_url' is not in the form", ''),
    ({'start_seconds': -1}, KEYS, 'start_seconds -1: ', 'start_seconds'),
    ({'start_seconds': '1'}, KEYS, "start_seconds '1': ", 'start_seconds'),
    ({'duration_seconds': 90}, KEYS, 'duration_seconds 90 is more than max_seconds 60', 'duration_seconds'),
    ({'quality': 'perfect'}, KEYS, 'quality ', 'quality'),
    ({'size': '640x480'}, KEYS, 'size ', 'size'),
    ({'seed': -1}, KEYS, 'seed -1', 'seed'),
    ({'profile': 'none'}, KEYS, "profile 'none' does not exist", 'profile'),
])
def test_a_wrong_wish_names_its_field(visitor, fields, files, words, field):
    answer = visitor.ask('POST', 'api/jobs', json={'fields': fields, 'files': files})
    assert answer.status_code == 400
    assert words in answer.json()['error']
    assert answer.json().get('field', '') == field

def test_a_tab_that_is_closed_in_an_upload_is_no_fault(address, visitor, remembered, caplog):
    caplog.set_level(logging.DEBUG, 'wan_avatar.local')
    host = visitor.origin.removeprefix('http://')
    cookie = '; '.join(f'{name}={value}' for name, value in visitor.http.cookies.items())
    head = [f'POST {visitor.base}api/files/driving?name=a.mp4 HTTP/1.1', f'Host: {host}', f'Origin: {visitor.origin}',
            f'Cookie: {cookie}', 'Content-Length: 1000', '', 'half']
    with socket.create_connection(host.split(':')) as half: half.sendall('\r\n'.join(head).encode())
    until = time.monotonic() + 20
    while 'hung up' not in caplog.text and time.monotonic() < until: threading.Event().wait(0.02)
    assert 'hung up' in caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
    assert not list(remembered.glob('upload-*'))

def test_the_page_says_that_its_endpoint_is_gone(bucket, tmp_path):
    access = EndpointAccess('http://127.0.0.1:9/v2/x', 'k', bucket.environment())
    (tmp_path / 'page').mkdir(mode=0o700)
    JobBook(tmp_path / 'page/page.jsonl').put(PageJob('j1', '2026-11-27T11:00:00Z', OWN))
    with serve_page(access, tmp_path / 'page') as address:
        visitor = Visitor(address)
        answer = visitor.ask('GET', 'api/jobs/j1')
        assert (answer.status_code, '127.0.0.1:9' in answer.json()['error']) == (502, True)
        listed = visitor.ask('GET', 'api/jobs').json()['jobs']
        assert [job['state'] for job in listed if job['id'] == 'j1'] == ['IN_QUEUE']

def test_a_video_that_somebody_else_sent_can_be_compared_and_made_again(bucket, tmp_path):
    "What it was made of, its manifest names; any other key stays out of reach"
    keys = {'input_image_minio_path': 'people/else.png', 'driving_video_path': 'templates/else.mp4'}
    with LocalEndpoint(['nothing'], {}, tmp_path / 'logs', max_workers=0) as endpoint:
        own = bucket.environment() | {'OUTPUT_PREFIX': 'elsewhere/'}
        desk = Desk(EndpointAccess(endpoint.address, endpoint.api_key, own), tmp_path / 'page')
        more = {'minio_key': 'elsewhere/j7.mp4', 'job_id': 'j7', 'start_s': 1.5, 'person': 'left', 'input_keys': keys}
        desk.store.write_json('elsewhere/j7.mp4.json', MADE | more)
        for key in ('elsewhere/j7.mp4', *keys.values()): desk.store.write_bytes(key, BYTES, 'video/mp4')
        files = {'picture': 'people/else.png', 'driving': 'templates/else.mp4'}
        with pytest.raises(PageRefused, match='choose the picture'): desk.submit({}, files)
        seen = desk.view('j7')
        assert {part: f['key'] for part, f in seen['files'].items()} == files
        assert seen['fields'] == {'profile': 'draft', 'start_seconds': 1.5, 'person': 'left'}
        assert desk.part('j7', 'driving') == Part('templates/else.mp4', 'else.mp4', 'video/mp4')
        again = desk.submit(seen['fields'], files)['id']
        assert desk.job(again).fields == seen['fields'] | keys
        with pytest.raises(PageRefused): desk.submit({}, files | {'picture': 'secret.mp4'})

def test_quality_that_cannot_be_measured_says_why(access, remembered, tmp_path):
    desk = Desk(access, tmp_path / 'page', comfy_dir=tmp_path)
    for job in JobBook(remembered / 'page.jsonl').newest(): desk.book.put(job)
    desk.measure('known')
    assert desk.quality.one.acquire(timeout=60) # until it has been judged
    assert desk.quality.view('known')['why'].startswith("input_missing: the picture 'uploads/ana.png' is not in the")

def test_a_worker_that_starts_is_seen_and_one_that_cannot_says_why(bucket, tmp_path):
    boot = BootClock(tmp_path)
    with LocalEndpoint(['nothing'], {}, tmp_path / 'logs', max_workers=0) as endpoint:
        access = EndpointAccess(endpoint.address, endpoint.api_key, bucket.environment())
        desk = Desk(access, tmp_path / 'page', boot=boot)
        desk.book.put(PageJob('j0', '2026-11-27T11:00:00Z', OWN, 'ana.png', 'wave.mp4'))
        job = desk.submit({}, KEYS)['id']
        assert [step['state'] for step in desk.view(job)['steps'][:2]] == ['now', 'todo']
        boot.event('worker_started', {'worker': 'w1'})
        boot.log.write_text('boot: the bucket is reachable after 0.1 s\n')
        (step,) = [step for step in desk.view(job)['steps'] if step['state'] == 'now']
        assert (step['name'], step['text']) == ('worker', 'the bucket is reachable after 0.1 s')
        assert desk.view(job)['warning'] is None
        boot.event('worker_unhealthy', {'why': 'no disk', 'log': 'its last words'})
        assert desk.view(job)['warning'] == 'the worker did not get ready: no disk\nits last words'

# in a browser

FLAGS = ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', *(['--no-sandbox'] if os.geteuid() == 0 else [])]
SECONDS = 60_000 # ms, of a wait

@pytest.fixture(scope='module')
def chromium():
    "A running browser that plays H.264"
    if (program := find_browser()) is None:
        pytest.skip('no Chromium is installed: the page was not tested in a browser; `apt-get install chromium`, or '
                    '`.venv/bin/python -m playwright install --with-deps chromium`, brings one')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()

class Tab:
    "A tab that notes what a page should not do"
    def __init__(self, browser, address: str, **options):
        self.address = address
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.wrong: list[str] = []
        self.texts: list[str] = [] # of the answers
        self.page.on('console', lambda m: self.wrong.append(m.text) if self.is_wrong(m) else None)
        self.page.on('pageerror', lambda error: self.wrong.append(str(error)))
        self.page.on('request', lambda r: self.wrong.append(r.url) if self.is_elsewhere(r.url) else None)
        self.page.goto(address)
        self.page.wait_for_selector('#profile option >> nth=1', state='attached')

    def is_wrong(self, message) -> bool: # violations of the policy are errors too
        gone = '/preview' in message.location.get('url', '') # a preview is removed when its video is delivered
        refused = re.fullmatch(r'Failed to load resource: .* 40[04] \(.*', message.text) # which the page says in words
        return message.type in ('error', 'warning') and not gone and not refused

    def is_elsewhere(self, url: str) -> bool:
        return not url.startswith((self.address.partition('?')[0], f'blob:{self.address.partition("/?")[0]}'))

    def close(self) -> None:
        self.context.close()
        assert self.wrong == []

@pytest.fixture
def open_tab(chromium, address):
    tabs = []
    def opened(**options) -> Tab:
        tabs.append(Tab(chromium, address, **options))
        return tabs[-1]
    yield opened
    for tab in tabs: tab.close()

DROP = """([zone, name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0))
    const carried = new DataTransfer()
    carried.items.add(new File([bytes], name, {type}))
    const target = document.querySelector(zone)
    for (const kind of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true}))
}"""

def drop(page, zone: str, path: Path, kind: str) -> None:
    page.evaluate(DROP, [zone, path.name, kind, base64.b64encode(path.read_bytes()).decode()])

def until(page, condition: str) -> None:
    "Until JavaScript is true; Playwright's own way needs `eval`, which the page forbids"
    page.evaluate(f"""new Promise((done, fail) => {{
        const end = Date.now() + {SECONDS}
        const look = () => {condition} ? done() : Date.now() > end ? fail(new Error('never')) : setTimeout(look, 20)
        look()
    }})""")

LOADED = "[...document.querySelectorAll('#player video')].every(video => video.readyState > 1)"
START_S = 0.25 # of the clip's two seconds: what is taken has 42 frames
CLOCKS = ("[document.getElementById('video-original').currentTime - " f"{START_S}, "
          "document.getElementById('video-avatar').currentTime]")

def job_of(page) -> str: return re.search(r'#job/(.+)', page.url)[1]

@pytest.fixture(scope='module')
def clip(service, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('dropped') / 'two windows.mp4'
    service.store.download('in/two windows.mp4', path, 'clip', 10**8)
    return path

SAID = [ # by a worker, and what the page makes of it
    (None, ('Reading the inputs',)),
    ({'stage': 'fetch', 'done': 44, 'total': 50, 'percent': 88}, ('Reading the inputs', '88 %')),
    ({'stage': 'track', 'done': 1, 'total': 48, 'percent': 2, 'eta_s': 17.2},
     ('Finding the person', '2 %', 'about 17 s to go')),
    ({'stage': 'render', 'done': 24, 'total': 48, 'percent': 50, 'eta_s': 200, 'segment': 1, 'segments': 2},
     ('Rendering', 'segment 1 of 2', '50 %', 'about 3 min to go')),
    ({'stage': 'render', 'done': 47, 'total': 48, 'percent': 98, 'eta_s': 1, 'segment': 2, 'segments': 2},
     ('Rendering', 'segment 2 of 2', '98 %', 'about 1 s to go')),
    ({'stage': 'upload'}, ('Uploading the video',))]

def test_the_steps_follow_what_the_worker_says(chromium, bucket, samples, clip, tmp_path):
    "The test is the worker, so that each step stays until it was seen"
    with LocalEndpoint(['nothing'], {}, tmp_path / 'logs', max_workers=0) as endpoint:
        access = EndpointAccess(endpoint.address, endpoint.api_key, bucket.environment())
        with serve_page(access, tmp_path / 'page', samples=samples) as address:
            tab = Tab(chromium, address)
            drop(tab.page, '#zone-picture', samples / 'astronaut.png', 'image/png')
            drop(tab.page, '#zone-driving', clip, 'video/mp4')
            tab.page.click('#make')
            tab.page.wait_for_selector('#steps .now')
            queue = endpoint.pool.queue
            async def taken() -> str: return queue.take('test')[0].id # on the loop, as all that changes the queue
            job = asyncio.run_coroutine_threadsafe(taken(), endpoint.loop).result(60)
            for update, words in SAID:
                if update: endpoint.loop.call_soon_threadsafe(queue.progress, 'test', job, update)
                shown = "(document.querySelector('#steps .now')?.innerText ?? '')"
                until(tab.page, f'{json.dumps(words)}.every(text => {shown}.includes(text))')
            tab.close()

def test_from_two_dropped_files_to_a_video(open_tab, clip, samples, access):
    tab = open_tab(viewport={'width': 1100, 'height': 800})
    page = tab.page
    if not page.evaluate("document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.64001f\"')"):
        pytest.skip('this browser plays no H.264; Chrome and Debian\'s Chromium do')
    page.on('response', lambda r: tab.texts.append(r.text()) if '/api/' in r.url and 'json' in r.headers.get(
        'content-type', '') and not r.url.endswith('/manifest') else None)
    drop(page, '#zone-picture', samples / 'astronaut.png', 'image/png')
    drop(page, '#zone-driving', clip, 'video/mp4')
    until(page, "document.getElementById('shown-picture').naturalWidth > 0")
    assert 'two windows.mp4' in page.inner_text('#name-driving')
    page.click('.more summary')
    page.fill('#start_seconds', str(START_S))
    page.click('#make')
    page.wait_for_selector('#job-result:not([hidden]) #player')
    the_player_plays_both(page)
    with page.expect_download() as download: page.click('#download')
    job = job_of(page)
    assert download.value.suggested_filename == f'avatar-{job}.mp4'
    assert Path(download.value.path()).stat().st_size == access.store().stat(f'avatars/{job}.mp4')['bytes']
    assert page.locator('#timeline tr').count() > 3
    page.reload()
    page.wait_for_selector('#job-result:not([hidden]) #player') # the link to a job leads to it
    until(page, LOADED) # both from the bucket: what was dropped is gone with the page it was dropped on
    assert page.locator('.recent a').first.get_attribute('aria-current') == 'page'
    page.click('#again-edit')
    page.wait_for_selector('#zone-driving.filled')
    assert page.inner_text('#name-driving') == 'two windows.mp4'
    said = ' '.join(tab.texts)
    for secret in (access.api_key, access.environment['MINIO_SECRET_KEY'], access.environment['MINIO_ENDPOINT'],
                   'X-Amz-Signature'): assert secret not in said

def the_player_plays_both(page) -> None:
    until(page, LOADED)
    page.click('#play')
    until(page, "document.getElementById('video-avatar').currentTime > 0.4")
    page.click('#play')
    first, second = page.evaluate(CLOCKS)
    assert abs(first - second) < 0.35 # a busy machine shows frames late
    page.locator('#scrub').fill('30')
    until(page, f'{CLOCKS}.every(t => Math.abs(t - 30.5 / 24) < 0.01)')
    page.focus('#scrub')
    for key, frame in (('ArrowRight', 31), ('ArrowRight', 32), ('ArrowLeft', 31), ('Home', 0), ('End', 41)):
        page.keyboard.press(key)
        until(page, f'{CLOCKS}.every(t => Math.abs(t - {frame + 0.5} / 24) < 0.01)')
    assert page.get_attribute('#scrub', 'aria-valuetext').startswith('frame 42 of 42')

def tab_to(page, selector: str) -> None:
    "By the keyboard alone"
    for _ in range(60):
        page.keyboard.press('Tab')
        if page.evaluate('s => document.activeElement.matches(s)', selector): return
    raise AssertionError(f'{selector} is not reached by Tab')

def test_a_job_is_sent_and_cancelled_by_the_keyboard(open_tab):
    page = open_tab().page
    tab_to(page, '#sample')
    page.keyboard.press('Enter')
    page.wait_for_selector('#zone-driving.filled')
    tab_to(page, '#make')
    page.keyboard.press('Enter')
    page.wait_for_selector('#steps .now')
    tab_to(page, '#cancel')
    page.keyboard.press('Enter')
    until(page, "document.getElementById('failure-title').textContent === 'Cancelled'")
    assert 'cancelled' in page.inner_text('#job-meta')
    page.reload()
    page.wait_for_selector('#job-failure:not([hidden])')
    assert page.locator('.recent .dot.CANCELLED').count() >= 1

def test_what_is_wrong_is_said_where_it_is(open_tab, tmp_path, samples):
    page = open_tab().page
    page.click('#make')
    assert page.inner_text('#form-fault') == 'Choose a picture first.'
    (notes := tmp_path / 'notes.txt').write_text('no picture')
    drop(page, '#zone-picture', notes, 'text/plain')
    assert 'notes.txt is no picture' in page.inner_text('#form-fault')
    (broken := tmp_path / 'broken.mp4').write_bytes(b'no video')
    drop(page, '#zone-picture', samples / 'astronaut.png', 'image/png')
    drop(page, '#zone-driving', broken, 'video/mp4')
    page.click('.more summary')
    page.fill('#start_seconds', '-1')
    with page.expect_response(lambda r: r.url.endswith('/api/jobs') and r.request.method == 'POST'): page.click('#make')
    page.wait_for_selector('#start_seconds[aria-invalid=true]:focus')
    page.fill('#start_seconds', '')
    page.click('#make')
    page.wait_for_selector('#job-failure:not([hidden])')
    assert page.inner_text('#failure-title') == 'Failed while reading the inputs (input_unreadable)'
    assert page.inner_text('#failure-remedy').startswith('Try another file')

# how it looks

CONTRAST = """() => {
    const parts = text => text.match(/[\\d.]+/g).map(Number)
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255)
    const ground = node => {
        for (let n = node; n; n = n.parentElement) {
            const found = parts(getComputedStyle(n).backgroundColor)
            if (found.length < 4 || found[3] === 1) return found
        }
        return [255, 255, 255]
    }
    const poor = []
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
        const node = text.parentElement
        if (!text.textContent.trim() || !node.checkVisibility()) continue
        if (node.closest('.hidden, .skip, option, script')) continue
        const [a, b] = [parts(getComputedStyle(node).color), ground(node)].map(light).sort((x, y) => y - x)
        if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([text.textContent.trim(), (a + 0.05) / (b + 0.05)])
    }
    return poor
}"""
CONTROLS = {'button', 'link', 'textbox', 'spinbutton', 'combobox', 'slider', 'checkbox', 'progressbar', 'region', 'img'}

def nameless(page) -> list[str]:
    "Controls without a name, as a screen reader would meet them"
    nodes = page.context.new_cdp_session(page).send('Accessibility.getFullAXTree')['nodes']
    return [n['role']['value'] for n in nodes if not n.get('ignored') and n['role']['value'] in CONTROLS
            and not n.get('name', {}).get('value')]

VIEWS = {'new': '#zone-picture', 'job/known': '#job-details:not([hidden]) #quality-rows tr',
         'job/bad': '#job-failure:not([hidden])', 'job/nobody': '#banner:not([hidden])'}

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1280])
def test_every_view_is_readable(open_tab, scheme, width):
    tab = open_tab(viewport={'width': width, 'height': 740}, color_scheme=scheme)
    page = tab.page
    for view, shown in VIEWS.items():
        page.evaluate('hash => { location.hash = hash }', view)
        page.wait_for_selector(shown)
        if view == 'new': page.evaluate("document.querySelector('.more').open = true")
        assert page.evaluate('document.documentElement.scrollWidth') <= width, view
        assert page.evaluate(CONTRAST) == [], view
        assert nameless(page) == [], view
    page.evaluate("location.hash = 'job/known'")
    page.wait_for_selector('#notes li')
    assert page.inner_text('#notes') == '<b>a note</b>' # what comes from elsewhere is text
    assert page.inner_text('#job-title') == 'ana.png in <i>wave</i>.mp4'
