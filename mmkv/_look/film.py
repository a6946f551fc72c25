"""The film: every sampled frame of a video, the input and all stages side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmkv._look.paint import paint
from mmkv._look.stages import Stage
from mmkv._look.strip import GAP, INK, MARGIN, PALE, PAPER, Scene, font, plain, shortened

PANEL = 240  # pixels of a panel's width
HEAD = 58


def panels(scene: Scene, stages: Sequence[Stage], pictures: np.ndarray) -> Iterator[np.ndarray]:
    """For each picture of `[T, H, W, 3]` one uint8 `[h, w, 3]` of even sides; T / frames pictures share a decoder frame."""
    step = math.ceil(len(pictures) / len(scene.images))
    across = min(1 + len(stages), 4)
    rows = math.ceil((1 + len(stages)) / across)
    labels = [("input", scene.caption, ""), *((stage.method, stage.place, stage.counts) for stage in stages)]
    for t, picture in enumerate(pictures):
        f = min(t // step, len(scene.images) - 1)
        row = [plain(picture, stages, f, PANEL)]
        row += [paint(picture, stage.group[f], stage.lead[f], PANEL) for stage in stages]
        wide, high = max(x.shape[1] for x in row) + GAP, max(x.shape[0] for x in row) + HEAD + GAP
        size = 2 * MARGIN + across * wide - GAP, 2 * MARGIN + rows * high - GAP
        canvas = Image.new("RGB", tuple(n + n % 2 for n in size), PAPER)
        draw = ImageDraw.Draw(canvas)
        for i, (label, image) in enumerate(zip(labels, row)):
            x, y = MARGIN + i % across * wide, MARGIN + i // across * high
            for line, points, ink, down in zip(label, (16, 12, 12), (INK, PALE, PALE), (0, 20, 36)):
                draw.text((x, y + down), shortened(line, points, wide - GAP), ink, font(points))
            canvas.paste(Image.fromarray(image), (x, y + HEAD))
        yield np.asarray(canvas)


def write_film(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    """Write uint8 `[h, w, 3]` frames of even sides as an H.264 mp4."""
    import av

    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = None
        for image in frames:
            if stream is None:
                stream = out.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], "yuv420p"
                stream.options = {"crf": "18"}
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if stream is not None:
            out.mux(stream.encode())
