"The public set: its list, and how its files come out of packages, here small ones made for the test; no network"
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import av
import pytest
from PIL import Image

from wan_avatar.job import ErrorCode
from wan_avatar.normalise import normalise_video
from wan_avatar.pictures import read_image
from wan_avatar.samples import draw_test_picture, draw_test_video, read_test_picture

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'nbs/tools'))
import samples as public  # noqa: E402
from samples import Sample, SampleError  # noqa: E402

LISTED = public.read_list()

# --- the list

@pytest.mark.parametrize('sample', LISTED, ids=lambda s: s.name)
def test_an_entry_says_where_it_is_from(sample):
    name, _, version = sample.pin.partition('==' if sample.registry == 'pypi' else '@')
    assert name and all(part.isdecimal() for part in version.split('.')), 'an exact version'
    assert sample.licence in public.LICENCES and sample.said and sample.origin == 'makers'
    assert sample.expect in ('', *get_args(ErrorCode)), 'a code that a job can end with'
    assert len(sample.sha256) == 64 and sample.about and sample.shows and sample.megabytes > 0

@pytest.mark.parametrize('tag', public.TAGS)
def test_each_case_has_a_clip(tag):
    assert any(s.kind == 'driving' for s in public.showing(tag)), f'no clip shows {tag}'

def test_pictures_are_of_different_people_and_no_file_is_there_twice():
    assert 3 <= sum(s.kind == 'picture' for s in LISTED) <= 5
    assert len({s.file for s in LISTED}) == len({s.recipe for s in LISTED}) == len(LISTED)

def test_only_a_person_starts_the_downloads():
    rules = [line.split('##')[0].split() for line in (ROOT / 'Makefile').read_text().splitlines() if '##' in line]
    assert [rule[0] for rule in rules if 'samples' in ' '.join(rule)] == ['samples:'], 'no other target needs them'
    assert 'samples' not in (ROOT / '.ci/run').read_text()

GOOD = {'name': 'clip', 'kind': 'driving', 'shows': ['close'], 'about': 'numbers', 'registry': 'pypi', 'megabytes': 1,
        'pin': 'pack==1.0', 'path': 'pack/a.mp4', 'sha256': 'a' * 64, 'licence': 'MIT', 'said': 'LICENSE',
        'origin': 'makers', 'start': 1.0, 'seconds': 1.0}
FAULTS = [
    ('name', '../clip', 'small letters'),
    ('name', '', 'small letters'),
    ('kind', 'film', 'picture or driving'),
    ('shows', [], 'one or more of'),
    ('shows', ['cosy'], 'one or more of'),
    ('registry', 'web', 'one of pypi'),
    ('pin', 'pack>=1.0', 'exact version'),
    ('pin', 'pack', 'exact version'),
    ('pin', '--index-url==1.0 x', 'exact version'),
    ('path', '../a.mp4', 'path in the package'),
    ('path', '/etc/hostname', 'path in the package'),
    ('path', 'pack\\..\\a.mp4', 'path in the package'),
    ('sha256', 'abc', '64 hexadecimal'),
    ('licence', 'CC-BY-NC-2.0', 'one of MIT'),
    ('licence', '', 'one of MIT'),
    ('said', '', 'file that says it'),
    ('origin', 'found', 'makers or package'),
    ('start', None, 'second of the source'),
    ('start', -1.0, 'second of the source'),
    ('seconds', 0, 'at most 30'),
    ('seconds', 31, 'at most 30'),
    ('shake', 200, 'at most 100'),
]

@pytest.mark.parametrize('field, value, remedy', FAULTS)
def test_a_faulty_entry_is_refused_by_name(field, value, remedy):
    with pytest.raises(SampleError) as e: Sample(**GOOD | {field: value})
    assert field in str(e.value) and repr(value) in str(e.value) and remedy in str(e.value)

LISTS = [
    ('twice', 2, {}, 'twice in the list: clip'),
    ('unknown field', 1, {'colour': 'red'}, 'unknown colour'),
    ('missing field', 1, {'path': None}, "'path'"),
]

def listed(samples: list[dict], path: Path) -> Path:
    "A list file with one package for each entry"
    text = ''
    for sample in samples:
        own = {k: v for k, v in sample.items() if v is not None}
        shared = ''.join(f'{k} = {json.dumps(own.pop(k))}\n' for k in ('registry', 'pin', 'megabytes'))
        text += f'[[package]]\n{shared}[[package.sample]]\n' + ''.join(f'{k} = {json.dumps(own[k])}\n' for k in own)
    path.write_text(text)
    return path

@pytest.mark.parametrize('times, change, words', [row[1:] for row in LISTS], ids=[row[0] for row in LISTS])
def test_a_faulty_list_is_refused(tmp_path, times, change, words):
    with pytest.raises(SampleError, match=words): public.read_list(listed([GOOD | change] * times, tmp_path / 'l.toml'))

@pytest.mark.parametrize('text', ['[[package', 'name = "a"'], ids=['no TOML', 'no packages'])
def test_a_file_that_is_no_list_is_named(tmp_path, text):
    (tmp_path / 'l.toml').write_text(text)
    with pytest.raises(SampleError, match='l.toml is no list of packages'): public.read_list(tmp_path / 'l.toml')

# --- from packages to files

def wheel(path: Path, files: dict[str, bytes], name: str = 'pack') -> Path:
    "A package of the given files that pip takes"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {'METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n', 'RECORD': '',
            'WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    with zipfile.ZipFile(path, 'w') as z:
        for member, content in (files | {f'{name}-1.0.dist-info/{k}': v.encode() for k, v in info.items()}).items():
            z.writestr(member, content)
    return path

@pytest.fixture(scope='module')
def made(tmp_path_factory) -> dict[str, bytes]:
    "Three seconds of numbered frames in two containers, and a picture"
    folder = tmp_path_factory.mktemp('films')
    for name in ('a.mp4', 'b.avi'): draw_test_video(folder / name, 3, size=(192, 144))
    Image.fromarray(draw_test_picture(7)).save(folder / 'p.png')
    return {f'pack/{name}': (folder / name).read_bytes() for name in ('a.mp4', 'b.avi', 'p.png')}

def entry(made: dict[str, bytes], name: str, path: str = 'pack/a.mp4', **change) -> Sample:
    digest = hashlib.sha256(made[path]).hexdigest()
    return Sample(**GOOD | {'name': name, 'path': path, 'sha256': digest} | change)

STILL = {'kind': 'picture', 'seconds': 0}

@pytest.fixture(scope='module')
def chosen(made) -> list[Sample]:
    "One of each kind, in two packages"
    other = {'pin': 'other==1.0'}
    return [entry(made, 'clip'), entry(made, 'shaken', shake=8, shows=['close', 'shaky']),
            entry(made, 'still', start=2.0, **STILL), entry(made, 'counted', 'pack/b.avi', **other),
            entry(made, 'portrait', 'pack/p.png', start=None, **STILL | other)]

class Registry:
    "Serves packages, and counts"
    def __init__(self, files: dict[str, bytes], until: int = 99):
        self.files, self.until, self.asked = files, until, []

    def __call__(self, sample: Sample, folder: Path, tick) -> Path:
        self.asked.append(sample.pin)
        if len(self.asked) > self.until: raise KeyboardInterrupt
        return wheel(folder / 'pack-1.0-py3-none-any.whl', self.files)

def numbers(path: Path) -> list[int]:
    with av.open(str(path)) as film:
        return [read_test_picture(f.to_ndarray(format='rgb24')) for f in film.decode(video=0)]

def number(path: Path) -> int: return read_test_picture(read_image(path))

def names(folder: Path) -> list[str]: return sorted(p.name for p in folder.iterdir())

NOTES = ['.lock', '.made.json', 'SOURCES.md']

@pytest.fixture(scope='module')
def whole(made, chosen, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('set')
    assert public.bring(chosen, folder, Registry(made), say=lambda text: None) == []
    return folder

def test_files_are_the_stretch_that_the_list_says(whole, made, tmp_path):
    assert numbers(whole / 'clip.mp4') == list(range(24, 48))
    assert numbers(whole / 'counted.mp4') == list(range(24, 48))
    assert number(whole / 'still.png') == 48
    assert (whole / 'portrait.png').read_bytes() == made['pack/p.png']
    clip = normalise_video(whole / 'clip.mp4', tmp_path / 'v.y4m', tmp_path / 'a.m4a', 60)
    assert clip.frames == 24 and clip.audio is None
    assert names(whole) == [*NOTES, 'clip.mp4', 'counted.mp4', 'portrait.png', 'shaken.mp4', 'still.png']

def test_a_shaken_clip_moves_and_stays_inside(whole):
    with av.open(str(whole / 'shaken.mp4')) as film:
        frames = [f.to_ndarray(format='gray') for f in film.decode(video=0)]
    assert {f.shape for f in frames} == {(128, 176)} and len(frames) == 24
    edge = [int((f[:90].astype(int).mean(axis=0) > 100).argmax()) for f in frames] # where the ramp passes a grey
    assert len(set(edge)) > 3, 'the ramp of the test picture wanders from frame to frame'

def test_another_run_gives_the_same_bytes(whole, made, chosen, tmp_path):
    public.bring(chosen, tmp_path, Registry(made), say=lambda text: None)
    here, there = ({n: (folder / n).read_bytes() for n in names(folder)} for folder in (tmp_path, whole))
    assert [n for n in here | there if here.get(n) != there.get(n)] == []

def test_sources_name_package_path_licence_and_changes(whole, chosen):
    rows = {line.split('`')[1]: line for line in (whole / 'SOURCES.md').read_text().splitlines() if '`' in line[:3]}
    for s in chosen:
        for said in (s.pin, s.path, s.licence, s.said, s.changes): assert said in rows[s.file]
    assert 'moved about' in rows['shaken.mp4'] and 'one frame, at 2 s' in rows['still.png']

def test_an_interrupted_run_goes_on_where_it_was(made, chosen, tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt): public.bring(chosen, tmp_path, Registry(made, until=1), said.append)
    assert names(tmp_path) == [*NOTES[:2], 'clip.mp4', 'shaken.mp4', 'still.png'], 'whole files, no downloads'
    before = (tmp_path / 'clip.mp4').stat()
    again = Registry(made)
    assert public.bring(chosen, tmp_path, again, said.append) == [] and again.asked == ['other==1.0']
    assert (tmp_path / 'clip.mp4').stat().st_mtime_ns == before.st_mtime_ns
    assert 'about' in said[0] and 's to go' in said[0] and '2 of 2' in said[-1]
    nothing = Registry(made)
    assert public.bring(chosen, tmp_path, nothing, said.append) == [] and nothing.asked == []

CHANGES = [
    ('is gone', lambda f: (f / 'still.png').unlink()),
    ('is cut off', lambda f: (f / 'still.png').write_bytes(b'half')),
    ('has no note', lambda f: (f / '.made.json').unlink()),
    ('has a damaged note', lambda f: (f / '.made.json').write_text('{')),
    ('has another note', lambda f: (f / '.made.json').write_text('5')),
    ('was fetched by a killed run', lambda f: (f / 'still.png').rename((f / '.download').mkdir() or f / '.download/a')),
]

@pytest.mark.parametrize('change', [row[1] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_what_is_not_whole_is_made_again(made, chosen, tmp_path, change):
    still = chosen[2:3]
    public.bring(still, tmp_path, Registry(made), say=lambda text: None)
    change(tmp_path)
    registry = Registry(made)
    assert public.bring(still, tmp_path, registry, say=lambda text: None) == [] and registry.asked == ['pack==1.0']
    assert names(tmp_path) == [*NOTES, 'still.png']
    assert number(tmp_path / 'still.png') == 48

def test_another_recipe_is_made_again_and_what_left_the_list_leaves_the_folder(made, chosen, tmp_path):
    public.bring(chosen[2:], tmp_path, Registry(made), say=lambda text: None)
    public.bring([entry(made, 'still', start=1.0, **STILL)], tmp_path, Registry(made), say=lambda text: None)
    assert names(tmp_path) == [*NOTES, 'still.png']
    assert number(tmp_path / 'still.png') == 24

def test_two_runs_at_once_are_refused(made, chosen, tmp_path):
    with public.alone(tmp_path), pytest.raises(SampleError, match='another `make samples`'):
        public.bring(chosen, tmp_path, Registry(made), say=lambda text: None)

# --- packages that are not what the list says

def npm(path: Path, content: bytes, kind: bytes = tarfile.REGTYPE, name: str = 'pack/a.mp4') -> Path:
    "An npm archive with one member"
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, '/etc/hostname', len(content) if kind == tarfile.REGTYPE else 0
    with tarfile.open(path, 'w:gz') as t: t.addfile(member, io.BytesIO(content))
    return path

PACKAGES = [
    ('another content', lambda p, film: wheel(p / 'a.whl', {'pack/a.mp4': film + b'!'}), 'look before you change'),
    ('not there', lambda p, film: wheel(p / 'a.whl', {'../pack/a.mp4': film}), 'has no pack/a.mp4'),
    ('not there, npm', lambda p, film: npm(p / 'a.tgz', film, name='../pack/a.mp4'), 'has no pack/a.mp4'),
    ('a link', lambda p, film: npm(p / 'a.tgz', film, tarfile.SYMTYPE), 'no plain file'),
    ('a hard link', lambda p, film: npm(p / 'a.tgz', film, tarfile.LNKTYPE), 'no plain file'),
    ('too large', lambda p, film: wheel(p / 'a.whl', {'pack/a.mp4': bytes(9 << 20)}), 'at most'),
    ('no archive', lambda p, film: (p / 'a.whl').write_bytes(b'PK') and p / 'a.whl', 'damaged'),
    ('no archive, npm', lambda p, film: (p / 'a.tgz').write_bytes(b'PK') and p / 'a.tgz', 'damaged'),
    ('half an archive', lambda p, film: (p / 'a.tgz').write_bytes(npm(p / 'b.tgz', film).read_bytes()[:999]) and
                                        p / 'a.tgz', 'damaged'),
]

@pytest.mark.parametrize('package, words', [row[1:] for row in PACKAGES], ids=[row[0] for row in PACKAGES])
def test_a_wrong_package_is_named_and_the_others_are_there(made, chosen, tmp_path, monkeypatch, package, words):
    monkeypatch.setattr(public, 'LARGEST', 8 << 20)
    good = Registry(made)
    def fetch(sample: Sample, folder: Path, tick) -> Path:
        if sample.pin == 'other==1.0': return good(sample, folder, tick)
        return package(folder, made['pack/a.mp4'])
    target = tmp_path / 'in/set'
    target.mkdir(parents=True)
    (target / 'still.png').write_bytes(b'by another recipe')
    failed = public.bring([chosen[2], chosen[4]], target, fetch, say=lambda text: None)
    line, = public.report(failed)
    assert line.startswith('still.png: pack==1.0: ') and words in line
    assert names(target) == [*NOTES, 'portrait.png']
    assert 'still.png' not in (target / 'SOURCES.md').read_text()

def test_members_that_lead_elsewhere_leave_nothing(made, chosen, tmp_path):
    evil = {'../x': b'1', '../../x': b'2', '/x': b'3', 'pack/../../x': b'4'}
    target = tmp_path / 'a/b/set'
    assert public.bring(chosen[:1], target, Registry(made | evil), say=lambda text: None) == []
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file())
    assert found == [f'a/b/set/{n}' for n in (*NOTES, 'clip.mp4')]

UNREADABLE = [
    ('no film', {'path': 'pack/p.png'}, b'text', 'cannot be read'),
    ('begins after its end', {'start': 9.0}, None, 'nothing between its seconds'),
    ('a frame after its end', {'start': 9.0} | STILL, None, 'the film has ended'),
]

@pytest.mark.parametrize('change, content, words', [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_a_stretch_that_cannot_be_cut_is_named(made, tmp_path, change, content, words):
    files = made | ({'pack/p.png': content} if content else {})
    failed = public.bring([entry(files, 'clip', **change)], tmp_path, Registry(files), say=lambda text: None)
    assert words in public.report(failed)[0] and names(tmp_path) == NOTES

# --- the command, with the real pip and no index

@pytest.fixture
def offline(made, tmp_path, monkeypatch) -> Path:
    "A folder that pip takes packages from, and from nowhere else"
    shelf = tmp_path / 'shelf'
    wheel(shelf / 'pack-1.0-py3-none-any.whl', made)
    for key, value in {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(shelf), 'PIP_EXTRA_INDEX_URL': ''}.items():
        monkeypatch.setenv(key, value)
    return shelf

def run(samples: list[Sample], folder: Path, *args: str) -> None:
    public.main([*args], listed([asdict(s) for s in samples], folder / 'list.toml'), folder / 'set')

def test_the_command_brings_what_pip_has_and_names_what_it_has_not(offline, chosen, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: run([chosen[2], chosen[4]], tmp_path)
    ended = str(e.value.code)
    assert 'MISSING portrait.png: other==1.0: the package could not be had' in ended and 'registry reachable' in ended
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith('still.png')).split()
    assert row == ['still.png', 'close', '192x144', '0.0', 'MIT'] and 'SOURCES.md' in printed
    assert names(tmp_path / 'set') == [*NOTES, 'still.png']

def test_a_download_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(public, 'WAIT', 0)
    with pytest.raises(SampleError, match='did not come within 0 s'):
        public.run_tool(['sleep', '60'], tmp_path / 'log', lambda: None)

def test_without_npm_its_packages_are_left_out_aloud(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', '')
    run([entry(made, 'still', start=2.0, registry='npm', pin='pack@1.0.0', **STILL)], tmp_path)
    assert 'LEFT OUT still.png: pack@1.0.0: npm is not installed' in capsys.readouterr().out

def test_names_by_tag(chosen, tmp_path, capsys):
    run(chosen, tmp_path, '--names', 'close', 'shaky')
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / 'set/shaken.mp4')]
    run(chosen, tmp_path, '--names')
    assert len(capsys.readouterr().out.splitlines()) == len(chosen)
    with pytest.raises(SystemExit, match='nothing shows'): run(chosen, tmp_path, '--names', 'cosy')
