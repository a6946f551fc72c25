"""Synthetic screens: elements on a desktop, and their pixels.

A screen is 128 x 96, 128 x 128 or 160 x 128 px (48, 64 or 80 tokens). Names on one screen are distinct; colours may repeat.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from mmkv.models.tiny.draw import CANVAS, sprite
from mmkv.models.tiny_agent.words import COLOURS, DRAWN_WORDS, FIELD, STEP

SIZES = ((128, 96), (128, 128), (160, 128))  # width, height in px
BAR = 9  # px: height of the title bar


@dataclasses.dataclass(frozen=True)
class Element:
    """A button with an icon, a digit or a word on it, or a text field.

    Args:
        name, colour: words of `NAMES` and `COLOURS`.
        x, y: centre, px.
        width, height: of the button, px: what a click must hit.
        radius: of the icon, px.
    """

    name: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the button, px."""
        return (self.x - self.width / 2, self.y - self.height / 2, self.x + self.width / 2, self.y + self.height / 2)

    @property
    def at(self) -> tuple[int, int]:
        """The point that the agent is taught to click: multiples of `STEP` px nearest to the centre."""
        return round(self.x / STEP) * STEP, round(self.y / STEP) * STEP

    def holds(self, x: float, y: float) -> bool:
        """Whether a point in px hits the button, its edge included."""
        left, top, right, bottom = self.box
        return left <= x <= right and top <= y <= bottom


def place_elements(wanted: list[tuple[str, str]], size: tuple[int, int], rng: np.random.Generator) -> list[Element]:
    """Elements for (name, colour) pairs where there is room; those that find none are left out."""
    placed: list[Element] = []
    for name, colour in wanted:
        for _ in range(60):
            element = _element(name, colour, size, rng)
            if all(_apart(element, other) for other in placed):
                placed.append(element)
                break
    return placed


def _element(name: str, colour: str, size: tuple[int, int], rng: np.random.Generator) -> Element:
    wide = name == FIELD or name in DRAWN_WORDS
    radius = 7.0 if name in DRAWN_WORDS else float(rng.choice([7.5, 8.0, 8.5]))
    width, height = (46.0, 20.0) if name == FIELD else (34.0 if wide else 24.0, 22.0 if wide else 24.0)
    x = rng.integers(np.ceil(width / 2) + 3, size[0] - np.ceil(width / 2) - 2)
    y = rng.integers(BAR + np.ceil(height / 2) + 1, size[1] - np.ceil(height / 2) - 1)
    return Element(name, colour, float(x), float(y), width, height, radius)


def _apart(a: Element, b: Element) -> bool:
    """True if two buttons leave two pixels between them."""
    return abs(a.x - b.x) >= (a.width + b.width) / 2 + 2 or abs(a.y - b.y) >= (a.height + b.height) / 2 + 2


def desktop(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """What the screens of a session share: float32 `[H, W, 3]` with gradient, window, title bar and grey clutter."""
    width, height = size
    base = rng.uniform(30, 80) + rng.uniform(-12, 12) * np.linspace(-1, 1, height)[:, None]
    picture = np.repeat((base + rng.uniform(-12, 12) * np.linspace(-1, 1, width)[None])[..., None], 3, 2)
    picture = (picture + rng.uniform(-8, 8, 3)).astype(np.float32)
    left, top = int(rng.integers(1, 12)), int(rng.integers(BAR + 1, 24))
    right, bottom = width - int(rng.integers(1, 12)), height - int(rng.integers(1, 10))
    picture[top:bottom, left:right] += rng.uniform(-18, 22)
    for _ in range(int(rng.integers(0, 4))):  # edges that belong to no element
        (x, y), shade, length = rng.integers(0, [width, height]), float(rng.uniform(20, 120)), int(rng.integers(10, 60))
        picture[y : y + 1, x : x + length] = shade
    picture[:BAR] = rng.uniform(90, 150) + rng.uniform(-10, 10, 3)
    for i in range(3):
        cv2.circle(picture, (width - 6 - 8 * i, BAR // 2), 2, (40.0, 40.0, 40.0), -1)
    return picture + rng.normal(0, 2, (height, width, 1)).astype(np.float32)


def render(elements: list[Element] | tuple[Element, ...], back: np.ndarray, shade: float = 20.0) -> np.ndarray:
    """uint8 `[H, W, 3]`: elements on a desktop. `shade`: how much lighter buttons are than the desktop's mean."""
    picture = back.copy()
    level = float(back.mean()) + shade
    for element in elements:
        left, top, right, bottom = (round(v) for v in element.box)
        picture[top:bottom, left:right] = level + 18
        picture[top + 1 : bottom - 1, left + 1 : right - 1] = level
        rows, columns, alpha = ink(element)
        picture[rows, columns] += alpha[..., None] * (np.float32(COLOURS[element.colour]) - picture[rows, columns])
    return np.clip(picture, 0, 255).astype(np.uint8)


def ink(element: Element) -> tuple[slice, slice, np.ndarray]:
    """Where the coloured part of an element is: rows, columns, opacity float32 in 0..1."""
    left, top, right, bottom = (round(v) for v in element.box)
    if element.name == FIELD:  # a coloured frame
        alpha = np.ones((bottom - top - 2, right - left - 2), np.float32)
        alpha[3:-3, 3:-3] = 0
        return slice(top + 1, bottom - 1), slice(left + 1, right - 1), alpha
    alpha = sprite(element.name, element.radius)
    half_x, half_y = (right - left) // 2 - 1, (bottom - top) // 2 - 1
    middle, x, y = CANVAS // 2, int(element.x), int(element.y)
    alpha = alpha[middle - half_y : middle + half_y, middle - half_x : middle + half_x]
    return slice(y - half_y, y + half_y), slice(x - half_x, x + half_x), alpha
