"""The picture: a column for each frame, a row for the input and for each stage, with legend and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkv._look.paint import EDGE, LEGEND, cell, fit, paint
from mmkv._look.stages import Stage

PAPER, INK, PALE, RULE = (255, 255, 255), (24, 24, 27), (92, 92, 102), (212, 212, 216)
GAP, MARGIN, SWATCH = 8, 20, 16
WIDTH = 1120  # pixels that the frames of a row share


@dataclass(frozen=True, eq=False)
class Scene:
    """What the decoder saw, and how to call it.

    Args:
        title, caption: above the picture.
        images: uint8 `[H, W, 3]`, one for each of the decoder's frames.
        labels: one for each frame, such as its time.
    """

    title: str
    caption: str
    images: Sequence[np.ndarray]
    labels: Sequence[str]


def chosen(count: int, most: int) -> list[int]:
    """At most `most` of `count` frames, evenly spread, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def strip(scene: Scene, stages: Sequence[Stage], most: int) -> Image.Image:
    """The whole picture, of at most `most` frames."""
    frames = chosen(len(scene.images), most)
    width = min(max((WIDTH - GAP * (len(frames) - 1)) // len(frames), 80), 420)
    rows = [[plain(scene.images[f], stages, f, width) for f in frames]]
    rows += [[paint(scene.images[f], stage.group[f], stage.lead[f], width) for f in frames] for stage in stages]
    labels = [("input", f"{len(scene.images)} frames" if len(scene.images) > 1 else "", "")]
    labels += [(stage.method, stage.place, stage.counts) for stage in stages]
    gutter = max(_label_width(label) for label in labels) + MARGIN
    columns = [max(row[i].shape[1] for row in rows) for i in range(len(frames))]
    heights = [max(max(image.shape[0] for image in row), 64) for row in rows]
    caption = scene.caption
    if len(frames) < len(scene.images):
        caption += f"; {len(frames)} of {len(scene.images)} frames shown"
    inner = max(gutter + sum(columns) + GAP * (len(columns) - 1), _legend_width())
    top = MARGIN + 30 + 22 + 30 + 22
    canvas = Image.new("RGB", (2 * MARGIN + inner, top + sum(heights) + GAP * len(rows) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), shortened(scene.title, 20, inner), INK, font(20))
    draw.text((MARGIN, MARGIN + 30), shortened(caption, 13, inner), PALE, font(13))
    _legend(draw, MARGIN, MARGIN + 54)
    x = MARGIN + gutter
    for f, wide in zip(frames, columns):
        draw.text((x, top - 18), shortened(scene.labels[f], 12, wide), PALE, font(12))
        x += wide + GAP
    y = top
    for i, (label, row, height) in enumerate(zip(labels, rows, heights)):
        if i and label[0] != labels[i - 1][0]:
            draw.line((MARGIN, y - GAP // 2, MARGIN + inner, y - GAP // 2), RULE)
        _label(draw, MARGIN, y, label)
        x = MARGIN + gutter
        for image, wide in zip(row, columns):
            canvas.paste(Image.fromarray(image), (x, y))
            x += wide + GAP
        y += height + GAP
    return canvas


def plain(image: np.ndarray, stages: Sequence[Stage], frame: int, width: int) -> np.ndarray:
    """A frame as it is, in the size in which the stages' are painted."""
    grid = next((stage.group[frame] for stage in reversed(stages) if stage.group[frame] is not None), None)
    rows, cols = (1, 1) if grid is None else grid.shape
    high, wide = cell(image.shape[1] / image.shape[0], rows, cols, width)
    return fit(image, cols * wide, rows * high)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings."""
    return ImageFont.load_default(size)


def shortened(text: str, size: int, width: int) -> str:
    """A text cut to so many pixels, with an ellipsis where it was."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _label(draw: ImageDraw.ImageDraw, x: int, y: int, lines: tuple[str, str, str]) -> None:
    for line, size, ink, down in zip(lines, (17, 13, 13), (INK, PALE, PALE), (0, 24, 42)):
        draw.text((x, y + down), line, ink, font(size))


def _label_width(lines: tuple[str, str, str]) -> int:
    return int(max(font(size).getlength(line) for line, size in zip(lines, (17, 13, 13)))) + 1


def _legend_width() -> int:
    return int(sum(font(13).getlength(word) + SWATCH + 6 + 22 for word, *_ in LEGEND))


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for word, fill, rim, thick in LEGEND:
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill, rim, thick)
        if rim == EDGE:
            draw.rectangle((x - 1, y - 1, x + SWATCH + 1, y + SWATCH + 1), None, RULE)
        draw.text((x + SWATCH + 6, y), word, PALE, font(13))
        x += int(font(13).getlength(word)) + SWATCH + 6 + 22
