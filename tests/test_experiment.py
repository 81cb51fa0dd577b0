"An experiment as its user runs it: read, made on a real worker, interrupted, gone on with, judged"
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

from wan_avatar.experiment import (
    Experiment,
    ExperimentError,
    Trial,
    TrialRunner,
    add_trial,
    code_digest,
    kept_experiment,
    plan_trials,
    read_experiment,
    read_trials,
)
from wan_avatar.frames import read_frames
from wan_avatar.metrics import JobRecord
from wan_avatar.mp4 import Encoder

FILE = """
{top}
[pictures]
ana = "{samples}/astronaut.png"
[driving]
{driving}
[variants.plain]
{rest}
"""

def written(folder: Path, samples: Path, top: str = '', driving: str = '', rest: str = '') -> Path:
    "An experiment file"
    driving = driving or f'talk = "{samples}/pexels.mp4"'
    (folder / 'light.toml').write_text(FILE.format(top=top, samples=samples, driving=driving, rest=rest))
    return folder / 'light.toml'

WRONG = [ # where, what stands there, what is said
    ('top', 'seeds = []', 'seeds: List should have at least 1 item'),
    ('top', 'seeds = [-1]', 'seeds.0: Input should be greater than or equal to 0'),
    ('top', 'seeds = [1.5]', 'seeds.0'),
    ('top', 'seconds = 0', 'seconds: Input should be greater than 0'),
    ('top', 'seconds = 1e9', 'seconds'),
    ('top', 'second = 1', 'second: Extra inputs are not permitted'),
    ('top', 'name = "../x"', 'name: '),
    ('top', 'profile = "a/b"', 'profile: '),
    ('top', 'name =', 'cannot be read'),
    ('driving', 'talk = "none.mp4"', "driving.talk '"),
    ('driving', 'talk = 5', 'driving.talk'),
    ('driving', '"a/b" = "x.mp4"', 'driving.a/b.[key]'),
    ('driving', '"a@b" = "x.mp4"', 'driving.a@b.[key]'),
    ('rest', '[variants.x]\nrelight_strength = [1]', 'variants.x.relight_strength'),
    ('rest', '[variants.x]\nrelight_strength = nan', 'variants.x.relight_strength'),
    ('rest', '[variants.x]\nseed = -1', 'variants.x.seed'),
    ('rest', '[variants.x]\ntracker = "a b"', 'variants.x.tracker'),
    ('rest', '[variants.x]\ngraph = "none.json"', 'none.json cannot be read'),
    ('rest', '[variants.x]\ngraph = "graph.json"', 'variants.x.graph.a.inputs'),
    ('rest', '[variants.x]\ngraph = "noise.json"', 'noise.json cannot be read'),
    ('rest', '[variants."' + 'x' * 49 + '"]', 'should match pattern'),
]

@pytest.mark.parametrize('where, text, says', [pytest.param(*c, id=c[1][:40]) for c in WRONG])
def test_what_is_wrong_with_a_file_is_said(tmp_path, samples, where, text, says):
    (tmp_path / 'graph.json').write_text('{"a": {"class_type": "KSampler"}}')
    (tmp_path / 'noise.json').write_bytes(b'\xff\x00')
    with pytest.raises(ExperimentError) as e: read_experiment(written(tmp_path, samples, **{where: text}))
    assert says in str(e.value)

def test_a_file_that_is_not_there_or_no_text(tmp_path):
    (tmp_path / 'x.toml').write_bytes(b'\xff\xfe')
    for name in ('none.toml', 'x.toml'):
        with pytest.raises(ExperimentError, match='cannot be read'): read_experiment(tmp_path / name)

def test_paths_are_seen_from_the_file(tmp_path, samples):
    (tmp_path / 'clip.mp4').touch()
    (tmp_path / 'mine.json').write_text('{"a": {"class_type": "KSampler", "inputs": {}}}')
    rest = '[variants.own]\ngraph = "mine.json"\nseed = 7\nprompt = "a person"'
    found = read_experiment(written(tmp_path, samples, driving='talk = "clip.mp4"', rest=rest))
    assert found.driving == {'talk': tmp_path / 'clip.mp4'} and found.variants['own'].graph == tmp_path / 'mine.json'
    assert found.name == 'light' and found.baseline == 'plain'

@pytest.fixture(scope='module')
def clips(samples, tmp_path_factory) -> Path:
    "Three short driving videos"
    folder = tmp_path_factory.mktemp('clips')
    for name, source, start in (('nod', 'single_face', 0), ('talk', 'pexels', 60), ('late', 'pexels', 120)):
        frames = list(read_frames(samples / f'{source}.mp4', start, 24))
        with Encoder(folder / f'{name}.mp4', size=frames[0].shape[1::-1]) as encoder:
            for frame in frames: encoder.write(frame)
    return folder

def experiment_of(clips: Path, **more) -> Experiment:
    told = {'name': 'x', 'pictures': {'ana': SAMPLES / 'astronaut.png', 'himself': 3},
            'driving': {'talk': clips / 'nod.mp4'}, 'seconds': 0.5,
            'variants': {'plain': {}, 'half': {'relight_strength': 0.5}}}
    return Experiment.model_validate(told | more)

def test_every_combination_once(tmp_path, clips):
    found = experiment_of(clips, seeds=[1, 2], variants={'plain': {}, 'seeded': {'seed': 9}})
    cells = [t.cell for t in plan_trials(found, tmp_path)]
    seeds = [('plain', 1), ('seeded', 9), ('plain', 2)]
    assert cells == [(p, 'talk', *s) for p in ('ana', 'himself') for s in seeds]
    assert [t.truth for t in plan_trials(found, tmp_path)] == [False] * 3 + [True] * 3

def done(run: TrialRunner, state: str = 'COMPLETED') -> None:
    "Note all that is open as made"
    for t in run.open():
        record = JobRecord(job_id='1', group='x', at='', submitted_s=0, done_s=1, state=state)
        (run.folder / 'videos').mkdir(exist_ok=True)
        video = f'videos/{t.picture}-{t.variant}.mp4'
        (run.folder / video).touch()
        made = {'video': video} if state == 'COMPLETED' else {}
        add_trial(run.folder, Trial(picture=t.picture, driving=t.driving, variant=t.variant, seed=t.seed, record=record,
                                    digest=t.digest(run.hashes, run.code), **made))

def relit(strength: float) -> dict: return {'relight_strength': strength}

AGAIN = [ # what is changed before the experiment is run again, how many of its four trials are made again
    ('nothing', lambda told, folder: told, 0),
    ('a variant more', lambda told, folder: told | {'variants': told['variants'] | {'dark': relit(0)}}, 2),
    ('a variant\'s value', lambda told, folder: told | {'variants': {'plain': {}, 'half': relit(0.6)}}, 2),
    ('a variant is renamed', lambda told, folder: told | {'variants': {'plain': {}, '50 %': relit(0.5)}}, 2),
    ('the profile', lambda told, folder: told | {'profile': 'wan22-animate-tiny'}, 4),
    ('the seeds', lambda told, folder: told | {'seeds': [2]}, 4),
    ('the seconds', lambda told, folder: told | {'seconds': 0.25}, 4),
    ('the frame that is the picture', lambda told, folder: told | {'pictures': told['pictures'] | {'himself': 4}}, 2),
    ('a video is gone', lambda told, folder: (folder / 'videos/ana-half.mp4').unlink() or told, 1),
]

@pytest.mark.parametrize('change, again', [pytest.param(c, n, id=what) for what, c, n in AGAIN])
def test_what_is_there_already_is_not_made_again(tmp_path, clips, change, again):
    first = experiment_of(clips)
    run = TrialRunner(first, tmp_path / 'out')
    assert len(run.open()) == 4
    done(run)
    told = change(first.model_dump(), tmp_path / 'out')
    assert len(TrialRunner(Experiment.model_validate(told), tmp_path / 'out').open()) == again

def test_what_other_code_made_is_made_again(tmp_path, clips):
    found = experiment_of(clips)
    done(TrialRunner(found, tmp_path / 'out', code='before'))
    assert [len(TrialRunner(found, tmp_path / 'out', code=c).open()) for c in ('before', 'after')] == [0, 4]
    assert len(code_digest()) == 16

def test_what_failed_is_tried_again_and_what_was_cut_off_is_passed_over(tmp_path, clips):
    run = TrialRunner(experiment_of(clips), tmp_path / 'out')
    done(run, 'FAILED')
    assert len(run.open()) == 4
    done(run)
    lines = tmp_path / 'out/trials.jsonl'
    with lines.open('a') as f: f.write('{"picture": "ana", "dri') # the power went
    assert len(read_trials(tmp_path / 'out')) == 4 and not run.open()
    add_trial(tmp_path / 'out', next(iter(read_trials(tmp_path / 'out').values())))
    assert len(lines.read_text().splitlines()) == 9 and len(read_trials(tmp_path / 'out')) == 4
    with lines.open('a') as f: f.write('{}\n')
    with pytest.raises(ExperimentError, match='line 10'): read_trials(tmp_path / 'out')

def test_a_driving_video_that_was_replaced_is_read_anew(tmp_path, clips):
    clip = tmp_path / 'clip.mp4'
    clip.write_bytes((clips / 'nod.mp4').read_bytes())
    found = experiment_of(clips, driving={'talk': clip})
    done(TrialRunner(found, tmp_path / 'out'))
    clip.write_bytes((clips / 'talk.mp4').read_bytes())
    assert len(TrialRunner(found, tmp_path / 'out').open()) == 4

def test_a_frame_that_is_not_there(tmp_path, clips):
    found = experiment_of(clips, pictures={'himself': 10**6})
    with pytest.raises(ExperimentError, match='has no frame 1000000'): TrialRunner(found, tmp_path / 'out')

# as its user runs it

@pytest.fixture(scope='module')
def ran(samples, clips, tmp_path_factory):
    "Three clips and two variants of the draft: interrupted while it makes the second, then run to its end"
    folder = tmp_path_factory.mktemp('experiment')
    driving = '\n'.join(f'{p.stem} = "{p}"' for p in sorted(clips.iterdir()))
    file = written(folder, samples, driving=driving, rest='[variants.half]\nrelight_strength = 0.5')
    command = [ROOT / '.venv/bin/wan-avatar', 'experiment', file, '--out', folder / 'out', '--folder', folder / 'local']
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    def heed() -> None: signal.signal(signal.SIGINT, signal.default_int_handler) # may be ignored here
    streams |= {'start_new_session': True, 'preexec_fn': heed}
    with subprocess.Popen(command, cwd=ROOT, **streams) as first:
        said = []
        for line in first.stdout:
            said.append(line)
            if 'nod, plain' in line: os.killpg(first.pid, signal.SIGINT)
        code = first.wait(timeout=60)
    kept = (folder / 'out/trials.jsonl').read_text()
    began = time.monotonic()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    return folder / 'out', (code, ''.join(said)), kept, second, time.monotonic() - began

def test_interrupted_it_says_so_and_leaves_nothing_behind(ran):
    _, (code, said), kept, _, _ = ran
    assert code == 130 and 'interrupted' in said and 'Traceback' not in said
    assert 0 < len(kept.splitlines()) < 6

def test_it_goes_on_where_it_was(ran):
    out, _, kept, second, _ = ran
    assert second.returncode == 0, second.stderr[-2000:]
    assert (out / 'trials.jsonl').read_text().startswith(kept)
    made = [json.loads(line) for line in (out / 'trials.jsonl').read_text().splitlines()]
    cells = [(t['driving'], t['variant']) for t in made if 'quality' not in t]
    assert sorted(cells) == sorted((d, v) for d in ('late', 'nod', 'talk') for v in ('half', 'plain'))

def test_every_trial_was_made_and_judged(ran):
    out, *_ = ran
    trials = read_trials(out)
    assert len(trials) == 6 and all(t.made and not t.note for t in trials.values())
    assert all(t.quality['face_found'] == 1 and t.quality['id_distance'] < 0.6 for t in trials.values())
    assert all((out / t.video).stat().st_size > 10_000 for t in trials.values())
    for driving in ('late', 'nod', 'talk'):
        plain, half = (trials['ana', driving, v, 1] for v in ('plain', 'half'))
        assert (out / plain.video).read_bytes() != (out / half.video).read_bytes()
    assert kept_experiment(out).baseline == 'plain'

def test_under_three_minutes(ran): assert ran[-1] < 180
