"""Hostile and broken inputs through the real handler: a clear error, nothing kept, no rendering"""
import io
import json
import struct
import tempfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import make_settings
from PIL import Image
from test_media import at_one_instant, clicking, with_larger_frames, without_decoder

from wan_avatar.handler import Handler
from wan_avatar.store import Store
from wan_avatar.worker import BareFormatter

pytestmark = pytest.mark.hostile('requests and inputs of whole jobs')

IMAGE = {'input_image_minio_path': 'in/astronaut.png'}
VIDEO = {'driving_video_path': 'in/single_face.mp4'}

def refused(service, files: dict[str, bytes], code: str, words: str, **job) -> None:
    "Run a job that must fail with this code and these words"
    for key, data in files.items(): service.store.write_bytes(key, data, 'application/octet-stream')
    service.reports.clear()
    answer = service.run('bad', **job)
    assert set(answer) == {'error'}, answer
    assert answer['error'].startswith(f'{code}: ') and words in answer['error'], answer['error']
    assert 'render' not in service.stages('bad')
    assert service.store.list('avatars/bad') == []
    assert not list((service.settings.work_dir / 'jobs').iterdir())

REQUESTS = {
    'no image': ({}, 'exactly one'),
    'two images': ({'input_image_url': 'https://example.org/a.png', **IMAGE}, 'exactly one'),
    'base64 in a field': ({'input_image_minio_path': 'data:image/png;base64,iVBORw0KGgo='}, 'base64'),
    'base64 in an unknown field': ({'image': 'iVBORw0KGgo' * 100, **IMAGE}, 'base64'),
    'key with ..': ({'input_image_minio_path': 'in/../secret.png'}, '".."'),
    'absolute key': ({'input_image_minio_path': '/etc/passwd'}, 'leading'),
    'video key with ..': ({**IMAGE, 'driving_video_path': '../x.mp4'}, 'driving_video_path'),
    'unknown field': ({**IMAGE, 'stpes': 4}, "'stpes' is not a field"),
    'wrong type': ({**IMAGE, 'seed': '7'}, 'seed'),
    'seconds as text': ({**IMAGE, 'max_seconds': '30'}, 'max_seconds'),
    'seconds as a flag': ({**IMAGE, 'max_seconds': True}, 'max_seconds'),
    'user id with a slash': ({**IMAGE, 'user_id': 'a/b'}, 'user_id'),
    'unknown profile': ({**IMAGE, **VIDEO, 'profile': '8k'}, 'profiles are'),
    'no video and no default': (IMAGE, 'DEFAULT_DRIVING_VIDEO_PATH'),
    'not an object': (None, 'JSON object'),
}

@pytest.mark.parametrize('name', REQUESTS)
def test_request(service, name):
    job, words = REQUESTS[name]
    answer = service.background.submit(service.handler({'id': 'bad', 'input': job})).result(timeout=30)
    assert answer['error'].startswith('bad_input: ')
    assert words in answer['error']

def test_request_in_the_store_sense(service):
    refused(service, {}, 'input_missing', 'input_image_minio_path', input_image_minio_path='in/nobody.png', **VIDEO)
    refused(service, {}, 'input_missing', 'driving_video_path', driving_video_path='in/nothing.mp4', **IMAGE)

@pytest.mark.parametrize('variable, value, words', [
    ('MINIO_SECRET_KEY', 'wrong', 'credentials'),
    ('MINIO_BUCKET', 'absent', 'absent'),
])
def test_store_that_refuses(service, bucket, tmp_path, variable, value, words):
    settings = make_settings(bucket, tmp_path, **{variable: value})
    handler = Handler(type(service.context)(settings, Store(settings), service.comfy, {}), service.note)
    answer = service.background.submit(handler({'id': 'bad', 'input': {**IMAGE, **VIDEO}})).result(timeout=60)
    assert answer['error'].startswith('storage_failed: ')
    assert words in answer['error']
    assert 'wrong' not in answer['error']

def png_header(width: int, height: int) -> bytes:
    "A PNG that claims a size and holds next to nothing"
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) +
            chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))

def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

def grey(size=(256, 256)) -> Image.Image: return Image.new('RGB', size, (127, 127, 127))

IMAGES = {
    'text': (b'this is not a picture', 'input_unreadable'),
    'truncated': (encoded(Image.effect_noise((256, 256), 50), 'PNG')[:9000], 'input_unreadable'),
    'one pixel': (encoded(grey((1, 1)), 'PNG'), 'input_unreadable'),
    'decompression bomb': (png_header(30000, 30000), 'input_unreadable'),
    'nobody in it': (encoded(grey(), 'PNG'), 'no_person'),
    'empty': (b'', 'input_unreadable'),
}

@pytest.mark.parametrize('name', IMAGES)
def test_image(service, name):
    data, code = IMAGES[name]
    words = 'image' if code == 'no_person' else ''
    refused(service, {'bad/picture': data}, code, words, input_image_minio_path='bad/picture', **VIDEO)

def test_a_picture_of_five_people(service, samples):
    files = {'bad/group': (samples / 'group.jpg').read_bytes()}
    words = 'the picture shows 5 people'
    refused(service, files, 'bad_input', words, input_image_minio_path='bad/group', **VIDEO)

def odd_pictures(path) -> dict[str, bytes]:
    "The astronaut in forms that must work: the same person each time"
    person = Image.open(path).convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6 # turned by a quarter; a viewer turns it back
    deep = np.asarray(person.convert('L')).astype(np.uint16) * 257
    transparent = person.convert('RGBA')
    transparent.putalpha(Image.new('L', person.size, 255))
    turned = person.transpose(Image.Transpose.ROTATE_90)
    more = [grey(person.size).quantize()]
    return {
        'animated': encoded(person.quantize(), 'GIF', save_all=True, append_images=more),
        'CMYK': encoded(person.convert('CMYK'), 'JPEG'),
        '16-bit': encoded(Image.fromarray(deep), 'PNG'),
        'EXIF-rotated': encoded(turned, 'JPEG', exif=exif),
        'transparent': encoded(transparent, 'PNG'),
    }

@pytest.mark.parametrize('name', ['animated', 'CMYK', '16-bit', 'EXIF-rotated', 'transparent'])
def test_odd_pictures_work(service, samples, name):
    key = f'odd pictures/{name} – портрет.bin' # and keys may hold spaces and any script
    service.store.write_bytes(key, odd_pictures(samples / 'astronaut.png')[name], 'application/octet-stream')
    answer = service.run(f'odd-{name}', input_image_minio_path=key, driving_video_path='in/brief.mp4')
    assert answer.get('width') == 1280, answer

def video(frames: int, size=(320, 240), rate=24, audio=False) -> bytes:
    out = io.BytesIO()
    with av.open(out, 'w', format='mp4') as container:
        if size:
            stream = container.add_stream('libx264', rate=rate, options={'preset': 'ultrafast'})
            stream.width, stream.height = size
            stream.pix_fmt = 'yuv420p'
            rng = np.random.default_rng(0)
            for _ in range(frames):
                pixels = np.zeros((size[1], size[0], 3), np.uint8)
                if frames < 100: pixels = rng.integers(0, 255, pixels.shape, dtype=np.uint8)
                picture = av.VideoFrame.from_ndarray(pixels)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        if audio:
            track = container.add_stream('aac', rate=48000)
            for n in range(20):
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
                sound.sample_rate = 48000
                sound.pts = n * 1024
                container.mux(track.encode(sound))
            container.mux(track.encode(None))
    return out.getvalue()

def endless_video() -> bytes: return video(300, size=(64, 64), rate=1) # five minutes

def written_by(make, name: str, *args) -> bytes:
    with tempfile.TemporaryDirectory() as folder: return make(Path(folder) / name, *args).read_bytes()

VIDEOS = {
    'text': (lambda: b'not a video at all', 'input_unreadable', ''),
    'audio only': (lambda: video(0, size=None, audio=True), 'input_unreadable', ''),
    'zero frames': (lambda: video(0), 'input_unreadable', ''),
    'truncated in the middle': (lambda: video(60)[:200_000], 'input_unreadable', ''),
    'one frame of noise': (lambda: video(1), 'no_person', 'driving'),
    'five minutes': (endless_video, 'too_long', '60'),
    'empty': (lambda: b'', 'input_unreadable', ''),
    'vast frames behind a small header': (
        lambda: written_by(with_larger_frames, 'a.mov', 'png', 'rgb24', 12000, (3,)), 'input_unreadable', '4K'
    ),
    'sound packets at one instant': (
        lambda: written_by(at_one_instant, 'a.mkv', 20_000), 'input_unreadable', 'more sound'
    ),
}

@pytest.mark.parametrize('name', VIDEOS)
def test_video(service, name):
    make, code, words = VIDEOS[name]
    refused(service, {'bad/video': make()}, code, words, driving_video_path='bad/video', **IMAGE)

def test_video_without_a_person(service):
    refused(service, {}, 'no_person', 'driving', driving_video_path='in/no_face.mp4', **IMAGE)

def with_spatial_sound(source, target):
    "A video as a phone makes it: beside plain sound a track that nothing here decodes"
    with av.open(str(source)) as i, av.open(str(target.with_suffix('.two')), 'w', format='mp4') as o:
        track = o.add_stream_from_template(i.streams.video[0])
        sounds = [o.add_stream('aac', rate=48000, layout='mono') for _ in range(2)]
        for packet in i.demux(video=0):
            if packet.dts is None: continue
            packet.stream = track
            o.mux(packet)
        for sound in sounds: o.mux(sound.encode(clicking(0.01, 0.1)[0]) + sound.encode())
    return without_decoder(target.with_suffix('.two'), target)

def test_one_frame_with_a_person_works(service, samples, tmp_path):
    from conftest import cut
    source = with_spatial_sound(cut(samples / 'pexels.mp4', 1, tmp_path), tmp_path / 'phone.mov')
    service.store.upload(source, 'in/one.mp4', 'video/mp4')
    answer = service.run('one', driving_video_path='in/one.mp4', **IMAGE)
    assert answer.get('frames') == 1, answer
    assert answer['has_audio']
    assert len(answer['notes']) == 1
    assert 'nothing here decodes' in answer['notes'][0]
    assert json.loads(service.store.read_bytes(answer['minio_key'] + '.json', 10**6))['notes'] == answer['notes']

URLS = {
    'loopback': 'http://127.0.0.1:1/a.png',
    'loopback by name': 'http://localhost/a.png',
    'decimal loopback': 'http://2130706433/a.png',
    'IPv6 loopback': 'http://[::1]/a.png',
    'mapped loopback': 'http://[::ffff:127.0.0.1]/a.png',
    'private 10': 'http://10.0.0.1/a.png',
    'private 172': 'http://172.16.0.1/a.png',
    'private 192': 'http://192.168.1.1/a.png',
    'metadata': 'http://169.254.169.254/latest/meta-data/',
    'file': 'file:///etc/passwd',
    'ftp': 'ftp://example.org/a.png',
    'credentials in it': 'http://user:pass@127.0.0.1/a.png',
}

@pytest.mark.parametrize('name', URLS)
def test_url(service, name):
    refused(service, {}, 'bad_input', 'input_image_url', input_image_url=URLS[name], **VIDEO)

class Trouble(BaseHTTPRequestHandler):
    "A picture that never ends, one that comes a byte at a time, and one that is somewhere it must not be"
    def do_GET(self):
        self.send_response(302 if self.path == '/moved' else 200)
        if self.path == '/moved': self.send_header('Location', 'file:///etc/passwd')
        self.end_headers()
        try:
            while self.path == '/endless': self.wfile.write(bytes(1 << 20))
            while self.path == '/slow' and not self.server.over.wait(0.1): self.wfile.write(b'x')
        except OSError: pass # the other side has had enough
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def trouble():
    with ThreadingHTTPServer(('127.0.0.1', 0), Trouble) as server:
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.over.set()
        server.shutdown()

@pytest.fixture(scope='module')
def fetching(service, bucket, trouble, tmp_path_factory):
    "Starts jobs whose pictures come from there, on a worker that may reach it"
    port = trouble.rpartition(':')[2]
    settings = make_settings(bucket, tmp_path_factory.mktemp('trouble'), ALLOW_PRIVATE_URLS='true', URL_PORTS=port)
    handler = Handler(type(service.context)(settings, service.store, service.comfy, {}), service.note)
    def start(path):
        event = {'id': path.strip('/'), 'input': {'input_image_url': trouble + path, **VIDEO}}
        return service.background.submit(handler(event))
    return start

@pytest.fixture(scope='module', autouse=True)
def slow(fetching): return fetching('/slow') # its 30 s pass while other tests run

@pytest.mark.parametrize('path, words', [('/endless', '20,000,000 bytes'), ('/moved', 'http://')])
def test_pictures_from_hostile_servers(fetching, path, words):
    answer = fetching(path).result(timeout=40)
    assert answer['error'].startswith('bad_input: ') and words in answer['error'], answer

def test_a_picture_that_drips_is_given_up_after_thirty_seconds(slow):
    assert 'did not arrive within 30 s' in slow.result(timeout=60)['error']

# ---- whose key, which port, and what is signed

class SignedPage(BaseHTTPRequestHandler):
    "The astronaut, for whoever has the signature"
    def do_GET(self):
        self.send_response(200 if 'X-Amz-Signature=hidden' in self.path else 403)
        self.end_headers()
        self.wfile.write(self.server.picture)
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def limited(service, bucket, samples, tmp_path_factory):
    "Runs jobs on a worker that reads from two folders and a port besides"
    with ThreadingHTTPServer(('127.0.0.1', 0), SignedPage) as web:
        web.picture = (samples / 'astronaut.png').read_bytes()
        threading.Thread(target=web.serve_forever, daemon=True).start()
        said = {'INPUT_PREFIXES': 'in/, templates', 'DEFAULT_DRIVING_VIDEO_PATH': 'own/default.mp4',
                'ALLOW_PRIVATE_URLS': 'true', 'URL_PORTS': str(web.server_port)}
        settings = make_settings(bucket, service.settings.work_dir, **said)
        handler = Handler(type(service.context)(settings, service.store, service.comfy, {}), service.note)
        def run(job_id, **job):
            return service.background.submit(handler({'id': job_id, 'input': job})).result(timeout=120)
        run.web = f'http://127.0.0.1:{web.server_port}'
        yield run
        web.shutdown()

REACH = { # what a caller asks for, and what he is told
    'a picture elsewhere': ({'input_image_minio_path': 'x/ana.png', **VIDEO}, 'input_image_minio_path', 'PREFIXES'),
    'a video elsewhere': ({**IMAGE, 'driving_video_path': 'other/talk.mp4'}, 'driving_video_path', 'in/, templates/'),
    'encoded': ({**IMAGE, 'driving_video_path': 'in/%2e%2e/other/talk.mp4'}, 'driving_video_path', 'INPUT_PREFIXES'),
    'a result': ({**IMAGE, 'driving_video_path': 'avatars/alone.mp4'}, 'driving_video_path', 'INPUT_PREFIXES'),
    'a track': ({**IMAGE, 'driving_video_path': 'tracks/x.track'}, 'driving_video_path', 'a file of the worker itself'),
    'a port': ({'input_image_url': 'http://127.0.0.1:6379/?token=hidden', **VIDEO}, 'input_image_url', 'URL_PORTS'),
    'a user name': ({'input_image_url': 'http://u:hidden@127.0.0.1/a.png', **VIDEO}, 'input_image_url', 'user name'),
}

@pytest.mark.parametrize('name', REACH)
def test_what_a_limited_worker_reads(limited, service, name):
    asked, field, words = REACH[name]
    answer = limited('reach', **asked)
    assert answer['error'].startswith(f'bad_input: {field}'), answer
    assert words in answer['error'], answer
    assert 'hidden' not in answer['error'], answer
    assert service.store.list('avatars/reach') == []

def test_a_track_is_nobodys_input_on_any_worker(service):
    refused(service, {}, 'bad_input', 'a file of the worker itself', driving_video_path='tracks/x.track', **IMAGE)

def test_the_operators_own_default_may_lie_anywhere(limited, service):
    service.store.write_bytes('own/default.mp4', service.store.read_bytes('in/brief.mp4', 10**8), 'video/mp4')
    assert limited('default', **IMAGE).get('frames') == 12

def test_a_signed_address_shows_up_nowhere(limited, service, caplog):
    caplog.set_level('DEBUG')
    service.reports.clear()
    picture = f'{limited.web}/ana.png'
    brief = {'driving_video_path': 'in/brief.mp4', 'presign': True}
    answer = limited('signed', input_image_url=f'{picture}?X-Amz-Signature=hidden', **brief)
    refusal = limited('unsigned', input_image_url=f'{picture}?X-Amz-Sig=hidden', **brief)
    assert answer.pop('presigned_url')
    assert 'input_missing' in refusal['error']
    assert 'HTTP 403' in refusal['error']
    manifest = service.store.read_bytes('avatars/signed.mp4.json', 10**7).decode()
    lines = [BareFormatter('%(message)s').format(r) for r in caplog.records]
    assert lines
    said = manifest, str(answer), str(refusal), str(service.reports), *lines
    assert not [text for text in said if 'hidden' in text or 'X-Amz-Signature=' in text.replace('Signature=…', '')]

ODD_REQUESTS = { # what JSON can hold, and the words of its refusal
    'half a character in a key': ({'input_image_minio_path': 'in/\ud800.png', **VIDEO}, 'input_image_minio_path'),
    'half a character in the key of the video': ({**IMAGE, 'driving_video_path': '\udfff.mp4'}, 'driving_video_path'),
    'half a character in an address': ({'input_image_url': 'https://h.example/\ud800', **VIDEO}, 'input_image_url'),
    'half a character in a host': ({'input_image_url': 'https://\ud800.example/a.png', **VIDEO}, 'input_image_url'),
    'half a character for a field': ({**IMAGE, **VIDEO, '\ud800': 1}, 'unicode'),
    'half a character in a name': ({**IMAGE, **VIDEO, 'user_id': '\ud800'}, 'user_id'),
    '40,000 unknown fields': ({**IMAGE, **VIDEO, **{f'{n} {"x" * 99}': n for n in range(40_000)}}, 'are not fields'),
    'a seed of 5000 digits': ({**IMAGE, **VIDEO, 'seed': 10**5000}, 'seed'),
    'seconds of 5000 digits': ({**IMAGE, **VIDEO, 'max_seconds': 10**5000}, 'max_seconds'),
    'seconds that are no number': ({**IMAGE, **VIDEO, 'max_seconds': float('nan')}, 'max_seconds'),
    'a port of 1500 digits': ({'input_image_url': f'https://h.example:{"9" * 1500}/a', **VIDEO}, 'input_image_url'),
}

@pytest.mark.parametrize('name', ODD_REQUESTS)
def test_odd_requests_are_bad_input(service, name):
    asked, words = ODD_REQUESTS[name]
    answer = service.background.submit(service.handler({'id': 'bad', 'input': asked})).result(timeout=30)
    assert answer['error'].startswith('bad_input: '), answer
    assert words in answer['error'], answer
    assert len(answer['error']) <= 1000, answer
    answer['error'].encode() # a terminal and JSON take it
