"""What a page remembers beside the stream: a small picture of every frame, and the memory and speed over time."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np

from mmkv.demos.page.uploads import shrink

SIDE = 96  # pixels of a thumbnail's longer side
POINTS = 240  # of a chart


def jpeg(picture: np.ndarray, side: int = SIDE, quality: int = 80) -> bytes:
    """A small JPEG of uint8 `[H, W, 3]`."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(shrink(picture, side)).save(out, "jpeg", quality=quality)
    return out.getvalue()


@dataclass(frozen=True)
class Point:
    """What was measured behind one batch.

    Args:
        frames: stored by then.
        fps: frames a second that were encoded since the point before.
        bytes: by tier.
    """

    frames: int
    fps: float
    bytes: dict[str, int]


@dataclass
class History:
    """Points of a chart, at most `POINTS`: when there are more, neighbours become one."""

    points: list[Point] = field(default_factory=list)
    every: int = 1
    _frames: int = 0
    _seconds: float = 0.0
    _batches: int = 0
    _last: int = 0

    def add(self, frames: int, seconds: float, held: dict[str, int]) -> None:
        """Frames are `frames` now; the batch took `seconds`."""
        self._frames += frames - self._last
        self._last = frames
        self._seconds += seconds
        self._batches += 1
        if self._batches < self.every:
            return
        self.points.append(Point(frames, self._frames / max(self._seconds, 1e-9), dict(held)))
        self._frames, self._seconds, self._batches = 0, 0.0, 0
        if len(self.points) > POINTS:
            self.points = self.points[1::2]
            self.every *= 2
