"""UniRes: how an image of any size becomes tiles of one size (LongVA, arXiv 2406.16852, section 3.2)."""

from __future__ import annotations

import math

from PIL import Image

TILE = 336  # pixels on a side of CLIP's input
MOST_TILES = 49
PINPOINTS = tuple(
    (TILE * w, TILE * h) for w in range(1, MOST_TILES + 1) for h in range(1, MOST_TILES + 1) if 2 <= w * h <= MOST_TILES
)
BLACK = (0, 0, 0)


def best_resolution(width: int, height: int, pinpoints) -> tuple[int, int]:
    """Width and height of the pinpoint that keeps most of an image's pixels, of those the one that wastes fewest.

    Args:
        width, height: pixels of the image.
        pinpoints: (width, height) pairs; of equal ones the first is taken.
    """
    return tuple(max(pinpoints, key=lambda wh: _worth(width, height, *wh)))


def _worth(width: int, height: int, wide: int, high: int) -> tuple[int, int]:
    """What is kept of an image, and, counted below 0, what of the pinpoint is wasted."""
    scale = min(wide / width, high / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - wide * high


def grid_of(width: int, height: int, pinpoints, tile: int = TILE) -> tuple[int, int]:
    """Rows and columns of tiles that an image of that many pixels is cut into."""
    wide, high = best_resolution(width, height, pinpoints)
    return high // tile, wide // tile


def tiles_of(image: Image.Image, pinpoints, tile: int = TILE) -> list[Image.Image]:
    """The tiles of an image, row by row: resized in its own proportions, centred on black, cut.

    The view of the whole image that the public code computes beside them never reaches its decoder; it is left out here.
    """
    wide, high = best_resolution(*image.size, pinpoints)
    canvas = _padded(image.convert("RGB"), wide, high)
    corners = [(x, y) for y in range(0, high, tile) for x in range(0, wide, tile)]
    return [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]


def _padded(image: Image.Image, wide: int, high: int) -> Image.Image:
    across, down = wide / image.width, high / image.height
    if across < down:
        size = wide, min(math.ceil(image.height * across), high)
    else:
        size = min(math.ceil(image.width * down), wide), high
    canvas = Image.new("RGB", (wide, high), BLACK)
    canvas.paste(image.resize(size), ((wide - size[0]) // 2, (high - size[1]) // 2))
    return canvas
