"""Frames and their times from a video file, in bounded memory.

`open_video` first walks the file's packets with PyAV without decoding them: that finds broken files cheaply and gives
the exact time of every frame, variable frame rates included. Frames are then decoded by decord where it can read the
file, else by PyAV; `Video.reader` says which one it was.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Frame", "Video", "VideoError", "open_video", "readers"]


class VideoError(ValueError):
    """The file cannot be used as a video; the message is one line and names the file and the reason."""


@dataclass(frozen=True)
class Frame:
    """One decoded frame.

    Attributes:
        image: uint8 array `[height, width, 3]`, RGB, turned upright as the file's rotation mark asks.
        timestamp: seconds from the start of the file at which the frame is first shown.
        index: which frame of the file it is, counted from 0 in the order of display.
    """

    image: np.ndarray
    timestamp: float
    index: int


@dataclass(frozen=True)
class _Index:
    """What the packets tell: display-ordered ticks and seconds, key frame ticks, and sizes of time."""

    stream: int
    ticks: list[int] | None  # presentation times in the stream's time base; None where the file has none
    seconds: list[float]
    keys: list[int]  # presentation times of key frames, ascending
    fps: float
    duration: float


def decord_module() -> Any:
    """decord, imported behind torch.

    Its wheel brings a library that takes over all matrix products of the process, and crashes where there is no GPU, unless
    torch's own is there first.

    Raises:
        ImportError, OSError: not installed, or a shared library of the wheel does not load here.
    """
    import torch  # noqa: F401

    return __import__("decord")


def readers() -> dict[str, str | None]:
    """Installed readers and their versions (None: not installed), in the order in which they are tried."""
    found: dict[str, str | None] = {"decord": None, "pyav": None}
    for name, module in (("decord", decord_module), ("pyav", lambda: __import__("av"))):
        try:
            found[name] = str(module().__version__)
        except (ImportError, OSError):
            continue
    return found


def open_video(path: str | os.PathLike[str], fps: float | None = None, frames: int | None = None) -> Video:
    """Open a video file; the result is iterated for `Frame`s, as often as needed.

    Args:
        path: the file.
        fps: frames a second to yield: at times k / fps from the first frame on, the frame that is on show at that time.
            Where the file holds one frame for longer than 1 / fps it is yielded again, so that what is yielded stays
            evenly spaced in time. None yields every frame.
        frames: how many frames to yield, evenly spaced over the file's, first and last included (one: the middle).

    Raises:
        FileNotFoundError: no such file.
        VideoError: not a readable video: a directory, empty, truncated, damaged, no picture track, another format.
        ValueError: `fps` and `frames` both given, not positive, `frames` more than the file has, or `fps` above what
            the file has anywhere (it could only repeat frames).
    """
    if fps is not None and frames is not None:
        raise ValueError("open_video takes fps or frames, not both")
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number of frames a second, not {fps!r}")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, Integral) or frames <= 0):
        raise ValueError(f"frames must be a positive whole number, not {frames!r}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such video file: {path}")
    if path.is_dir():
        raise VideoError(f"{path} is a directory, not a video file")
    if not path.is_file():
        raise VideoError(f"{path} is not a regular file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes)")
    index = _read_index(path)
    return Video(path, index, _pick(path, index, fps, frames), fps)


class Video:
    """An open video; iterating yields the chosen `Frame`s one at a time, decoding no further ahead than it must.

    Attributes:
        path: the file.
        fps: frames a second of the file (its average, where the rate varies).
        sample_fps: frames a second of what iterating yields.
        duration: seconds from the first frame's start to the last frame's end.
        frame_count: frames in the file; `len(video)` is the number that iterating yields.
        indices: which frames are yielded; `timestamps`: their seconds.
        width, height: pixels of a yielded frame.
        reader: "decord" or "pyav", whichever decodes this file.
    """

    def __init__(self, path: Path, index: _Index, indices: list[int], fps: float | None) -> None:
        self.path = path
        self.fps = index.fps
        self.duration = index.duration
        self.frame_count = len(index.seconds)
        self.indices = indices
        self.timestamps = [index.seconds[i] for i in indices]
        span = self.timestamps[-1] - self.timestamps[0]
        if fps is not None:
            self.sample_fps = float(fps)
        else:
            self.sample_fps = (len(indices) - 1) / span if span > 0 else index.fps
        self._index = index
        self._closed = False
        self._decord = _open_decord(path, self.frame_count)
        self.reader = "pyav" if self._decord is None else "decord"
        first = next(iter(self))  # shows now, not in the middle of a run, whether the pictures can be decoded at all
        self.height, self.width = first.image.shape[:2]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Frame]:
        if self._closed:
            raise ValueError(f"{self.path} was closed")
        done = 0
        if self._decord is not None:
            for i in self.indices:
                image = _decord_frame(self._decord, i)
                if image is None:  # decord gives this file up: PyAV reads the rest, and `reader` says so
                    self._decord, self.reader = None, "pyav"
                    break
                yield Frame(image, self._index.seconds[i], i)
                done += 1
        if done < len(self.indices):
            rest = self.indices[done:]
            for i, image in zip(rest, _pyav_frames(self.path, self._index, rest)):
                yield Frame(image, self._index.seconds[i], i)

    def array(self) -> np.ndarray:
        """All chosen frames at once: uint8 `[T, height, width, 3]`, RGB (T x height x width x 3 bytes of memory)."""
        out = np.empty((len(self), self.height, self.width, 3), np.uint8)
        for t, frame in enumerate(self):
            out[t] = frame.image
        return out

    def close(self) -> None:
        """Release the reader; iterating afterwards raises ValueError."""
        self._decord = None
        self._closed = True

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Video({str(self.path)!r}, {self.width}x{self.height}, {len(self)} of {self.frame_count} frames, "
            f"{self.duration:.2f} s at {self.fps:.3g} fps, reader={self.reader!r})"
        )


# --- which frames there are ------------------------------------------------------------------------------------


def _read_index(path: Path) -> _Index:
    """Walk the packets of the picture track; raise VideoError for what is not a whole video."""
    import av

    try:
        with av.open(str(path)) as container:
            return _index_of(path, container)
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot read {path} as a video: {text} (truncated, damaged, or not a video)") from error


def _index_of(path: Path, container: Any) -> _Index:
    from av.stream import Disposition

    form = container.format.name
    if form == "tty" or form == "image2" or form.endswith("_pipe"):
        raise VideoError(f"{path} is not a video (it looks like {'text' if form == 'tty' else 'an image'})")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams if s.type})
        what = "only " + " and ".join(kinds) if kinds else "no tracks"
        raise VideoError(f"{path} has no picture track ({what})")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: its picture track uses a codec that cannot be decoded here")

    ticks: list[int | None] = []
    keys: list[int] = []
    last_length, seen = 0, 0
    for packet in container.demux(stream):
        if packet.size == 0:  # the flush packet at the end
            continue
        seen += 1
        if packet.is_corrupt:
            raise VideoError(f"{path} is truncated or damaged after {seen - 1} frames")
        if packet.is_discard:  # cut away by the file's edit list
            continue
        ticks.append(packet.pts)
        last_length = packet.duration or last_length
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if not ticks:
        raise VideoError(f"{path} has a picture track without frames")
    if "mp4" in form and stream.frames > seen:
        raise VideoError(f"{path} is truncated: it holds {seen} of {stream.frames} frames")

    rate = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
    known = sorted(t for t in ticks if t is not None)
    if len(known) < len(ticks):  # raw streams: no times at all, so frames follow each other at the nominal rate
        return _Index(stream.index, None, [i / rate for i in range(len(ticks))], [], rate, len(ticks) / rate)
    base = stream.time_base
    offset = max(container.start_time or 0, 0) / 1_000_000  # players start the clock here
    # Offsets are rare: without one a time is the exact quotient, rounded once.
    seconds = [float(t * base) - offset if offset else float(t * base) for t in known]
    end = seconds[-1] + float((last_length or (known[-1] - known[-2] if len(known) > 1 else 0)) * base)
    promised = _seconds(stream.metadata.get("DURATION"))  # Matroska and WebM write it per track
    duration = end - seconds[0]
    if duration <= 0:
        duration = len(seconds) / rate
    if promised is not None and promised - end > max(1.0, 2 * duration / len(seconds)):
        raise VideoError(f"{path} is truncated: it holds {end:.1f} of {promised:.1f} seconds")
    return _Index(stream.index, known, seconds, sorted(keys), len(seconds) / duration, duration)


def _seconds(clock: str | None) -> float | None:
    """Seconds of an `h:mm:ss.fff` tag, None where there is none."""
    try:
        hours, minutes, rest = (clock or "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(rest)
    except ValueError:
        return None


def _pick(path: Path, index: _Index, fps: float | None, frames: int | None) -> list[int]:
    """Indices of the frames to yield; ascending, repeated only where `fps` meets a frame that is held."""
    count, seconds = len(index.seconds), index.seconds
    if frames is not None:
        if frames > count:
            raise ValueError(f"{frames} frames asked of {path}, which has {count}")
        return [count // 2] if frames == 1 else [int(i) for i in np.linspace(0, count - 1, frames).round()]
    if fps is None:
        return list(range(count))
    gaps = [b - a for a, b in zip(seconds, seconds[1:]) if b > a]
    highest = max(index.fps, 1 / min(gaps)) if gaps else index.fps
    if fps > highest * 1.01:  # a hundredth for rates such as 29.97 and for times in whole milliseconds
        raise ValueError(f"{fps:g} frames a second asked of {path}, which has {highest:.4g}: frames would only repeat")
    steps = max(1, math.ceil(index.duration * fps - 1e-6))
    slack = 1e-6 + 1e-3 / fps
    return [max(0, bisect_right(seconds, seconds[0] + k / fps + slack) - 1) for k in range(steps)]


# --- decoding ---------------------------------------------------------------------------------------------


def _open_decord(path: Path, count: int) -> Any:
    """decord's reader, or None where decord is missing, cannot open this file, or counts its frames differently."""
    try:
        decord = decord_module()
    except (ImportError, OSError):
        return None
    try:
        # fault_tol: raise on frames that cannot be decoded; by default decord repeats a neighbour without a word.
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), fault_tol=1e-6)
    except Exception:  # its own error class derives from Exception alone
        return None
    return reader if len(reader) == count else None


def _decord_frame(reader: Any, index: int) -> np.ndarray | None:
    """One frame `[H, W, 3]`, or None: the caller goes on with PyAV, which raises with a reason if it cannot either."""
    try:
        image = reader[index].asnumpy()
    except Exception:
        return None
    # For some widths of turned videos decord2 3.4 takes its padded rows for pixels of four bytes.
    return image if image.ndim == 3 and image.shape[2] == 3 else None


def _decode_in_this_thread(stream: Any) -> None:
    """No decoder threads: older torchvision turns on PyAV's logging, which calls Python from them, and freeing the decoder of
    a damaged file then waits for a thread that waits for Python, for ever."""
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1


def _pyav_frames(path: Path, index: _Index, wanted: list[int]) -> Iterator[np.ndarray]:
    """Images of the `wanted` frames (ascending, may repeat); seeks over whole groups of pictures it does not need."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams[index.stream]
            _decode_in_this_thread(stream)
            decoded = container.decode(stream)
            frame, at, size = None, -1, None
            for i in wanted:
                if index.ticks is not None and i > at + 1:
                    here = index.ticks[at] if at >= 0 else None
                    before = bisect_right(index.keys, index.ticks[i]) - 1
                    if before >= 0 and (here is None or index.keys[before] > here):
                        container.seek(index.keys[before], stream=stream)
                        decoded = container.decode(stream)
                while at < i:
                    frame = next(decoded, None)
                    if frame is None:
                        raise VideoError(f"{path} is truncated or damaged: frame {i} cannot be decoded")
                    at = at + 1 if index.ticks is None else _position(index.ticks, frame.pts, at)
                if at > i or frame is None:
                    raise VideoError(f"{path} is damaged: frame {i} cannot be decoded")
                size = size or (frame.width, frame.height)
                image = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                yield np.ascontiguousarray(np.rot90(image, round(getattr(frame, "rotation", 0) / 90)))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}") from error


def _position(ticks: list[int], pts: int | None, at: int) -> int:
    """Which frame of the index a decoded frame is; frames that the edit list cuts away keep the position before."""
    if pts is None:
        return at + 1
    found = bisect_right(ticks, pts) - 1
    return found if found >= 0 and ticks[found] == pts else at
