"""Videos that strangers send: which are opened at all, and pictures of them at a steady rate and a bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmkv.demos.page.options import Limits
from mmkv.video import Video, VideoError, open_video

TYPES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")
MOST_PIXELS = 4096 * 2304


def check(path: Path, name: str, limits: Limits) -> None:
    """Refuse what is no film by its first bytes, before any decoder sees it.

    FFmpeg takes a playlist for a video whatever its name is, and then reads files and addresses that it lists.

    Raises:
        ValueError: too large, or not one of the containers that `TYPES` stand for; names the file as its user does.
    """
    size = path.stat().st_size
    if size > limits.megabytes * 2**20:
        raise ValueError(f"{name} has {size / 2**20:.0f} MB; this page takes up to {limits.megabytes} MB")
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    with path.open("rb") as file:
        head = file.read(12)
    mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    matroska = head[:4] == b"\x1a\x45\xdf\xa3"
    avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    if not (mp4 or matroska or avi):
        raise ValueError(f"{name} is not a video that this page takes; possible are MP4, MOV, WebM, MKV and AVI")


def open_upload(path: Path, name: str, limits: Limits) -> Video:
    """Open a video at the page's rate, or at its own where that is lower.

    Raises:
        ValueError: broken, too long, too large; one line, names the file as its user does, never a path of this machine.
    """
    check(path, name, limits)
    try:
        video = open_video(path)
        if video.duration > limits.minutes * 60:
            raise ValueError(
                f"{name} lasts {video.duration / 60:.1f} min; this page takes up to {limits.minutes:g} min"
            )
        if video.width * video.height > MOST_PIXELS:
            raise ValueError(f"{name} has {video.width}x{video.height} pixels; this page takes up to 4096x2304")
        if video.fps > limits.fps * 1.01:
            video.close()
            video = open_video(path, fps=limits.fps)
        return video
    except (ValueError, OSError) as error:
        raise ValueError(named(error, path, name)) from error


def named(error: BaseException, path: Path, name: str) -> str:
    """An error's first line, with the user's name of a file in place of its path."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].replace(str(path), name)


def pictures(video: Video, side: int, name: str) -> Iterator[tuple[np.ndarray, float]]:
    """Pictures uint8 `[H, W, 3]` and their seconds, ascending: where the file holds a picture, it is shown again later.

    Raises:
        ValueError: the file is damaged from here on; names it as its user does.
    """
    index, last = -1, float("-inf")
    try:
        for frame in video:
            time = last + 1 / video.sample_fps if frame.index == index else frame.timestamp
            if time > last:
                index, last = frame.index, time
                yield shrink(frame.image, side), time
    except VideoError as error:
        raise ValueError(named(error, video.path, name)) from error
    finally:
        video.close()


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The same picture with a longer side of at most `side` pixels."""
    from PIL import Image

    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
