"""The store against a real S3 server behind a line that can be cut, and pictures from hostile web servers"""
import itertools
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import make_settings

from wan_avatar.job import JobError
from wan_avatar.store import PART, Store, address, check_url, fetch_image, is_public

class Line:
    "A TCP relay to the bucket: counts connections, and cuts the n-th of them after so many bytes of the answer"
    def __init__(self, target: tuple[str, int], cuts: dict[int, int]):
        self.target, self.cuts, self.connections = target, cuts, 0
        self.listener = socket.create_server(('127.0.0.1', 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str: return f'http://127.0.0.1:{self.listener.getsockname()[1]}'

    def _accept(self) -> None:
        while True:
            try: near, _ = self.listener.accept()
            except OSError: return # closed
            number, self.connections = self.connections, self.connections + 1
            far = socket.create_connection(self.target)
            threading.Thread(target=self._copy, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, self.cuts.get(number)), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while (data := source.recv(1 << 16)) and (limit is None or passed < limit):
                target.sendall(data)
                passed += len(data)
        except OSError: pass # the other direction was cut
        for s in (source, target):
            try: s.shutdown(socket.SHUT_RDWR)
            except OSError: pass # it is closed already
            s.close()

@contextmanager
def line_to(bucket, cuts=()):
    parts = urlsplit(bucket.endpoint)
    line = Line((parts.hostname, parts.port), dict(cuts))
    try: yield line
    finally: line.listener.close()

@pytest.fixture
def store(bucket, tmp_path): return Store(make_settings(bucket, tmp_path))

@pytest.mark.parametrize('endpoint, use_ssl, expected', [
    ('minio.example.org', None, ('minio.example.org', True)), ('https://minio.example.org/', None, ('minio.example.org', True)),
    ('http://minio:9000', None, ('minio:9000', False)), ('minio:9000', False, ('minio:9000', False)), ('http://minio:9000', True, ('minio:9000', True)),
    ('[::1]:9000', False, ('[::1]:9000', False))])
def test_endpoint_with_or_without_scheme(endpoint, use_ssl, expected): assert address(endpoint, use_ssl) == expected

@pytest.mark.parametrize('key', ['plain.bin', 'with spaces/and – unicode/портрет 肖像.bin', 'a+b&c=d?e#f%20.bin', "quote'and\"double.bin"])
def test_any_key_survives_a_round_trip(store, tmp_path, key):
    (tmp_path / 'in').write_bytes(key.encode() * 100)
    store.upload(tmp_path / 'in', key, 'application/octet-stream')
    assert store.download(key, tmp_path / 'out', 'driving_video_path', 10**6) == len(key.encode()) * 100
    assert (tmp_path / 'out').read_bytes() == (tmp_path / 'in').read_bytes() and key in store.list('')

def test_download_goes_on_where_the_line_was_cut(store, bucket, tmp_path):
    data = bytes(range(256)) * 40_000 # 10 MB
    store.write_bytes('big.bin', data, 'application/octet-stream')
    seen = []
    with line_to(bucket, {0: 3_000_000, 1: 3_000_000}) as line:
        cut = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address))
        cut.download('big.bin', tmp_path / 'big', 'driving_video_path', 10**8, progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / 'big').read_bytes() == data and line.connections >= 3
    assert seen == sorted(seen), 'bytes that were here came again'
    assert {total for _, total in seen} == {len(data)}

def test_upload_over_a_line_that_is_cut_arrives_whole(store, bucket, tmp_path):
    data = bytes(range(256)) * 160_000 # 41 MB: several parts
    (tmp_path / 'in').write_bytes(data)
    with line_to(bucket, {0: 0}) as line:
        Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address)).upload(tmp_path / 'in', 'up.bin', 'application/octet-stream')
    assert store.stat('up.bin')['bytes'] == len(data) and store.read_bytes('up.bin', 10**8) == data

@pytest.mark.parametrize('change, words', [({'MINIO_SECRET_KEY': 'wrong'}, 'MINIO_SECRET_KEY'), ({'MINIO_ACCESS_KEY': 'nobody'}, 'MINIO_ACCESS_KEY'),
                                           ({'MINIO_BUCKET': 'absent'}, 'MINIO_BUCKET')])
def test_what_waiting_does_not_cure_fails_at_once(bucket, tmp_path, change, words):
    with line_to(bucket) as line:
        refused = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address, **change))
        with pytest.raises(JobError) as e: refused.download('x.bin', tmp_path / 'x', 'driving_video_path', 10)
        with pytest.raises(JobError): refused.check()
    assert e.value.code == 'storage_failed' and words in e.value.message and line.connections == 1, 'tried again, or not over one kept connection'
    assert not any(v in str(e.value) for v in ('wrong', bucket.secret_key)) and list(tmp_path.iterdir()) == []

def test_missing_key_and_too_large(store, tmp_path):
    with pytest.raises(JobError, match='input_missing: driving_video_path \'nothing.mp4\''): store.download('nothing.mp4', tmp_path / 'x', 'driving_video_path', 10)
    store.write_bytes('eleven', bytes(11), 'application/octet-stream')
    with pytest.raises(JobError, match='bad_input: driving_video_path'): store.download('eleven', tmp_path / 'x', 'driving_video_path', 10)
    assert list(tmp_path.iterdir()) == [] and store.stat('nothing.mp4') is None and store.read_json('nothing.json') is None

def test_bucket_that_stays_away_is_given_up(bucket, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    away = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=f'http://127.0.0.1:{port}'), window_s=0.5)
    with pytest.raises(JobError, match='storage_failed: .*did not answer'): away.read_bytes('x', 10)

@contextmanager
def proxy(answers: list[int]):
    "A proxy before no bucket at all: an HTML page with each of these codes, the last one for ever; counts requests"
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get('Content-Length') or 0))
            code, asked[0] = answers[min(asked[0], len(answers) - 1)], asked[0] + 1
            body = b'' if self.command == 'HEAD' else b'<html>Bad Gateway</html>'
            self.send_response(code)
            for name, value in {'Content-Type': 'text/html', 'Content-Length': str(len(body))}.items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET
        def log_message(self, *args): pass
    asked, server = [0], ThreadingHTTPServer(('127.0.0.1', 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', asked
    finally: server.shutdown()

@pytest.mark.parametrize('code, again', [(502, True), (503, True), (429, True), (400, False), (418, False)])
@pytest.mark.parametrize('what', ['read', 'stat', 'write', 'download', 'upload', 'remove'])
def test_what_a_proxy_says_in_the_buckets_place(bucket, tmp_path, what, code, again):
    (tmp_path / 'in').write_bytes(b'in')
    with proxy([code]) as (endpoint, asked):
        store = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=endpoint), window_s=1)
        works = {'read': lambda: store.read_bytes('k', 10), 'stat': lambda: store.stat('k'), 'write': lambda: store.write_bytes('k', b'x', 'text/plain'), 'remove': lambda: store.remove('k'),
                 'download': lambda: store.download('k', tmp_path / 'out', 'driving_video_path', 10), 'upload': lambda: store.upload(tmp_path / 'in', 'k', 'text/plain')}
        with pytest.raises(JobError, match='storage_failed'): works[what]()
    assert (asked[0] > 1) == again and not (tmp_path / 'out').exists()

def test_a_cancelled_upload_leaves_nothing(store, tmp_path):
    (tmp_path / 'in').write_bytes(bytes(size := 3 * PART))
    seen = []
    with pytest.raises(JobError, match='cancelled'):
        store.upload(tmp_path / 'in', 'never.bin', 'application/octet-stream', cancelled=lambda: len(seen) > 1, progress=lambda done, total: seen.append(done))
    assert store.stat('never.bin') is None and 0 < seen[-1] < size
    assert 'never.bin' not in [u.object_name for u in store.client._list_multipart_uploads(store.bucket).uploads]

def test_a_cancelled_wait_for_the_bucket_ends(bucket, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    away = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=f'http://127.0.0.1:{port}'), window_s=3600)
    asked = itertools.count()
    with pytest.raises(JobError, match='cancelled'): away.download('x', tmp_path / 'x', 'driving_video_path', 10, cancelled=lambda: next(asked) > 1)

def test_presigned_addresses(bucket, store, tmp_path):
    store.write_bytes('pre signed.bin', b'hello', 'application/octet-stream')
    assert httpx.get(store.presign('pre signed.bin', 60)).content == b'hello'
    public = Store(make_settings(bucket, tmp_path, MINIO_PUBLIC_ENDPOINT='https://media.example.org')).presign('a.mp4', 60)
    assert public.startswith('https://media.example.org/media/a.mp4?') and 'X-Amz-Expires=60' in public and bucket.secret_key not in public

# pictures from the web

class Hostile(BaseHTTPRequestHandler):
    "A web server with an answer for each kind of trouble"
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        kind, _, rest = self.path[1:].partition('/')
        try: getattr(self, f'do_{kind}')(rest)
        except OSError: self.close_connection = True # the other side left

    def say(self, status=200, body=b'picture', **headers):
        self.send_response(status)
        for k, v in ({'Content-Length': len(body)} | {k.replace('_', '-'): v for k, v in headers.items()}).items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def do_good(self, rest): self.say()
    def do_hop(self, rest): self.say(302, b'', Location='/good' if rest == '1' else f'/hop/{int(rest) - 1}')
    def do_to(self, rest): self.say(302, b'', Location=rest)
    def do_umlaut(self, rest): self.say(302, b'', Location='/good/bild ü.png')
    def do_status(self, rest): self.say(int(rest))
    def do_short(self, rest): self.say(Content_Length=100)
    def do_large(self, rest): self.say(Content_Length=30_000_000)
    def do_zipped(self, rest): self.say(Content_Encoding='gzip')
    def do_endless(self, rest):
        self.send_response(200)
        self.end_headers()
        while True: self.wfile.write(bytes(1 << 20))
    def do_drip(self, rest):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b'x')
            time.sleep(0.02) # slower than any deadline forgives
    def do_silent(self, rest): self.server.over.wait(20)
    def do_headers(self, rest):
        self.wfile.write(b'HTTP/1.1 200 OK\r\n')
        while True:
            self.wfile.write(b'X-More: 1\r\n')
            time.sleep(0.02)
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def web():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hostile)
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.over.set()
    server.shutdown()
    server.server_close()

def ports(web: str) -> set[int]: return {urlsplit(web).port} # as URL_PORTS would say

@pytest.mark.parametrize('path, code, words', [
    ('/to/http://[::1', 'bad_input', 'which is no address'), ('/status/404', 'input_missing', 'HTTP 404'), ('/status/500', 'input_missing', 'HTTP 500'), ('/short', 'input_missing', 'can not be fetched'),
    ('/large', 'bad_input', '20,000,000'), ('/endless', 'bad_input', '20,000,000'), ('/zipped', 'bad_input', 'compressed'),
    ('/hop/4', 'bad_input', 'more than 3'), ('/to/file:///etc/passwd', 'bad_input', 'http'), ('/drip', 'input_missing', 'within'),
    ('/silent', 'input_missing', 'within'), ('/headers', 'input_missing', '')])
def test_pictures_that_do_not_come(web, tmp_path, path, code, words):
    began = time.monotonic()
    with pytest.raises(JobError) as e: fetch_image(web + path, tmp_path / 'a.png', allow_private=True, deadline_s=1, ports=ports(web))
    assert e.value.code == code and words in e.value.message, e.value
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - began < 5

@pytest.mark.parametrize('path', ['/good', '/hop/1', '/hop/3', '/umlaut'])
def test_pictures_that_come(web, tmp_path, path):
    assert fetch_image(web + path, tmp_path / 'a.png', allow_private=True, ports=ports(web)) == 7 and (tmp_path / 'a.png').read_bytes() == b'picture'

INSIDE = ['http://169.254.169.254/latest/meta-data/', 'http://127.0.0.1:9000/', 'http://10.0.0.8/', 'http://[::1]/', 'http://0x7f000001/', 'http://inside.example/']

@pytest.mark.parametrize('target', INSIDE)
def test_a_redirect_is_checked_like_the_address(web, target):
    "A public name may lead anywhere afterwards"
    def pretend(host, port): return ['127.0.0.1'] if host in ('0x7f000001',) or host[0].isdigit() or ':' in host else ['10.1.1.1'] if host == 'inside.example' else ['1.1.1.1']
    with pytest.raises(JobError, match='bad_input: .*not public'): check_url(target, pretend)
    assert check_url('http://outside.example/', pretend)[3] == '1.1.1.1'

def test_the_checked_address_is_the_one_connected_to(web, tmp_path):
    "A name that answers differently the second time (DNS rebinding) is asked once per hop"
    answers, asked = iter([['127.0.0.1'], ['127.0.0.1'], ['203.0.113.9']]), []
    def rebinding(host, port):
        asked.append(host)
        return next(answers)
    port = urlsplit(web).port
    assert fetch_image(f'http://rebind.example:{port}/hop/1', tmp_path / 'a.png', allow_private=True, resolver=rebinding, ports={port}) == 7
    assert asked == ['rebind.example'] * 2

@pytest.mark.parametrize('ip', ['fec0::1', '192.88.99.1', '100.64.0.1', '0.0.0.0', '224.0.0.1', '::ffff:10.0.0.1', '64:ff9b::a00:1', '2002:a00:1::', 'fe80::1%eth0', '255.255.255.255'])
def test_addresses_that_are_not_public(ip): assert not is_public(ip)

@pytest.mark.parametrize('url, words', [('http://a..b/x.png', 'names no host'), (f'http://{"a" * 64}.example/x.png', 'names no host'), ('http://[::1', 'is not an address'), ('http://h:99999/', 'is not an address'),
                                        ('http:///x.png', 'name a host'), ('ftp://h/x.png', 'must begin with'), ('http://u:p@h/x.png', 'user name')])
def test_addresses_that_are_none(url, words):
    with pytest.raises(JobError, match=f'bad_input: .*{words}'): check_url(url)

def test_one_private_answer_among_public_ones_is_enough_to_refuse():
    with pytest.raises(JobError, match='not public'): check_url('https://example.org/a.png', lambda host, port: ['1.1.1.1', '192.168.0.1'])
