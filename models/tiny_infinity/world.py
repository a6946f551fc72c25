"""Captioned pictures of coloured shapes: a seed gives what a caption says, a picture of it, and the sentence."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmkv.models.tiny import draw
from mmkv.models.tiny_infinity.words import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Facts,
    caption_of,
)

SIDE = 64  # px
RADIUS = {"large": 13.0, "small": 7.0, "pair": 9.5, "count": 7.5}  # px, half of a circle's width
AREA = {"circle": np.pi, "square": 2.88, "triangle": 1.87}  # of a shape of radius 1, as `draw` makes them
PLACES = {  # px: centres of several objects of a kind
    2: ((18, 32), (46, 32)),
    3: ((18, 44), (46, 44), (32, 18)),
    4: ((18, 18), (46, 18), (18, 46), (46, 46)),
}
APART = 14  # px from the middle to each of a pair


@dataclasses.dataclass(frozen=True)
class Picture:
    """A caption and what it describes.

    Args:
        facts: what it says.
        image: uint8 `[SIDE, SIDE, 3]`.
    """

    facts: Facts
    image: np.ndarray

    @property
    def caption(self) -> str:
        return caption_of(self.facts)


def make_facts(rng: np.random.Generator, kind: str | None = None) -> Facts:
    """What a caption may say, drawn evenly; `kind` is one of `words.KINDS`, None for any."""
    kind = kind or str(rng.choice(KINDS, p=[0.3, 0.45, 0.25]))
    background = str(rng.choice(list(BACKGROUNDS)))
    colours, shapes = rng.permutation(list(COLOURS)), rng.choice(SHAPES, 2)
    first = (str(colours[0]), str(shapes[0]))
    if kind == "single":
        return Facts(background, (first,), size=str(rng.choice(SIZES)))
    if kind == "pair":
        return Facts(background, (first, (str(colours[1]), str(shapes[1]))), relation=str(rng.choice(RELATIONS)))
    return Facts(background, (first,) * int(rng.choice(list(COUNTS.values()))))


def render(facts: Facts, rng: np.random.Generator) -> np.ndarray:
    """A picture that fits, uint8 `[SIDE, SIDE, 3]`: places vary by a few px, colours by a few levels."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = np.float32(BACKGROUNDS[facts.background]) + rng.uniform(-8, 8)
    radius = RADIUS[facts.size or facts.kind] * rng.uniform(0.95, 1.05)
    spread = 5.0 if facts.kind == "single" else 2.0
    for (colour, shape), (x, y) in zip(facts.things, _centres(facts), strict=True):
        at = (x + rng.uniform(-spread, spread), y + rng.uniform(-spread, spread))
        mask = draw.place(draw.sprite(shape, round(radius, 1)), *at, SIDE)
        image += mask[..., None] * (np.float32(COLOURS[colour]) + rng.uniform(-8, 8) - image)
    return np.clip(image, 0, 255).astype(np.uint8)


def _centres(facts: Facts) -> tuple[tuple[float, float], ...]:
    """(x, y) of each object, px, before they vary."""
    middle = SIDE / 2
    if facts.kind == "single":
        return ((middle, middle),)
    if facts.kind == "count":
        return PLACES[len(facts.things)]
    x, y = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[facts.relation]
    return tuple((middle + side * x * APART, middle + side * y * APART) for side in (1, -1))


def make_picture(seed: int, kind: str | None = None) -> Picture:
    """The picture of a seed, the same on every machine."""
    rng = np.random.default_rng([seed, 11])
    facts = make_facts(rng, kind)
    return Picture(facts, render(facts, rng))
