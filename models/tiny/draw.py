"""Pixels of the synthetic world: anti-aliased sprites and backgrounds."""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np

from mmkv.models.tiny.words import DIGITS, DRAWN_WORDS

CANVAS = 36  # side of a sprite, px
FINE = 8  # drawn this many times larger, then averaged down: anti-aliased edges


def _polygon(image, points):
    cv2.fillPoly(image, [np.round(np.asarray(points)).astype(np.int32)], 255)


def _regular(corners, radius, turn=-90.0, inner=None):
    """Corners of a regular polygon, or of a star when `inner` (radius of the inner corners, px) is given."""
    centre, steps = CANVAS * FINE / 2, corners * (2 if inner else 1)
    points = []
    for i in range(steps):
        r = inner if inner and i % 2 else radius
        angle = math.radians(turn + 360 * i / steps)
        points.append((centre + r * math.cos(angle), centre + r * math.sin(angle)))
    return points


@functools.lru_cache(maxsize=4096)
def sprite(name: str, radius: float) -> np.ndarray:
    """Opacity of an object of about 2 * radius px, float32 [CANVAS, CANVAS] in 0..1."""
    side = CANVAS * FINE
    image = np.zeros((side, side), np.uint8)
    c, r = side // 2, radius * FINE
    if name in DIGITS or name in DRAWN_WORDS:
        font = cv2.FONT_HERSHEY_SIMPLEX
        target = 2 * r if name in DIGITS else 3.3 * r  # px: height of a digit, width of a word
        thick = round((0.42 if name in DIGITS else 0.24) * r)
        (w, h), _ = cv2.getTextSize(name, font, 1.0, 1)
        scale = (target - thick) / (h if name in DIGITS else w)
        (w, h), _ = cv2.getTextSize(name, font, scale, 1)
        cv2.putText(image, name, (c - w // 2, c + h // 2), font, scale, 255, thick, cv2.LINE_AA)
    elif name == "circle":
        cv2.circle(image, (c, c), round(r), 255, -1)
    elif name == "ring":
        cv2.circle(image, (c, c), round(r * 0.8), 255, round(r * 0.4))
    elif name == "square":
        _polygon(image, _regular(4, r * 1.2, turn=45))
    elif name == "diamond":
        points = np.array(_regular(4, r * 1.15)) - c
        _polygon(image, points * (0.75, 1.0) + c)
    elif name == "triangle":
        _polygon(image, np.array(_regular(3, r * 1.2)) + (0, r * 0.2))
    elif name == "hexagon":
        _polygon(image, _regular(6, r * 1.05))
    elif name == "star":
        _polygon(image, _regular(5, r * 1.15, inner=r * 0.48))
    elif name == "cross":
        half, arm = round(r), round(r * 0.34)
        cv2.rectangle(image, (c - half, c - arm), (c + half, c + arm), 255, -1)
        cv2.rectangle(image, (c - arm, c - half), (c + arm, c + half), 255, -1)
    elif name == "bar":
        cv2.rectangle(
            image, (c - round(r * 1.1), c - round(r * 0.35)), (c + round(r * 1.1), c + round(r * 0.35)), 255, -1
        )
    elif name == "heart":
        for side_ in (-1, 1):
            cv2.circle(image, (round(c + side_ * r * 0.46), round(c - r * 0.35)), round(r * 0.5), 255, -1)
        _polygon(image, [(c - r * 0.92, c - r * 0.15), (c + r * 0.92, c - r * 0.15), (c, c + r)])
    elif name == "arrow":
        cv2.rectangle(image, (c - round(r * 0.3), c - round(r * 0.1)), (c + round(r * 0.3), c + round(r)), 255, -1)
        _polygon(image, [(c - r, c), (c + r, c), (c, c - r * 1.1)])
    elif name == "moon":
        cv2.circle(image, (c, c), round(r), 255, -1)
        cv2.circle(image, (round(c + r * 0.5), c), round(r * 0.8), 0, -1)
    else:
        raise ValueError(f"no drawing for {name!r}")
    small = cv2.resize(image, (CANVAS, CANVAS), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def place(alpha: np.ndarray, x: float, y: float, side: int) -> np.ndarray:
    """The sprite's opacity on a whole frame, float32 [side, side], its centre at (x, y) px, sub-pixel exact."""
    shift = np.float32([[1, 0, x - (CANVAS - 1) / 2], [0, 1, y - (CANVAS - 1) / 2]])
    return cv2.warpAffine(alpha, shift, (side, side), flags=cv2.INTER_LINEAR)


def background(kind: str, side: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [frames, side, side, 3]. `plain`: grey with a gradient; `texture`: drifting coloured clutter."""
    level = rng.uniform(25, 95) if kind == "plain" else rng.uniform(50, 95)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    base = level + rng.uniform(-14, 14) * ramp[:, None] + rng.uniform(-14, 14) * ramp[None]
    still = np.repeat(base[..., None], 3, axis=2) + rng.normal(0, 3, (side, side, 1)).astype(np.float32)
    if kind == "plain":
        return np.broadcast_to(still, (frames, side, side, 3))
    cells = int(rng.integers(4, 12))
    coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    coarse = coarse * 0.4 + coarse.mean(axis=2, keepdims=True) * 0.6  # mostly grey, so that colours stay nameable
    texture = cv2.resize(
        coarse, (side, side), interpolation=cv2.INTER_CUBIC if rng.random() < 0.5 else cv2.INTER_NEAREST
    )
    still = still + rng.uniform(20, 50) * texture
    for _ in range(int(rng.integers(0, 6))):  # thin grey lines: edges that belong to no object
        (x0, y0, x1, y1), shade = rng.integers(0, side, 4), float(rng.uniform(20, 170))
        cv2.line(still, (int(x0), int(y0)), (int(x1), int(y1)), (shade, shade, shade), 1, cv2.LINE_AA)
    if rng.random() < 0.5:
        return np.broadcast_to(still, (frames, side, side, 3))
    speed = rng.uniform(-0.5, 0.5, 2)
    rows = [np.roll(still, (int(speed[0] * t), int(speed[1] * t)), axis=(0, 1)) for t in range(frames)]
    return np.stack(rows)
