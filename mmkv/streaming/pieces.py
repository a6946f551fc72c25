"""`Pieces`: pictures and their times, in whole frames of the decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Pieces:
    """Checks pictures and hands them on in batches; what makes no whole frame waits.

    Args:
        pictures: that make a frame of the decoder.
        fps: pictures per second, where no times are told.
    """

    def __init__(self, pictures: int, fps: float):
        self.per_frame, self.fps = pictures, fps
        self.shape: tuple[int, ...] | None = None
        self._waiting: list[np.ndarray] = []
        self._times: list[float] = []
        self._last: float | None = None

    def go_on(self, last: float) -> None:
        """Continue behind a frame whose first picture was at `last` seconds."""
        self._last = last + (self.per_frame - 1) / self.fps

    def add(
        self, pictures, times: Sequence[float] | float | None, most: int
    ) -> Iterator[tuple[np.ndarray, list[float]]]:
        """Batches of up to `most` pictures uint8 `[T, H, W, 3]` and the seconds of their frames (of each frame's first picture).

        Args:
            pictures: `[H, W, 3]`, `[T, H, W, 3]`, or an iterable of either.
            times: seconds of each picture, or of the one there is; None counts on.
            most: a multiple of `per_frame`.

        Raises:
            ValueError: another size or type than before, times that do not ascend or do not fit. What came before it is kept.
        """
        told = iter([times] if isinstance(times, (int, float)) else times) if times is not None else None
        for picture in _each(pictures):
            self._take(picture, told)
            if len(self._waiting) == most:
                yield self._whole(most)
        if told is not None and next(told, None) is not None:
            raise ValueError("more times than pictures; give one for each")
        whole = len(self._waiting) // self.per_frame * self.per_frame
        if whole:
            yield self._whole(whole)

    def _take(self, picture: np.ndarray, told) -> None:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"a picture of {picture.dtype} {picture.shape}; uint8 [H, W, 3] is needed")
        if self.shape is not None and picture.shape != self.shape:
            raise ValueError(
                f"a picture of {picture.shape[:2]} after pictures of {self.shape[:2]}; resize it, or make a new stream"
            )
        if told is None:
            time = 0.0 if self._last is None else self._last + 1 / self.fps
        else:
            time = next(told, None)
            if time is None:
                raise ValueError("fewer times than pictures; give one for each")
            time = float(time)
        if not np.isfinite(time) or (self._last is not None and time <= self._last):
            raise ValueError(f"a picture at {time} s after one at {self._last} s; times have to ascend")
        self.shape, self._last = picture.shape, time
        self._waiting.append(picture)
        self._times.append(time)

    def _whole(self, count: int) -> tuple[np.ndarray, list[float]]:
        batch, times = np.stack(self._waiting[:count]), self._times[: count : self.per_frame]
        del self._waiting[:count], self._times[:count]
        return batch, times


def _each(pictures) -> Iterator[np.ndarray]:
    """Single pictures of whatever was given."""
    if isinstance(pictures, (str, bytes)):
        raise ValueError("watch takes pictures, not a path; read a file with mmkv.open_video")
    if hasattr(pictures, "ndim") or hasattr(pictures, "dim"):
        array = np.asarray(pictures)
        yield from (array if array.ndim == 4 else [array])
        return
    if not isinstance(pictures, Iterable):
        raise ValueError(f"{type(pictures).__name__} holds no pictures; give uint8 arrays [H, W, 3]")
    for part in pictures:
        yield from _each(part)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`; when the items end with an error, those before it come first."""
    batch: list[T] = []
    each = iter(items)
    while True:
        try:
            batch.append(next(each))
        except StopIteration:
            break
        except Exception:
            if batch:
                yield batch
            raise
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
