"Media from anywhere: what is read, what is refused, and that nothing shifts in time or colour"
import math
import pickle
import re
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from wan_avatar.clocks import ClockPart, Reading, sound_on_one_clock
from wan_avatar.decoders import decoder_threads, pictures_kept
from wan_avatar.files import whole_file
from wan_avatar.fit import resample
from wan_avatar.frames import Rectangle, read_frames, thread_count
from wan_avatar.job import JobError
from wan_avatar.mark import COMPOSED, MADE, SOURCE_TYPES, read_mark, top_boxes, write_mark, xmp_packet
from wan_avatar.media import probe
from wan_avatar.mp4 import Encoder, check_mp4, filmstrip, pictures_at
from wan_avatar.normalise import normalise_image, normalise_video
from wan_avatar.pictures import read_image
from wan_avatar.samples import draw_test_picture, draw_test_video, read_test_picture
from wan_avatar.sound import extract_audio

SMALL = (320, 180)
LANDSCAPE = slice(160, 1120) # where a 4:3 picture lies in 1280x720


def normalised(source, folder, **options):
    return normalise_video(source, folder / 'out.y4m', folder / 'out.m4a', options.pop('max_seconds', 61), **options)


def indices(clip, columns=LANDSCAPE):
    return [read_test_picture(frame[:, columns]) for frame in read_frames(clip.path)]


def expected(times, last):
    "The source frame of each frame of the result, the slow way: the nearest that begins around it, else the one shown"
    def shown(i):
        begin = [k for k, t in enumerate(times) if math.floor(t * 24 + Fraction(1, 2)) == i]
        if begin: return min(begin, key=lambda k: (abs(times[k] - Fraction(i, 24)), k))
        return max(k for k, t in enumerate(times) if t * 24 < i)
    return [shown(i) for i in range(max(1, math.floor((times[-1] + last) * 24 + Fraction(1, 2))))]


def refused(path, **options):
    with pytest.raises(JobError) as e: normalised(path, path.parent, **options)
    assert not (path.parent / 'out.y4m').exists()
    assert not list(path.parent.glob('.*.part'))
    return e.value


# kind of file

@pytest.mark.parametrize('ending, options', [
    ('mp4', {}),
    ('mov', {'codec': 'mjpeg', 'pix_fmt': 'yuvj420p'}),
    ('avi', {'codec': 'mpeg4'}),
    ('webm', {'codec': 'libvpx'}),
    ('webm', {'codec': 'libvpx-vp9', 'pix_fmt': 'yuva420p'}),
    ('mkv', {'codec': 'ffv1', 'pix_fmt': 'gray'}),
    ('ts', {'audio': 'aac'}),
    ('flv', {'audio': 'aac'}),
    ('y4m', {'codec': 'rawvideo'}),
    ('apng', {'codec': 'apng', 'pix_fmt': 'rgb24'}),
    ('mkv', {'pix_fmt': 'yuv420p10le'}),
    ('mp4', {'codec': 'libx265', 'pix_fmt': 'yuv420p10le'}),
    ('mp4', {'codec': 'libsvtav1'}),
    ('mov', {'codec': 'prores_ks', 'pix_fmt': 'yuva444p10le'}),
    ('mov', {'codec': 'qtrle', 'pix_fmt': 'argb'}),
    ('mp4', {'pix_fmt': 'yuv444p'}),
], ids=lambda v: v if isinstance(v, str) else '-'.join(str(x) for x in v.values()))
def test_any_container_and_codec(tmp_path, ending, options):
    clip = normalised(draw_test_video(tmp_path / f'in.{ending}', **options), tmp_path)
    assert indices(clip) == list(range(24))
    assert (clip.audio is not None) == ('audio' in options)
    with av.open(str(clip.path)) as out:
        video = out.streams.video[0]
        assert (video.width, video.height) == (1280, 720)
        assert video.pix_fmt == 'yuv420p'
        assert video.average_rate == 24


@pytest.mark.parametrize('fps', [Fraction(24000, 1001), 25, Fraction(30000, 1001), 30, 60, 12, 120, 24, 15, 1])
def test_any_rate(tmp_path, fps):
    clip = normalised(draw_test_video(tmp_path / 'in.mp4', seconds=2, fps=fps, size=(160, 120)), tmp_path)
    n = round(2 * fps)
    assert indices(clip) == expected([k / Fraction(fps) for k in range(n)], 1 / Fraction(fps))


def test_gif(tmp_path):
    clip = normalised(draw_test_video(tmp_path / 'in.gif', seconds=1, fps=10, codec='gif', pix_fmt='rgb8'), tmp_path)
    assert indices(clip) == expected([Fraction(k, 10) for k in range(10)], Fraction(1, 10))


def test_variable_rate(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 40, 60, 500, 700, 710, 1500)]
    clip = normalised(draw_test_video(tmp_path / 'in.mkv', times=times), tmp_path)
    assert indices(clip) == expected(times, Fraction(42, 1000))


def test_no_drift_in_a_minute(tmp_path):
    source = draw_test_video(tmp_path / 'in.mp4', seconds=60, fps=Fraction(30000, 1001), size=(96, 64))
    clip = normalised(source, tmp_path, size=(192, 128))
    times = [Fraction(k * 1001, 30000) for k in range(1798)]
    got = [read_test_picture(f) for f in read_frames(clip.path)]
    assert len(got) == clip.frames == 1440
    assert all(abs(times[g] - Fraction(i, 24)) <= Fraction(1001, 60000) for i, g in enumerate(got))


@pytest.mark.parametrize('rates', [(7, 1), (240, 1), (24, 1), (23, 1), (50, 3), (90, 1), (1000, 7)])
def test_resampling_counts_and_picks(rates):
    for n in (1, 2, 3, 10, 101):
        times = [k / Fraction(*rates) for k in range(n)]
        items = ((t, 1 / Fraction(*rates), k) for k, t in enumerate(times))
        got = [k for k, times_shown in resample(items) for _ in range(times_shown)]
        assert got == expected(times, 1 / Fraction(*rates))


IN_CONTEXT = ('colorspace', 'color_range', 'color_primaries', 'color_trc', 'time_base') # not options of a stream


def written(path, tracks):
    "A file of `tracks`, one after the other: (encoder, options of its stream, frames with pts and time_base) each"
    with av.open(str(path), 'w') as out:
        streams = []
        for codec, options, _ in tracks:
            options = dict(options)
            later = {name: options.pop(name) for name in ('disposition',) if name in options}
            context = {name: options.pop(name) for name in IN_CONTEXT if name in options}
            streams.append(out.add_stream(codec, **options))
            for name, value in context.items(): setattr(streams[-1].codec_context, name, value)
            for name, value in later.items(): setattr(streams[-1], name, value)
        for stream, (_, _, frames) in zip(streams, tracks, strict=True):
            for frame in frames: out.mux(stream.encode(frame))
            out.mux(stream.encode())
    return path


def stamped(frame, second, base=Fraction(1, 1000)):
    frame.pts = round(Fraction(second) / base)
    frame.time_base = base
    return frame


def step(times, first, size=(96, 64)):
    "Dark pictures at these times, white ones from the `first`-th on"
    for i, t in enumerate(times):
        picture = np.full((size[1], size[0], 3), 235 if i >= first else 20, np.uint8)
        yield stamped(av.VideoFrame.from_ndarray(picture, 'rgb24'), t)


def clicking(click, seconds, level=0.9):
    "Silence with a click at a second"
    wave = np.zeros((1, round(seconds * 48000)), np.float32)
    wave[0, round(click * 48000):][:480] = level
    frame = av.AudioFrame.from_ndarray(wave, 'fltp', 'mono')
    frame.sample_rate = 48000
    return [stamped(frame, 0, Fraction(1, 48000))]


def click_of(path):
    "The second of the first loud sample"
    samples, start = sound(path)
    return int(np.argmax(np.abs(samples) > 0.2 * np.abs(samples).max())) / 48000 + start


RATES = [1, 5, 10, 12, 15, Fraction(24000, 1001), 25, Fraction(30000, 1001), 30, 48, 50, 60, 120]
def steady(rate):
    return [k / Fraction(rate) for k in range(math.ceil(2.2 * rate))], math.ceil(rate * Fraction(103, 100))


STEPS = {f'{float(rate):g} fps': steady(rate) for rate in RATES} | {
    'held for 4 s': ([0, 4, Fraction(4033, 1000), Fraction(4066, 1000), Fraction(41, 10), 5], 1),
    'held for 1.5 s at 25 fps': ([Fraction(k, 25) for k in range(60) if not 5 < k < 43], 6),
    '30 fps with a dropout': ([Fraction(k, 30) for k in range(60) if not 20 < k < 29], 21),
    '60 fps with dropouts': ([Fraction(k, 60) for k in range(120) if k % 10 < 7], 30),
}


@pytest.mark.parametrize('name', STEPS)
def test_flash_and_click_stay_together(tmp_path, name):
    times, first = STEPS[name]
    fast = {'preset': 'ultrafast'}
    options = dict(rate=30, width=96, height=64, pix_fmt='yuv420p', time_base=Fraction(1, 1000), options=fast)
    video = 'libx264', options, step(times, first)
    sound_track = 'pcm_s16le', dict(rate=48000, layout='mono'), clicking(times[first], times[-1] + 1)
    clip = normalised(written(tmp_path / 'in.mkv', [video, sound_track]), tmp_path, size=(64, 48))
    flash = Fraction(next(i for i, f in enumerate(read_frames(clip.path)) if f.mean() > 120), 24)
    off = float(flash - times[first])
    assert -0.0215 <= off < 1 / 24
    assert abs(click_of(clip.audio) - float(times[first])) < 0.003 # Matroska counts milliseconds


COUNTS = [
    (48, 105, 53),
    (48, 1, 1),
    (24, 1, 1),
    (240, 1, 1),
    (30, 5, 4),
    (16, 1, 2),
    (Fraction(30000, 1001), 1798, 1440),
    (1, 1, 24),
    (60, 33, 13),
    (25, 26, 25),
]


@pytest.mark.parametrize('fps, frames, wanted', COUNTS)
def test_as_many_frames_as_ffmpeg_gives(fps, frames, wanted):
    rate = Fraction(fps)
    assert wanted == max(1, math.floor(frames / rate * 24 + Fraction(1, 2)))
    assert sum(n for _, n in resample((k / rate, 1 / rate, k) for k in range(frames))) == wanted


def interlaced(codec, **options):
    "Bars that move; odd lines show them a fiftieth of a second later"
    def line(t): return np.where((np.arange(160) - round(400 * t)) % 64 < 32, 210, 40)
    def woven(i):
        grey = np.array([line(i / 25 + y % 2 / 50) for y in range(96)], np.uint8)
        picture = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), 'rgb24')
        return stamped(picture, Fraction(i, 25), Fraction(1, 25))
    frames = (woven(i) for i in range(12))
    return codec, dict(rate=25, width=160, height=96, **options), frames


@pytest.mark.parametrize('ending, codec, options', [
    ('ts', 'mpeg2video', {'pix_fmt': 'yuv420p', 'options': {'flags': '+ildct+ilme', 'b': '8000000'}}),
    ('mp4', 'libx264', {'pix_fmt': 'yuv422p', 'options': {'x264-params': 'tff=1', 'qp': '10'}}),
    ('mkv', 'mpeg2video', {'pix_fmt': 'yuv422p', 'options': {'flags': '+ildct+ilme', 'b': '8000000'}}),
])
def test_interlaced_is_woven_apart(tmp_path, ending, codec, options):
    source = written(tmp_path / f'in.{ending}', [interlaced(codec, **options)])
    clip = normalised(source, tmp_path, size=(160, 96))
    with av.open(str(source)) as c: assert next(c.decode(video=0)).interlaced_frame
    frames = [f[..., 1].astype(float) for f in read_frames(clip.path)]
    assert clip.frames == 12
    assert max(np.abs(np.diff(f, axis=0)).mean() for f in frames) < 6 # woven: 40 and more


# clocks

def later(source, target, seconds):
    "The same file with its clock moved"
    with av.open(str(source)) as i, av.open(str(target), 'w', format='mpegts') as o:
        tracks = {s.index: o.add_stream_from_template(s) for s in i.streams}
        for packet in i.demux():
            if packet.dts is None: continue
            packet.pts += round(seconds / packet.time_base)
            packet.dts += round(seconds / packet.time_base)
            packet.stream = tracks[packet.stream.index]
            o.mux(packet)
    return target


JOINS = { # (seconds, clock moved by, where it clicks) of each part; frames of the whole, where it clicks
    'clock restarts': ([(3, 0, None), (2, 0, 1)], 120, 4.0),
    'clock jumps by an hour': ([(3, 0, None), (2, 3600, 1)], 120, 4.0),
    'clock goes back by an hour': ([(2, 3600, None), (1, 0, 0.5)], 72, 2.5),
    'a short one first': ([(1, 0, None), (2, 0, 1.5)], 72, 2.5),
    'three parts': ([(1, 0, None), (1, 50, None), (1, 0, 0.5)], 72, 2.5),
    'goes on': ([(2, 0, None), (1, 2, 0.5)], 72, 2.5),
}


@pytest.mark.parametrize('codec', ['aac', 'mp2'])
@pytest.mark.parametrize('name', JOINS)
@pytest.mark.hostile('videos')
def test_joined_recordings_are_on_one_clock(tmp_path, name, codec):
    parts, frames, click = JOINS[name]
    data = b''
    for k, (seconds, moved, at) in enumerate(parts):
        part = draw_test_video(
            tmp_path / f'{k}.ts', seconds=seconds, size=(96, 64), audio=codec, flash_at=99 if at is None else at
        )
        data += (later(part, tmp_path / 'moved.ts', moved) if moved else part).read_bytes()
    (tmp_path / 'in.ts').write_bytes(data)
    clip = normalised(tmp_path / 'in.ts', tmp_path, size=(96, 64))
    got = [read_test_picture(f) for f in read_frames(clip.path)]
    assert got == [i for seconds, _, _ in parts for i in range(24 * seconds)]
    assert len(got) == clip.frames == frames
    assert abs(click_of(clip.audio) - click) < 0.05
    assert abs(clip.audio_s - clip.duration_s) < 0.1


def test_sound_finds_its_part_when_another_has_none():
    class Packet:
        size = 1
        duration = 0
        time_base = Fraction(1, 10)
        dts = None
        def __init__(self, pts, pos):
            self.pts = pts
            self.pos = pos
    parts = [
        ClockPart(0, Fraction(0), Fraction(0)), # of 3 s
        ClockPart(1000, Fraction(0), Fraction(3)), # of 2 s
        ClockPart(2000, Fraction(0), Fraction(5)), # of 9 s
    ]
    silent_middle = [Packet(t, 10 * t) for t in range(0, 30, 5)] + [Packet(t, 1990 + 10 * t) for t in range(0, 30, 5)]
    assert [p.pts for p in sound_on_one_clock(silent_middle, parts)] == [*range(0, 30, 5), *range(50, 80, 5)]
    assert [p.pts for p in sound_on_one_clock([Packet(t, 1010 + t) for t in (0, 5)], parts)] == [30, 35]


# geometry

@pytest.mark.parametrize('rotation, size', [(90, (240, 320)), (180, (320, 240)), (270, (240, 320))])
def test_rotation_flag(tmp_path, rotation, size):
    source = draw_test_video(tmp_path / 'in.mp4', seconds=0.2, size=size, rotation=rotation)
    assert probe(source).rotation == rotation
    got = next(read_frames(normalised(source, tmp_path).path)).astype(int)
    stored = pictures_at(draw_test_video(tmp_path / 'plain.mp4', seconds=0.2, size=size), [0], size)[0]
    turned = Image.fromarray(np.rot90(stored, -rotation // 90))
    upright = np.asarray(turned.resize((960, 720), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got[:, LANDSCAPE] - upright).mean() < 4


def test_mirrored_display_matrix(tmp_path):
    with av.open(str(tmp_path / 'in.mp4'), 'w') as out:
        video = out.add_stream('libx264', rate=24, width=320, height=180, pix_fmt='yuv420p')
        video.set_display_rotation(0, hflip=True)
        picture = np.zeros((180, 320, 3), np.uint8)
        picture[:, :160] = 255
        out.mux(video.encode(av.VideoFrame.from_ndarray(picture)) + video.encode())
    got = next(read_frames(normalised(tmp_path / 'in.mp4', tmp_path).path))
    assert got[:, :600].max() < 20
    assert got[:, 680:].min() > 235


@pytest.mark.parametrize('size, sar, box', [
    ((640, 360), 1, (1280, 720)),
    ((641, 359), 1, (1280, 716)),
    ((360, 640), 1, (404, 720)),
    ((320, 240), 1, (960, 720)),
    ((180, 180), Fraction(16, 9), (1280, 720)),
    ((1920, 64), 1, (1280, 42)),
])
def test_whole_picture_fitted_on_black(tmp_path, size, sar, box):
    pix_fmt = 'yuv444p' if size[0] % 2 or size[1] % 2 else 'yuv420p'
    source = flat(tmp_path / 'in.mkv', (200, 200, 200), size, sar=Fraction(sar), pix_fmt=pix_fmt)
    clip = normalised(source, tmp_path)
    frame = next(read_frames(clip.path)).max(axis=2) > 24
    assert (clip.content.width, clip.content.height) == box
    assert clip.size == (1280, 720)
    inside = frame[clip.content.top:clip.content.bottom, clip.content.left:clip.content.right]
    assert inside.all(), 'part of the content is black'
    frame_outside = frame.copy()
    frame_outside[clip.content.top:clip.content.bottom, clip.content.left:clip.content.right] = False
    assert not frame_outside.any(), 'part of the picture lies in the bars'
    width, height = frame.any(axis=0).sum(), frame[:frame.shape[0]].any(axis=1).sum()
    assert abs(int(width) - box[0]) <= 4
    assert abs(int(height) - box[1]) <= 4


def test_size_changes_midway(tmp_path):
    parts = [draw_test_video(tmp_path / f'{w}.ts', seconds=1, size=(w, w * 3 // 4)) for w in (320, 160)]
    (tmp_path / 'in.ts').write_bytes(parts[0].read_bytes())
    with av.open(str(tmp_path / 'in.ts'), 'w', format='mpegts') as out:
        track = None
        for k, part in enumerate(parts):
            with av.open(str(part)) as source:
                track = track or out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is None: continue
                    packet.pts, packet.dts, packet.stream = packet.pts + k * 90000, packet.dts + k * 90000, track
                    out.mux(packet)
    clip = normalised(tmp_path / 'in.ts', tmp_path)
    assert indices(clip) == [*range(24), *range(24)]
    assert clip.content == Rectangle(160, 0, 960, 720)


# colour

def flat(path, colour, size, **options):
    with av.open(str(path), 'w') as out:
        video = out.add_stream(
            options.pop('codec', 'libx264'), rate=24, width=size[0], height=size[1],
            pix_fmt=options.pop('pix_fmt', 'yuv420p')
        )
        context = video.codec_context
        context.sample_aspect_ratio = options.get('sar', 1)
        for name in ('colorspace', 'color_range', 'color_primaries', 'color_trc'):
            if name in options: setattr(context, name, options[name])
        pixels = np.full((size[1], size[0], len(colour)), colour, np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format='rgb24' if len(colour) == 3 else 'rgba')
        if 'colorspace' in options:
            frame = frame.reformat(
                format=video.pix_fmt, dst_colorspace=options['colorspace'], src_color_range=2,
                dst_color_range=options['color_range']
            )
        for i in range(3):
            frame.pts = i
            frame.time_base = Fraction(1, 24)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return path


COLOURS = [(220, 30, 40), (20, 200, 60), (30, 50, 230), (128, 128, 128), (250, 240, 20)]


@pytest.mark.parametrize('colour', COLOURS)
def test_delivered_colour(tmp_path, colour):
    with Encoder(tmp_path / 'a.mp4') as encoder:
        for _ in range(3): encoder.write(np.full((720, 1280, 3), colour, np.uint8))
    with av.open(str(tmp_path / 'a.mp4')) as out:
        video = out.streams.video[0]
        frame = next(out.decode(video=0))
        assert (video.color_range, video.colorspace, video.color_primaries, video.color_trc) == (1, 1, 1, 1)
        y, cb, cr = (np.asarray(p).reshape(p.height, p.line_size)[100, 100].astype(int) for p in frame.planes)
    r, g, b = (c / 255 for c in colour)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b # straight from the standard, no library in between
    wanted = (16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748)
    assert max(abs(a - w) for a, w in zip((y, cb, cr), wanted, strict=True)) <= 2


@pytest.mark.parametrize('colour', COLOURS)
@pytest.mark.parametrize('matrix, range_', [(5, 1), (1, 1), (5, 2), (1, 2)], ids=['601', '709', '601-full', '709-full'])
def test_source_matrix_and_range(tmp_path, colour, matrix, range_):
    source = flat(tmp_path / 'in.mkv', colour, (320, 180), colorspace=matrix, color_range=range_)
    got = next(read_frames(normalised(source, tmp_path).path))[360, 640].astype(int)
    assert np.abs(got - colour).max() <= 6


LUMA = {'601': (0.299, 0.114), '709': (0.2126, 0.0722), '2020': (0.2627, 0.0593)} # of red and of blue
TO_XYZ = {
    '709': [[0.4123908, 0.3575843, 0.1804808], [0.212639, 0.7151687, 0.0721923], [0.0193308, 0.1191948, 0.9505322]],
    '2020': [[0.636958, 0.1446169, 0.168881], [0.2627002, 0.6779981, 0.0593017], [0, 0.0280727, 1.0609851]],
    'p3': [[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0, 0.0451134, 1.0439444]],
}


def to_yuv(colour, matrix, full=False, bits=8):
    "Luma and both chroma straight from the standard, no library in between"
    red, blue = LUMA[matrix]
    r, g, b = (c / 255 for c in colour)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (1 - blue) / 2, (r - luma) / (1 - red) / 2
    if full: return [round(255 * luma), *(round(128 + 255 * c) for c in chroma)]
    return [round(v * 2 ** (bits - 8)) for v in (16 + 219 * luma, *(128 + 224 * c for c in chroma))]


def in_the_middle(plane):
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return float(pixels[plane.height // 2, plane.width // 2])


def shown_colour(path):
    "RGB that a player makes of the first picture: BT.709, limited range, straight from the standard"
    with av.open(str(path)) as source:
        frame = next(source.decode(video=0))
        y, u, v = (in_the_middle(plane) for plane in frame.planes)
    (red, blue), luma = LUMA['709'], (y - 16) / 219
    r, b = luma + 2 * (1 - red) * (v - 128) / 224, luma + 2 * (1 - blue) * (u - 128) / 224
    return np.array([r, (luma - red * r - blue * b) / (1 - red - blue), b]) * 255


EXACT = { # options of encoders that change colours the least
    'libx264': {'qp': '0', 'preset': 'ultrafast'},
    'libx265': {'x265-params': 'log-level=none:qp=1', 'preset': 'ultrafast'},
    'mjpeg': {'q:v': '1'},
}


def patch(path, codec, pix_fmt, size, yuv, **tags):
    "A patch of one colour, given as its numbers in the file"
    def frames():
        for i in range(3):
            frame = av.VideoFrame(*size, pix_fmt)
            for plane, value in zip(frame.planes, yuv, strict=True):
                wide = '10' in pix_fmt
                plane.update(np.full(plane.buffer_size // (1 + wide), value, np.uint16 if wide else np.uint8).tobytes())
            for name in tags: setattr(frame, name, tags[name])
            yield stamped(frame, Fraction(i, 24), Fraction(1, 24))
    exact = EXACT.get(codec, {})
    options = dict(rate=24, width=size[0], height=size[1], pix_fmt=pix_fmt, options=exact, **tags)
    return written(path, [(codec, options, frames())])


SD = (640, 360)
HD = (1280, 720)
FULL_HD = (1920, 1080)
PATCHES = { # encoder, pixels, size, matrix its numbers are in, full range, tags
    'untagged 360': ('libx264', 'yuv420p', SD, '601', False, {}),
    'untagged 576': ('libx264', 'yuv420p', (720, 576), '601', False, {}),
    'untagged 720': ('libx264', 'yuv420p', HD, '709', False, {}),
    'untagged 720 upright': ('libx264', 'yuv420p', (720, 1280), '709', False, {}),
    'untagged 1080': ('libx264', 'yuv420p', FULL_HD, '709', False, {}),
    'untagged 720, 10 bit': ('libx264', 'yuv420p10le', HD, '709', False, {}),
    'untagged 360, 10 bit': ('libx264', 'yuv422p10le', SD, '601', False, {}),
    'untagged 720, full': ('libx264', 'yuv420p', HD, '709', True, {'color_range': 2}),
    'untagged 360, full': ('libx264', 'yuv420p', SD, '601', True, {'color_range': 2}),
    'bt470bg 1080': ('libx264', 'yuv420p', FULL_HD, '601', False, {'colorspace': 5}),
    'smpte170m 720': ('libx264', 'yuv420p', HD, '601', False, {'colorspace': 6}),
    'smpte170m 360': ('libx264', 'yuv420p', SD, '601', False, {'colorspace': 6}),
    'bt470bg 720, full': ('libx264', 'yuv420p', HD, '601', True, {'colorspace': 5, 'color_range': 2}),
    'bt470bg 720, 10 bit': ('libx265', 'yuv420p10le', HD, '601', False, {'colorspace': 5}),
    'bt709 360': ('libx264', 'yuv420p', SD, '709', False, {'colorspace': 1}),
    'bt709 1080': ('libx264', 'yuv420p', FULL_HD, '709', False, {'colorspace': 1}),
    'bt709 360, full': ('libx264', 'yuv420p', SD, '709', True, {'colorspace': 1, 'color_range': 2}),
    'untagged 720, HEVC': ('libx265', 'yuv420p10le', HD, '709', False, {}),
    'untagged 720, VP9': ('libvpx-vp9', 'yuv420p', HD, '709', False, {}),
    'MJPEG 360': ('mjpeg', 'yuvj420p', SD, '601', True, {}),
    'MJPEG 720': ('mjpeg', 'yuvj420p', HD, '601', True, {}),
    'MJPEG 1080': ('mjpeg', 'yuvj422p', FULL_HD, '601', True, {}),
    'ProRes 720': ('prores_ks', 'yuv422p10le', HD, '709', False, {}),
    'ProRes 360, bt709': ('prores_ks', 'yuv422p10le', SD, '709', False, {'colorspace': 1}),
    'ProRes 720, smpte170m': ('prores_ks', 'yuv422p10le', HD, '601', False, {'colorspace': 6}),
}


@pytest.mark.parametrize('name', PATCHES)
def test_colours_are_believed_or_guessed_as_players_do(tmp_path, name):
    codec, pix_fmt, size, matrix, full, tags = PATCHES[name]
    for colour in ((200, 30, 30), (40, 160, 210)):
        yuv = to_yuv(colour, matrix, full, 10 if '10' in pix_fmt else 8)
        name = 'in.mov' if codec in ('mjpeg', 'prores_ks') else 'in.mkv'
        clip = normalised(patch(tmp_path / name, codec, pix_fmt, size, yuv, **tags), tmp_path, size=SMALL)
        assert np.abs(shown_colour(clip.path) - colour).max() <= 3


def in_primaries(colour, primaries):
    "A BT.709 colour in other primaries, BT.709's curve"
    c = np.array(colour) / 255
    linear = np.where(c < 0.081, c / 4.5, ((c + 0.099) / 1.099) ** (1 / 0.45))
    light = np.linalg.inv(TO_XYZ[primaries]) @ np.array(TO_XYZ['709']) @ linear
    return 255 * np.where(light < 0.018, 4.5 * light, 1.099 * light ** 0.45 - 0.099)


@pytest.mark.parametrize('codec, pix_fmt, matrix, primaries, tags', [
    ('libx265', 'yuv420p10le', '2020', '2020', {'colorspace': 9, 'color_primaries': 9, 'color_trc': 14}),
    ('libx265', 'yuv420p10le', '2020', '2020', {'colorspace': 9}),
    ('libx264', 'yuv420p', '2020', '2020', {'colorspace': 9, 'color_primaries': 9, 'color_trc': 1}),
    ('libx264', 'yuv420p', '709', 'p3', {'colorspace': 1, 'color_primaries': 12, 'color_trc': 1}),
    ('libx265', 'yuv420p10le', '601', 'p3', {'colorspace': 6, 'color_primaries': 12, 'color_trc': 1}),
    ('prores_ks', 'yuv422p10le', '709', 'p3', {'colorspace': 1, 'color_primaries': 12, 'color_trc': 1}),
], ids=lambda v: v if isinstance(v, str) else '-'.join(str(x) for x in v.values()))
def test_wide_primaries_become_bt709(tmp_path, codec, pix_fmt, matrix, primaries, tags):
    for colour in ((200, 30, 30), (128, 128, 128), (30, 120, 60)):
        yuv = to_yuv(in_primaries(colour, primaries), matrix, bits=10 if '10' in pix_fmt else 8)
        name = 'in.mov' if codec == 'prores_ks' else 'in.mkv'
        clip = normalised(patch(tmp_path / name, codec, pix_fmt, (320, 180), yuv, **tags), tmp_path, size=SMALL)
        assert np.abs(shown_colour(clip.path) - colour).max() <= 6


def test_alpha_lies_over_grey(tmp_path):
    clip = normalised(flat(tmp_path / 'in.mov', (255, 0, 0, 0), (320, 180), codec='png', pix_fmt='rgba'), tmp_path)
    assert np.abs(next(read_frames(clip.path))[360, 640].astype(int) - 128).max() <= 4


@pytest.mark.parametrize('transfer', [16, 18], ids=['pq', 'hlg'])
def test_hdr_becomes_sdr(tmp_path, transfer):
    options = dict(
        codec='libx265', pix_fmt='yuv420p10le', colorspace=9, color_range=1, color_primaries=9, color_trc=transfer
    )
    clip = normalised(flat(tmp_path / 'in.mkv', (140, 140, 140), (320, 180), **options), tmp_path)
    got = next(read_frames(clip.path))[360, 640].astype(int)
    assert np.ptp(got) <= 4
    assert 60 < got.mean() < 250


# sound

def sound(path):
    "(sound as mono samples at 48 kHz, second of the first)"
    with av.open(str(path)) as source:
        resampler = av.AudioResampler('fltp', 'mono', 48000)
        pieces = []
        start = None
        for frame in source.decode(audio=0):
            start = frame.time if start is None else start
            pieces += [f.to_ndarray()[0] for f in resampler.resample(frame)]
    return np.concatenate(pieces), start


@pytest.mark.parametrize('ending, codec, layout', [
    ('mp4', 'aac', 'mono'),
    ('mkv', 'aac', 'stereo'),
    ('mp4', 'aac', '5.1'),
    ('webm', 'libopus', 'stereo'),
    ('mkv', 'libopus', '5.1'),
    ('mkv', 'libmp3lame', 'stereo'),
    ('mkv', 'pcm_s16le', 'mono'),
    ('ts', 'aac', 'stereo'),
])
def test_sound_stays_with_the_picture(tmp_path, ending, codec, layout):
    video = 'libvpx' if ending == 'webm' else 'libx264'
    source = draw_test_video(
        tmp_path / f'in.{ending}', seconds=3, codec=video, audio=codec, layout=layout, flash_at=1.5
    )
    clip = normalised(source, tmp_path, size=SMALL)
    with Encoder(tmp_path / 'a.mp4', SMALL, audio=clip.audio) as encoder:
        for frame in read_frames(clip.path): encoder.write(frame)
    check_mp4(tmp_path / 'a.mp4', clip.frames, SMALL, has_audio=True, audio_s=clip.audio_s)
    flash = next(i for i, f in enumerate(read_frames(tmp_path / 'a.mp4')) if f[25, 160].min() > 230) / 24
    samples, start = sound(tmp_path / 'a.mp4')
    click = int(np.argmax(np.abs(samples) > 0.2 * np.abs(samples).max())) / 48000 + start
    assert flash == 1.5
    assert abs(click - 1.5) < 0.03


@pytest.mark.parametrize('codec', ['aac', 'libopus'])
@pytest.mark.parametrize('span, start, end', [
    ((0.5, 2), 0.5, 2),
    ((0, 3), 0, 2),
    ((0, 1), 0, 1),
    ((1, 5), 1, 2),
], ids=str)
def test_sound_late_short_and_long(tmp_path, codec, span, start, end):
    source = draw_test_video(tmp_path / 'in.mkv', seconds=2, audio=codec, audio_seconds=span)
    clip = normalised(source, tmp_path, size=SMALL)
    with Encoder(tmp_path / 'a.mp4', SMALL, audio=clip.audio) as encoder:
        for frame in read_frames(clip.path): encoder.write(frame)
    assert abs(clip.audio_s - end) < 0.05
    assert abs(sound(tmp_path / 'a.mp4')[1] - start) < 0.03
    assert check_mp4(tmp_path / 'a.mp4', 48, SMALL, audio_s=clip.audio_s).audio_s <= 2.03


def test_sound_after_the_picture_is_no_sound(tmp_path):
    clip = normalised(draw_test_video(tmp_path / 'in.mkv', seconds=1, audio='aac', audio_seconds=(1.5, 2)), tmp_path)
    assert clip.source.has_audio
    assert clip.audio is None
    assert not (tmp_path / 'out.m4a').exists()


def test_aac_is_copied(tmp_path):
    source = draw_test_video(tmp_path / 'in.mp4', seconds=1, audio='aac')
    extract_audio(source, tmp_path / 'out.m4a', seconds=1)
    packets = []
    for path in (source, tmp_path / 'out.m4a'):
        with av.open(str(path)) as container: packets.append([bytes(p) for p in container.demux(audio=0) if p.size])
    assert packets[1] == packets[0][:len(packets[1])]
    assert len(packets[1]) >= 47


def test_picture_starting_late(tmp_path):
    times = [Fraction(k, 24) + 1 for k in range(48)]
    source = draw_test_video(tmp_path / 'in.mkv', times=times, audio='aac', audio_seconds=(0, 3), flash_at=2)
    clip = normalised(source, tmp_path)
    samples, start = sound(clip.audio)
    assert clip.frames == 48
    assert abs(np.argmax(np.abs(samples) > 0.3) / 48000 + start - 1) < 0.03


# which track

def pictures(level, size, count=24):
    for i in range(count):
        picture = np.full((size[1], size[0], 3), level, np.uint8)
        yield stamped(av.VideoFrame.from_ndarray(picture, 'rgb24'), Fraction(i, 24))


def marked(default): return Disposition.default if default else Disposition(0)


def video_track(default, size=(320, 240), level=90, codec='libx264', count=24):
    pix_fmt = 'yuv420p' if codec == 'libx264' else 'yuvj420p'
    options = dict(rate=24, width=size[0], height=size[1], pix_fmt=pix_fmt, disposition=marked(default))
    return codec, options, pictures(level, size, count)


def sound_track(default, level, seconds=1):
    return 'aac', dict(rate=48000, layout='mono', disposition=marked(default)), clicking(0.5, seconds, level)


def loudness(path): return float(np.abs(sound(path)[0]).max()) if path else 0.0


def without_decoder(source, target, nth=0):
    "The same MP4 with the `nth` sound track in a format nobody has: as phones write spatial sound"
    data = bytearray(source.read_bytes())
    at = -1
    for _ in range(nth + 1): at = data.index(b'mp4a', at + 1)
    data[at:at + 4] = b'apac'
    inner = data.index(b'esds', at)
    data[inner:inner + 4] = b'free'
    target.write_bytes(data)
    return target


@pytest.mark.parametrize('ending', ['mkv', 'mp4'])
@pytest.mark.parametrize('tracks, loud', [
    ([(False, 0.0), (True, 0.5)], True),
    ([(True, 0.0), (False, 0.5)], False),
    ([(False, 0.5), (False, 0.0)], True),
], ids=['second', 'first', 'none'])
def test_the_default_sound_track_wins(tmp_path, ending, tracks, loud):
    source = written(tmp_path / f'in.{ending}', [video_track(True), *(sound_track(*t) for t in tracks)])
    clip = normalised(source, tmp_path, size=(64, 48))
    assert (loudness(clip.audio) > 0.1) == loud
    assert clip.notes == ()


@pytest.mark.parametrize('nth, loud', [(0, 0.5), (1, 0.25)])
def test_a_sound_track_nobody_decodes_yields_and_is_named(tmp_path, nth, loud):
    tracks = [video_track(True), sound_track(nth == 0, 0.25), sound_track(nth == 1, 0.5)]
    source = without_decoder(written(tmp_path / 'a.mp4', tracks), tmp_path / 'in.mov', nth)
    clip = normalised(source, tmp_path, size=(64, 48))
    assert loudness(clip.audio) == pytest.approx(loud, abs=0.12)
    assert len(clip.notes) == 1
    assert f'track {nth + 1} ' in clip.notes[0]
    assert pickle.loads(pickle.dumps(clip)) == clip


def test_sound_of_which_no_packet_decodes_yields_too(tmp_path):
    broken = 'flac', sound_track(True, 0.3)[1], clicking(0.5, 1, 0.3)
    source = written(tmp_path / 'in.mkv', [video_track(True), broken, sound_track(False, 0.5)])
    with av.open(str(source)) as i: packets = [bytes(p) for p in i.demux(audio=0) if p.size > 8]
    data = source.read_bytes()
    for packet in packets: data = data.replace(packet, b'\x55' * len(packet))
    (tmp_path / 'bad.mkv').write_bytes(data)
    clip = normalised(tmp_path / 'bad.mkv', tmp_path, size=(64, 48))
    assert loudness(clip.audio) == pytest.approx(0.5, abs=0.15)
    assert 'none of its' in clip.notes[0]


def test_sound_that_nobody_decodes_alone_is_refused(tmp_path):
    source = written(tmp_path / 'a.mp4', [video_track(True), sound_track(True, 0.3)])
    assert 'no decoder for its sound' in refused(without_decoder(source, tmp_path / 'in.mov')).message


@pytest.mark.parametrize('ending, tracks', [
    ('mkv', [((160, 120), False, 'mjpeg', 24), ((320, 240), True, 'libx264', 24)]),
    ('mkv', [((160, 120), False, 'libx264', 24), ((320, 240), True, 'libx264', 24)]),
    ('mp4', [((160, 120), False, 'libx264', 24), ((320, 240), True, 'libx264', 24)]),
    ('mov', [((160, 120), True, 'mjpeg', 24), ((320, 240), True, 'libx264', 24)]),
    ('mov', [((640, 480), True, 'mjpeg', 1), ((320, 240), True, 'libx264', 24)]),
    ('mp4', [((160, 120), True, 'libx264', 1), ((320, 240), True, 'libx264', 24)]),
    ('mkv', [((320, 240), True, 'libx264', 24), ((640, 480), False, 'libx264', 24)]),
    ('mkv', [((320, 240), False, 'libx264', 24), ((640, 480), False, 'libx264', 24)]),
])
def test_the_default_video_wins_and_a_thumbnail_never(tmp_path, ending, tracks):
    streams = [video_track(default, size, codec=codec, count=count) for size, default, codec, count in tracks]
    source = written(tmp_path / f'in.{ending}', streams)
    found = normalised(source, tmp_path, size=(64, 48)).source
    assert (found.width, found.height) == (320, 240) == (probe(source).width, probe(source).height)


# good input that looks bad

@pytest.mark.parametrize('ending, codec, sound_codec', [
    ('mkv', 'libx264', 'aac'),
    ('webm', 'libvpx', 'libopus'),
    ('mp4', 'libx264', 'aac'),
    ('ts', 'libx264', 'aac'),
])
@pytest.mark.parametrize('start', [0.3, 0.7, 2, 10])
def test_a_start_time_is_not_part_of_what_is_promised(tmp_path, ending, codec, sound_codec, start):
    times = [Fraction(start) + Fraction(i, 24) for i in range(48)]
    source = draw_test_video(
        tmp_path / f'in.{ending}', size=(96, 64), codec=codec, times=times, audio=sound_codec,
        audio_seconds=(start, start + 2), flash_at=start + 1
    )
    clip = normalised(source, tmp_path, size=(96, 64))
    assert clip.frames == 48
    assert abs(click_of(clip.audio) - 1) < 0.05


def patched(data, *changes):
    "Bytes with (marker, bytes behind the marker's beginning, new bytes) put in"
    data = bytearray(data)
    for marker, offset, new in changes:
        at = data.index(marker) + offset
        data[at:at + len(new)] = new
    return bytes(data)


def double(seconds): return b'\0' + struct.pack('>d', seconds)


STALE = { # file's ending, encoder, what of it is stale
    'Matroska duration': ('mkv', 'libx264', [(b'\x44\x89\x88', 3, struct.pack('>d', 9000.0))]),
    'WebM duration': ('webm', 'libvpx', [(b'\x44\x89\x88', 3, struct.pack('>d', 9000.0))]),
    'Matroska duration over the limit': ('mkv', 'libx264', [(b'\x44\x89\x88', 3, struct.pack('>d', 3.6e6))]),
    'Matroska size': ('mkv', 'libx264', [(b'\x18\x53\x80\x67', 4, b'\x01\0\0\0\x7f\0\0\0')]),
    'Matroska size never written': (
        'mkv', 'libx264',
        [(b'\x18\x53\x80\x67', 4, b'\x01' + b'\xff' * 7), (b'\x44\x89\x88', 3, struct.pack('>d', 9000.0))]
    ),
    'AVI size': ('avi', 'mpeg4', [(b'RIFF', 4, struct.pack('<I', 10**7))]),
    'AVI size never written': ('avi', 'mpeg4', [(b'RIFF', 4, bytes(4))]),
    'AVI frames': ('avi', 'mpeg4', [(b'vids', 32, struct.pack('<I', 240))]),
    'FLV duration': ('flv', 'libx264', [(b'duration', 8, double(9.0))]),
    'FLV size': ('flv', 'libx264', [(b'filesize', 8, double(1e9))]),
    'MP4 duration of the film': ('mp4', 'libx264', [(b'mvhd', 20, struct.pack('>I', 9000))]),
    'MP4 duration of the track': ('mp4', 'libx264', [(b'mdhd', 20, struct.pack('>I', 120000))]),
    'MP4 duration over the limit': (
        'mp4', 'libx264', [(b'mvhd', 20, struct.pack('>I', 3600000)), (b'mdhd', 20, struct.pack('>I', 50000000))]
    ),
    'MP4 size of the data': ('mp4', 'libx264', [(b'mdat', -4, struct.pack('>I', 10**7))]),
}


def remuxed(source, target, flags):
    "The same packets in another layout of MP4"
    with av.open(str(source)) as i, av.open(str(target), 'w', options={'movflags': flags}) as o:
        tracks = {s.index: o.add_stream_from_template(s) for s in i.streams}
        for packet in i.demux():
            if packet.dts is None: continue
            packet.stream = tracks[packet.stream_index]
            o.mux(packet)
    return target


@pytest.mark.parametrize('name', STALE)
@pytest.mark.hostile('videos')
def test_stale_headers_are_no_reason_to_refuse(tmp_path, name):
    ending, codec, changes = STALE[name]
    source = draw_test_video(tmp_path / f'whole.{ending}', seconds=2, size=(96, 64), codec=codec)
    if ending == 'mp4': source = remuxed(source, tmp_path / 'fast.mp4', '+faststart')
    (tmp_path / f'in.{ending}').write_bytes(patched(source.read_bytes(), *changes))
    assert normalised(tmp_path / f'in.{ending}', tmp_path, size=(96, 64)).frames == 48


def test_a_gif_without_its_last_byte_is_whole(tmp_path):
    data = draw_test_video(tmp_path / 'whole.gif', fps=10, size=(96, 64), codec='gif', pix_fmt='rgb8').read_bytes()
    (tmp_path / 'in.gif').write_bytes(data[:-1])
    assert normalised(tmp_path / 'in.gif', tmp_path, size=(96, 64)).frames == 24


@pytest.mark.parametrize('ending, codec', [
    ('mp4', 'libx264'),
    ('mkv', 'libx264'),
    ('webm', 'libvpx'),
    ('avi', 'mpeg4'),
    ('flv', 'libx264'),
    ('wmv', 'wmv2'),
])
@pytest.mark.hostile('videos')
def test_a_cut_file_is_refused_with_the_share_that_is_there(tmp_path, ending, codec):
    source = draw_test_video(
        tmp_path / f'whole.{ending}', seconds=4, size=(96, 64), codec=codec, container={'wmv': 'asf'}.get(ending)
    )
    data = source.read_bytes()
    if ending == 'mp4': data = remuxed(source, tmp_path / 'fast.mp4', '+faststart').read_bytes()
    (tmp_path / f'in.{ending}').write_bytes(data[:int(len(data) * 0.6)])
    message = refused(tmp_path / f'in.{ending}').message
    share = re.search(r'\((\d+)% is there\)', message)
    assert 'cut off' in message and share and 20 <= int(share[1]) <= 85, message


@pytest.mark.parametrize('flags', [
    'frag_keyframe',
    'frag_keyframe+empty_moov',
    'frag_keyframe+empty_moov+default_base_moof',
    'dash+frag_every_frame',
])
def test_a_fragmented_mp4_is_whole_or_refused(tmp_path, flags):
    whole = draw_test_video(tmp_path / 'whole.mp4', seconds=3, size=(96, 64), audio='aac')
    source = remuxed(whole, tmp_path / 'in.mp4', flags)
    assert normalised(source, tmp_path, size=(96, 64)).frames == 72
    for name in ('out.y4m', 'out.m4a'): (tmp_path / name).unlink()
    data = source.read_bytes()
    for share in (0.3, 0.65, 0.9):
        source.write_bytes(data[:int(len(data) * share)])
        assert 'cut off' in refused(source).message


# what is refused

@pytest.mark.parametrize('part', [0.3, 0.7])
@pytest.mark.parametrize('ending, codec', [
    ('mp4', 'libx264'),
    ('mkv', 'libx264'),
    ('webm', 'libvpx'),
    ('avi', 'mpeg4'),
    ('flv', 'libx264'),
    ('gif', 'gif'),
])
@pytest.mark.hostile('videos')
def test_truncated(tmp_path, ending, codec, part):
    source = draw_test_video(
        tmp_path / f'whole.{ending}', seconds=4, codec=codec, pix_fmt='rgb8' if codec == 'gif' else 'yuv420p'
    )
    (tmp_path / f'in.{ending}').write_bytes(source.read_bytes()[:int(source.stat().st_size * part)])
    assert refused(tmp_path / f'in.{ending}').code == 'input_unreadable'


@pytest.mark.hostile('videos')
def test_truncated_behind_its_index(tmp_path):
    with Encoder(tmp_path / 'whole.mp4', size=(320, 240)) as encoder:
        for i in range(72): encoder.write(draw_test_picture(i))
    data = (tmp_path / 'whole.mp4').read_bytes()
    (tmp_path / 'in.mp4').write_bytes(data[:len(data) * 6 // 10])
    with pytest.raises(JobError, match=r'cut off after \d+ bytes: its frames from \d\.\d\d s on are missing'):
        probe(tmp_path / 'in.mp4')


@pytest.mark.hostile('videos')
def test_damage_is_bridged_and_holes_are_not(tmp_path):
    data = bytearray(draw_test_video(tmp_path / 'whole.avi', seconds=4, codec='mpeg4').read_bytes())
    small = bytearray(data)
    large = bytearray(data)
    small[len(data) // 2:len(data) // 2 + 200] = bytes(range(200))
    large[len(data) * 4 // 10:len(data) * 7 // 10] = bytes(len(data) * 7 // 10 - len(data) * 4 // 10)
    (tmp_path / 'small.avi').write_bytes(small)
    (tmp_path / 'large.avi').write_bytes(large)
    assert 'decoding stopped at' in refused(tmp_path / 'large.avi').message
    assert normalised(tmp_path / 'small.avi', tmp_path).frames == 96


@pytest.mark.parametrize('name, content, says', [
    ('a.mp4', b'hello ' * 100, 'is text'),
    ('a.mp4', b'', 'is empty'),
    ('a.mp4', b'\x89PNG\r\n\x1a\n' + bytes(100), 'is a picture'),
    ('a.m3u8', b'#EXTM3U\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n', 'is text'),
    ('a.mp4', b'ffconcat version 1.0\nfile secret.mp4\n', 'is text'),
    ('a.ffconcat', b'ffconcat version 1.0\nfile secret.mp4\n', 'is text'),
    ('a.sdp', b'v=0\nm=video 9 RTP/AVP 96\nc=IN IP4 127.0.0.1\n', 'is text'),
    ('a.m3u8', b'#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n', 'is text'),
    ('a.mp4', b'\0' * 999, 'not a video'),
    ('a.xml', b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', 'is text'),
])
@pytest.mark.hostile('videos')
def test_not_a_video(tmp_path, name, content, says):
    draw_test_video(tmp_path / 'secret.mp4', seconds=0.2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=says): probe(tmp_path / name)


@pytest.mark.hostile('videos')
def test_playlists_would_be_followed_without_the_guard(tmp_path):
    "Keeps the tests above honest: libav alone opens the other file"
    draw_test_video(tmp_path / 'secret.mp4', seconds=0.2)
    (tmp_path / 'a.ffconcat').write_text('ffconcat version 1.0\nfile secret.mp4\n')
    with av.open(str(tmp_path / 'a.ffconcat')) as container:
        assert container.format.name == 'concat'
        assert next(container.decode(video=0))


@pytest.mark.hostile('videos')
def test_audio_only_and_no_frames(tmp_path):
    with av.open(str(tmp_path / 'in.mp3'), 'w') as out:
        track = out.add_stream('libmp3lame', rate=48000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), 'fltp', 'mono')
        frame.sample_rate = 48000
        out.mux(track.encode(frame) + track.encode())
    assert 'only audio' in refused(tmp_path / 'in.mp3').message
    with av.open(str(tmp_path / 'none.mp4'), 'w') as out:
        out.add_stream('libx264', rate=24, width=320, height=240, pix_fmt='yuv420p')
        out.start_encoding()
    assert refused(tmp_path / 'none.mp4').code == 'input_unreadable'


def test_one_frame(tmp_path):
    clip = normalised(draw_test_video(tmp_path / 'in.mp4', times=[0]), tmp_path)
    assert (clip.frames, indices(clip)) == (1, [0])
    with Encoder(tmp_path / 'a.mp4') as encoder: encoder.write(next(read_frames(clip.path)))
    assert check_mp4(tmp_path / 'a.mp4', 1).duration_s == round(1 / 24, 3)


@pytest.mark.parametrize('ending, options', [
    ('mp4', {'seconds': 70}),
    ('mkv', {'times': [0, 0.1, 3600]}),
    ('apng', {'seconds': 70, 'fps': 1, 'codec': 'apng', 'pix_fmt': 'rgb24'}),
])
@pytest.mark.hostile('videos')
def test_too_long(tmp_path, ending, options):
    error = refused(draw_test_video(tmp_path / f'in.{ending}', size=(64, 64), **{'fps': 4, **options}), max_seconds=60)
    assert error.code == 'too_long'
    assert 'max_seconds' in error.message


@pytest.mark.hostile('videos')
def test_absurd_size_and_rate(tmp_path):
    assert '8704x64' in refused(draw_test_video(tmp_path / 'in.mkv', seconds=0.1, size=(8704, 64))).message
    source = draw_test_video(tmp_path / 'fast.mkv', times=[k / 1000 for k in range(900)], size=(64, 64))
    assert 'frames a second' in refused(source, max_seconds=1).message


def test_cancel_and_progress(tmp_path):
    seen = []
    source = draw_test_video(tmp_path / 'in.mp4', seconds=2)
    def progress(done, so_far): seen.append((done, so_far.frames))
    error = refused(source, cancelled=lambda: len(seen) >= 10, progress=progress)
    assert error.code == 'cancelled'
    assert len(seen) == 10
    assert seen[-1] == (10, 48)


# hostile

def picture_packet(codec, pix_fmt, side):
    "One coded picture; a very large one is a small PNG that claims to be large"
    drawn = min(side, 3200)
    context = av.CodecContext.create(codec, 'w')
    context.width = drawn
    context.height = drawn
    context.pix_fmt = pix_fmt
    context.time_base = Fraction(1, 24)
    frame = av.VideoFrame(drawn, drawn, pix_fmt)
    for plane in frame.planes: plane.update(bytes(plane.buffer_size))
    data = bytes((context.encode(stamped(frame, 0, Fraction(1, 24))) + context.encode())[0])
    if side == drawn: return data
    header = b'IHDR' + struct.pack('>II', side, side) + data[24:29]
    return data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:]


def with_larger_frames(path, codec, pix_fmt, side, at, count=6):
    "A file whose header says 320x240, and some frames say otherwise"
    large = picture_packet(codec, pix_fmt, side)
    with av.open(str(path), 'w') as out:
        track = out.add_stream(codec, rate=24, width=320, height=240, pix_fmt=pix_fmt)
        packets = [p for frame in pictures(90, (320, 240), count) for p in track.encode(frame)] + track.encode()
        for i, packet in enumerate(packets):
            if i in at:
                other = av.Packet(large)
                other.pts = packet.pts
                other.dts = packet.dts
                other.time_base = packet.time_base
                other.duration = packet.duration
                other.is_keyframe = True
                packet = other
                other.stream = track
            out.mux(packet)
    return path


READ_AND_SAY_MEMORY = """
import sys
from wan_avatar.job import JobError
from wan_avatar.normalise import normalise_video
try: print('accepted', normalise_video(*sys.argv[1:4], 60).frames)
except JobError as e: print(e)
print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


@pytest.mark.parametrize('codec, pix_fmt, side, at, says', [
    ('png', 'rgb24', 12000, (3,), 'larger than 9 megapixels'),
    ('png', 'rgb24', 12000, (0, 1, 2, 3, 4, 5), 'larger than 9 megapixels'),
    ('mjpeg', 'yuvj420p', 3200, (1, 2, 3), 'larger than 9 megapixels'),
    ('png', 'rgb24', 1600, (2, 4), 'accepted 6'),
])
@pytest.mark.hostile('videos')
def test_a_frame_larger_than_the_header_says_takes_no_memory(tmp_path, codec, pix_fmt, side, at, says):
    source = with_larger_frames(tmp_path / 'in.mov', codec, pix_fmt, side, at)
    command = [sys.executable, '-c', READ_AND_SAY_MEMORY, source, tmp_path / 'o.y4m', tmp_path / 'o.m4a']
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    said, mebibytes = run.stdout.splitlines()
    assert says in said
    assert said.startswith(('input_unreadable', 'accepted'))
    assert int(mebibytes) < 400


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    source = written(tmp_path / 'in.mp4', [video_track(True, (1920, 1080), count=100)])
    code = 'import gc\ngc.disable() # frames must not wait for the cycle collector' + READ_AND_SAY_MEMORY
    command = [sys.executable, '-c', code, source, tmp_path / 'o.y4m', tmp_path / 'o.m4a']
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    said, mebibytes = run.stdout.splitlines()
    assert said == 'accepted 100'
    assert int(mebibytes) < 260 # a hundred frames alone are 300


@pytest.mark.parametrize('size, pixel_format, kept, fits', [
    ((1920, 1080), 'yuv420p', 16, True),
    ((3840, 2160), 'yuv420p', 16, True),
    ((3840, 2160), 'yuv420p10le', 16, True),
    ((4096, 2160), 'yuv420p10le', 16, True),
    ((3840, 2160), 'yuv422p10le', 16, True),
    ((3840, 2160), 'yuv444p16le', 16, False),
    ((5312, 2988), 'yuv420p10le', 5, True),
    ((7680, 4320), 'yuv420p', 6, True),
    ((7680, 4320), 'yuv420p', 16, False),
    ((7680, 4320), 'yuv420p10le', 6, False),
    ((7680, 4320), 'yuv420p10le', 2, True),
    ((7680, 4320), None, 3, False),
    ((8704, 64), 'yuv420p', 1, False),
    ((8192, 8192), 'gray', 1, False),
    ((64, 64), None, 16, True),
])
@pytest.mark.hostile('videos')
def test_memory_is_counted_before_it_is_taken(size, pixel_format, kept, fits):
    if fits: assert 1 <= decoder_threads(size, pixel_format, kept, 'a.mp4') <= thread_count()
    else:
        with pytest.raises(JobError, match=r'^input_unreadable: a.mp4 is .* at most'):
            decoder_threads(size, pixel_format, kept, 'a.mp4')


@pytest.mark.parametrize('codec, ending, options, kept', [
    ('libx264', 'mp4', {'x264-params': 'ref=1:bframes=0'}, {1}),
    ('libx264', 'mkv', {'x264-params': 'ref=5:bframes=0'}, {5}),
    ('libx264', 'ts', {'x264-params': 'ref=16'}, {16}),
    ('libx264', 'avi', {'x264-params': 'ref=3:bframes=0'}, {3}),
    ('libx265', 'mp4', {'x265-params': 'log-level=none:ref=1:bframes=0'}, {1, 2}),
    ('libx265', 'mkv', {'x265-params': 'log-level=none:ref=5:bframes=3'}, {5, 6, 7}),
    ('mpeg4', 'avi', {}, {3}),
    ('libvpx-vp9', 'webm', {}, {8}),
], ids=lambda v: v if isinstance(v, str) else '')
def test_references_are_read_from_the_header(tmp_path, codec, ending, options, kept):
    options = dict(rate=24, width=96, height=64, pix_fmt='yuv420p', options=options)
    source = written(tmp_path / f'in.{ending}', [(codec, options, pictures(90, (96, 64), 8))])
    with av.open(str(source)) as c:
        context = c.streams.video[0].codec_context
        assert pictures_kept(context.name, context.extradata or b'') in kept


@pytest.mark.hostile('videos')
def test_a_header_that_makes_no_sense_counts_as_the_most():
    rng = np.random.default_rng(0)
    for codec in ('h264', 'hevc'):
        for n in range(300):
            assert 0 <= pictures_kept(codec, rng.bytes(n % 60)) <= 16
            assert 0 <= pictures_kept(codec, b'\1' + rng.bytes(60)) <= 16
        assert pictures_kept(codec, b'') == 16


def at_one_instant(path, count):
    "A second of video, and `count` sound packets that all claim its beginning"
    with av.open(str(path), 'w') as out:
        video = out.add_stream('libx264', rate=24, width=96, height=64, pix_fmt='yuv420p')
        track = out.add_stream('aac', rate=48000, layout='mono')
        packet = bytes(track.encode(clicking(0.5, 1)[0])[2])
        for frame in pictures(90, (96, 64)): out.mux(video.encode(frame))
        out.mux(video.encode())
        for _ in range(count):
            sounding = av.Packet(packet)
            sounding.pts = 0
            sounding.dts = 0
            sounding.time_base = Fraction(1, 48000)
            sounding.duration = 0
            sounding.stream = track
            out.mux(sounding)
    return path


@pytest.fixture(scope='module')
def crowded(tmp_path_factory): return at_one_instant(tmp_path_factory.mktemp('crowded') / 'in.mkv', 120_000)


@pytest.mark.hostile('videos')
def test_sound_packets_at_one_instant_are_refused_at_once(crowded, tmp_path):
    with pytest.raises(JobError, match='input_unreadable: in.mkv has more sound than 60 s of video can hold'):
        normalised(crowded, tmp_path, max_seconds=60, size=SMALL)
    with pytest.raises(JobError, match='input_unreadable: in.mkv has more than 36000 packets'):
        normalised(crowded, tmp_path, max_seconds=2, size=SMALL)


@pytest.mark.parametrize('asked', [30, 3000, 60_000])
def test_every_packet_asks_whether_to_go_on(crowded, tmp_path, asked):
    calls = []
    def cancelled():
        calls.append(None)
        return len(calls) > asked
    with pytest.raises(JobError, match='^cancelled'): normalised(crowded, tmp_path, cancelled=cancelled, size=SMALL)
    assert len(calls) == asked + 1


def test_sound_asks_whether_to_go_on(tmp_path):
    source = draw_test_video(tmp_path / 'in.mp4', size=(96, 64), audio='aac')
    with pytest.raises(JobError, match='^cancelled'):
        extract_audio(source, tmp_path / 'a.m4a', reading=Reading('in.mp4', cancelled=lambda: True))
    assert not (tmp_path / 'a.m4a').exists()


# reading, writing, proving

@pytest.fixture(scope='module')
def three_seconds(tmp_path_factory):
    folder = tmp_path_factory.mktemp('three')
    return normalised(draw_test_video(folder / 'in.mp4', seconds=3), folder)


@pytest.mark.parametrize('start, count', [(0, 3), (1, 1), (23, 3), (24, 3), (71, 1), (0, None), (70, None), (5, 0)])
def test_read_frames_by_index(three_seconds, start, count):
    got = [read_test_picture(f[:, LANDSCAPE]) for f in read_frames(three_seconds.path, start, count)]
    assert got == list(range(72))[start:None if count is None else start + count]


def test_read_beyond_the_end(three_seconds):
    with pytest.raises(JobError, match='72 frames'): list(read_frames(three_seconds.path, 70, 5))


def test_encoder_leaves_nothing_half(tmp_path):
    (tmp_path / 'a.mp4').write_text('the one before')
    with pytest.raises(ZeroDivisionError), Encoder(tmp_path / 'a.mp4', size=(64, 64)) as encoder:
        for _ in range(50): encoder.write(np.zeros((64, 64, 3), np.uint8))
        _ = 1 / 0
    with pytest.raises(JobError, match='no frame'), Encoder(tmp_path / 'a.mp4', size=(64, 64)): pass
    assert [p.name for p in tmp_path.iterdir()] == ['a.mp4']
    assert (tmp_path / 'a.mp4').read_text() == 'the one before'


def test_check_names_the_figure(tmp_path):
    source = draw_test_video(tmp_path / 'in.mp4', seconds=1, audio='aac', size=(320, 240))
    audio = tmp_path / 'a.m4a'
    extract_audio(source, audio, seconds=1)
    with Encoder(tmp_path / 'a.mp4', size=(320, 240), audio=audio, source_type=MADE) as encoder:
        for i in range(24): encoder.write(draw_test_picture(i))
    good = dict(frames=24, size=(320, 240), has_audio=True, audio_s=1.0, source_type=MADE)
    assert check_mp4(tmp_path / 'a.mp4', **good).audio_s == pytest.approx(1, abs=0.05)
    for change, says in (
        ({'frames': 25}, '25 frames'),
        ({'size': (320, 180)}, '320x180'),
        ({'has_audio': False}, 'no sound'),
        ({'fps': 25}, '25/1'),
        ({'audio_s': 0.5}, 'sound until 0.50'),
        ({'source_type': COMPOSED}, f'digital source type {COMPOSED}; it has {MADE}'),
    ):
        with pytest.raises(JobError, match=says): check_mp4(tmp_path / 'a.mp4', **(good | change))
    data = bytearray((tmp_path / 'a.mp4').read_bytes())
    at = data.index(b'mdat') + 1500
    data[at:at + 3000] = bytes(3000)
    (tmp_path / 'bad.mp4').write_bytes(data)
    with pytest.raises(JobError, match='internal'): check_mp4(tmp_path / 'bad.mp4', **good)
    with pytest.raises(JobError, match='moov'): check_mp4(source, **good)


XMP_BOX = bytes.fromhex('be7acfcb97a942e89c71999491e3afac')

def as_box(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    return (8 + len(content) if length is None else length).to_bytes(4, 'big') + kind + content

def as_element(term: str) -> bytes: # another way to write it, which Adobe's programs take
    return xmp_packet(MADE).replace(b' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/'
                                    b'trainedAlgorithmicMedia"/>',
                                    b'><Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/'
                                    + term.encode() + b'</Iptc4xmpExt:DigitalSourceType></rdf:Description>')

MARKS = [ # what stands behind a video, the mark that is read
    (b'', None),
    (as_box(b'uuid', XMP_BOX + xmp_packet(MADE)), MADE),
    (as_box(b'uuid', XMP_BOX + as_element(COMPOSED)), COMPOSED),
    (as_box(b'uuid', bytes(16) + xmp_packet(MADE)), None), # somebody else's box
    (as_box(b'uuid', bytes(16)) + as_box(b'uuid', XMP_BOX + xmp_packet(MADE)), MADE),
    (as_box(b'uuid', XMP_BOX), None),
    (as_box(b'uuid', XMP_BOX + b'<x'), None),
    (as_box(b'uuid', XMP_BOX + b'\xff\xfe'), None),
    (as_box(b'uuid', XMP_BOX + bytes(70_000)), None),
    (as_box(b'uuid', XMP_BOX + xmp_packet(MADE), length=7), None),
    (as_box(b'free', b'') * 200 + as_box(b'uuid', XMP_BOX + xmp_packet(MADE)), None), # nobody writes so many
    (b'\0\0\0\1uuid', None), # a length of 64 bits that is cut off
]

@pytest.mark.parametrize('behind, found', MARKS)
def test_the_mark_that_is_read(tmp_path, behind, found):
    video = draw_test_video(tmp_path / 'a.mp4', seconds=0.1, size=(64, 64))
    video.write_bytes(video.read_bytes() + behind)
    assert read_mark(video) == found

@pytest.mark.parametrize('source_type', SOURCE_TYPES)
def test_every_mark_is_read_by_ffmpeg_and_moves_nothing(tmp_path, source_type):
    video = draw_test_video(tmp_path / 'a.mp4', seconds=0.1, size=(64, 64))
    before = video.read_bytes()
    write_mark(video, source_type)
    assert video.read_bytes().startswith(before) and read_mark(video) == source_type
    assert [box.kind for box in top_boxes(video)][-1] == 'uuid'
    with av.open(str(video), options={'export_xmp': '1'}) as container:
        assert f'digitalsourcetype/{source_type}"' in container.metadata['xmp']

def test_a_video_that_failed_is_not_marked(tmp_path):
    with pytest.raises(ZeroDivisionError), Encoder(tmp_path / 'a.mp4', size=(64, 64), source_type=MADE) as encoder:
        encoder.write(1 / 0)
    assert not list(tmp_path.iterdir())

def test_whole_file(tmp_path):
    with whole_file(tmp_path / 'a') as part:
        part.write_text('x')
        assert not (tmp_path / 'a').exists()
    assert (tmp_path / 'a').read_text() == 'x'
    assert len(list(tmp_path.iterdir())) == 1


# pictures

def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path)


RED = Image.new('RGB', (96, 64), (200, 30, 30))


@pytest.mark.parametrize('name, options, off', [
    ('a.jpg', {'quality': 95}, 6),
    ('a.png', {}, 0),
    ('a.webp', {'lossless': True}, 0),
    ('a.bmp', {}, 0),
    ('a.tiff', {}, 0),
    ('a.gif', {}, 2),
    ('a.avif', {'quality': 95}, 8),
])
def test_picture_formats(tmp_path, name, options, off):
    got = saved(tmp_path / name, RED, **options)
    assert got.shape == (64, 96, 3)
    assert got.dtype == np.uint8
    assert np.abs(got[30, 30].astype(int) - (200, 30, 30)).max() <= off
    (tmp_path / name).rename(tmp_path / 'other.txt')
    assert np.array_equal(read_image(tmp_path / 'other.txt'), got) # the content decides


@pytest.mark.parametrize('mode, colour, wanted', [
    ('L', 77, (77,) * 3),
    ('1', 1, (255,) * 3),
    ('RGBA', (255, 0, 0, 0), (128,) * 3),
    ('RGBA', (255, 0, 0, 255), (255, 0, 0)),
    ('LA', (0, 0), (128,) * 3),
    ('I;16', 0x8080, (128,) * 3),
    ('P', 0, (0, 0, 0)),
])
def test_picture_modes(tmp_path, mode, colour, wanted):
    assert np.abs(saved(tmp_path / 'a.png', Image.new(mode, (64, 64), colour))[5, 5].astype(int) - wanted).max() <= 1


def test_cmyk_palette_with_hole_and_animation(tmp_path):
    red = Image.new('CMYK', (64, 64), (0, 255, 255, 0))
    assert np.abs(saved(tmp_path / 'a.jpg', red)[5, 5].astype(int) - (255, 0, 0)).max() <= 6
    assert (saved(tmp_path / 'a.png', Image.new('P', (64, 64), 0), transparency=0)[5, 5] == 128).all()
    animation = saved(tmp_path / 'a.gif', RED, save_all=True, append_images=[Image.new('RGB', (96, 64))])
    assert (animation[5, 5] == (200, 30, 30)).all()
    assert saved(tmp_path / 'a.tif', Image.fromarray(np.full((64, 64), 0.5, np.float32)))[5, 5].tolist() == [128] * 3


@pytest.mark.parametrize('orientation, corner', [
    (1, (0, 0)),
    (3, (-1, -1)),
    (6, (0, -1)),
    (8, (-1, 0)),
    (2, (0, -1)),
    (5, (0, 0)),
])
def test_exif_orientation(tmp_path, orientation, corner):
    image = Image.new('RGB', (96, 64))
    exif = Image.Exif()
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif[0x112] = orientation
    got = saved(tmp_path / 'a.jpg', image, exif=exif)
    assert got.shape[:2] == ((96, 64) if orientation >= 5 else (64, 96))
    assert got[corner].min() > 200
    assert (got > 128).sum() < 3 * 400


def png_header(width, height):
    "A PNG that claims a size and holds next to nothing"
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    chunks = [
        chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
        chunk(b'IDAT', zlib.compress(bytes(99))),
        chunk(b'IEND', b''),
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize('content, says', [
    (b'hello ' * 99, 'is text'),
    (b'', 'is empty'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'SVG'),
    (png_header(30000, 30000), 'megapixels'),
    (png_header(10000, 6000), '10000x6000'),
    (png_header(1, 1), '1x1'),
    (png_header(63, 500), '63x500'),
    (png_header(500, 500), 'damaged or cut off'),
    (b'\0\0\0\x18ftypheic' + bytes(99), 'HEIC'),
    (bytes(500), 'not a picture'),
    (b'%PDF-1.7\n' + bytes(range(9)), 'not a picture'),
    (b'%!PS-Adobe', 'is text'),
])
@pytest.mark.hostile('pictures')
def test_pictures_refused(tmp_path, content, says):
    (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(JobError, match=says) as e: read_image(tmp_path / 'a.png')
    assert e.value.code == 'input_unreadable'


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.gif'])
@pytest.mark.hostile('pictures')
def test_picture_cut_off(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    noise.save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:len(data) // 2])
    with pytest.raises(JobError, match='input_unreadable'): read_image(tmp_path / name)


@pytest.mark.parametrize('size, wanted', [
    ((3000, 1000), (1536, 512)),
    ((200, 100), (200, 100)),
    ((100, 2000), (77, 1536)),
])
def test_normalise_image(tmp_path, size, wanted):
    Image.new('RGB', size).save(tmp_path / 'a.jpg')
    assert normalise_image(tmp_path / 'a.jpg', tmp_path / 'b.png') == wanted
    with Image.open(tmp_path / 'b.png') as image:
        assert (image.format, image.mode, image.size) == ('PNG', 'RGB', wanted)


def test_filmstrip(tmp_path):
    driving = draw_test_video(tmp_path / 'in.mp4', seconds=2, fps=30, size=(640, 360))
    clip = normalised(driving, tmp_path)
    with Image.open(filmstrip(driving, clip.path, tmp_path / 's.png', columns=4)) as strip:
        assert strip.size == (4 * 328 + 8, 30 + 2 * 188 + 8)
        above, below = (np.asarray(strip)[top:top + 180, 8:328] for top in (30, 218))
    assert abs(read_test_picture(above) / 30 - read_test_picture(below) / 24) < 0.05
