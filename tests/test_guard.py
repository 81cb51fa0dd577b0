"""What passes the guard and what does not: people drawn by hand, good tracks and broken ones"""
import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_settings
from PIL import Image

from wan_avatar.comfy import Restarts
from wan_avatar.frames import Rectangle
from wan_avatar.guard import Finding, GuardRules, guard_notes, guard_track, refusal_of
from wan_avatar.inputs import Inputs
from wan_avatar.inspection import MOST_ASKED, cut_finder, inspect_track
from wan_avatar.job import Job, JobError
from wan_avatar.manifest import BootReport
from wan_avatar.mp4 import Encoder
from wan_avatar.plan import stretches
from wan_avatar.run import JobRun
from wan_avatar.store import Store
from wan_avatar.timeline import Timeline
from wan_avatar.track import TRACKERS, Track, check_person, pack_mask
from wan_avatar.workflow import TINY, WAN, Profile, get_profile, prepare

SIZE = (320, 180)
WHOLE = Rectangle(0, 0, *SIZE)
BODY = [(0, .3), (-.3, 0), (.3, 0), (-.9, 0), (.9, 0), (-1.6, 1.6), (1.6, 1.6), (-1.7, 3), (1.7, 3), (-1.5, 4.5),
        (1.5, 4.5), (-1, 4.5), (1, 4.5)]

def mask(x: float, y: float, r: float) -> np.ndarray: # (180, 320) bool
    "Head and trunk of somebody whose face of radius r is at x, y"
    across, down = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    head = np.hypot(across - x, down - y) < 1.4 * r
    return head | (abs(across - x) < 2 * r) & (down > y + r) & (down < y + 6 * r)

def keypoints(x: float, y: float, r: float, i: int) -> np.ndarray: # (133, 3)
    "The same person's joints and face; it speaks"
    points = np.zeros((133, 3), np.float32)
    around = np.arange(68) * 2.4
    points[23:91] = np.stack([x + r * np.cos(around), y + r * np.sin(around), np.ones(68)], 1)
    points[[83, 85, 87], 1] += 2 * np.sin(i)
    points[:13] = [(x + r * a, y + r * b, 1) for a, b in BODY]
    return points

def person(places, masks_at=None, missing=(), y=60.0, r=16.0, tracker='mediapipe', still=False) -> Track:
    "Somebody at these places; the masks may be elsewhere"
    n = len(places)
    present = ~np.isin(np.arange(n), missing)
    points = np.stack([keypoints(x, y, r, 0 if still else i) for i, x in enumerate(places)])
    points[~present] = np.nan
    packed = tuple(pack_mask(mask(x, y, r) & here) for x, here in zip(masks_at or places, present, strict=True))
    return Track(SIZE, present, {'wholebody': points}, SIZE, packed, TRACKERS[tracker])

def without(track: Track, joints: slice) -> Track:
    "Keypoints that are not seen"
    points = track.points['wholebody'].copy()
    points[:, joints, 2] = 0
    return replace(track, points={'wholebody': points})

STAND, WALK = [100.0] * 60, [60 + 2.0 * i for i in range(60)]
DASH = [60.0] * 20 + [60 + 14.0 * k for k in range(1, 11)] + [200.0] * 20
BACK_AND_FORTH = [100 + 40 * np.sin(i / 3) for i in range(60)]
SLIP = [100.0] * 30 + [140.0] * 2 + [100.0] * 30

GOOD = { # track, content of the frame
    'stands': (person(STAND), WHOLE),
    'walks': (person(WALK), WHOLE),
    'dashes': (person(DASH), WHOLE),
    'sways fast': (person(BACK_AND_FORTH), WHOLE),
    'close-up: joints outside the frame': (person(STAND, y=80, r=60), WHOLE),
    'close-up in a 9:16 clip': (person([160.0] * 60, r=20), Rectangle(110, 0, 100, 180)),
    'from behind: no face': (without(person(WALK), slice(23, 91)), WHOLE),
    'face alone': (without(person(STAND), slice(0, 23)), WHOLE),
    'leaves and comes back': (person([100.0] * 150, missing=range(50, 90)), WHOLE),
    'missed for two frames': (person(WALK, missing=(20, 21)), WHOLE),
    'keeps still for two seconds': (person(STAND, still=True), WHOLE)}

@pytest.mark.parametrize('track, content', GOOD.values(), ids=GOOD)
def test_people_pass(track, content):
    found = guard_track(track, stretches(track.present), content)
    assert [f for f in found if f.grade == 'failed'] == []
    assert refusal_of(found, GuardRules(), track.tracker) is None

BROKEN = { # track, content of the frame; what failed, its frame or None, the code
    'mask on something else': (person(WALK, masks_at=WALK[::-1]), WHOLE, 'inside', None, 'no_person'),
    'mask goes elsewhere': (person(STAND, masks_at=[100.0] * 30 + [230.0] * 30), WHOLE, 'mask', 30, 'no_person'),
    'another person is taken over': (person([60.0] * 30 + [160.0] * 30), WHOLE, 'face', 30, 'no_person'),
    'mask in the bars': (person([100.0] * 60), Rectangle(110, 0, 100, 180), 'bars', None, 'input_unreadable'),
    'mask over everything': (replace(person(STAND), masks=(pack_mask(np.ones(SIZE[::-1], bool)),) * 60), WHOLE,
                             'filled', None, 'no_person'),
    'comes and goes': (person([100.0] * 120, missing=range(0, 120, 9)), WHOLE, 'broken', 1, 'no_person'),
    'a face that never moves': (person([100.0] * 120, still=True), WHOLE, 'still', 0, 'no_person'),
    'trembles all the time': (person([100 + 14.0 * (i % 2) for i in range(60)]), WHOLE, 'tremble', None,
                              'input_unreadable')}

@pytest.mark.parametrize('track, content, what, frame, code', BROKEN.values(), ids=BROKEN)
def test_broken_tracks_are_refused_with_frame_figure_and_limit(track, content, what, frame, code):
    found = guard_track(track, stretches(track.present), content)
    failed = {f.what: f for f in found if f.grade == 'failed'}
    assert what in failed, found
    if frame is not None: assert failed[what].frame == frame
    error = refusal_of([failed[what]], GuardRules(), track.tracker, 'avatars/x.guard.jpg')
    assert error and error.code == code
    finding = failed[what]
    assert f'frame {finding.frame}' in error.message
    assert error.message.startswith(f'the driving video: {finding.sentence()}')
    assert finding.sentence().partition('; ')[2], 'it says what helps'
    assert 'avatars/x.guard.jpg' in error.message

def test_a_slip_that_passes_is_a_doubt_and_a_cut_is_a_note():
    slip = guard_track(person(SLIP), [range(62)], WHOLE)
    assert {f.grade for f in slip} == {'doubtful'}
    assert all(note.startswith('guard: doubtful: in frame ') for note in guard_notes(slip))
    other, = BROKEN['another person is taken over'][:1]
    cut = guard_track(other, [range(60)], WHOLE, is_cut=lambda frame: frame == 30)
    assert [(f.what, f.frame, f.grade) for f in cut] == [('cut', 30, 'note')]

ENFORCED = { # rules; a track by this tracker is refused
    'by tracker, MediaPipe': (GuardRules(), 'mediapipe', True),
    'by tracker, SAM2, whose limits no run bears out yet': (GuardRules(), 'wholebody-sam2', False),
    'always': (GuardRules(guard='always'), 'wholebody-sam2', True),
    'never': (GuardRules(guard='never'), 'mediapipe', False),
    'off': (GuardRules(guard='off'), 'mediapipe', False),
    'a limit of ones own': (GuardRules(inside_failed=0.0, beside_failed=2.0), 'mediapipe', False)}

@pytest.mark.parametrize('rules, tracker, refused', ENFORCED.values(), ids=ENFORCED)
def test_a_failure_refuses_or_is_noted(rules, tracker, refused):
    track = person(STAND, masks_at=[220.0] * 60, tracker=tracker)
    found = guard_track(track, [range(60)], WHOLE, rules)
    assert (refusal_of(found, rules, track.tracker) is not None) == refused
    assert bool(guard_notes(found)) == (rules.guard != 'off')

@pytest.mark.parametrize('profile', [WAN, TINY, get_profile('draft')], ids=lambda p: p.name)
def test_limits_are_values_of_the_profile(profile: Profile):
    assert profile.rules(GuardRules) == GuardRules()
    assert profile.changed(guard='always', inside_failed=0.7).rules(GuardRules) == GuardRules('always', 0.7)

SEEN = [ # frames, of them with a person; is that enough
    (240, 12, True), (240, 11, False), (24, 12, True), (10, 5, True), (10, 4, False), (1, 1, True), (240, 0, False)]

@pytest.mark.parametrize('n, seen, enough', SEEN)
def test_half_a_second_of_a_person_is_enough(n, seen, enough):
    track = person([100.0] * n, missing=range(seen, n))
    if enough: return check_person(track, 'video')
    with pytest.raises(JobError, match=f'a body in {seen} of {n} frames.* at least {min(12, -(-n // 2))} frames'):
        check_person(track, 'video')

# in a job

def clip_of(folder, shade: Callable[[int], int], n: int = 60) -> SimpleNamespace:
    with Encoder(folder / 'driving.mp4', size=SIZE) as encoder:
        for i in range(n): encoder.write(np.full((*SIZE[::-1], 3), (shade(i), 90, 120), np.uint8))
    return SimpleNamespace(path=folder / 'driving.mp4', frames=n, size=SIZE, content=WHOLE)

def job_of(bucket, folder, profile: Profile) -> JobRun:
    settings = make_settings(bucket, folder)
    worker = SimpleNamespace(settings=settings, store=Store(settings))
    boot = BootReport(job_number=1, process_s=0, taken_s=0, stages=[])
    return JobRun(worker, prepare(profile), folder, Timeline(), Restarts(), job_id='g', seed=1, boot=boot,
                  job=Job(input_image_minio_path='a.png'), key=f'avatars/{profile.name}.mp4')

@pytest.mark.parametrize('profile, refused', [(get_profile('draft'), True), (WAN.changed(guard='never'), False)],
                         ids=['refused', 'noted'])
def test_a_refusal_leaves_a_small_picture(bucket, tmp_path, profile, refused):
    track = person(WALK, masks_at=WALK[::-1])
    run = job_of(bucket, tmp_path, profile)
    inputs = Inputs(tmp_path, clip_of(tmp_path, lambda i: 90), sha256='')
    key = f'avatars/{profile.name}.guard.jpg'
    if refused:
        with pytest.raises(JobError, match=rf'no_person: .*frame \d+ .*{key}'):
            asyncio.run(inspect_track(run, inputs, track))
        picture = Image.open(io.BytesIO(run.worker.store.read_bytes(key, 10**6)))
        assert picture.size == SIZE and picture.format == 'JPEG'
    else:
        assert asyncio.run(inspect_track(run, inputs, track))
        assert run.worker.store.stat(key) is None
    assert [s.name for s in run.timeline.stages] == ['guard']

def test_a_bucket_that_fails_does_not_hide_the_reason(bucket, tmp_path, caplog):
    run = job_of(bucket, tmp_path, get_profile('draft'))
    def broken(*args): raise JobError('storage_failed', 'no room')
    run.worker.store = SimpleNamespace(write_bytes=broken)
    inputs = Inputs(tmp_path, clip_of(tmp_path, lambda i: 90), sha256='')
    with pytest.raises(JobError, match='no_person'):
        asyncio.run(inspect_track(run, inputs, person(WALK, masks_at=WALK[::-1])))
    assert 'no room' in caplog.text

def test_cuts_are_found_in_the_video_and_looked_for_a_bounded_number_of_times(tmp_path):
    clip = clip_of(tmp_path, lambda i: 40 if i < 30 else 200)
    is_cut = cut_finder(clip.path)
    assert [i for i in range(26, 34) if is_cut(i)] == [30]
    for _ in range(MOST_ASKED): is_cut(29)
    assert not is_cut(30), 'it was asked too often'

def test_the_gravest_finding_comes_first():
    found = guard_track(person(WALK, masks_at=WALK[::-1]), [range(60)], WHOLE)
    assert [f.grade for f in found] == sorted((f.grade for f in found), key=['failed', 'doubtful', 'note'].index)
    assert all(isinstance(f, Finding) and f.sentence() for f in found)
