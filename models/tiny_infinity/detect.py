"""What is in a picture, by classical image analysis: colours, connected areas, the shape that each overlaps most."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from mmkv.models.tiny import draw
from mmkv.models.tiny_infinity.words import BACKGROUNDS, COLOURS, SHAPES, Facts
from mmkv.models.tiny_infinity.world import APART, AREA, RADIUS

LEAST = 50  # px of an object
SPECK = np.ones((2, 2), np.uint8)  # what is nowhere as wide is the mixed colour of an edge
SIZES_MEET = (RADIUS["large"] + RADIUS["small"]) / 2  # px, radius between large and small
HANGS = {"triangle": 0.2}  # how far below its middle a shape is drawn, in radii


@dataclasses.dataclass(frozen=True)
class Found:
    """An object in a picture.

    Args:
        colour, shape: as in `words`.
        x, y: its middle, px.
        radius: as the world counts it, px.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture, as the detector sees it: its background's name, and objects by area, the largest first."""

    background: str
    things: tuple[Found, ...]


def look(image: np.ndarray) -> Seen:
    """What is in a picture, uint8 `[H, W, 3]`."""
    names = [*BACKGROUNDS, *COLOURS]
    palette = np.float32([*BACKGROUNDS.values(), *COLOURS.values()])
    nearest = ((image[:, :, None].astype(np.float32) - palette) ** 2).sum(-1).argmin(-1)
    background = int(np.bincount(nearest.ravel(), minlength=len(names))[: len(BACKGROUNDS)].argmax())
    things = []
    for index in range(len(BACKGROUNDS), len(names)):
        mask = cv2.erode((nearest == index).astype(np.uint8), SPECK, anchor=(0, 0))
        mask = cv2.dilate(mask, SPECK, anchor=(1, 1))  # anchors reflected: nothing moves
        count, labels, boxes, centres = cv2.connectedComponentsWithStats(mask, connectivity=4)
        for label in range(1, count):
            if (area := int(boxes[label, cv2.CC_STAT_AREA])) >= LEAST:
                things.append((area, _named(names[index], labels == label, *map(float, centres[label]))))
    return Seen(names[background], tuple(found for _, found in sorted(things, key=lambda pair: -pair[0])))


def _named(colour: str, mask: np.ndarray, x: float, y: float) -> Found:
    """The shape that overlaps most with an area, bool `[H, W]`, of the same size and with its middle at (x, y)."""
    best, out = -1.0, None
    for shape in SHAPES:
        radius = math.sqrt(mask.sum() / AREA[shape])
        drawn = draw.place(draw.sprite(shape, round(radius, 1)), x, y - HANGS.get(shape, 0) * radius, len(mask)) > 0.5
        overlap = (mask & drawn).sum() / (mask | drawn).sum()
        if overlap > best:
            best, out = overlap, Found(colour, shape, x, y, radius)
    return out


def agreement(facts: Facts, image: np.ndarray) -> dict[str, bool]:
    """What of a caption is true of a picture: background, number, colours, shapes, place (or size), and all of these."""
    seen = look(image)
    wanted, found = list(facts.things), [(thing.colour, thing.shape) for thing in seen.things]
    true = {
        "background": seen.background == facts.background,
        "number": len(found) == len(wanted),
        "colours": sorted(colour for colour, _ in found) == sorted(colour for colour, _ in wanted),
        "shapes": sorted(found) == sorted(wanted),
    }
    true["place"] = true["colours"] and _placed(facts, seen)
    return true | {"all": all(true.values())}


def _placed(facts: Facts, seen: Seen) -> bool:
    """Whether size or relation are right; of objects of a kind nothing is said."""
    if facts.kind == "count":
        return True
    if facts.kind == "single":
        return (seen.things[0].radius > SIZES_MEET) == (facts.size == "large")
    first = next(thing for thing in seen.things if thing.colour == facts.things[0][0])
    second = next(thing for thing in seen.things if thing.colour == facts.things[1][0])
    right, down = second.x - first.x, second.y - first.y
    ahead = {"left of": right, "right of": -right, "above": down, "below": -down}[facts.relation]
    return bool(ahead > APART and ahead > 2 * min(abs(right), abs(down)))
