"What a job may choose beside picture and video: a video by its address, a quality"
import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import SAMPLES, cut

from wan_avatar.job import JobError, Variant, parse_job
from wan_avatar.run import profile_here
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

FETCHED = [('/page.html', 'input_unreadable', 'is text, not a video'), ('/none.mp4', 'input_missing', 'driving_video_url')]

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
