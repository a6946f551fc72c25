"""Which frames of a video a model is shown: the samplers of the public benchmarks, by frame index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkv.eval.media import Clip
from mmkv.video import Video, open_video

SAMPLERS = ("linspace", "vlmeval")


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen.

    Args:
        frames: how many, evenly spaced; a shorter video gives all it has, once each. None where `fps` is given.
        fps: frames a second; a video with fewer gives every frame. None where `frames` is given.
        sampler: of `frames`: "linspace" (LongVA, LLaVA-OneVision, lmms-eval: first and last frame included) or "vlmeval"
            (VLMEvalKit: neither of them).
        max_pixels: larger frames are shrunk to at most this area, px, before they are kept; None leaves them as they are.
        start, end: seconds between which frames are taken; end None is the end of the file.
    """

    frames: int | None = None
    fps: float | None = None
    sampler: str = "linspace"
    max_pixels: int | None = None
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.fps is None):
            raise ValueError(f"frames {self.frames} and fps {self.fps}: give one of the two")
        if self.frames is not None and (isinstance(self.frames, bool) or self.frames < 1):
            raise ValueError(f"frames {self.frames!r}: possible are whole numbers from 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps {self.fps!r}: possible are numbers above 0")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}: possible are {', '.join(SAMPLERS)}")
        if self.max_pixels is not None and self.max_pixels < 28 * 28:
            raise ValueError(f"max_pixels {self.max_pixels}: possible are areas from {28 * 28} px (28 x 28)")

    def settings(self) -> dict[str, Any]:
        """What a result says about it."""
        return dict(frames=self.frames, fps=self.fps, sampler=self.sampler, max_pixels=self.max_pixels)


def linspace(count: int, frames: int) -> list[int]:
    """`frames` indices from 0 to count - 1, first and last included, rounded down (spec: LongVA, LLaVA-OneVision)."""
    return [int(i) for i in np.linspace(0, count - 1, frames)]


def vlmeval(count: int, frames: int) -> list[int]:
    """int(i * count / (frames + 1)) for i = 1 ... frames (spec: VLMEvalKit's Video-MME)."""
    step = count / (frames + 1)
    return [int(i * step) for i in range(1, frames + 1)]


def chosen(video: Video, sampling: Sampling) -> list[int]:
    """Indices of the frames to read, ascending.

    Args:
        video: opened without a choice of its own, so that its `timestamps` are those of the whole file.

    Raises:
        ValueError: no frame lies between `start` and `end`.
    """
    end = float("inf") if sampling.end is None else sampling.end
    inside = [i for i, t in enumerate(video.timestamps) if sampling.start <= t <= end]
    if not inside:
        raise ValueError(f"{video.path} has no frame between {sampling.start:g} and {end:g} s")
    if sampling.fps is not None:
        return _at_rate([video.timestamps[i] for i in inside], inside, sampling.fps)
    count, frames = len(inside), int(sampling.frames or 0)
    if frames >= count:
        return inside
    rule = linspace if sampling.sampler == "linspace" else vlmeval
    return [inside[i] for i in rule(count, frames)]


def _at_rate(times: list[float], indices: list[int], fps: float) -> list[int]:
    """The frames on show at times k / fps from the first one on, each once."""
    marks = np.arange(times[0], times[-1] + 1e-6, 1 / fps)
    found = np.searchsorted(np.asarray(times), marks + 1e-6, side="right") - 1
    return [indices[i] for i in dict.fromkeys(found.clip(0).tolist())]


def read_clip(path: str | os.PathLike[str], sampling: Sampling) -> Clip:
    """Decode the chosen frames of a video file.

    Raises:
        FileNotFoundError, VideoError: as `mmkv.video.open_video`.
        ValueError: no frame lies in the window asked for.
    """
    with open_video(path) as video:
        indices = chosen(video, sampling)
        times = [video.timestamps[i] for i in indices]
        video.indices, video.timestamps = indices, times
        frames = np.stack([_shrunk(frame.image, sampling.max_pixels) for frame in video])
        span = times[-1] - times[0]
        fps = (len(times) - 1) / span if span > 0 else video.fps
        return Clip(frames, fps, tuple(times), video.frame_count, video.duration, video.reader, sampling.frames)


def _shrunk(image: np.ndarray, max_pixels: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    if max_pixels is None or height * width <= max_pixels:
        return image
    import cv2

    factor = (max_pixels / (height * width)) ** 0.5
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
