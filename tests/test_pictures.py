"Broken metadata is no reason to refuse a picture, missing pixels are; no error but `input_unreadable` comes out"
import hashlib
import io
import random
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from wan_avatar.apart import peak_memory
from wan_avatar.job import JobError
from wan_avatar.metadata import strip_metadata
from wan_avatar.normalise import normalise_image
from wan_avatar.pictures import read_image

MEMORY_DISK = '/dev/shm' if Path('/dev/shm').is_dir() else None # thousands of small files
SIZE = (96, 64)
Y, X = np.mgrid[:SIZE[1], :SIZE[0]]
PICTURE = Image.fromarray(np.stack([X * 2, Y * 3, X + Y], -1).astype(np.uint8))
BIG = b'a' * 1_500_000
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()

def encoded(kind: str, image: Image.Image = PICTURE, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010e] = orientation, 'a camera'
    return made

def chunk(kind: bytes, data: bytes, check: int | None = None) -> bytes:
    "Of a PNG"
    if check is None: check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

def png_with(*chunks: bytes, at: int = 33) -> bytes:
    "The sample with chunks behind its header, or elsewhere"
    return PNG[:at] + b''.join(chunks) + PNG[at:]

def text(data: bytes) -> bytes: return chunk(b'zTXt', b'workflow\0\0' + zlib.compress(data))

def segment(marker: int, data: bytes) -> bytes:
    "Of a JPEG"
    return bytes([0xff, marker]) + struct.pack('>H', len(data) + 2) + data

def riff(*chunks: tuple[bytes, bytes], said: int | None = None) -> bytes:
    "A WebP of these chunks; `said`: the size in its header"
    def packed(kind, data): return kind + struct.pack('<I', len(data)) + data + b'\0' * (len(data) % 2)
    body = b'WEBP' + b''.join(packed(*each) for each in chunks)
    return b'RIFF' + struct.pack('<I', len(body) if said is None else said) + body

def tiff_with(*entries: tuple[int, int, int, int], second: int = 0) -> bytes:
    "A TIFF with more tags: number, type, count, value"
    data = bytearray(encoded('TIFF'))
    at, = struct.unpack('<I', data[4:8])
    count, = struct.unpack('<H', data[at:at + 2])
    there = [bytes(data[at + 2 + 12 * i:at + 14 + 12 * i]) for i in range(count)]
    more = [struct.pack('<HHII', *entry) for entry in entries]
    tags = sorted(there + more, key=lambda tag: int.from_bytes(tag[:2], 'little'))
    data[4:8] = struct.pack('<I', len(data))
    return bytes(data) + struct.pack('<H', len(tags)) + b''.join(tags) + struct.pack('<I', second)

PNG = encoded('PNG')
JPEG = encoded('JPEG', quality=90)
STEPS = encoded('JPEG', quality=90, progressive=True)
WEBP = encoded('WEBP', lossless=True)
TIFF = encoded('TIFF')
GIF = encoded('GIF', PICTURE.quantize(32))
VP8L = WEBP[20:]
# its flags say: profile, EXIF, XMP
VP8X = struct.pack('<I', 0x2c) + struct.pack('<I', SIZE[0] - 1)[:3] + struct.pack('<I', SIZE[1] - 1)[:3]
AVIF = encoded('AVIF', exif=b'MM\0*' + exif(1).tobytes()[10:] + b'0123456789')
BROKEN = b'\0\x08\0\x02\x01\x12\0\x03'

# name: the file, the same picture without what stands beside it

SHOWN = {
    'PNG, broken eXIf': (PNG[:33] + chunk(b'eXIf', BROKEN) + PNG[33:], PNG),
    'PNG, eXIf of nothing': (PNG[:33] + chunk(b'eXIf', b'') + PNG[33:], PNG),
    'PNG, eXIf that points outside': (PNG[:33] + chunk(b'eXIf', b'II*\0' + b'\xff' * 8) + PNG[33:], PNG),
    'PNG, a workflow of 1.5 MB in zTXt': (png_with(text(BIG)), PNG),
    'PNG, a workflow of 1.5 MB in compressed iTXt': (
        png_with(chunk(b'iTXt', b'workflow\0\1\0\0\0' + zlib.compress(BIG))),
        PNG,
    ),
    'PNG, 3 MB of plain text': (PNG[:33] + chunk(b'tEXt', b'prompt\0' + BIG * 2) + PNG[33:], PNG),
    'PNG, a hundred texts of 1 MB': (png_with(text(bytes(10**6)) * 100), PNG),
    'PNG, a text that does not unpack': (PNG[:33] + chunk(b'zTXt', b'workflow\0\0not deflated') + PNG[33:], PNG),
    'PNG, a text with a wrong checksum': (PNG[:33] + chunk(b'tEXt', b'a\0b', check=7) + PNG[33:], PNG),
    'PNG, a text behind the pixels': (png_with(text(BIG), at=-12), PNG),
    'PNG, a profile of 1.5 MB that is none': (PNG[:33] + chunk(b'iCCP', b'p\0\0' + zlib.compress(BIG)) + PNG[33:], PNG),
    'PNG, a profile of 100 MB': (PNG[:33] + chunk(b'iCCP', b'p\0\0' + zlib.compress(bytes(10**8))) + PNG[33:], PNG),
    'PNG, a profile that does not unpack': (PNG[:33] + chunk(b'iCCP', b'p\0\0not deflated') + PNG[33:], PNG),
    'PNG, a profile cut in the middle': (png_with(chunk(b'iCCP', b'p\0\0' + zlib.compress(PROFILE[:200]))), PNG),
    'PNG, density of three bytes': (PNG[:33] + chunk(b'pHYs', b'abc') + PNG[33:], PNG),
    'PNG, time of three bytes': (PNG[:33] + chunk(b'tIME', b'abc') + PNG[33:], PNG),
    'PNG, no IEND': (PNG[:-12], PNG),
    'PNG, half an IEND': (PNG[:-5], PNG),
    'PNG, junk behind its end': (PNG + b'junk' * 100, PNG),
    'PNG, animated, second frame broken': (
        PNG[:33] + chunk(b'acTL', struct.pack('>II', 2, 0)) + PNG[33:-12] + chunk(b'fdAT', b'??') + PNG[-12:],
        PNG,
    ),
    'JPEG, an empty EXIF block': (JPEG[:2] + segment(0xe1, b'Exif\0\0') + JPEG[2:], JPEG),
    'JPEG, broken EXIF': (JPEG[:2] + segment(0xe1, b'Exif\0\0MM\0*' + BROKEN) + JPEG[2:], JPEG),
    'JPEG, orientation 99': (JPEG[:2] + segment(0xe1, b'Exif\0\0' + exif(99).tobytes()[6:]) + JPEG[2:], JPEG),
    'JPEG, a broken list of more pictures': (JPEG[:2] + segment(0xe2, b'MPF\0MM\0*' + BROKEN) + JPEG[2:], JPEG),
    'JPEG, a broken block of an image editor': (
        JPEG[:2] + segment(0xed, b'Photoshop 3.0\0008BIM\x03\xed\0') + JPEG[2:],
        JPEG,
    ),
    'JPEG, half a profile': (JPEG[:2] + segment(0xe2, b'ICC_PROFILE\0\1\2' + PROFILE[:200]) + JPEG[2:], JPEG),
    'JPEG, 3 MB of EXIF thumbnails': (JPEG[:2] + segment(0xe1, b'Exif\0\0' + bytes(60_000)) * 50 + JPEG[2:], JPEG),
    'JPEG, without its end': (JPEG[:-2], JPEG),
    'JPEG, with half its end': (JPEG[:-1], JPEG),
    'JPEG, a thumbnail inside, without its end': (JPEG[:2] + segment(0xe1, b'Exif\0\0' + JPEG) + JPEG[2:-2], JPEG),
    'JPEG, progressive, without its end': (STEPS[:-2], STEPS),
    'WebP, broken EXIF': (riff((b'VP8X', VP8X), (b'VP8L', VP8L), (b'EXIF', BROKEN)), WEBP),
    'WebP, flags of what is not there': (riff((b'VP8X', VP8X), (b'VP8L', VP8L)), WEBP),
    'WebP, 1.5 MB of XMP': (riff((b'VP8X', VP8X), (b'VP8L', VP8L), (b'XMP ', BIG)), WEBP),
    'WebP, a profile that is none': (riff((b'VP8X', VP8X), (b'ICCP', b'no'), (b'VP8L', VP8L)), WEBP),
    'WebP, a size that is stale': (riff((b'VP8L', VP8L), said=10**6), WEBP),
    'WebP, EXIF that is cut off': (riff((b'VP8X', VP8X), (b'VP8L', VP8L), (b'EXIF', exif(1).tobytes()))[:-9], WEBP),
    'TIFF, EXIF outside the file': (tiff_with((34665, 4, 1, 10**8)), TIFF),
    'TIFF, EXIF that is the picture itself': (tiff_with((34665, 4, 1, 8)), TIFF),
    'TIFF, a description of 4 GB': (tiff_with((270, 2, 2**32 - 1, 8)), TIFF),
    'TIFF, orientation 99': (tiff_with((274, 3, 1, 99)), TIFF),
    'TIFF, a profile outside the file': (tiff_with((34675, 7, 500, 10**8)), TIFF),
    'TIFF, a second picture outside the file': (tiff_with(second=10**8), TIFF),
    'TIFF, a second picture that is the first': (tiff_with(second=len(TIFF)), TIFF),
    'AVIF, broken EXIF': (
        AVIF.replace(b'0123456789', b'\xff' * 10).replace(b'MM\0*', b'\xff\xff\xff\xff'),
        encoded('AVIF'),
    ),
    'GIF, without its end': (GIF[:-1], GIF),
    'GIF, a comment of 1 MB': (GIF[:-1] + b'!\xfe' + (b'\xff' + b'c' * 255) * 4000 + b'\0;', GIF),
}

@pytest.mark.parametrize('name', SHOWN)
@pytest.mark.hostile('pictures')
def test_what_stands_beside_the_pixels_does_not_matter(name, tmp_path):
    odd, plain = SHOWN[name]
    for file, data in (('odd', odd), ('plain', plain)): (tmp_path / file).write_bytes(data)
    assert np.array_equal(read_image(tmp_path / 'odd'), read_image(tmp_path / 'plain'))

def png_with(kind, data): return PNG[:33] + chunk(kind, data) + PNG[33:]

TURNED = {
    'PNG': png_with(b'eXIf', exif(6).tobytes().removeprefix(b'Exif\0\0')),
    'PNG, behind the pixels': PNG[:-12] + chunk(b'eXIf', exif(6).tobytes().removeprefix(b'Exif\0\0')) + PNG[-12:],
    'JPEG': encoded('JPEG', exif=exif(6)),
    'WebP': encoded('WEBP', exif=exif(6), lossless=True),
    'TIFF': tiff_with((274, 3, 1, 6)),
    'AVIF': encoded('AVIF', exif=exif(6)),
}
@pytest.mark.parametrize('name', TURNED)
def test_orientation_is_read(name, tmp_path):
    (tmp_path / 'x').write_bytes(TURNED[name])
    got = read_image(tmp_path / 'x')
    upright = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 12

@pytest.mark.parametrize('turn', range(1, 9))
def test_every_orientation(turn, tmp_path):
    "Against Pillow's own reading of the same number"
    from PIL import ImageOps
    (tmp_path / 'x').write_bytes(png_with(b'eXIf', exif(turn).tobytes().removeprefix(b'Exif\0\0')))
    with Image.open(tmp_path / 'x') as image:
        assert np.array_equal(read_image(tmp_path / 'x'), ImageOps.exif_transpose(image))

@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'TIFF'])
def test_a_profile_is_read(kind, tmp_path):
    "Blue and red change places in this profile"
    profile = swapped_profile()
    (tmp_path / 'x').write_bytes(encoded(kind, Image.new('RGB', SIZE, (200, 30, 30)), icc_profile=profile))
    red, _, blue = read_image(tmp_path / 'x')[10, 10].astype(int)
    assert blue > 150 > 100 > red

def swapped_profile() -> bytes:
    "sRGB's, with the tags of red and blue exchanged"
    return PROFILE.replace(b'rXYZ', b'????').replace(b'bXYZ', b'rXYZ').replace(b'????', b'bXYZ')

# really cut

KINDS = {
    'JPEG': JPEG,
    'progressive JPEG': STEPS,
    'JPEG with EXIF': encoded('JPEG', exif=exif(6), icc_profile=PROFILE),
    'CMYK JPEG': encoded('JPEG', PICTURE.convert('CMYK')),
    'JPEG with restarts': encoded('JPEG', restart_marker_blocks=3),
    'PNG': PNG,
    'PNG with EXIF': encoded('PNG', exif=exif(6), icc_profile=PROFILE),
    'PNG of 16 bits': encoded('PNG', Image.fromarray((X * Y * 7).astype(np.uint16))),
    'PNG with palette': encoded('PNG', PICTURE.quantize(16), transparency=3),
    'animated PNG': encoded('PNG', save_all=True, append_images=[PICTURE.rotate(90)]),
    'WebP': encoded('WEBP', exif=exif(6), icc_profile=PROFILE),
    'lossless WebP': WEBP,
    'animated WebP': encoded('WEBP', save_all=True, append_images=[PICTURE.rotate(90)]),
    'BMP': encoded('BMP'),
    'TIFF': TIFF,
    'TIFF by LZW': encoded('TIFF', compression='tiff_lzw'),
    'TIFF by JPEG': encoded('TIFF', compression='jpeg'),
    'TIFF of floats': encoded('TIFF', Image.fromarray((X * Y * 7.).astype(np.float32))),
    'GIF': GIF,
    'animated GIF': encoded('GIF', PICTURE.quantize(16), save_all=True, append_images=[PICTURE.rotate(90).quantize(9)]),
    'AVIF': encoded('AVIF', exif=exif(6), icc_profile=PROFILE),
}

def pixels(data: bytes, folder: Path) -> str | None: # None: refused
    "What is seen of a file, whichever way it is turned: where a file is cut its EXIF may be gone"
    (folder / 'x').write_bytes(data)
    try: got = read_image(folder / 'x')
    except JobError as e:
        assert e.code == 'input_unreadable'
        return None
    return min(hashlib.sha256(np.ascontiguousarray(np.rot90(got, k))).hexdigest() for k in range(4))

@pytest.mark.filterwarnings('ignore::UserWarning') # a decoder's opinion of a TIFF
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.hostile('pictures')
def test_a_file_cut_anywhere_shows_all_its_pixels_or_is_refused(kind, tmp_path):
    whole = KINDS[kind]
    size = len(KINDS[kind])
    cuts = {*range(size - 14, size), *range(0, size, max(1, size // 24))}
    seen = {pixels(whole[:cut], tmp_path) for cut in cuts}
    assert seen <= {None, pixels(whole, tmp_path)}
    assert pixels(whole, tmp_path)
    assert pixels(whole[:size // 3], tmp_path) is None

SCANS = [i for i in range(len(STEPS)) if STEPS[i:i + 2] == b'\xff\xda'][1:]
@pytest.mark.parametrize('at', SCANS)
@pytest.mark.hostile('pictures')
def test_a_progressive_picture_that_lacks_a_scan_is_cut(at, tmp_path):
    assert pixels(STEPS[:at], tmp_path) is None

def test_stripping_is_done_once():
    for data in KINDS.values(): assert strip_metadata(strip_metadata(data).data).data == strip_metadata(data).data

# mutations

def mutated(data: bytes, rng: random.Random) -> bytes:
    "Cut, shortened, lengthened, or with other bytes, often in its header"
    kind = rng.randrange(6)
    changed = bytearray(data)
    at = rng.randrange(len(data))
    some = rng.randrange(1, 64)
    if kind == 0: return data[:at]
    if kind == 1: return data[:at] + data[at + some:]
    if kind == 2: return data[:at] + rng.randbytes(some) + data[at:]
    for _ in range(rng.choice((1, 1, 2, 8, 30))):
        value = rng.choice((0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)))
        changed[rng.randrange(len(data) if kind < 5 else min(200, len(data)))] = value
    return bytes(changed)

def try_mutations(kind: str, count: int) -> Counter:
    "Runs apart: how many were read, how many refused, and what else came out"
    rng = random.Random(kind)
    seen = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as d:
        for _ in range(count):
            (path := Path(d) / 'x').write_bytes(mutated(KINDS[kind], rng))
            try: seen['read'] += read_image(path).dtype == np.uint8
            except JobError as e: seen[e.code] += 1
            except Exception as e: seen[repr(e)] += 1 # noqa: BLE001 - what comes out is what is asked
    return seen

def ready() -> None: "Runs apart: this module is imported once"

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.hostile('pictures', cases=30)
def test_mutations(kind, apart):
    seen = apart.run(try_mutations, kind, 30, memory=200_000_000)
    assert set(seen) <= {'read', 'input_unreadable'} and sum(seen.values()) == 30 and seen['input_unreadable'], seen

# memory

def take(source: Path, target: Path) -> tuple[tuple[int, int], int]:
    "Runs apart: size of the result, memory it took"
    return normalise_image(source, target), peak_memory()

def test_the_largest_picture_stays_under_a_gigabyte(apart, tmp_path):
    "WebP's decoder takes more than any other: 800 MB of 50 megapixels"
    Image.new('RGB', (8000, 6250), (200, 30, 30)).save(tmp_path / 'x', 'WEBP', method=0, quality=0)
    size, peak = apart.run(take, tmp_path / 'x', tmp_path / 'y', what='the picture')
    assert size == (1536, 1200)
    assert peak < 10**9

@pytest.mark.hostile('pictures')
def test_a_picture_beyond_the_limit_is_told_the_limit(apart, tmp_path):
    Image.new('RGB', (4000, 4000)).save(tmp_path / 'x', 'PNG', compress_level=1)
    with pytest.raises(JobError, match='the picture needs more than 100 MB of memory') as e:
        apart.run(normalise_image, tmp_path / 'x', tmp_path / 'y', what='the picture', memory=100_000_000)
    assert e.value.code == 'input_unreadable'
    assert not (tmp_path / 'y').exists()
