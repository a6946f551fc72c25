"""What a sample shows the model: the frames of one video, or images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clip:
    """Frames of one video, chosen and decoded.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB.
        fps: frames a second of exactly these frames.
        timestamps: seconds at which each is shown, counted from the start of the file.
        frame_count: frames in the file.
        duration: seconds of the file.
        reader: what decoded it, "decord" or "pyav".
        asked: frames that were asked for; more than there are where the video is shorter. None where a rate was.
    """

    frames: np.ndarray
    fps: float
    timestamps: Sequence[float] = ()
    frame_count: int = 0
    duration: float = 0.0
    reader: str = ""
    asked: int | None = None

    @property
    def short(self) -> bool:
        """Whether the video has fewer frames than were asked for."""
        return self.asked is not None and len(self.frames) < self.asked


@dataclass(frozen=True)
class Media:
    """Everything a sample shows, in the order in which its messages name it.

    Args:
        clip: the video, None where there is none; a prompt has one at most.
        images: uint8 `[H, W, 3]` each, RGB.
    """

    clip: Clip | None = None
    images: tuple[np.ndarray, ...] = ()


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file, upright: uint8 `[H, W, 3]`, RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such image file: {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a readable image") from error
