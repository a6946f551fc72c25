"""One frame with its tokens: kept ones bright, groups in colour, dropped ones dark."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from mmkv._look.stages import ALONE, DROPPED, NOWHERE

DIM = 0.2  # brightness of what was dropped
HATCH, LINE = 9, 52  # pixels between the lines over it, and their brightness: dark frames need more than darkening
TINT = 0.4  # share of a group's colour over what was merged away
EDGE = (255, 255, 255)  # between kept and dropped tokens
DARK = (24, 24, 27)  # where there is no token
BLANK = (228, 228, 231)  # a frame of which nothing is known
_GREY, _HUE = (150, 160, 170), (214, 72, 48)
_MIXED = tuple(round(g + TINT * (h - g)) for g, h in zip(_GREY, _HUE))
LEGEND = (  # words, colour of a token, colour and width of its rim
    ("kept", _GREY, EDGE, 1),
    ("others merged into it", _GREY, _HUE, 3),
    ("merged away, by group", _MIXED, _HUE, 1),
    ("dropped", tuple(round(g * DIM) for g in _GREY), DARK, 1),
)


def colour(group: int) -> tuple[int, int, int]:
    """Of a group from 1 on: neighbouring numbers are far apart on the colour wheel, and a number has one colour at all stages."""
    hue = group * 0.618034 % 1
    return tuple(round(255 * x) for x in colorsys.hls_to_rgb(hue, (0.5, 0.62, 0.42)[group % 3], 0.95))  # type: ignore[return-value]


def fit(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """An image uint8 `[H, W, 3]` in another size; enlarged pixels stay recognisable, shrunk ones are averaged."""
    method = Image.Resampling.BICUBIC if width >= image.shape[1] else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize((width, height), method))


def paint(image: np.ndarray, group: np.ndarray | None, lead: np.ndarray | None, width: int) -> np.ndarray:
    """A frame with its tokens drawn over it.

    Args:
        image: uint8 `[H, W, 3]`.
        group: int64 `[rows, cols]` as in `Stage`; None for a frame that the stage does not know, which is left blank.
        lead: bool `[rows, cols]`.
        width: about how wide, in pixels; each token gets a whole number of them.

    Returns:
        uint8 `[h, w, 3]`.
    """
    rows, cols = (1, 1) if group is None else group.shape
    high, wide = cell(image.shape[1] / image.shape[0], rows, cols, width)
    if group is None or lead is None:
        return np.full((high, wide, 3), BLANK, np.uint8)
    group, lead = ((x.repeat(high, 0).repeat(wide, 1)) for x in (group, lead))
    out = fit(image, cols * wide, rows * high).astype(np.float32)
    out[group == DROPPED] *= DIM
    y, x = np.arange(rows * high)[:, None], np.arange(cols * wide)[None]
    hatched = ((y + x) % HATCH == 0) & (group == DROPPED)
    out[hatched] = np.maximum(out[hatched], LINE)
    out[group == NOWHERE] = DARK
    numbers, which = np.unique(np.maximum(group, ALONE), return_inverse=True)
    tint = np.array([colour(g) if g else EDGE for g in numbers.tolist()], np.float32)[which.reshape(group.shape)]
    away = (group > ALONE) & ~lead
    out[away] += TINT * (tint - out)[away]
    line = edges(group) & (group >= ALONE)
    thick = max(1, min(high, wide) // 10)
    y, x = y % high, x % wide
    rim = (y < thick) | (y >= high - thick) | (x < thick) | (x >= wide - thick)
    line |= rim & lead & (group > ALONE)
    out[line] = tint[line]
    return out.round().clip(0, 255).astype(np.uint8)


def cell(aspect: float, rows: int, cols: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of a token in an image of that aspect (width to height), about `width` wide; 3 at least."""
    return max(3, round(width / aspect / rows)), max(3, round(width / cols))


def edges(group: np.ndarray) -> np.ndarray:
    """bool, shape of `group` `[h, w]`: pixels next to one of another group."""
    out = np.zeros(group.shape, bool)
    down, right = group[1:] != group[:-1], group[:, 1:] != group[:, :-1]
    out[1:] |= down
    out[:-1] |= down
    out[:, 1:] |= right
    out[:, :-1] |= right
    return out
