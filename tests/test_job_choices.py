"What a job may choose beside picture and video: a video by its address, a stretch of it, a quality"
import functools
import io
import json
import re
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from conftest import SAMPLES, cut
from PIL import Image

from wan_avatar.clocks import Stretch
from wan_avatar.frames import read_frames
from wan_avatar.inputs import SIZES
from wan_avatar.job import JobError, Variant, parse_job
from wan_avatar.mp4 import Encoder
from wan_avatar.normalise import normalise_video
from wan_avatar.run import profile_here
from wan_avatar.samples import draw_test_video, read_test_picture
from wan_avatar.track import track_key
from wan_avatar.workflow import PROFILES, TINY, WAN, profile_graph, with_quality

IMAGE = {'input_image_minio_path': 'in/face.png'}

@pytest.fixture(scope='module')
def web(tmp_path_factory):
    "A web server with a short driving video, and something that is none"
    folder = tmp_path_factory.mktemp('web')
    cut(SAMPLES / 'pexels.mp4', 12, tmp_path_factory.mktemp('cut')).rename(folder / 'brief.mp4')
    (folder / 'page.html').write_text('<html>')
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()

@pytest.fixture
def open_service(service, web):
    "The service, allowed to fetch from this machine for the length of a test"
    settings = service.context.settings
    may = {'allow_private_urls': True, 'url_ports': (int(web.rpartition(':')[2]),)}
    object.__setattr__(service.context, 'settings', settings.model_copy(update=may))
    yield service
    object.__setattr__(service.context, 'settings', settings)

def test_a_driving_video_by_its_address_is_the_same_video(open_service, web):
    by_key = open_service.run('choice-key', **IMAGE, driving_video_path='in/brief.mp4', seed=1)
    by_url = open_service.run('choice-url', **IMAGE, driving_video_url=f'{web}/brief.mp4', seed=1)
    assert 'error' not in by_url and by_url['sha256'] == by_key['sha256'] and by_url['frames'] == 12

ADDRESSES = [ # address, code, what is said
    ('http://169.254.169.254/latest/meta-data/', 'bad_input', 'not public'),
    ('http://127.0.0.1:8188/', 'bad_input', 'driving_video_url'),
    ('http://[::1]/a.mp4', 'bad_input', 'not public'),
    ('http://10.0.0.1/a.mp4', 'bad_input', 'not public'),
    ('http://example.org:6379/a.mp4', 'bad_input', 'leads to port 6379'),
    ('http://ana:pw@example.org/a.mp4', 'bad_input', 'must not carry a user name'),
    ('file:///etc/passwd', 'bad_input', 'URL scheme'),
    ('ftp://example.org/a.mp4', 'bad_input', 'URL scheme'),
]

@pytest.mark.parametrize('url, code, says', [pytest.param(*a, id=a[0]) for a in ADDRESSES])
def test_an_address_is_guarded_as_the_pictures_is(service, url, code, says):
    answer = service.run(f'guarded-{len(url)}', **IMAGE, driving_video_url=url)
    said = answer['error']
    assert said.startswith(f'{code}: driving_video_url') and says in said and 'pw' not in said

FETCHED = [
    ('/page.html', 'input_unreadable', 'is text, not a video'),
    ('/none.mp4', 'input_missing', 'driving_video_url'),
]

@pytest.mark.parametrize('path, code, says', FETCHED, ids=[f[0] for f in FETCHED])
def test_what_an_address_gives_is_checked(open_service, web, path, code, says):
    answer = open_service.run(f'fetched-{path[1:5]}', **IMAGE, driving_video_url=f'{web}{path}?X-Amz-Signature=5ec7e7')
    assert answer['error'].startswith(f'{code}:') and says in answer['error'] and '5ec7e7' not in answer['error']

REFUSED = [ # fields, what is said
    ({'driving_video_path': 'a.mp4', 'driving_video_url': 'https://example.org/a.mp4'}, 'not both'),
    ({'driving_video_url': 'a.mp4'}, 'driving_video_url'),
    ({'driving_video_url': 5}, 'driving_video_url'),
    ({'quality': 'perfect'}, "quality 'perfect'"),
    ({'quality': 4}, 'quality 4'),
]

@pytest.mark.parametrize('fields, says', [pytest.param(*r, id=r[1]) for r in REFUSED])
def test_fields_that_do_not_fit(fields, says):
    with pytest.raises(JobError) as e: parse_job(IMAGE | fields)
    assert e.value.code == 'bad_input' and says in e.value.message

QUALITIES = [ # profile, quality, steps, sampler, strength of the distillation
    (WAN, None, 6, 'euler', 1.0), (WAN, 'fast', 4, 'euler', 1.0), (WAN, 'standard', 6, 'euler', 1.0),
    (WAN, 'best', 20, 'dpmpp_2m', 0.0), (TINY, 'best', 20, 'dpmpp_2m', 0.0)]

@pytest.mark.parametrize('profile, quality, steps, sampler, strength', QUALITIES)
def test_a_quality_is_steps_and_loras_of_the_profile(profile, quality, steps, sampler, strength):
    graph = profile_graph(with_quality(profile, quality))
    assert (graph['sample']['inputs']['steps'], graph['sample']['inputs']['sampler_name']) == (steps, sampler)
    assert graph['distill']['inputs']['strength_model'] == strength

@pytest.mark.parametrize('name', ['draft', 'wan22-animate-reference'])
def test_a_profile_without_qualities_says_who_has_them(name):
    says = f'quality .best.: profile {name} has none; leave it out, or take wan22-animate or'
    with pytest.raises(JobError, match=says): with_quality(PROFILES[name], 'best')

def test_the_draft_refuses_it_before_anything_is_fetched(service):
    job = {'input_image_minio_path': 'in/none.png', 'driving_video_path': 'in/brief.mp4', 'quality': 'best'}
    answer = service.run('no-quality', **job)
    assert answer['error'].startswith('bad_input: quality')

def test_a_variant_goes_on_from_the_quality(service):
    settings = service.settings.model_copy(update={'allow_variants': True, 'profile': WAN.name})
    made = profile_here(settings, variant=Variant(values={'relight_strength': 0.5}), quality='fast')
    assert (made.values['steps'], made.values['relight_strength']) == (4, 0.5)

# a stretch of the driving video

@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "Four seconds with numbered frames, and a click in the sound at 2.5 s"
    folder = tmp_path_factory.mktemp('long')
    return draw_test_video(folder / 'long.mp4', 4, 24, (1280, 720), audio='aac', flash_at=2.5)

STRETCHES = [ # start_seconds, duration_seconds, first frame of the source, frames
    (0, None, 0, 96), (0, 1, 0, 24), (1, None, 24, 72), (1.5, 1, 36, 24), (3.5, 60, 84, 12), (0, 0.01, 0, 1),
    (3.95, None, 95, 1), (2.02, 0.5, 48, 12)]

@pytest.mark.parametrize('start, seconds, first, count', STRETCHES)
def test_a_stretch_is_taken_frame_by_frame(long, tmp_path, start, seconds, first, count):
    clip = normalise_video(long, tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60, stretch=Stretch(start, seconds))
    seen = [read_test_picture(f) for f in read_frames(clip.path)]
    assert seen == list(range(first, first + count)) and clip.frames == count

def test_the_sound_goes_with_it(long, tmp_path):
    clip = normalise_video(long, tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60, stretch=Stretch(2, 1))
    with av.open(str(clip.audio)) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert abs(np.abs(sound).argmax() / 48000 - 0.5) < 0.1 and abs(clip.audio_s - 1) < 0.05

LIMITS = [ # max_seconds, start, duration, code
    (3, 0, None, 'too_long'), (3, 0.5, None, 'too_long'), (3, 1, None, None), (3, 0, 3, None), (1, 2, 1, None),
    (60, 4, None, 'bad_input'), (60, 9, 1, 'bad_input')]

@pytest.mark.parametrize('most, start, seconds, code', LIMITS)
def test_max_seconds_applies_to_the_stretch(long, tmp_path, most, start, seconds, code):
    targets = tmp_path / 'v.y4m', tmp_path / 'a.m4a'
    def take(): return normalise_video(long, *targets, most, stretch=Stretch(start, seconds))
    if code is None: assert take().frames
    else:
        with pytest.raises(JobError) as e: take()
        assert e.value.code == code

def test_a_frame_that_stays_is_the_first_of_a_stretch(tmp_path):
    "Pictures that came up before the stretch begins, and a rate that is not ours"
    source = draw_test_video(tmp_path / 'slow.mkv', times=[0, 0.5, 2.0, 2.5])
    clip = normalise_video(source, tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60, (320, 240), stretch=Stretch(1.0, 1.5))
    seen = [read_test_picture(f) for f in read_frames(clip.path)]
    assert seen == [1] * 24 + [2] * 12

def test_a_job_takes_a_stretch_and_its_track_is_its_own(service, long):
    service.store.upload(SAMPLES / 'pexels.mp4', 'in/whole.mp4', 'video/mp4')
    job = IMAGE | {'driving_video_path': 'in/whole.mp4', 'seed': 1, 'start_seconds': 2, 'duration_seconds': 0.5}
    one = service.run('stretch-1', **job)
    other = service.run('stretch-2', **job | {'start_seconds': 5})
    assert (one['frames'], other['frames']) == (12, 12) and one['sha256'] != other['sha256']
    told = [json.loads(service.store.read_bytes(f'{a["minio_key"]}.json', 10**6)) for a in (one, other)]
    assert [(m['start_s'], m['stretch_s']) for m in told] == [(2, 0.5), (5, 0.5)]
    assert told[0]['track_object'].endswith('-from48-for12.track')
    assert told[1]['track_object'].endswith('-from120-for12.track')
    again = service.run('stretch-3', **job)
    assert again['sha256'] == one['sha256'] and again['timings']['track'] < one['timings']['track']

TIMES = [{'start_seconds': -1}, {'start_seconds': 3601}, {'start_seconds': float('nan')}, {'duration_seconds': 0},
         {'duration_seconds': 90}, {'duration_seconds': 601, 'max_seconds': 600}, {'start_seconds': '1'}]

@pytest.mark.parametrize('fields', TIMES, ids=str)
def test_times_that_cannot_be(fields):
    with pytest.raises(JobError, match='bad_input') as e: parse_job(IMAGE | {'driving_video_path': 'a.mp4'} | fields)
    assert next(iter(fields)) in e.value.message

def test_tracks_of_stretches_have_keys_of_their_own():
    stretches = [Stretch(), Stretch(1), Stretch(0, 1), Stretch(1, 1), Stretch(2, 1)]
    keys = {track_key('ab' * 32, (1280, 720), 24, stretch=s) for s in stretches}
    assert len(keys) == 5 and all(key.startswith('tracks/') and '..' not in key for key in keys)

# upright

@pytest.fixture(scope='module')
def upright(tmp_path_factory):
    "A face in a video of 9:16, 12 frames"
    path = tmp_path_factory.mktemp('upright') / 'upright.mp4'
    with Encoder(path, size=(360, 640)) as encoder:
        for frame in read_frames(SAMPLES / 'single_face.mp4', 0, 12):
            encoder.write(np.asarray(Image.fromarray(frame).crop((219, 0, 421, 360)).resize((360, 640))))
    return path

SIZED = [ # source, size of the job, size of the result, content without bars
    ('upright', '1280x720', (1280, 720), 405), ('upright', '720x1280', (720, 1280), 720),
    ('upright', 'auto', (720, 1280), 720), ('long', 'auto', (1280, 720), 1280), ('long', '720x1280', (720, 1280), 720)]

@pytest.mark.parametrize('source, asked, size, width', SIZED)
def test_a_size_of_the_result(request, tmp_path, source, asked, size, width):
    video = request.getfixturevalue(source)
    clip = normalise_video(video, tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60, SIZES[asked], stretch=Stretch(0, 0.1))
    assert clip.size == size and abs(clip.content.width - width) <= 2
    assert next(read_frames(clip.path)).shape == (size[1], size[0], 3)

TURNED = [(0, Fraction(1), (1280, 720)), (90, Fraction(1), (720, 1280)), (0, Fraction(1, 2), (720, 1280)),
          (270, Fraction(1, 2), (1280, 720)), (0, Fraction(3, 4), (1280, 720)), (90, Fraction(3, 4), (1280, 720))]

@pytest.mark.parametrize('rotation, sar, size', TURNED)
def test_what_counts_is_how_it_is_shown(tmp_path, rotation, sar, size):
    source = draw_test_video(tmp_path / 's.mp4', 0.2, rotation=rotation, sar=sar)
    assert normalise_video(source, tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60, None).size == size

def test_an_upright_job(service, upright):
    service.store.upload(upright, 'in/upright.mp4', 'video/mp4')
    job = IMAGE | {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/upright.mp4', 'seed': 1}
    made = service.run('upright', **job, size='auto')
    assert (made.get('width'), made.get('height'), made.get('frames')) == (720, 1280, 12), made
    told = json.loads(service.store.read_bytes(f'{made["minio_key"]}.json', 10**6))
    assert told['track_object'].startswith('tracks/mediapipe-6/720x1280-24/')
    wide = service.run('wide', **job)
    assert (wide['width'], wide['height']) == (1280, 720)

# one of several people

@pytest.fixture(scope='module')
def pair(service, tmp_path_factory):
    "Key of a video of 12 frames: a man on the left, a woman on the right"
    path = tmp_path_factory.mktemp('pair') / 'pair.mp4'
    both = (read_frames(SAMPLES / name, 0, 12) for name in ('single_face.mp4', 'pexels.mp4'))
    with Encoder(path, size=(640, 360)) as encoder:
        for his, hers in zip(*both, strict=True): encoder.write(np.concatenate([his[:, 130:450], hers[:, 260:580]], 1))
    service.store.upload(path, 'in/pair.mp4', 'video/mp4')
    return IMAGE | {'input_image_minio_path': 'in/astronaut.png', 'driving_video_path': 'in/pair.mp4', 'seed': 1}

NAMED = [('left', '-left'), ([0.8, 0.5], '-at0.8x0.5')] # person, end of the track's key

@pytest.mark.parametrize('person, end', NAMED, ids=str)
def test_the_named_person_alone_is_replaced(service, pair, tmp_path, person, end):
    made = service.run(f'named{end.replace(".", "-")}', **pair, person=person)
    assert 'error' not in made, made
    told = json.loads(service.store.read_bytes(f'{made["minio_key"]}.json', 10**6))
    assert told['person'] == person and told['track_object'].endswith(f'{end}.track')
    assert told['track'] == {'frames': 12, 'present': 12, 'faces': 12, 'guessed_masks': 0}
    pictures = []
    for key in ('in/pair.mp4', made['minio_key']):
        service.store.download(key, tmp_path / 'v.mp4', 'key', 10**8)
        frame, = read_frames(tmp_path / 'v.mp4', 6, 1)
        pictures.append(np.asarray(Image.fromarray(frame).resize((640, 360))).astype(int))
    changed = np.abs(pictures[0] - pictures[1]).max(-1)
    sides = [changed[60:, :280], changed[60:, 360:]] # not the border, over which a sleeve may reach
    ours, other = sides if person == 'left' else sides[::-1]
    assert (ours > 40).mean() > 0.15 and (other > 40).mean() < 0.02

def test_a_point_on_nobody_says_where_people_are(service, tmp_path):
    with Encoder(tmp_path / 'far.mp4', size=(640, 360)) as encoder:
        for frame in read_frames(SAMPLES / 'single_face.mp4', 0, 12):
            small = Image.new('RGB', (640, 360), (90, 110, 150))
            small.paste(Image.fromarray(frame).resize((320, 180)), (0, 180))
            encoder.write(np.asarray(small))
    service.store.upload(tmp_path / 'far.mp4', 'in/far.mp4', 'video/mp4')
    said = service.run('named-nobody', **IMAGE, driving_video_path='in/far.mp4', person=[0.9, 0.2])['error']
    assert said.startswith('no_person: person [0.9, 0.2] is on nobody in frame 0 of what is taken of the driving')
    x, y = map(float, re.search(r'people are at \[([\d.]+), ([\d.]+)\]$', said).groups())
    assert 0.15 < x < 0.3 and 0.6 < y < 0.8, said # his face

# a picture of the first window

def test_a_preview_comes_with_the_first_window_and_goes_with_the_job(service):
    wanted = IMAGE | {'driving_video_path': 'in/two windows.mp4', 'seed': 1, 'preview': True}
    job = service.submit('peek', **wanted)
    key = service.wait_report('peek', preview='avatars/peek.preview.jpg')['preview']
    data = service.store.read_bytes(key, 10**6)
    answer = job.result(timeout=180)
    assert 'error' not in answer and service.store.stat(key) is None
    if data is not None: assert Image.open(io.BytesIO(data)).size == (640, 360) # the second window may have been quick
    updates = [u for i, u in service.reports if i == 'peek' and u.get('preview')]
    assert {u['stage'] for u in updates} == {'render'}

def test_nobody_asked_no_picture(service):
    service.run('no-peek', **IMAGE, driving_video_path='in/brief.mp4', seed=1)
    assert not [u for i, u in service.reports if i == 'no-peek' and u.get('preview')]

def test_a_bucket_that_takes_no_preview_does_not_fail_the_job(service, monkeypatch):
    real = service.store.write_bytes
    def refused(key, *more):
        if key.endswith('.preview.jpg'): raise JobError('storage_failed', 'the bucket is full')
        return real(key, *more)
    monkeypatch.setattr(service.store, 'write_bytes', refused)
    answer = service.run('unseen', **IMAGE, driving_video_path='in/brief.mp4', seed=1, preview=True)
    assert 'error' not in answer and not [u for i, u in service.reports if i == 'unseen' and u.get('preview')]
