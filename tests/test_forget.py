"""`wan-avatar forget`: what of a person goes, what stays because of others, and that an interruption loses nothing"""
import json

import pytest
from typer.testing import CliRunner

from wan_avatar import cli_forget
from wan_avatar.bucket import bucket_server
from wan_avatar.cli import app
from wan_avatar.cli_forget import Of, find_traces, remove_traces
from wan_avatar.config import load_settings
from wan_avatar.job import JobError, guard_key, manifest_key, preview_key
from wan_avatar.manifest import Manifest
from wan_avatar.store import Store

VIDEO = {'width': 1280, 'height': 720, 'fps': 24, 'frames': 24, 'duration_s': 1, 'bytes': 1, 'has_audio': False}
WALK, ANN, TRACK = 'uploads/walk.mp4', 'uploads/ann.jpg', 'tracks/walk.track'

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with bucket_server(tmp_path_factory.mktemp('forget') / 'bucket') as running: yield running

@pytest.fixture
def store(server):
    "An empty bucket"
    opened = Store(load_settings(server.environment() | {'OUTPUT_PREFIX': 'out'}))
    for key in opened.list(''): opened.remove(key)
    return opened

def deliver(store: Store, place: str, picture: str | None = None, video: str | None = None,
            track: str | None = None) -> str: # key of the MP4
    key = f'{store.settings.output_prefix}/{place}.mp4'
    inputs = {'input_image_minio_path': picture, 'driving_video_path': video}
    made = Manifest(minio_key=key, job_id=place.rpartition('/')[2], seed=1, profile='draft', sha256='0' * 64, worker={},
                    timings={}, timeline=[], track_object=track, **VIDEO,
                    input_keys={field: k for field, k in inputs.items() if k})
    for k in filter(None, (key, picture, video, track)): store.write_bytes(k, b'x', 'application/octet-stream')
    store.write_json(manifest_key(key), made.record())
    return key

def outputs(store: Store, *names: str) -> set[str]: return {f'{store.settings.output_prefix}/{name}' for name in names}

# what is asked for; what goes beside the results of `ann/j1`, what stays; what else there is
SHARED = [
    ('nobody else', {ANN, WALK, TRACK}, set(), ()),
    ('the video and its track', {ANN}, {WALK, TRACK}, [('bob/j2', 'uploads/bob.jpg', WALK, TRACK)]),
    ('the picture, without a user', {WALK, TRACK}, {ANN}, [('j3', ANN)]),
    ('the track, of an upload under two names', {ANN, WALK}, {TRACK}, [('bob/j2', None, 'uploads/walk2.mp4', TRACK)]),
    ('all of it', set(), {ANN, WALK, TRACK}, [('bob/j2', ANN, WALK), ('eve/j4', None, None, TRACK)]),
]

@pytest.mark.parametrize('others_use, goes, stays, others', SHARED, ids=[s[0] for s in SHARED])
@pytest.mark.parametrize('name', ['j1', 'ann'])
def test_what_others_use_stays(store, others_use, goes, stays, others, name):
    deliver(store, 'ann/j1', ANN, WALK, TRACK)
    theirs = {k for other in others for key in [deliver(store, *other)] for k in (key, manifest_key(key))}
    before = set(store.list(''))
    traces = find_traces(store, name)
    assert {t.key for t in traces.found if t.stays} == stays
    assert set(remove_traces(store, traces)) == goes | outputs(store, 'ann/j1.mp4', 'ann/j1.mp4.json')
    assert set(store.list('')) == before - goes - outputs(store, 'ann/j1.mp4', 'ann/j1.mp4.json')
    assert theirs <= set(store.list(''))

# what is asked for -> the results that go
NAMES = [
    ('j1', Of.JOB, {'ann/j1.mp4', 'ann/j1.mp4.json', 'ann/j1.guard.jpg', 'ann/j1.preview.jpg'}),
    ('failed', Of.JOB, {'ann/failed.guard.jpg'}),
    ('j2', Of.JOB, {'j2.mp4', 'j2.mp4.json'}),
    ('ann', Of.USER, {'ann/j1.mp4', 'ann/j1.mp4.json', 'ann/j1.guard.jpg', 'ann/j1.preview.jpg', 'ann/failed.guard.jpg',
                      'ann/host/j9.mp4', 'ann/host/j9.mp4.json', 'ann/notes.txt'}),
    ('anna', Of.USER, {'anna/j5.mp4', 'anna/j5.mp4.json'}),
    ('j', Of.JOB, set()),
    ('an', Of.JOB, set()),
    ('mp4', Of.JOB, set()),
]

@pytest.mark.parametrize('name, kind, goes', NAMES)
def test_whose_a_result_is(store, name, kind, goes):
    first, *_ = [deliver(store, place) for place in ('ann/j1', 'ann/host/j9', 'anna/j5', 'j2')]
    for key in (guard_key(first), preview_key(first), *outputs(store, 'ann/failed.guard.jpg', 'ann/notes.txt')):
        store.write_bytes(key, b'x', 'image/jpeg')
    traces = find_traces(store, name)
    assert ({t.key for t in traces.found}, traces.kind) == (outputs(store, *goes), kind)

def test_a_name_of_both_is_asked_about(store):
    deliver(store, 'both/j1')
    deliver(store, 'both')
    with pytest.raises(cli_forget.InputRefused, match='--of job or --of user'): find_traces(store, 'both')
    for kind, names in ((Of.JOB, ('both.mp4', 'both.mp4.json')), (Of.USER, ('both/j1.mp4', 'both/j1.mp4.json'))):
        assert {t.key for t in find_traces(store, 'both', kind).found} == outputs(store, *names)

@pytest.mark.parametrize('deleted', range(6))
def test_an_interruption_loses_nothing(store, monkeypatch, deleted):
    key = deliver(store, 'ann/j1', ANN, WALK, TRACK)
    store.write_bytes(guard_key(key), b'x', 'image/jpeg')
    real, left = store.remove, [deleted]
    def remove(k: str) -> None:
        if not left[0]: raise JobError('storage_failed', 'gone')
        left[0] -= 1
        real(k)
    monkeypatch.setattr(store, 'remove', remove)
    with pytest.raises(JobError): remove_traces(store, find_traces(store, 'ann'))
    assert store.stat(manifest_key(key)), 'the manifest names the rest'
    monkeypatch.undo()
    remove_traces(store, find_traces(store, 'ann'))
    assert store.list('') == []

# what lies in place of the manifest; what is noted
NOTES = [
    (b'{"half": ', 'is damaged'),
    (b'', 'is damaged'),
    (None, 'names no inputs'),
]

@pytest.mark.parametrize('data, noted', NOTES)
def test_what_is_not_known_is_said(store, data, noted):
    key = deliver(store, 'ann/j1')
    store.write_bytes(ANN, b'x', 'image/jpeg')
    if data is not None: store.write_bytes(manifest_key(key), data, 'application/json')
    traces = find_traces(store, 'ann')
    assert any(noted in note for note in traces.notes)
    remove_traces(store, traces)
    assert store.list('') == [ANN], 'the results went'

def test_a_listing_that_is_cut_keeps_what_may_be_shared(store, monkeypatch):
    deliver(store, 'ann/j1', ANN, WALK, TRACK)
    whole = store.look
    monkeypatch.setattr(store, 'look', lambda prefix: whole(prefix, most=2))
    deliver(store, 'bob/j2', ANN)
    traces = find_traces(store, 'ann')
    assert {t.key for t in traces.found if t.stays} == {ANN, WALK, TRACK}
    assert any('too many objects' in note for note in traces.notes)

# words of the command, what is answered at the question -> exit code, whether the picture is left
COMMANDS = [
    (('ann',), 'n\n', 2, True),
    (('ann',), '', 1, True),
    (('ann',), 'y\n', 0, False),
    (('ann', '--yes'), '', 0, False),
    (('ann', '--json'), '', 0, True),
    (('ann', '--json', '--yes'), '', 0, False),
    (('bob', '--yes'), '', 4, True),
    (('../ann', '--yes'), '', 2, True),
    (('ann', '--of', 'job', '--yes'), '', 4, True),
    (('ann', '--of', 'dog', '--yes'), '', 2, True),
]

@pytest.mark.parametrize('words, answer, code, left', COMMANDS)
def test_the_command_asks(store, server, monkeypatch, tmp_path, words, answer, code, left):
    monkeypatch.chdir(tmp_path) # no local endpoint
    deliver(store, 'ann/j1', ANN)
    environ = server.environment() | {'OUTPUT_PREFIX': store.settings.output_prefix}
    said = CliRunner().invoke(app, ['forget', *words], input=answer, env=environ)
    assert said.exit_code == code, said.output
    assert (store.stat(ANN) is not None) == left
    if '--json' in words: assert len(json.loads(said.stdout)['deleted']) == (0 if left else 3)
    elif code == 0: assert 'uploads/ann.jpg' in said.output and '3 objects deleted' in said.output
