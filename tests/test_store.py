"""The store against a real S3 server behind a line that can be cut, and pictures from hostile web servers"""
import gzip
import io
import itertools
import logging
import random
import re
import socket
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, urlsplit

import httpx2
import pytest
from conftest import make_settings

from wan_avatar.config import SettingsError, load_settings
from wan_avatar.job import JobError, parse_job
from wan_avatar.store import (
    CACHES,
    PART,
    WEB_PORTS,
    Replaced,
    Store,
    address,
    check_reach,
    check_url,
    fetch_url,
    is_public,
    ports_of,
)


class Line:
    "A TCP relay to the bucket: counts connections, and cuts the n-th of them after so many bytes of the answer"
    def __init__(self, target: tuple[str, int], cuts: dict[int, int]):
        self.target = target
        self.cuts = cuts
        self.connections = 0
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
    ('minio.example.org', None, ('minio.example.org', True)),
    ('https://minio.example.org/', None, ('minio.example.org', True)),
    ('http://minio:9000', None, ('minio:9000', False)),
    ('minio:9000', False, ('minio:9000', False)),
    ('http://minio:9000', True, ('minio:9000', True)),
    ('[::1]:9000', False, ('[::1]:9000', False)),
])
def test_endpoint_with_or_without_scheme(endpoint, use_ssl, expected): assert address(endpoint, use_ssl) == expected

@pytest.mark.parametrize('key', [
    'plain.bin',
    'with spaces/and – unicode/портрет 肖像.bin',
    'a+b&c=d?e#f%20.bin',
    "quote'and\"double.bin",
])
def test_any_key_survives_a_round_trip(store, tmp_path, key):
    (tmp_path / 'in').write_bytes(key.encode() * 100)
    store.upload(tmp_path / 'in', key, 'application/octet-stream')
    assert store.download(key, tmp_path / 'out', 'driving_video_path', 10**6) == len(key.encode()) * 100
    assert (tmp_path / 'out').read_bytes() == (tmp_path / 'in').read_bytes()
    assert key in store.list('')

def test_download_goes_on_where_the_line_was_cut(store, bucket, tmp_path):
    data = bytes(range(256)) * 40_000 # 10 MB
    store.write_bytes('big.bin', data, 'application/octet-stream')
    seen = []
    with line_to(bucket, {0: 3_000_000, 1: 3_000_000}) as line:
        cut = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address))
        cut.download(
            'big.bin', tmp_path / 'big', 'driving_video_path', 10**8,
            progress=lambda done, total: seen.append((done, total))
        )
    assert (tmp_path / 'big').read_bytes() == data
    assert line.connections >= 3
    assert seen == sorted(seen), 'bytes that were here came again'
    assert {total for _, total in seen} == {len(data)}

def test_upload_over_a_line_that_is_cut_arrives_whole(store, bucket, tmp_path):
    data = bytes(range(256)) * 160_000 # 41 MB: several parts
    (tmp_path / 'in').write_bytes(data)
    with line_to(bucket, {0: 0}) as line:
        Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address)).upload(
            tmp_path / 'in', 'up.bin', 'application/octet-stream'
        )
    assert store.stat('up.bin')['bytes'] == len(data)
    assert store.read_bytes('up.bin', 10**8) == data

@pytest.mark.parametrize('change, words', [
    ({'MINIO_SECRET_KEY': 'wrong'}, 'MINIO_SECRET_KEY'),
    ({'MINIO_ACCESS_KEY': 'nobody'}, 'MINIO_ACCESS_KEY'),
    ({'MINIO_BUCKET': 'absent'}, 'MINIO_BUCKET'),
])
def test_what_waiting_does_not_cure_fails_at_once(bucket, tmp_path, change, words):
    with line_to(bucket) as line:
        refused = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address, **change))
        with pytest.raises(JobError) as e: refused.download('x.bin', tmp_path / 'x', 'driving_video_path', 10)
        with pytest.raises(JobError): refused.check()
    assert e.value.code == 'storage_failed'
    assert words in e.value.message
    assert line.connections == 1, 'tried again, or not over one kept connection'
    assert not any(v in str(e.value) for v in ('wrong', bucket.secret_key))
    assert list(tmp_path.iterdir()) == []

def test_missing_key_and_too_large(store, tmp_path):
    with pytest.raises(JobError, match='input_missing: driving_video_path \'nothing.mp4\''):
        store.download('nothing.mp4', tmp_path / 'x', 'driving_video_path', 10)
    store.write_bytes('eleven', bytes(11), 'application/octet-stream')
    with pytest.raises(JobError, match='bad_input: driving_video_path'):
        store.download('eleven', tmp_path / 'x', 'driving_video_path', 10)
    assert list(tmp_path.iterdir()) == []
    assert store.stat('nothing.mp4') is None
    assert store.read_json('nothing.json') is None

def test_bucket_that_stays_away_is_given_up(bucket, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    away = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=f'http://127.0.0.1:{port}'), outage_s=0.5)
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
            for name, value in {'Content-Type': 'text/html', 'Content-Length': str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET
        def log_message(self, *args): pass
    asked = [0]
    server = ThreadingHTTPServer(('127.0.0.1', 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', asked
    finally: server.shutdown()

@pytest.mark.parametrize('code, again', [(502, True), (503, True), (429, True), (400, False), (418, False)])
@pytest.mark.parametrize('what', ['read', 'stat', 'write', 'download', 'upload', 'remove'])
@pytest.mark.hostile('servers')
def test_what_a_proxy_says_in_the_buckets_place(bucket, tmp_path, what, code, again):
    (tmp_path / 'in').write_bytes(b'in')
    with proxy([code]) as (endpoint, asked):
        store = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=endpoint), outage_s=1)
        works = {
            'read': lambda: store.read_bytes('k', 10),
            'stat': lambda: store.stat('k'),
            'write': lambda: store.write_bytes('k', b'x', 'text/plain'),
            'remove': lambda: store.remove('k'),
            'download': lambda: store.download('k', tmp_path / 'out', 'driving_video_path', 10),
            'upload': lambda: store.upload(tmp_path / 'in', 'k', 'text/plain'),
        }
        with pytest.raises(JobError, match='storage_failed'): works[what]()
    assert (asked[0] > 1) == again
    assert not (tmp_path / 'out').exists()

def test_a_cancelled_upload_leaves_nothing(store, tmp_path):
    (tmp_path / 'in').write_bytes(bytes(size := 3 * PART))
    seen = []
    with pytest.raises(JobError, match='cancelled'):
        store.upload(
            tmp_path / 'in', 'never.bin', 'application/octet-stream', cancelled=lambda: len(seen) > 1,
            progress=lambda done, total: seen.append(done)
        )
    assert store.stat('never.bin') is None
    assert 0 < seen[-1] < size
    assert 'never.bin' not in [u.object_name for u in store.client._list_multipart_uploads(store.bucket).uploads]

def test_a_cancelled_wait_for_the_bucket_ends(bucket, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    away = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=f'http://127.0.0.1:{port}'), outage_s=3600)
    asked = itertools.count()
    with pytest.raises(JobError, match='cancelled'):
        away.download('x', tmp_path / 'x', 'driving_video_path', 10, cancelled=lambda: next(asked) > 1)

def test_presigned_addresses(bucket, store, tmp_path):
    store.write_bytes('pre signed.bin', b'hello', 'application/octet-stream')
    assert httpx2.get(store.presign('pre signed.bin', 60)).content == b'hello'
    public = Store(make_settings(bucket, tmp_path, MINIO_PUBLIC_ENDPOINT='https://media.example.org')).presign(
        'a.mp4', 60
    )
    assert public.startswith('https://media.example.org/media/a.mp4?')
    assert 'X-Amz-Expires=60' in public
    assert bucket.secret_key not in public

CONDITIONS = [ # what lies there, what is said to lie there ('etag': what does), is it written?
    (None, None, True),
    (None, 'another', False),
    (b'old', None, False),
    (b'old', 'etag', True),
    (b'old', 'another', False),
    (b'old', '*', True),
    (None, '*', True),
]

@pytest.mark.parametrize('size', [10, PART + 1], ids=['in one', 'in parts'])
@pytest.mark.parametrize('there, said, written', CONDITIONS)
def test_a_file_is_written_in_place_of_what_was_seen_alone(store, tmp_path, there, said, written, size):
    key = f'conditions/{there}-{said}-{size}'
    if there: store.write_bytes(key, there, 'text/plain')
    with (tmp_path / 'in').open('wb') as f: f.truncate(size)
    in_place_of = store.stat(key)['etag'] if said == 'etag' else said
    def upload(): store.upload(tmp_path / 'in', key, 'text/plain', in_place_of=in_place_of)
    if written:
        upload()
        assert store.stat(key)['bytes'] == size
    else:
        with pytest.raises(Replaced): upload()
        assert (store.stat(key) or {}).get('bytes') == (len(there) if there else None)

@pytest.mark.parametrize('status, code, outcome', [
    (412, 'PreconditionFailed', Replaced),
    (409, 'ConditionalRequestConflict', Replaced),
    (404, 'NoSuchKey', Replaced),
    (501, 'NotImplemented', None),
])
def test_what_a_server_makes_of_a_condition(bucket, tmp_path, status, code, outcome):
    (tmp_path / 'in').write_bytes(b'in')
    asked = []
    def answer(method, begin):
        asked.append(method)
        return (200, {}, b'') if outcome is None and len(asked) > 1 else (status, XML, said(code))
    with strict(answer) as server:
        def upload(): at(server, bucket, tmp_path).upload(tmp_path / 'in', 'k', 'text/plain', in_place_of='a')
        if outcome is None: upload()
        else:
            with pytest.raises(outcome): upload()
    assert len(asked) == (2 if outcome is None else 1)

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
        for k, v in ({'Content-Length': len(body)} | {k.replace('_', '-'): v for k, v in headers.items()}).items():
            self.send_header(k, str(v))
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
    ('/to/http://[::1', 'bad_input', 'which is no address'),
    ('/status/404', 'input_missing', 'HTTP 404'),
    ('/status/500', 'input_missing', 'HTTP 500'),
    ('/short', 'input_missing', 'cannot be fetched'),
    ('/large', 'bad_input', '20,000,000'),
    ('/endless', 'bad_input', '20,000,000'),
    ('/zipped', 'bad_input', 'compressed'),
    ('/hop/4', 'bad_input', 'more than 3'),
    ('/to/file:///etc/passwd', 'bad_input', 'http'),
    ('/drip', 'input_missing', 'within'),
    ('/silent', 'input_missing', 'within'),
    ('/headers', 'input_missing', ''),
])
@pytest.mark.hostile('servers')
def test_pictures_that_do_not_come(web, tmp_path, path, code, words):
    began = time.monotonic()
    with pytest.raises(JobError) as e:
        fetch_url(web + path, tmp_path / 'a.png', allow_private=True, deadline_s=1, ports=ports(web))
    assert e.value.code == code, e.value
    assert words in e.value.message, e.value
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 5

@pytest.mark.parametrize('path', ['/good', '/hop/1', '/hop/3', '/umlaut'])
def test_pictures_that_come(web, tmp_path, path):
    assert fetch_url(web + path, tmp_path / 'a.png', allow_private=True, ports=ports(web)) == 7
    assert (tmp_path / 'a.png').read_bytes() == b'picture'

INSIDE = [
    'http://169.254.169.254/latest/meta-data/',
    'http://127.0.0.1:9000/',
    'http://10.0.0.8/',
    'http://[::1]/',
    'http://0x7f000001/',
    'http://inside.example/',
]

@pytest.mark.parametrize('target', INSIDE)
@pytest.mark.hostile('addresses')
def test_a_redirect_is_checked_like_the_address(web, target):
    "A public name may lead anywhere afterwards"
    def pretend(host, port):
        if host[0].isdigit() or ':' in host: return ['127.0.0.1'] # also 0x7f000001
        return ['10.1.1.1'] if host == 'inside.example' else ['1.1.1.1']
    with pytest.raises(JobError, match='bad_input: .*not public'): check_url(target, pretend)
    assert check_url('http://outside.example/', pretend)[3] == '1.1.1.1'

def test_the_checked_address_is_the_one_connected_to(web, tmp_path):
    "A name that answers differently the second time (DNS rebinding) is asked once per hop"
    answers = iter([['127.0.0.1'], ['127.0.0.1'], ['203.0.113.9']])
    asked = []
    def rebinding(host, port):
        asked.append(host)
        return next(answers)
    port = urlsplit(web).port
    url = f'http://rebind.example:{port}/hop/1'
    asks = {'allow_private': True, 'resolver': rebinding, 'ports': {port}}
    assert fetch_url(url, tmp_path / 'a.png', **asks) == 7
    assert asked == ['rebind.example'] * 2

@pytest.mark.parametrize('ip', [
    'fec0::1',
    '192.88.99.1',
    '100.64.0.1',
    '0.0.0.0',
    '224.0.0.1',
    '::ffff:10.0.0.1',
    '64:ff9b::a00:1',
    '2002:a00:1::',
    'fe80::1%eth0',
    '255.255.255.255',
])
@pytest.mark.hostile('addresses')
def test_addresses_that_are_not_public(ip): assert not is_public(ip)

@pytest.mark.parametrize('url, words', [
    ('http://a..b/x.png', 'names no host'),
    (f'http://{"a" * 64}.example/x.png', 'names no host'),
    ('http://[::1', 'is not an address'),
    ('http://h:99999/', 'is not an address'),
    ('http:///x.png', 'name a host'),
    ('ftp://h/x.png', 'must begin with'),
    ('http://u:p@h/x.png', 'user name'),
])
@pytest.mark.hostile('addresses')
def test_addresses_that_are_none(url, words):
    with pytest.raises(JobError, match=f'bad_input: .*{words}'): check_url(url)

@pytest.mark.hostile('addresses')
def test_one_private_answer_among_public_ones_is_enough_to_refuse():
    with pytest.raises(JobError, match='not public'):
        check_url('https://example.org/a.png', lambda host, port: ['1.1.1.1', '192.168.0.1'])

# what is stored or sent compressed

PLAIN = bytes(range(256)) * 200

def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()

UNPACKED = { # Content-Encoding, the bytes that lie there: all of them mean PLAIN
    'gzip': ('gzip', gzip.compress(PLAIN)),
    'gzip in capitals': ('GZIP', gzip.compress(PLAIN)),
    'its old name': ('x-gzip', gzip.compress(PLAIN)),
    'two members': ('gzip', gzip.compress(PLAIN[:100]) + gzip.compress(PLAIN[100:])),
    'zeros behind it': ('gzip', gzip.compress(PLAIN) + bytes(1000)),
    'deflate with its header': ('deflate', zlib.compress(PLAIN)),
    'deflate without': ('deflate', raw_deflate(PLAIN)),
    'gzip twice': ('gzip, gzip', gzip.compress(gzip.compress(PLAIN))),
    'two of a kind each': ('deflate,gzip', gzip.compress(zlib.compress(PLAIN))),
    'identity': ('identity', PLAIN),
    'how it was uploaded': ('aws-chunked', PLAIN),
    'uploaded so, and packed': ('gzip,aws-chunked', gzip.compress(PLAIN)),
}
REFUSED_PACKED = {
    'brotli': ('br', b'whatever', 'only gzip and deflate'),
    'zstd': ('zstd', b'\x28\xb5\x2f\xfd', 'only gzip and deflate'),
    'a word of its own': ('squeezed', b'x', 'only gzip and deflate'),
    'gzip in brotli': ('gzip, br', b'x', 'only gzip and deflate'),
    'three times': ('gzip, gzip, gzip', gzip.compress(gzip.compress(gzip.compress(PLAIN))), 'two at most'),
    'no gzip': ('gzip', PLAIN, 'damaged'),
    'half of it': ('gzip', gzip.compress(PLAIN)[:200], 'damaged'),
    'a bit off': ('gzip', gzip.compress(PLAIN)[:-8] + bytes(8), 'damaged'),
    'gzip once, said twice': ('gzip, gzip', gzip.compress(PLAIN), 'damaged'),
    'something behind it': ('gzip', gzip.compress(PLAIN) + b'more', 'damaged'),
    'nothing': ('gzip', b'\x1f', 'damaged'),
    'a bomb': ('gzip', gzip.compress(bytes(50_000_000)), 'more than 1,000,000 bytes'),
    'a bomb in a bomb': ('gzip, gzip', gzip.compress(gzip.compress(bytes(50_000_000))), 'more than 1,000,000 bytes'),
    'a bomb that unpacks to little': ('gzip, gzip', gzip.compress(gzip.compress(b'x') + bytes(10**7)), 'more than 1'),
}

class Strict(BaseHTTPRequestHandler):
    "An S3 server of one object, whose headers and bytes are the test's: what a real one cannot be made to send"
    protocol_version = 'HTTP/1.1'
    spared = True # an object that no bucket has is not there here either
    def do_GET(self):
        server = self.server
        begin = int(re.match(r'bytes=(\d+)-|', self.headers.get('Range', ''))[1] or 0)
        server.asked.append((self.command, begin))
        self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.spared and self.path.startswith('/media/no-such-object'): status, headers, body = 404, {}, b''
        else: status, headers, body = server.answer(self.command, begin)
        self.send_response(status)
        for name, value in ({'ETag': '"a"', 'Content-Length': len(body)} | headers).items():
            for each in value if isinstance(value, list) else [value] * (value is not None):
                self.send_header(name, str(each))
        self.end_headers()
        try: self.wfile.write(b'' if self.command == 'HEAD' else body)
        except OSError: pass # the other side has had enough
        if self.command == 'GET' and headers.get('Content-Length', '') != len(body): self.close_connection = True
    do_HEAD = do_PUT = do_GET
    def log_message(self, *args): pass

@contextmanager
def strict(answer):
    "Answers (status, headers, body) to (method, first byte)"
    with ThreadingHTTPServer(('127.0.0.1', 0), Strict) as server:
        server.answer = answer
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()

def at(server, bucket, work, **more) -> Store:
    said = {'MINIO_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'MINIO_BUCKET': 'media'} | more
    return Store(make_settings(bucket, work, **said), outage_s=30)

def packed_object(said, body):
    headers = {'Content-Encoding': said}
    return lambda method, begin: (206 if begin else 200, headers | {'Content-Length': len(body) - begin}, body[begin:])

def put_packed(store: Store, key: str, body: bytes) -> None:
    store.client.put_object(bucket_name=store.bucket, object_name=key, data=io.BytesIO(body), length=len(body),
                            metadata={'Content-Encoding': 'gzip'})

def picture_at(server, folder, **more) -> int:
    "Fetch a picture from a server on this machine"
    port = server.server_port
    return fetch_url(f'http://127.0.0.1:{port}/a.png', folder / 'a', allow_private=True, ports={port}, **more)

@pytest.mark.parametrize('name', UNPACKED)
def test_what_is_stored_compressed_is_unpacked(bucket, tmp_path, name):
    said, body = UNPACKED[name]
    with strict(packed_object(said, body)) as server:
        store = at(server, bucket, tmp_path)
        assert store.download('v.mp4', tmp_path / 'v', 'driving_video_path', 10**6) == len(PLAIN)
        assert (tmp_path / 'v').read_bytes() == PLAIN == store.read_bytes('v.mp4', 10**6)

@pytest.mark.parametrize('name', REFUSED_PACKED)
@pytest.mark.hostile('servers')
def test_what_cannot_be_unpacked_is_said_at_once(bucket, tmp_path, name):
    said, body, words = REFUSED_PACKED[name]
    with strict(packed_object(said, body)) as server:
        store = at(server, bucket, tmp_path)
        began = time.monotonic()
        def download(): return store.download('v.mp4', tmp_path / 'v', 'driving_video_path', 10**6)
        for read in (download, lambda: store.read_bytes('v.mp4', 10**6)):
            with pytest.raises(JobError, match='bad_input: ') as e: read()
            assert words in e.value.message, e.value
    assert time.monotonic() - began < 5, 'it was tried again'
    assert list(tmp_path.iterdir()) == [], 'it was tried again'
    assert len(server.asked) <= 4, 'it was tried again'

def test_a_real_server_keeps_the_encoding(store, tmp_path):
    body = gzip.compress(PLAIN)
    put_packed(store, 'packed.bin', body)
    assert store.download('packed.bin', tmp_path / 'v', 'driving_video_path', 10**6) == len(PLAIN)
    assert (tmp_path / 'v').read_bytes() == PLAIN

def test_a_compressed_download_goes_on_where_the_line_was_cut(store, bucket, tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    body = gzip.compress(data)
    put_packed(store, 'packed big.bin', body)
    seen = []
    with line_to(bucket, {0: 1_000_000, 1: 1_000_000}) as line:
        cut = Store(make_settings(bucket, tmp_path, MINIO_ENDPOINT=line.address))
        def progress(done, total): seen.append(done)
        cut.download('packed big.bin', tmp_path / 'v', 'driving_video_path', 10**7, progress=progress)
    assert (tmp_path / 'v').read_bytes() == data
    assert seen == sorted(seen)
    assert line.connections >= 3

WHOLE = gzip.compress(PLAIN)
def head(answer, then): return lambda method, n: answer if method == 'HEAD' else then

ON_THE_WAY = { # what a server, or a proxy before it, answers to (method, how many requests came), and what comes of it
    'it knows no ranges': (
        lambda method, n: (200, {'Content-Length': len(PLAIN)}, PLAIN if n > 2 else PLAIN[:20_000]),
        PLAIN,
    ),
    'it unpacks itself': (
        head((200, {'Content-Encoding': 'gzip'}, WHOLE), (200, {'Content-Length': None}, PLAIN)),
        PLAIN,
    ),
    'a proxy packs what is not packed': (
        head((200, {}, PLAIN), (200, {'Content-Encoding': 'gzip'}, WHOLE)),
        'storage_failed: .*on the way',
    ),
    'a proxy packs with what nobody knows': (
        head((200, {}, PLAIN), (200, {'Content-Encoding': 'br'}, b'x')),
        'bad_input: .*only gzip',
    ),
    'a size of 5000 digits': (lambda method, n: (200, {'Content-Length': '9' * 5000}, b''), 'bad_input: driving_video'),
    'a size below nothing': (lambda method, n: (200, {'Content-Length': '-5'}, b''), 'bad_input: driving_video'),
    'a size that is no number': (lambda method, n: (200, {'Content-Length': 'many'}, b''), 'bad_input: driving_video'),
}

@pytest.mark.parametrize('name', ON_THE_WAY)
@pytest.mark.hostile('servers')
def test_what_stands_between(bucket, tmp_path, name):
    answer, expected = ON_THE_WAY[name]
    counted = itertools.count(1)
    began = time.monotonic()
    with strict(lambda method, begin: answer(method, next(counted))) as server:
        def download():
            return at(server, bucket, tmp_path).download('v.mp4', tmp_path / 'v', 'driving_video_path', 10**6)
        if isinstance(expected, bytes):
            download()
            assert (tmp_path / 'v').read_bytes() == expected
        else:
            with pytest.raises(JobError, match=expected): download()
    assert time.monotonic() - began < 5

@pytest.mark.parametrize('name', [*UNPACKED, *REFUSED_PACKED])
@pytest.mark.hostile('servers')
def test_pictures_that_are_sent_compressed(bucket, tmp_path, name):
    said, body, *words = UNPACKED.get(name) or REFUSED_PACKED[name]
    with strict(lambda method, begin: (200, {'Content-Encoding': said}, body)) as server:
        def fetch():
            return picture_at(server, tmp_path, max_bytes=10**6)
        if not words: assert fetch() == len(PLAIN) and (tmp_path / 'a').read_bytes() == PLAIN
        else:
            with pytest.raises(JobError, match='bad_input: ') as e: fetch()
            assert words[0] in e.value.message
            assert list(tmp_path.iterdir()) == []

LENGTHS = { # Content-Length of a picture of 7 bytes -> what comes of it
    '7': 7,
    '007': 7,
    '7, 7': 7,
    None: 7,
    '0' * 5000 + '7': 7,
    '9' * 5000: 'more than',
    '99999999999999999999': 'more than',
    '20000001': 'more than',
    '-1': 'no number',
    '7, 8': 'no number',
    '7.0': 'no number',
    '+7': 'no number',
    '0x7': 'no number',
    'seven': 'no number',
    '\xb2': 'no number',
    '1e1': 'no number',
}

@pytest.mark.parametrize('length', LENGTHS, ids=lambda v: str(v)[:12])
@pytest.mark.hostile('servers')
def test_a_content_length_of_any_kind(bucket, tmp_path, length):
    with strict(lambda method, begin: (200, {'Content-Length': length, 'Connection': 'close'}, b'picture')) as server:
        def fetch():
            return picture_at(server, tmp_path, deadline_s=5)
        if LENGTHS[length] == 7: assert fetch() == 7
        else:
            with pytest.raises(JobError, match=f'bad_input: .*{LENGTHS[length]}') as e: fetch()
            assert len(str(e.value)) < 1000

TWICE = { # headers of a picture that are there twice -> what comes of it
    'the same length': ({'Content-Length': ['7', '7']}, None),
    'two lengths': ({'Content-Length': ['7', '8']}, 'no number'),
    'two encodings': ({'Content-Encoding': ['gzip', 'br']}, 'only gzip'),
}

@pytest.mark.parametrize('name', TWICE)
@pytest.mark.hostile('servers')
def test_a_header_that_is_there_twice(bucket, tmp_path, name):
    headers, words = TWICE[name]
    with strict(lambda method, begin: (200, headers | {'Connection': 'close'}, b'picture')) as server:
        if words is None: assert picture_at(server, tmp_path) == 7
        else:
            with pytest.raises(JobError, match=f'bad_input: .*{words}'): picture_at(server, tmp_path)

# settings of the bucket

MINIO = {'MINIO_ENDPOINT': 'http://h:9000', 'MINIO_ACCESS_KEY': 'AK', 'MINIO_SECRET_KEY': 'SK', 'MINIO_BUCKET': 'media'}
BAD = [ # variable, value, what its message says
    ('MINIO_ENDPOINT', 'localhost:9000 ', 'blank'),
    ('MINIO_ENDPOINT', ' h ', 'blank'),
    ('MINIO_ENDPOINT', 'h:9000\n', 'line end'),
    ('MINIO_ENDPOINT', 'h\t:9000', 'blank'),
    ('MINIO_ENDPOINT', 'h:port', 'port'),
    ('MINIO_ENDPOINT', 'h:', 'port'),
    ('MINIO_ENDPOINT', 'h:0', 'port'),
    ('MINIO_ENDPOINT', 'https://h:99999', 'port'),
    ('MINIO_ENDPOINT', 'h:-1', 'port'),
    ('MINIO_ENDPOINT', 'h:9000:9000', 'port'),
    ('MINIO_ENDPOINT', 'h#x', 'nothing may stand there'),
    ('MINIO_ENDPOINT', 'h?', 'nothing may stand there'),
    ('MINIO_ENDPOINT', 'h?X-Amz-Signature=hidden', 'nothing may stand there'),
    ('MINIO_ENDPOINT', 'http://h:9000/media', 'MINIO_BUCKET'),
    ('MINIO_ENDPOINT', 'http://http://h', 'MINIO_BUCKET'),
    ('MINIO_ENDPOINT', 's3://media', 'http://'),
    ('MINIO_ENDPOINT', 'http://u:hidden@h', 'user name'),
    ('MINIO_ENDPOINT', 'h\\x', 'backslash'),
    ('MINIO_ENDPOINT', '::1', 'brackets|names no host|port'),
    ('MINIO_ENDPOINT', 'http://[::1', 'brackets'),
    ('MINIO_ENDPOINT', 'http://', 'names no host'),
    ('MINIO_ENDPOINT', 'a..b', 'names no host'),
    ('MINIO_ENDPOINT', '-h', 'names no host'),
    ('MINIO_ENDPOINT', 'münchen.example', 'names no host'),
    ('MINIO_ENDPOINT', 'media.s3.eu-central-1.amazonaws.com', 'in front of the server'),
    ('MINIO_ENDPOINT', 'https://media.s3.amazonaws.com', 'in front of the server'),
    ('MINIO_ENDPOINT', 'other.s3-eu-west-1.amazonaws.com', 'in front of the server'),
    ('MINIO_ENDPOINT', 'media.s3.fr-par.scw.cloud', 'in front of the server'),
    ('MINIO_PUBLIC_ENDPOINT', 'media.s3.eu-central-1.amazonaws.com', 'in front of the server'),
    ('MINIO_PUBLIC_ENDPOINT', 'https://h/x', 'path'),
    ('MINIO_BUCKET', 'media/sub', 'slash'),
    ('MINIO_BUCKET', ' media', 'blank'),
    ('MINIO_BUCKET', 's3://media', 'slash'),
    ('MINIO_BUCKET', 'me..dia', 'no name'),
    ('MINIO_BUCKET', 'media?', 'no name'),
    ('MINIO_BUCKET', '-media', 'no name'),
    ('MINIO_BUCKET', 'm' * 64, 'no name'),
    ('MINIO_BUCKET', 'ab', '3 to 63'),
    ('MINIO_BUCKET', '10.0.0.1', 'IP address'),
    ('MINIO_BUCKET', 'medi\ud800', 'no name'),
    ('MINIO_ACCESS_KEY', 'hidden key', 'blank'),
    ('MINIO_SECRET_KEY', 'hidden\n', 'line end'),
    ('MINIO_SECRET_KEY', 'hidd\xe9n', 'ASCII'),
    ('MINIO_REGION', 'eu central', 'no name of a region'),
    ('MINIO_REGION', 'EU', 'no name of a region'),
    ('MINIO_USE_SSL', 'perhaps', 'boolean'),
    ('URL_PORTS', '8080;8443', 'integer'),
    ('URL_PORTS', '0', 'greater'),
    ('URL_PORTS', '65536', 'less'),
    ('URL_PORTS', ' , ', 'without anything'),
    ('INPUT_PREFIXES', ',', 'without anything'),
    ('INPUT_PREFIXES', 'people,/', '1 to 1024'),
    ('INPUT_PREFIXES', '../x', '".."'),
    ('LOG_LEVEL', 'loud', 'levels are'),
    ('RUNPOD_LOG_LEVEL', 'DEBUG', 'ALLOW_SDK_DEBUG'),
    ('RUNPOD_LOG_LEVEL', 'trace', 'ALLOW_SDK_DEBUG'),
    ('RUNPOD_DEBUG_LEVEL', 'debug', 'ALLOW_SDK_DEBUG'),
    ('RUNPOD_DEBUG_LEVEL', 'verbose', 'levels are'),
]

@pytest.mark.parametrize('variable, value, words', BAD)
@pytest.mark.hostile('settings')
def test_a_bad_value_is_refused_by_its_name(variable, value, words):
    with pytest.raises(SettingsError) as e: Store(load_settings(MINIO | {variable: value}))
    assert str(e.value).startswith(f'{variable}: '), e.value
    assert re.search(words, str(e.value)), e.value
    assert 'hidd' not in str(e.value)

GOOD = [ # variable, value, what a presigned address begins with
    ('MINIO_ENDPOINT', 'http://h:9000/', 'http://h:9000/media/k?'),
    ('MINIO_ENDPOINT', 'HTTP://h:9000', 'http://h:9000/media/k?'),
    ('MINIO_ENDPOINT', 'h', 'https://h/media/k?'),
    ('MINIO_ENDPOINT', 'minio_1:9000', 'https://minio_1:9000/media/k?'),
    ('MINIO_ENDPOINT', 'http://[::1]:9000', 'http://[::1]:9000/media/k?'),
    ('MINIO_ENDPOINT', 'media.example.org', 'https://media.example.org/media/k?'),
    ('MINIO_BUCKET', 'media/', 'http://h:9000/media/k?'),
    ('MINIO_BUCKET', 'Media_2.x', 'http://h:9000/Media_2.x/k?'),
    ('MINIO_ENDPOINT', 'lb-1.eu-west-1.elb.amazonaws.com', 'https://lb-1.eu-west-1.elb.amazonaws.com/media/k?'),
    ('RUNPOD_LOG_LEVEL', 'INFO', 'http://h:9000/media/k?'),
]

@pytest.mark.parametrize('variable, value, begins', GOOD)
def test_a_value_that_can_be_mended_is(variable, value, begins):
    assert Store(load_settings(MINIO | {variable: value})).presign('k', 60).startswith(begins)

def test_the_sdks_debug_level_when_it_is_wanted():
    assert load_settings(MINIO | {'RUNPOD_LOG_LEVEL': 'DEBUG', 'ALLOW_SDK_DEBUG': 'true'}).runpod_log_level == 'DEBUG'

REGIONS = [ # endpoint, the host and the region a request is signed for
    ('s3.eu-central-1.amazonaws.com', 'media.s3.eu-central-1.amazonaws.com', 'eu-central-1'),
    ('https://s3.ap-southeast-2.amazonaws.com/', 'media.s3.ap-southeast-2.amazonaws.com', 'ap-southeast-2'),
    ('s3-eu-west-1.amazonaws.com', 'media.s3.eu-west-1.amazonaws.com', 'eu-west-1'),
    ('https://s3-fips-us-gov-west-1.amazonaws.com', 'media.s3-fips.us-gov-west-1.amazonaws.com', 'us-gov-west-1'),
    ('s3.dualstack.us-east-2.amazonaws.com', 'media.s3.dualstack.us-east-2.amazonaws.com', 'us-east-2'),
    ('s3-fips.us-east-2.amazonaws.com', 'media.s3-fips.us-east-2.amazonaws.com', 'us-east-2'),
    ('s3-fips.dualstack.us-west-2.amazonaws.com', 'media.s3-fips.dualstack.us-west-2.amazonaws.com', 'us-west-2'),
    ('s3.us-gov-west-1.amazonaws.com', 'media.s3.us-gov-west-1.amazonaws.com', 'us-gov-west-1'),
    ('s3.cn-north-1.amazonaws.com.cn', 'media.s3.cn-north-1.amazonaws.com.cn', 'cn-north-1'),
    ('bucket.vpce-1a2b-5e6f.s3.eu-west-3.vpce.amazonaws.com', '', 'eu-west-3'),
    ('s3.amazonaws.com', '', 'us-east-1'),
    ('minio.eu-central-1.example.org', 'minio.eu-central-1.example.org', 'us-east-1'),
]

@pytest.mark.parametrize('endpoint, host, region', REGIONS)
def test_an_endpoint_is_signed_for_the_region_it_names(endpoint, host, region):
    settings = load_settings(MINIO | {'MINIO_ENDPOINT': endpoint})
    signed = urlsplit(Store(settings).presign('k', 60))
    assert settings.minio_region == region
    assert f'%2F{region}%2Fs3%2F' in signed.query
    assert signed.hostname.startswith(host)

def test_a_public_endpoint_is_signed_for_its_own_region():
    store = Store(load_settings(MINIO | {'MINIO_PUBLIC_ENDPOINT': 'https://s3.eu-north-1.amazonaws.com'}))
    assert '%2Feu-north-1%2Fs3%2F' in store.presign('k', 60)
    assert store.settings.minio_region == 'us-east-1'

def test_two_regions_are_refused():
    with pytest.raises(SettingsError, match='MINIO_REGION: is us-east-1, and MINIO_ENDPOINT names eu-central-1'):
        load_settings(MINIO | {'MINIO_ENDPOINT': 's3.eu-central-1.amazonaws.com', 'MINIO_REGION': 'us-east-1'})
    with pytest.raises(SettingsError, match='MINIO_REGION: not set'):
        load_settings(MINIO | {'MINIO_ENDPOINT': 's3.amazonaws.com.cn'})

XML = {'Content-Type': 'application/xml'}
SAID = { # what a server answers, and what the caller of `check` and `download` reads; nothing of it is tried again
    'moved for good': (301, {'x-amz-bucket-region': 'eu-central-1'}, b'', 'MINIO_REGION=eu-central-1'),
    'moved for now': (
        307,
        {'x-amz-bucket-region': 'eu-west-3', 'Location': '/elsewhere'},
        b'',
        'MINIO_REGION=eu-west-3',
    ),
    'a HEAD without words': (400, {'x-amz-bucket-region': 'ap-south-1'}, b'', 'MINIO_REGION=ap-south-1'),
    'a HEAD without anything': (400, {}, b'', 'check MINIO_REGION'),
    'forbidden from there': (403, {'x-amz-bucket-region': 'eu-north-1'}, b'', 'MINIO_REGION=eu-north-1'),
    'a clock an hour ahead': (403, {'Date': formatdate(time.time() - 3600, usegmt=True)}, b'', 'minutes ahead'),
    'a clock a day behind': (403, {'Date': formatdate(time.time() + 86400, usegmt=True)}, b'', 'minutes behind'),
    'a clock that is right': (403, {}, b'', 'MINIO_SECRET_KEY'),
    'yes to everything': (200, {}, b'<html>hello</html>', 'no S3 server; check MINIO_ENDPOINT'),
    'a page for a door': (302, {'Location': 'https://login.example/'}, b'', 'does not answer like S3'),
}

@pytest.mark.parametrize('name', SAID)
@pytest.mark.hostile('servers')
def test_what_a_server_says_about_the_settings(bucket, tmp_path, name):
    status, headers, body, words = SAID[name]
    class Dated(Strict):
        spared = False
        def date_time_string(self, timestamp=None): return headers.get('Date') or super().date_time_string(timestamp)
    began = time.monotonic()
    with ThreadingHTTPServer(('127.0.0.1', 0), Dated) as server:
        sent = {k: v for k, v in headers.items() if k != 'Date'}
        server.answer = lambda method, begin: (status, sent, body)
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(JobError, match='storage_failed: ') as e: at(server, bucket, tmp_path).check()
        server.shutdown()
    assert words in e.value.message, e.value
    assert time.monotonic() - began < 5, e.value
    assert len(server.asked) <= 2, e.value

def said(code: str, **more: str) -> bytes:
    "An error as S3 servers write it"
    fields = ''.join(f'<{k}>{v}</{k}>' for k, v in {'Code': code, 'Message': 'no', **more}.items())
    return f'<Error>{fields}</Error>'.encode()

ERRORS = { # the text of an error, and what is said
    'another region': (400, said('AuthorizationHeaderMalformed', Region='eu-west-3'), 'MINIO_REGION=eu-west-3'),
    'another address': (301, said('PermanentRedirect', Endpoint='media.s3-us-west-1.amazonaws.com'), 'us-west-1'),
    'the clock': (403, said('RequestTimeTooSkewed'), 'set the clock'),
    'a bucket that is full': (507, said('XMinioStorageFull'), 'XMinioStorageFull'),
    'plain HTTP to TLS': (400, b'Client sent an HTTP request to an HTTPS server.\n', 'MINIO_USE_SSL'),
    'no XML': (400, b'<Error', 'does not answer like S3'),
}

@pytest.mark.parametrize('name', ERRORS)
@pytest.mark.hostile('servers')
def test_what_an_error_says_about_the_settings(bucket, tmp_path, name):
    status, body, words = ERRORS[name]
    headers = XML if b'<' in body else {'Content-Type': 'text/plain'}
    with strict(lambda method, begin: (status, headers, body)) as server:
        store = at(server, bucket, tmp_path)
        store.outage_s = 0.5
        with pytest.raises(JobError, match='storage_failed: ') as e: store.write_bytes('k', b'x', 'text/plain')
    assert words in e.value.message, e.value
    assert not e.value.worker_unfit, e.value

def test_tls_asked_of_a_server_without_it(bucket, tmp_path):
    began = time.monotonic()
    with pytest.raises(JobError, match='storage_failed: .*MINIO_USE_SSL') as e:
        Store(make_settings(bucket, tmp_path, MINIO_USE_SSL='true')).check()
    assert time.monotonic() - began < 5
    assert 'http://' in e.value.message

@pytest.mark.parametrize('hours', [-1, 1])
def test_a_clock_that_is_off_is_told_from_a_wrong_secret(bucket, store, monkeypatch, hours):
    from minio import time as clock
    now = clock.utcnow
    monkeypatch.setattr('minio.time.utcnow', lambda: now() + timedelta(hours=hours))
    with pytest.raises(JobError, match='storage_failed: ') as e: store.write_bytes('late', b'x', 'text/plain')
    assert 'clock' in e.value.message, e.value

# addresses and ports

ADDRESSES = { # address -> may a worker connect to it?
    '8.8.8.8': True,
    '1.1.1.1': True,
    '93.184.215.14': True,
    '2606:4700:4700::1111': True,
    '2a00:1450:4001:829::200e': True,
    '192.0.1.1': True,
    '168.63.129.17': True,
    '172.32.0.1': True,
    '100.128.0.1': True,
    '::ffff:8.8.8.8': True,
    '64:ff9b::808:808': True,
    # ISATAP of a public address
    '2a00:1450::5efe:808:808': True,
    '192.0.0.0': False,
    '192.0.0.8': False,
    '192.0.0.9': False,
    '192.0.0.10': False,
    '192.0.0.170': False,
    '192.0.0.192': False,
    '168.63.129.16': False,
    '169.254.169.254': False,
    '100.100.100.200': False,
    '10.0.0.1': False,
    '172.31.255.255': False,
    '192.168.0.1': False,
    '127.8.8.8': False,
    '0.0.0.0': False,
    '198.18.0.1': False,
    '198.51.100.1': False,
    '203.0.113.1': False,
    '192.0.2.1': False,
    '239.0.0.1': False,
    '240.0.0.1': False,
    '255.255.255.255': False,
    '::': False,
    '::1': False,
    'fe80::1': False,
    'fc00::1': False,
    'fd00:ec2::254': False,
    'ff02::1': False,
    'fec0::1': False,
    '100::1': False,
    '5f00::1': False,
    '3fff::1': False,
    '3fff:fff::1': False,
    '2001:db8::1': False,
    '2001:2::1': False,
    '2001:20::1': False,
    '2001:1::1': False,
    '::ffff:10.0.0.1': False,
    '::ffff:168.63.129.16': False,
    '::ffff:0:10.0.0.1': False,
    '::10.0.0.1': False,
    '::808:808': False,
    # NAT64, and its local form
    '64:ff9b::a00:1': False,
    '64:ff9b::a83f:8110': False,
    '64:ff9b:1::808:808': False,
    # 6to4 and Teredo
    '2002:a00:1::1': False,
    '2002:808:808::1': False,
    '2001:0:808:808::1': False,
    # ISATAP
    '2a00:1450::5efe:a00:1': False,
    '2a00:1450::200:5efe:a00:1': False,
    '2a00:1450:0:1:0:5efe:7f00:1': False,
    '2a00:1450::5efe:a83f:8110': False,
    'fe80::5efe:808:808': False,
    'fe80::1%eth0': False,
    '2a00:1450::1%eth0': True,
    'no address': False,
    '': False,
}

@pytest.mark.parametrize('ip', ADDRESSES)
@pytest.mark.hostile('addresses')
def test_addresses_by_our_own_tables(ip, monkeypatch):
    for name in ('is_global', 'is_private', 'is_reserved'): # whatever the interpreter thinks of them
        for kind in ('IPv4Address', 'IPv6Address'):
            monkeypatch.setattr(f'ipaddress.{kind}.{name}', property(lambda self: pytest.fail('Python was asked')))
    assert is_public(ip) == ADDRESSES[ip]

PORTS = [ # address, ports besides 80 and 443, may it be asked?
    ('http://h.example/a.png', set(), True),
    ('https://h.example/a.png', set(), True),
    ('http://h.example:443/a.png', set(), True),
    ('https://h.example:80/a.png', set(), True),
    ('http://h.example:8080/a.png', {8080}, True),
    ('http://h.example:8080/a.png', set(), False),
    ('http://h.example:22/a.png', {8080}, False),
    ('http://h.example:0/a.png', set(), False),
    ('http://h.example:6379/a.png', set(), False),
]

@pytest.mark.parametrize('url, more, good', PORTS)
@pytest.mark.hostile('addresses')
def test_ports(url, more, good):
    def look(): return check_url(url, lambda host, port: ['1.1.1.1'], ports=WEB_PORTS | more)
    if good: assert look()[3] == '1.1.1.1'
    else:
        with pytest.raises(JobError, match=f'bad_input: .*port {urlsplit(url).port};.*URL_PORTS'): look()

def test_ports_of_a_worker():
    said = {'MINIO_ENDPOINT': 'h:9000', 'MINIO_PUBLIC_ENDPOINT': 'https://h.example:9443', 'URL_PORTS': '8080, 8443'}
    assert ports_of(load_settings(MINIO | said)) == {80, 443, 9000, 9443, 8080, 8443}
    assert ports_of(load_settings(MINIO | {'MINIO_ENDPOINT': 'h'})) == {80, 443}

@pytest.mark.hostile('addresses')
def test_a_redirect_to_another_port(web, tmp_path):
    with pytest.raises(JobError, match='bad_input: .*leads to port 6379'):
        fetch_url(f'{web}/to/http://127.0.0.1:6379/', tmp_path / 'a.png', allow_private=True, ports=ports(web))

# whose key

OWN = {}
LISTED = {'INPUT_PREFIXES': 'people/, templates/waves'}
KEYS = [ # settings, key, may a caller have it read?
    (OWN, 'anything/at/all.png', True),
    (OWN, 'a%20b/100%.png', True),
    (OWN, 'tracksuits/a.png', True),
    (OWN, 'mine/tracks/a.png', True),
    (OWN, 'tracks/mediapipe-1/a.track', False),
    (OWN, 'embeddings/x.safetensors', False),
    (OWN, 'tracks', False),
    (OWN, 'tracks%2Fa.track', False),
    (OWN, '%74racks/a.track', False),
    (OWN, '%2574racks/a.track', False),
    (OWN, 'Tracks/a.track', False),
    (OWN, 'people/%2e%2e/tracks/a.track', False),
    (OWN, 'people%5c..%5ctracks/a.track', False),
    (OWN, '%2Ftracks/a.track', False),
    (OWN, '.%2Ftracks/a.track', False),
    (OWN, 'ｔｒａｃｋｓ/a.track', False),
    ({'MODELS_MIRROR': 'weights/v1/'}, 'weights/v1/vae/x.safetensors', False),
    ({'MODELS_MIRROR': 'weights/v1/'}, 'weights/v2/x.png', True),
    (LISTED, 'people/ana.png', True),
    (LISTED, 'people/Ünal Şahin/портрет 1.png', True),
    (LISTED, 'people/100%.png', True),
    (LISTED, 'templates/waves/1.mp4', True),
    (LISTED, 'templates/waves', True),
    (LISTED, 'templates/other.mp4', False),
    (LISTED, 'templates/waves2/1.mp4', False),
    (LISTED, 'people-of-others/a.png', False),
    (LISTED, 'People/ana.png', False),
    (LISTED, 'x/people/ana.png', False),
    (LISTED, 'people/%2e%2e/secret.png', False),
    (LISTED, 'people/%252e%252e/secret.png', False),
    (LISTED, 'people%2F..%2Fsecret.png', False),
    (LISTED, 'people/%2e%2e%5csecret.png', False),
    (LISTED, 'people' + '%25' * 20 + '2e', False),
    (LISTED, 'avatars/j1.mp4', False),
]

@pytest.mark.parametrize('said, key, good', KEYS)
@pytest.mark.hostile('keys')
def test_whose_key_it_is(said, key, good):
    settings = load_settings(MINIO | said)
    if good: check_reach('driving_video_path', key, settings)
    else:
        with pytest.raises(JobError, match='bad_input: driving_video_path'):
            check_reach('driving_video_path', key, settings)

def test_the_workers_own_folders_are_those_it_writes_to():
    from wan_avatar.embeddings import embedding_key
    from wan_avatar.prompt import Embedding
    from wan_avatar.track import track_key
    written = track_key('ab' * 32, (1280, 720), 24), embedding_key(Embedding('a', 'b'))
    assert {key.partition('/')[0] for key in written} == set(CACHES)

# secrets

SECRET = 'X-Amz-Credential=hidden&X-Amz-Signature=hidden'
SIGNED = [ # addresses whose query, fragment or user must not be shown
    f'https://h.example/a.png?{SECRET}',
    f'https://h.example:22/a.png?{SECRET}',
    f'https://u:hidden@h.example/a.png?{SECRET}',
    'https://hidden@h.example/a.png',
    f'https://h.example/a b.png?{SECRET} hidden',
    'https://h.example/a.png#hidden',
    'https://h.example?hidden',
    f'ftp://h.example/a.png?{SECRET}',
    f'//h.example/a.png?{SECRET}',
    f'h.example/a.png?{SECRET}',
    f'HTTPS:\\\\h.example\\a.png?{SECRET}',
    'https:h.example?hidden',
    'u:hidden@h.example/a.png',
    f'https://[::1/a.png?{SECRET}',
    f'https://h.example:99999/a.png?{SECRET}',
    f'https://{"h" * 300}.example/a.png?{SECRET}',
]

@pytest.mark.parametrize('url', SIGNED)
@pytest.mark.hostile('secrets')
def test_no_message_shows_what_an_address_was_signed_with(store, tmp_path, url):
    def resolver(host, port): raise OSError
    works = (
        lambda: check_url(url, resolver),
        lambda: check_url(url, lambda host, port: ['10.0.0.1']),
        lambda: fetch_url(url, tmp_path / 'a', resolver=resolver),
        lambda: parse_job({'input_image_url': url, 'seed': url}),
        lambda: parse_job({'input_image_minio_path': url, url: 1}),
        lambda: parse_job({'input_image_url': {'a': [url]}}),
        lambda: parse_job(url),
        lambda: store.download(url, tmp_path / 'a', 'input_image_minio_path', 10),
        lambda: check_reach('driving_video_path', f'tracks/{url}', store.settings))
    for work in works:
        with pytest.raises(JobError) as e: work()
        assert 'hidden' not in str(e.value), e.value

@pytest.mark.parametrize('path', ['/status/403', '/short', '/hop/9', '/to/ftp://h/x', '/drip', '/zipped', '/large'])
@pytest.mark.hostile('secrets')
def test_no_answer_of_a_server_brings_it_up(web, tmp_path, path):
    with pytest.raises(JobError) as e:
        fetch_url(f'{web}{path}?{SECRET}', tmp_path / 'a', allow_private=True, deadline_s=0.5, ports=ports(web))
    assert 'hidden' not in str(e.value)

@pytest.mark.parametrize('url', SIGNED)
@pytest.mark.hostile('secrets')
def test_no_log_line_shows_it_either(url):
    from wan_avatar.worker import BareFormatter
    try: raise ValueError(f'Max retries exceeded with url: {quote(url, safe=":/?#[]@&=")}')
    except ValueError:
        asked = (quote(url, safe=':/?#[]@&=\\'),)
        record = logging.LogRecord('urllib3', logging.DEBUG, '', 0, 'asked for %s', asked, sys.exc_info())
    line = BareFormatter('%(message)s').format(record)
    assert 'hidden' not in line
    assert 'Max retries' in line

@pytest.mark.parametrize('arguments', [['--rp_log_level', 'DEBUG'], ['--rp_log_level=debug'], ['--rp_log_l', 'TRACE']])
def test_a_worker_that_is_told_to_print_requests_does_not_start(monkeypatch, arguments):
    from wan_avatar.worker import main
    sdk = {'RUNPOD_LOG_LEVEL': 'INFO', 'RUNPOD_SKIP_AUTO_SYSTEM_CHECKS': 'true', 'RUNPOD_SKIP_GPU_CHECK': 'true'}
    for name, value in (MINIO | sdk).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('sys.argv', ['worker', *arguments])
    with pytest.raises(SystemExit, match='--rp_log.*ALLOW_SDK_DEBUG'): main()

@pytest.mark.parametrize('arguments', [
    [],
    ['--rp_log_level', 'INFO'],
    ['--rp_serve_api'],
    ['--rp_log_level'],
    ['DEBUG'],
])
def test_a_worker_that_is_not_told_so_may_start(arguments):
    from wan_avatar.worker import loud_argument
    assert loud_argument(arguments) is None
