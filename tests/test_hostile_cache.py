"""A file that others wrote into a cache counts as absent unless it is what a job needs, and costs little to find out.

Tracks and embeddings come from a bucket that more than one may write to. Their checksums are of no help: the maker of
a file makes its checksum, too. Here are files made on purpose, and thousands made by chance."""
import hashlib
import io
import json
import random
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_track import make_track

from wan_avatar.apart import peak_memory
from wan_avatar.embeddings import find_embedding
from wan_avatar.normalise import Clip
from wan_avatar.prompt import Embedding, EmbeddingDamaged, check_embedding
from wan_avatar.track import (
    GROUPS,
    KEYPOINTS,
    LIGHTS,
    MAGIC,
    TRACKERS,
    TrackDamaged,
    draw_debug,
    dump_track,
    parse_track,
    scene_cells,
    track_bytes_at_most,
    track_facts,
    wholebody_points,
    with_face,
)
from wan_avatar.tracks import load_cached_track

MEMORY_DISK = '/dev/shm' if Path('/dev/shm').is_dir() else None # thousands of small files
N = 5
SIZE = (160, 90)
WHO = TRACKERS['mediapipe']
PLATE = np.full((90, 160, 3), 77, np.uint8)
TRACK = replace(
    make_track(N, SIZE, plate=PLATE),
    guessed=np.zeros(N, bool),
    light=np.full((LIGHTS, 2, 3), 20, np.float32),
    grain=np.ones(3, np.float32),
    scene=np.full((N, *scene_cells(SIZE), 3), 90, np.uint8),
)
WHOLE = dump_track(TRACK)
BODY = WHOLE[len(MAGIC) + 32:]
ARRAYS = dict(np.load(io.BytesIO(BODY)))
CLIP = Clip(Path('x.mp4'), None, N, *SIZE, 24, 1.0, None, 0.0, None)
LIMIT = 200_000_000

def sealed(body: bytes) -> bytes:
    "With the checksum it needs"
    return MAGIC + hashlib.sha256(body).digest() + body

def with_arrays(pack=np.savez, **changes) -> bytes:
    "The track with some arrays changed; None: left out"
    out = io.BytesIO()
    pack(out, **{k: v for k, v in (ARRAYS | changes).items() if v is not None})
    return sealed(out.getvalue())

def with_meta(**changes) -> bytes:
    said = json.loads(ARRAYS['meta'].tobytes()) | changes
    return with_arrays(meta=np.frombuffer(
        json.dumps({k: v for k, v in said.items() if v is not None}).encode(), np.uint8
    ))

def with_entry(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    "The track with other bytes in place of an array"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for each, array in ARRAYS.items():
            if each == name: z.writestr(f'{name}.npy', content, method); continue
            with z.open(f'{each}.npy', 'w') as f: np.lib.format.write_array(f, array)
    return sealed(out.getvalue())

def npy(header: str, content: bytes = b'') -> bytes:
    text = (header + '\n').encode()
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + content

def picture(kind: str, size=SIZE, mode='RGB', **options) -> np.ndarray:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8)

def patched(old: bytes, new: bytes) -> bytes:
    assert old in BODY
    assert len(old) == len(new)
    return sealed(BODY.replace(old, new))

def other(name: str, at, value) -> np.ndarray:
    array = ARRAYS[name].copy()
    array[at] = value
    return array

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 160 90\n%%EndComments\n(/bin/sh) run\n'
NEST = json.dumps({'tracker': WHO, 'size': SIZE, 'mask_size': (80, 45), 'groups': GROUPS})[:-1]
ZEROS = bytes(3 * 10**7)
DIRECTORY = BODY.rindex(b'PK\x01\x02')
POISONED = {
    'cut in an array': sealed(BODY[:DIRECTORY // 2] + BODY[-2000:]),
    'cut at its end': sealed(BODY[:-5]),
    'no list of arrays': sealed(BODY[:200]),
    'a comment behind the list': sealed(BODY[:-2] + b'\4\0note'),
    'a list of 60,000 arrays': sealed(BODY[:-12] + struct.pack('<HH', 60_000, 60_000) + BODY[-8:]),
    'a list that begins outside': sealed(BODY[:-6] + struct.pack('<I', 2**31) + BODY[-2:]),
    'an unknown compression': sealed(BODY[:DIRECTORY + 10] + b'\x63' + BODY[DIRECTORY + 11:]),
    'encrypted': sealed(BODY[:DIRECTORY + 8] + b'\1' + BODY[DIRECTORY + 9:]),
    'sizes that lie': sealed(BODY[:DIRECTORY + 20] + b'\xff' * 8 + BODY[DIRECTORY + 28:]),
    'an array outside': sealed(BODY[:DIRECTORY + 42] + b'\xff\xff\xff\x7f' + BODY[DIRECTORY + 46:]),
    'bad deflate': with_entry('face', b'\xff' * 500, zipfile.ZIP_STORED),
    'an array of nothing': with_entry('face', b''),
    'an array that is cut': with_entry(
        'face', npy("{'descr': '<f2', 'fortran_order': False, 'shape': (5, 478, 3), }", b'short')
    ),
    'an array with a tail': with_entry(
        'skin', npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", bytes(13))
    ),
    'an array of negative length': with_entry(
        'present', npy("{'descr': '|b1', 'fortran_order': False, 'shape': (-5,), }", bytes(5))
    ),
    'an array of 4 EB': with_entry(
        'present', npy("{'descr': '|b1', 'fortran_order': False, 'shape': (4611686018427387904,), }", bytes(5))
    ),
    'an array of Python objects': with_entry(
        'present', npy("{'descr': '|O', 'fortran_order': False, 'shape': (5,), }", b'cos\nsystem\n')
    ),
    'a header deep as a well': with_entry('present', npy('(' * 9000, bytes(5))),
    'a header that is code': with_entry('present', npy("__import__('os').getpid()", bytes(5))),
    'a bomb: a present of 2 GB': with_entry(
        'present', npy("{'descr': '|b1', 'fortran_order': False, 'shape': (2000000000,), }") + ZEROS
    ),
    'a bomb: masks of 30 MB': with_entry(
        'mask_bytes', npy("{'descr': '|u1', 'fortran_order': False, 'shape': (30000000,), }") + ZEROS
    ),
    'a bomb: a mask of 300 MB': with_arrays(
        mask_bytes=np.frombuffer(bomb := zlib.compress(bytes(3 * 10**8), 1), np.uint8),
        mask_lengths=np.array([len(bomb), 0, 0, 0, 0], np.uint32)
    ),
    'a bomb nobody asked for': with_entry(
        'meta', npy("{'descr': '|u1', 'fortran_order': False, 'shape': (30000000,), }") + ZEROS
    ),
    'no face': with_arrays(face=None),
    'no centre of the face': with_arrays(face_at=None),
    'no masks': with_arrays(mask_bytes=None),
    'no presence': with_arrays(present=None),
    'no meta': with_arrays(meta=None),
    'nothing': with_arrays(**dict.fromkeys(ARRAYS)),
    'one frame less': dump_track(make_track(N - 1, SIZE, plate=PLATE)),
    'points of float64': with_arrays(face=ARRAYS['face'].astype(float)),
    'points of 477': with_arrays(face=ARRAYS['face'][:, 1:]),
    'points in two dimensions': with_arrays(face=ARRAYS['face'][0]),
    'big-endian points': with_arrays(face=ARRAYS['face'].astype('>f2')),
    'text for points': with_arrays(face=np.full((N, 478, 3), 'a')),
    'a number for points': with_arrays(face=np.float16(1)),
    'an infinite point': with_arrays(face=other('face', (0, 0, 0), np.inf)),
    'half a point': with_arrays(body=other('body', (0, 0, 0), np.nan)),
    'part of a face': with_arrays(face=other('face', (0, slice(0, 9)), np.nan)),
    'infinite depth': with_arrays(face=other('face', (0, 0, 2), -np.inf)),
    'presence in numbers': with_arrays(present=np.array([2, 3, 4, 5, 6], np.uint8)),
    'presence neither true nor false': with_arrays(present=np.array([0, 1, 2, 0, 255], np.uint8).view(bool)),
    'a camera of nan': with_arrays(camera=np.full((N, 2, 3), np.nan, np.float32)),
    'a camera out of this world': with_arrays(camera=np.full((N, 2, 3), 1e30, np.float32)),
    'a camera too short': with_arrays(camera=ARRAYS['camera'][1:]),
    'skin of another planet': with_arrays(skin=np.array([1, 2, 999], np.float32)),
    'skin in part': with_arrays(skin=np.array([1, 2, np.nan], np.float32)),
    'light of another planet': with_arrays(light=other('light', (0, 1, 2), 999)),
    'light in part': with_arrays(light=other('light', (2, 0, 0), np.nan)),
    'endless light': with_arrays(light=other('light', (2, 0, 0), np.inf)),
    'light of nine stretches': with_arrays(light=np.zeros((LIGHTS + 1, 2, 3), np.float32)),
    'grain of nan': with_arrays(grain=np.full(3, np.nan, np.float32)),
    'grain like sand': with_arrays(grain=np.array([1, 1, 99], np.float32)),
    'grain less than nothing': with_arrays(grain=np.array([1, -1, 1], np.float32)),
    'grain of one channel': with_arrays(grain=np.ones(1, np.float32)),
    'a scene of another size': with_arrays(scene=ARRAYS['scene'][:, 1:]),
    'a scene too short': with_arrays(scene=ARRAYS['scene'][1:]),
    'a scene of float': with_arrays(scene=ARRAYS['scene'].astype(np.float32)),
    'guesses too many': with_arrays(guessed=np.zeros(N + 1, bool)),
    'mask lengths that are not there': with_arrays(mask_lengths=np.full(N, 2**32 - 1, np.uint32)),
    'mask lengths of nothing': with_arrays(mask_lengths=np.zeros(N, np.uint32)),
    'masks of noise': with_arrays(mask_bytes=np.frombuffer(
        random.Random(1).randbytes(len(ARRAYS['mask_bytes'])), np.uint8
    )),
    'masks of another size': with_meta(mask_size=(81, 45)),
    'masks of no size': with_meta(mask_size=(0, 45)),
    'masks of half a pixel': with_meta(mask_size=(80.0, 45)),
    'masks of 4 gigapixels': with_meta(mask_size=(65536, 65536)),
    'a mask size of three': with_meta(mask_size=(80, 45, 1)),
    'a mask size that is true': with_meta(mask_size=(True, 45)),
    'another size': with_meta(size=(320, 180)),
    'no size': with_meta(size=None),
    'a size of text': with_meta(size='ab'),
    'another tracker': with_meta(tracker='somebody-1'),
    'a tracker of lists': with_meta(tracker=[[]]),
    'no groups': with_meta(groups=[]),
    'a group nobody knows': with_meta(groups=['tail']),
    'groups of text': with_meta(groups='face'),
    'a part of the groups': with_meta(groups=['face']),
    'meta of lists': with_arrays(meta=np.frombuffer(b'[]', np.uint8)),
    'meta of text': with_arrays(meta=np.frombuffer(b'"a"', np.uint8)),
    'meta that is no JSON': with_arrays(meta=np.frombuffer(b'{', np.uint8)),
    'meta of lone surrogates': with_arrays(meta=np.frombuffer(b'{"size": "\\ud800"}', np.uint8)),
    'meta deep as a well': with_arrays(meta=np.frombuffer(
        (NEST + ', "x": ' + '[' * 3000 + ']' * 3000 + '}').encode()[:4096], np.uint8
    )),
    'a number of 3,000 digits in meta': with_arrays(meta=np.frombuffer(
        (NEST.replace('160', '1' + '0' * 3000) + '}').encode(), np.uint8
    )),
    'a plate in PostScript': with_arrays(plate=np.frombuffer(EPS, np.uint8)),
    'a plate in PNG': with_arrays(plate=picture('PNG')),
    'a plate in TIFF': with_arrays(plate=picture('TIFF')),
    'a plate of another size': with_arrays(plate=picture('JPEG', (161, 90))),
    'a plate of 25 megapixels': with_arrays(plate=picture('JPEG', (5000, 5000))),
    'a grey plate': with_arrays(plate=picture('JPEG', mode='L')),
    'a plate in four inks': with_arrays(plate=picture('JPEG', mode='CMYK')),
    'a progressive plate': with_arrays(plate=picture('JPEG', progressive=True)),
    'half a plate': with_arrays(plate=picture('JPEG')[:400]),
    'no plate but its place': with_arrays(plate=np.zeros(0, np.uint8)),
    'a matte in JPEG': with_arrays(matte=picture('JPEG', mode='L')),
    'a matte in colour': with_arrays(matte=picture('PNG')),
    'a matte of 25 megapixels': with_arrays(matte=picture('PNG', (5000, 5000), 'L')),
    'no bytes': b'',
    'text': b'not a track',
    'a wrong checksum': MAGIC + bytes(32) + BODY,
    'a zip alone': BODY,
}

class Bucket:
    "One object for whatever is asked"
    def __init__(self, data: bytes | None): self.data, self.asked = data, []
    def stat(self, key: str) -> dict | None: return None if self.data is None else {'bytes': len(self.data)}
    def read_bytes(self, key: str, most: int) -> bytes | None:
        self.asked.append(most)
        return self.data

def ready() -> None: "Runs apart: this module is imported once"

def use(track) -> None:
    "What jobs do with a track; raises if something in it is not as it should be"
    frame = np.zeros((*track.size[::-1], 3), np.uint8)
    for i in range(len(track)):
        assert track.mask(i).shape == track.size[::-1]
    draw_debug(frame, track, 0)
    facts = track_facts(track)
    assert with_face(track).shape == (len(track),)
    assert 0 <= facts['present'] <= facts['frames'] == len(track)
    assert facts['guessed_masks'] <= facts['frames']
    assert wholebody_points(track).shape == (len(track), 133, 3)
    assert not any(np.isinf(v).any() for v in track.points.values())

def taken(data: bytes) -> str:
    "Runs apart: what a worker makes of an object in its cache"
    with tempfile.TemporaryDirectory() as d:
        track = load_cached_track(Bucket(data), 'key', Path(d) / 'x.track', CLIP, WHO)
        if track is None: return 'absent' if not any(Path(d).iterdir()) else 'a file is left'
        use(track)
        return 'taken' if (Path(d) / 'x.track').read_bytes() == data else 'another file'

def test_a_good_track_is_taken(apart):
    assert apart.run(taken, WHOLE, memory=LIMIT) == apart.run(taken, with_arrays(), memory=LIMIT) == 'taken'
    assert len(WHOLE) < track_bytes_at_most(N, SIZE)

def all_taken(names: list[str]) -> dict[str, str]:
    "Runs apart: every poisoned track, and how much memory all of them took"
    return {name: taken(POISONED[name]) for name in names} | {'memory': peak_memory()}

@pytest.fixture(scope='module')
def outcomes(apart): return apart.run(all_taken, list(POISONED), memory=LIMIT)

@pytest.mark.parametrize('name', POISONED)
@pytest.mark.hostile('tracks')
def test_a_poisoned_track_counts_as_absent(outcomes, name):
    assert outcomes[name] == 'absent'
    with pytest.raises(TrackDamaged): parse_track(POISONED[name], N, SIZE, WHO)

def test_poisoned_tracks_take_little_memory(outcomes): assert outcomes['memory'] < LIMIT

@pytest.mark.hostile('tracks')
def test_an_object_too_large_is_not_even_read():
    bucket = Bucket(bytes(track_bytes_at_most(N, SIZE) + 1))
    assert load_cached_track(bucket, 'key', Path('x'), CLIP, WHO) is None
    assert not bucket.asked
    assert load_cached_track(Bucket(None), 'key', Path('x'), CLIP, WHO) is None

@pytest.mark.hostile('tracks')
def test_a_track_of_an_hour_is_none():
    with pytest.raises(TrackDamaged): parse_track(dump_track(replace(TRACK, present=np.ones(90_000, bool))))

# by chance

def mutated_track(rng: random.Random) -> bytes:
    "Other bytes in the archive, or in one of its arrays, or arrays of another kind"
    kind = rng.randrange(8)
    if kind < 3: return sealed(other_bytes(BODY, rng))
    name = rng.choice(list(ARRAYS))
    array = ARRAYS[name]
    if kind == 3:
        header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
        return with_entry(name, other_bytes(npy(header, array.tobytes()), rng), zipfile.ZIP_STORED)
    if kind == 4:
        return with_arrays(**{
            name: rng.choice((
                None,
                array[1:],
                array.astype(rng.choice(('<f8', '<i4', '|u1', '|b1', '>f2'))),
                np.zeros((N,) * rng.randrange(4)),
            )),
        })
    if kind == 5:
        return with_meta(**{
            rng.choice(('size', 'mask_size', 'groups', 'tracker')): rng.choice((
                None, 0, '', [], {}, [1], [1, 2], [0, -1], [1e9, 1], ['face'], 'wholebody', list(GROUPS),
            )),
        })
    changed = array.copy()
    if changed.size:
        if changed.dtype.kind == 'f': value = rng.choice((0, 1, 127, np.inf, -np.inf, np.nan))
        elif changed.dtype.kind == 'b': value = rng.random() < .5
        else: value = rng.randrange(128)
        changed.flat[rng.randrange(changed.size)] = value
    return with_arrays(**{name: changed})

def other_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at = rng.randrange(len(changed))
        if rng.random() < .5:
            at = max(0, len(changed) - 1 - rng.randrange(1500)) # where the list of arrays is, and what it says
        way = rng.randrange(8)
        if way == 0: del changed[at:at + rng.randrange(1, 40)]
        elif way == 1: changed[at:at] = rng.randbytes(rng.randrange(1, 40))
        else: changed[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)))
        if len(changed) < 2: return bytes(changed)
    return bytes(changed)

def try_tracks(count: int, seed: int) -> tuple[Counter, int]:
    "Runs apart"
    rng = random.Random(seed)
    seen = Counter()
    for _ in range(count):
        data = mutated_track(rng)
        try: track = parse_track(data, N, SIZE, WHO)
        except TrackDamaged: seen['absent'] += 1
        else: use(track); seen['valid'] += 1
    return seen, peak_memory()

@pytest.mark.hostile('tracks', cases=2000)
def test_2000_mutations_of_a_track(apart):
    seen, memory = apart.run(try_tracks, 2000, 7, memory=LIMIT)
    assert sum(seen.values()) == 2000, (seen, memory)
    assert seen['absent'] > 800, (seen, memory)
    assert seen['valid'] > 50, (seen, memory)
    assert memory < LIMIT, (seen, memory)

# embeddings

SMALL = Embedding('a person', 'abc', shape=(1, 4, 8))

def embedding(data: bytes | None = None, said: dict | None = None, raw: bytes | None = None, **tensor) -> bytes:
    "A safetensors file by hand"
    data = np.linspace(-1, 1, 32, dtype=np.float16).tobytes() if data is None else data
    header = {
        '__metadata__': SMALL.metadata() if said is None else said,
        'embedding': {'dtype': 'F16', 'shape': SMALL.shape, 'data_offsets': [0, len(data)]} | tensor,
    }
    header['embedding'] = {k: v for k, v in header['embedding'].items() if v is not None}
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack('<Q', len(text)) + text + data

GOOD = embedding()
TEXT = GOOD[8:8 + int.from_bytes(GOOD[:8], 'little')]
FLAWED = np.linspace(-1, 1, 32, dtype=np.float32)
def flawed(value: float, kind: str = '<f2') -> bytes:
    numbers = FLAWED.astype(kind)
    numbers[7] = value
    return numbers.tobytes()

VALID = {
    'float16': GOOD,
    'float32': embedding(FLAWED.tobytes(), dtype='F32'),
    'bfloat16': embedding((FLAWED.view('<u4') >> 16).astype('<u2').tobytes(), dtype='BF16'),
    'a header with blanks behind it': embedding(raw=TEXT + b' ' * 7),
    'more said': embedding(said=SMALL.metadata() | {'format': 'pt'}),
    'the largest numbers': embedding(flawed(65504)),
}
WRONG = {
    'empty': b'',
    'seven bytes': bytes(7),
    'a header of 2**63 bytes': struct.pack('<Q', 2**63) + bytes(90),
    'a header longer than the file': struct.pack('<Q', 90_000) + b'{}',
    'cut': GOOD[:-3],
    'longer': GOOD + b'x',
    'no JSON': embedding(raw=b'{"a'),
    'a list': embedding(raw=b'[]'),
    'a number': embedding(raw=b'17'),
    'in UTF-16': embedding(raw=TEXT.decode().encode('utf-16')),
    'not Unicode': embedding(raw=b'{"\xff": 1}'),
    'blanks in front': embedding(raw=b' ' + TEXT),
    'deep as a well': embedding(raw=b'[' * 400_000),
    'NaN in it': embedding(raw=TEXT.replace(b'"F16"', b'NaN')),
    'a number of 5,000 digits': embedding(raw=TEXT.replace(b'[0,', b'[' + b'9' * 5000 + b',')),
    'a name twice': embedding(raw=TEXT[:-1] + b', "embedding": {}}'),
    'a lone surrogate': embedding(said=SMALL.metadata() | {'more': '\ud800'}),
    'a number said': embedding(said=SMALL.metadata() | {'more': 1}),
    'nothing said': embedding(said={}),
    'another prompt': embedding(said=SMALL.metadata() | {'prompt': 'a dog'}),
    'another encoder': embedding(said=SMALL.metadata() | {'encoder_sha256': 'x'}),
    'metadata of lists': embedding(raw=TEXT.replace(b'{"__metadata__": {', b'{"x": [], "__metadata__": {')),
    'no metadata': embedding(raw=b'{"embedding": {}}'),
    'metadata of text': embedding(raw=b'{"embedding": {}, "__metadata__": "a"}'),
    'no tensor': embedding(raw=b'{"__metadata__": {}}'),
    'a tensor of text': embedding(raw=b'{"__metadata__": {}, "embedding": "a"}'),
    'two tensors': embedding(raw=TEXT[:-1] + b', "more": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}'),
    'no offsets': embedding(data_offsets=None),
    'one offset': embedding(data_offsets=[0]),
    'three offsets': embedding(data_offsets=[0, 64, 64]),
    'offsets from behind': embedding(data_offsets=[64, 0]),
    'negative offsets': embedding(data_offsets=[-64, 0]),
    'offsets of text': embedding(data_offsets='ab'),
    'offsets of floats': embedding(data_offsets=[0.0, 64.0]),
    'offsets elsewhere': embedding(data_offsets=[8, 64]),
    'no shape': embedding(shape=None),
    'a shape of text': embedding(shape='abc'),
    'a shape of lists': embedding(shape=[[1], [4], [8]]),
    'another shape': embedding(shape=[1, 8, 4]),
    'a shape of floats': embedding(shape=[1.0, 4, 8]),
    'a shape that is true': embedding(shape=[True, 4, 8]),
    'one dimension more': embedding(shape=[1, 1, 4, 8]),
    'a shape of 2**62': embedding(shape=[2**62, 4, 8]),
    'no kind': embedding(dtype=None),
    'whole numbers': embedding(dtype='I16'),
    'numbers of 8 bits': embedding(data=bytes(32), dtype='F8_E4M3'),
    'a kind nobody knows': embedding(dtype='X' * 10_000),
    'a kind of lists': embedding(dtype=[]),
    'more about the tensor': embedding(offset=1),
    'half as many numbers': embedding(data=bytes(32)),
    'not a number': embedding(flawed(np.nan)),
    'infinite': embedding(flawed(np.inf)),
    'minus infinite': embedding(flawed(-np.inf)),
    'infinite in float32': embedding(flawed(np.inf, '<f4'), dtype='F32'),
    'not a number in bfloat16': embedding(
        (flawed_32 := np.frombuffer(flawed(np.nan, '<f4'), '<u4') >> 16).astype('<u2').tobytes(), dtype='BF16'
    ),
}

@pytest.mark.parametrize('name', VALID)
def test_a_good_embedding_is_taken(name, tmp_path):
    assert find_embedding(SMALL, tmp_path / 'work/e', tmp_path, Bucket(VALID[name])) == 'bucket'
    assert (tmp_path / 'work/e').read_bytes() == VALID[name]
    assert find_embedding(SMALL, tmp_path / 'work/e', tmp_path, Bucket(None)) == 'here'

@pytest.mark.parametrize('name', WRONG)
@pytest.mark.hostile('embeddings')
def test_a_poisoned_embedding_counts_as_absent(name, tmp_path):
    "In the bucket, with the weights and where jobs look first"
    for place in ('models/embeddings', 'work'):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / SMALL.name).write_bytes(WRONG[name])
        with pytest.raises(EmbeddingDamaged): check_embedding(tmp_path / place / SMALL.name, SMALL)
    assert find_embedding(SMALL, tmp_path / 'work' / SMALL.name, tmp_path / 'models', Bucket(WRONG[name])) is None
    replaced = find_embedding(SMALL, tmp_path / 'work' / SMALL.name, tmp_path / 'models', Bucket(GOOD))
    assert replaced == 'bucket'

PLACES = [
    ('a folder', lambda p: p.mkdir()),
    ('a link to itself', lambda p: p.symlink_to(p)),
    ('a link to nothing', lambda p: p.symlink_to(p.with_name('none'))),
]
@pytest.mark.parametrize('make', [m for _, m in PLACES], ids=[n for n, _ in PLACES])
@pytest.mark.hostile('embeddings')
def test_what_is_no_file_is_no_embedding(make, tmp_path):
    (tmp_path / 'embeddings').mkdir()
    make(tmp_path / 'embeddings' / SMALL.name)
    assert find_embedding(SMALL, tmp_path / 'work/e', tmp_path, Bucket(GOOD)) == 'bucket'

@pytest.mark.hostile('embeddings')
def test_an_embedding_too_large_is_not_even_read(tmp_path):
    bucket = Bucket(bytes(SMALL.bytes_at_most + 1))
    assert find_embedding(SMALL, tmp_path / 'e', tmp_path, bucket) is None
    assert not bucket.asked

def mutated_embedding(rng: random.Random) -> bytes:
    if rng.random() < .5: return other_bytes(rng.choice(list(VALID.values())), rng)
    header = json.loads(TEXT)
    place = rng.choice((header, header['embedding'], header['__metadata__']))
    place[rng.choice([*place, 'more'])] = rng.choice((
        None, 0, -1, 64, '', 'F32', [], [0, 64], [1, 4, 8], {}, True, 1e300, [0, 2**63],
    ))
    return embedding(rng.choice((None, bytes(64), rng.randbytes(64), bytes(128))), raw=json.dumps(header).encode())

def try_embeddings(count: int, seed: int) -> tuple[Counter, int]:
    "Runs apart"
    rng = random.Random(seed)
    seen = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as d:
        for _ in range(count):
            (path := Path(d) / 'x').write_bytes(mutated_embedding(rng))
            try: check_embedding(path, SMALL)
            except EmbeddingDamaged: seen['absent'] += 1
            else: read_back(path.read_bytes()); seen['valid'] += 1
    return seen, peak_memory()

def read_back(data: bytes) -> None:
    "As a reader that believes the header would"
    length = int.from_bytes(data[:8], 'little')
    tensor = json.loads(data[8:8 + length])['embedding']
    begin, end = tensor['data_offsets']
    kind = {'F16': '<f2', 'BF16': '<u2', 'F32': '<f4'}[tensor['dtype']]
    numbers = np.frombuffer(data[8 + length:][begin:end], kind).reshape(tensor['shape'])
    if tensor['dtype'] == 'BF16': numbers = (numbers.astype('<u4') << 16).view('<f4')
    assert numbers.shape == SMALL.shape
    assert np.isfinite(numbers).all()

@pytest.mark.hostile('embeddings', cases=2000)
def test_2000_mutations_of_an_embedding(apart):
    seen, memory = apart.run(try_embeddings, 2000, 7, memory=LIMIT)
    assert sum(seen.values()) == 2000, (seen, memory)
    assert seen['absent'] > 800, (seen, memory)
    assert seen['valid'] > 50, (seen, memory)
    assert memory < LIMIT, (seen, memory)

def test_keypoints_are_those_of_the_trackers():
    assert {g: KEYPOINTS[g] for g in GROUPS} == {g: TRACK.points[g].shape[1] for g in GROUPS}
