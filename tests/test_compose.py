"""What is delivered: the driver's own bytes outside the mask, no step at its border, no drift, black bars"""
import functools

import cv2
import numpy as np
import pytest

from wan_avatar.compose import (
    ComposeRules,
    Drift,
    Tone,
    block_means,
    colour_distance,
    compose_frame,
    correction,
    feathered,
    find_drift,
    find_ring,
    to_lab,
    tone_of,
)
from wan_avatar.frames import Rectangle
from wan_avatar.segments import WHOLE, grow_mask

AREA = Rectangle(320, 112, 480, 560)
HERE = np.s_[AREA.top:AREA.bottom, AREA.left:AREA.right]

def noise(seed: int, *shape: int) -> np.ndarray: return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

def person() -> np.ndarray: # (720, 1280) bool
    "A head and a trunk"
    out = np.zeros((720, 1280), np.uint8)
    cv2.circle(out, (560, 250), 60, 1, -1)
    cv2.rectangle(out, (480, 310), (640, 600), 1, -1)
    return out.astype(bool)

GROWN = grow_mask(person())

def made_of(colours: np.ndarray) -> np.ndarray: # (h, w, 4) of the area
    return np.dstack([colours, GROWN[HERE] * np.uint8(255)])

BARS = {'none': WHOLE, 'at the sides': Rectangle(438, 0, 404, 720), 'above and below': Rectangle(0, 140, 1280, 440)}

@pytest.mark.parametrize('content', BARS.values(), ids=BARS)
def test_outside_the_mask_are_the_drivers_bytes_and_bars_are_black(content):
    driver, made = noise(0, 720, 1280, 3), made_of(noise(1, 560, 480, 3))
    out = compose_frame(driver.copy(), made, AREA, content, ComposeRules(), Tone(gain=(0.9, 1.0, 1.1)))
    inside = np.zeros((720, 1280), bool)
    inside[content.top:content.bottom, content.left:content.right] = True
    assert not out[~inside].any()
    assert np.array_equal(out[inside & ~GROWN], driver[inside & ~GROWN])

def test_inside_is_what_was_made_behind_a_feather_of_eight_pixels():
    driver, colours = noise(0, 720, 1280, 3), noise(1, 560, 480, 3)
    out = compose_frame(driver.copy(), made_of(colours), AREA, WHOLE, ComposeRules())
    deep = cv2.erode(GROWN.astype(np.uint8), np.ones((19, 19), np.uint8))[HERE] > 0
    assert np.array_equal(out[HERE][deep], colours[deep])
    person_in_area = person()[HERE]
    assert np.array_equal(out[HERE][person_in_area], colours[person_in_area]), 'nothing of the old person shows'

SWITCHED = {
    'not composed': (ComposeRules(composite=False), lambda colours, mask, driver: colours),
    'no feather': (ComposeRules(feather=0), lambda colours, mask, driver: np.where(mask[..., None], colours, driver))}

@pytest.mark.parametrize('rules, wanted', SWITCHED.values(), ids=SWITCHED)
def test_each_step_can_be_switched_off(rules, wanted):
    driver, colours = noise(0, 720, 1280, 3), noise(1, 560, 480, 3)
    out = compose_frame(driver.copy(), made_of(colours), AREA, WHOLE, rules)
    assert np.array_equal(out[HERE], wanted(colours, GROWN[HERE], driver[HERE]))

def test_soft_alpha_of_a_drawing_is_used_as_it_is():
    driver = np.full((720, 1280, 3), 100, np.uint8)
    made = np.full((560, 480, 4), 200, np.uint8)
    made[..., 3] = np.linspace(0, 255, 480, dtype=np.uint8)
    out = compose_frame(driver.copy(), made, AREA, WHOLE, ComposeRules(feather=0))
    assert np.array_equal(out[HERE][0, :, 0], 100 + np.round(100.0 * made[0, :, 3] / 255))

def test_a_mask_that_reaches_the_border_of_the_area_has_no_feather_there():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:, :30] = 255
    weight = feathered(mask, 8)
    assert (weight[30:, :10] == 255).all()
    assert 0 < weight[10, 0] < 64

def across_and_along(frame: np.ndarray) -> float:
    "Gradient across the mask's border over the gradient along it"
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    gx, gy = np.abs(cv2.Sobel(grey, cv2.CV_32F, 1, 0)), np.abs(cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    edge = GROWN ^ (cv2.erode(GROWN.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    upright = edge & np.roll(edge, 1, 0) & np.roll(edge, -1, 0)
    return float(gx[upright].mean() / gy[upright].mean())

def vae(frame: np.ndarray, seed: int) -> np.ndarray: # float32
    "A round trip through an imagined VAE: a little blur, a little noise"
    blurred = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 0.8)
    return blurred + np.random.default_rng(seed).normal(0, 2, frame.shape).astype(np.float32)

def as_bytes(frame: np.ndarray) -> np.ndarray: return np.clip(frame + 0.5, 0, 255).astype(np.uint8)

def test_no_seam_at_the_border():
    "The model gives the scene back with an offset of two levels: without a feather that is a line"
    texture = cv2.GaussianBlur(noise(3, 720, 1280, 3), (0, 0), 6).astype(np.float32)
    driver = as_bytes((texture - texture.mean()) * 6 + 120)
    made = made_of(as_bytes(vae(driver, 0) + 2)[HERE])
    composed = compose_frame(driver.copy(), made, AREA, WHOLE, ComposeRules())
    assert across_and_along(composed) / across_and_along(driver) <= 1.15

# drift: seven windows, each of which goes on from what was delivered of the one before

SURROUNDINGS = {'grey': 128, 'green': (30, 190, 60), 'white': 250, 'black': 4, 'dark': (30, 28, 26)}
DRIFTS = { # what the model does to colours in each window; dE after seven windows without and with the correction
    'darker and yellower': (tone_of(np.array([0.979, 0.98, 0.96]), np.zeros(3)), 6.5, 0.6),
    'flatter': (tone_of(np.full(3, 0.95), np.full(3, 6.0)), 4, 0.6),
    'too little to see at once': (tone_of(np.full(3, 0.996), np.zeros(3)), 0.8, 0.6),
    'none': (Tone(), 0, 0.1)}

SMALL = Rectangle(400, 240, 240, 240) # of the frame: all of the scene that is looked at
MASK = GROWN[SMALL.top:SMALL.bottom, SMALL.left:SMALL.right] * np.uint8(255)
AS_WHOLE = Rectangle(0, 0, SMALL.width, SMALL.height)

def scene(colour) -> np.ndarray: # (240, 240, 3) uint8
    "A patchwork person before a plain wall"
    patches = cv2.resize(noise(5, 10, 10, 3) // 2 + 60, (240, 240), interpolation=cv2.INTER_NEAREST)
    return np.where(MASK[..., None] > 0, patches, np.uint8(colour)).astype(np.uint8)

@functools.cache
def after_seven_windows(colour, drift: Tone, rules: ComposeRules) -> float:
    "dE of the person's mean colours from those of the first window"
    first = scene(colour)
    solid = feathered(MASK, rules.feather) == 255
    delivered, due = first, Tone()
    for k in range(7):
        made = as_bytes(drift(vae(delivered, k)))
        found = find_drift(made[None], delivered[None], solid[None])
        tone, due = correction(found, due, rules.drift_band) if rules.match_drift else (Tone(), due)
        delivered = compose_frame(first.copy(), np.dstack([made, MASK]), AS_WHOLE, AS_WHOLE, rules, tone)
    (now, share), (then, _) = (block_means(f, solid) for f in (delivered, first))
    return colour_distance(now[share > 0.9], then[share > 0.9])

@pytest.mark.parametrize('colour', SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize('drift, raw, matched', DRIFTS.values(), ids=DRIFTS)
def test_drift_is_brought_back_whatever_is_around(drift, raw, matched, colour):
    base = after_seven_windows(colour, Tone(), ComposeRules(match_drift=False)) # blur and noise alone
    assert after_seven_windows(colour, drift, ComposeRules(match_drift=False)) - base >= raw - 0.05
    assert after_seven_windows(colour, drift, ComposeRules()) - base <= matched

LAB = { # sRGB; CIELAB under D65, as published converters give it
    'white': ((255, 255, 255), (100, 0, 0)),
    'black': ((0, 0, 0), (0, 0, 0)),
    'red': ((255, 0, 0), (53.24, 80.09, 67.20)),
    'blue': ((0, 0, 255), (32.30, 79.19, -107.86)),
    'grey': ((119, 119, 119), (50.03, 0, 0))}

@pytest.mark.parametrize('rgb, lab', LAB.values(), ids=LAB)
def test_lab(rgb, lab): assert to_lab(np.array([rgb], float))[0] == pytest.approx(lab, abs=0.05)

def test_too_few_blocks_say_nothing():
    frame = noise(0, 64, 64, 3)[None]
    assert find_drift(frame, frame, np.zeros((1, 64, 64), bool)) is None
    assert correction(None, Tone(), 0.5) == (Tone(), Tone())

def test_frames_that_were_not_given_back_are_no_drift():
    frames = [cv2.resize(noise(n, 9, 8, 3), (128, 144), interpolation=cv2.INTER_NEAREST)[None] for n in range(2)]
    assert find_drift(*frames, np.ones((1, 144, 128), bool)) is None

def test_a_mouth_that_is_drawn_otherwise_is_no_drift():
    colours = cv2.resize(noise(5, 9, 8, 3), (128, 144), interpolation=cv2.INTER_NEAREST)
    other = colours.copy()
    other[64:96, 32:96] //= 3
    found = find_drift(other[None], colours[None], np.ones((1, 144, 128), bool))
    assert found and found.distance < 0.1

RINGS = { # how the model gives the surroundings back; the dE that the ring says
    'true': (Tone(), 0, 0.1),
    'darker': (tone_of(np.ones(3), np.full(3, -10.0)), 3, 5)}

@pytest.mark.parametrize('drift, least, most', RINGS.values(), ids=RINGS)
def test_the_ring_says_how_far_the_surroundings_are_off(drift, least, most):
    driver = scene(128)
    made = np.dstack([as_bytes(drift(vae(driver, 1))), MASK])
    ring = find_ring(made[None], driver[None])
    assert ring and ring.tone.gain == (1, 1, 1), 'a free slope moves faces'
    assert least <= ring.distance <= most

def test_clipped_surroundings_say_nothing():
    driver = scene(255)
    made = np.dstack([driver, MASK])
    assert find_ring(made[None], driver[None]) is None

def test_small_drifts_are_remembered_until_they_can_be_seen():
    small = Drift(tone_of(np.ones(3), np.full(3, 0.5)), 0.2)
    due, changed = Tone(), []
    for _ in range(7):
        tone, due = correction(small, due, 0.5)
        changed.append(tone != Tone())
    assert changed == [False, False, True, False, False, True, False]
