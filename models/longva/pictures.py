"""Images and videos to pixels for CLIP: shortest edge to 336 pixels, bicubic, then the centre square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from mmkv.models.longva.configuration import LongVAConfig
from mmkv.models.longva.unires import TILE, tiles_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def frame_indices(total: int, count: int) -> list[int]:
    """Which of `total` frames are read: `count`, evenly spaced and rounded down, the first and the last included.

    Raises:
        ValueError: a count below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_frames={count!r}; possible are whole numbers from 1")
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def clip_pixels(images: Sequence[Image.Image], size: int = TILE) -> torch.Tensor:
    """fp32 `[n, 3, size, size]`, normalised; the sides of what is not square are cut off, as in the public code."""
    pixels = np.stack([np.asarray(_square(image.convert("RGB"), size)) for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def opened(picture) -> Image.Image:
    """A picture as PIL has it.

    Args:
        picture: a `PIL.Image`, or uint8 `[H, W, 3]` or `[3, H, W]`, numpy or torch.

    Raises:
        TypeError: something else.
        ValueError: an array of another shape or dtype.
    """
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray | torch.Tensor):
        raise TypeError(f"a picture is a PIL image or an array, not {type(picture).__name__}; open files first")
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"a picture of {array.dtype} {list(array.shape)}; possible are uint8 [H, W, 3] and [3, H, W]")
    return Image.fromarray(np.ascontiguousarray(array))


class LongVAImages:
    """Images to UniRes tiles.

    Args:
        config: of the model.
    """

    def __init__(self, config: LongVAConfig):
        self.size, self.pinpoints = config.vision_config.image_size, config.image_grid_pinpoints

    def __call__(self, images: Sequence, return_tensors: str | None = None) -> BatchFeature:
        """`pixel_values` fp32 `[sum of tiles, 3, S, S]` and `image_tiles` int64 `[images]`."""
        tiles = [tiles_of(opened(image), self.pinpoints, self.size) for image in images]
        pixels = clip_pixels([tile for some in tiles for tile in some], self.size)
        return BatchFeature(dict(pixel_values=pixels, image_tiles=torch.tensor([len(some) for some in tiles])))

    def to_dict(self) -> dict[str, Any]:
        """What its pixels depend on."""
        return dict(size=self.size, pinpoints=[list(p) for p in self.pinpoints], mean=MEAN, std=STD)


class LongVAVideos:
    """Frames of videos to squares for CLIP.

    Args:
        config: of the model.
    """

    def __init__(self, config: LongVAConfig):
        self.size = config.vision_config.image_size

    def __call__(self, videos, do_sample_frames=False, num_frames=32, return_tensors=None) -> BatchFeature:
        """`pixel_values_videos` fp32 `[sum of frames, 3, S, S]` and `video_frames` int64 `[videos]`.

        Args:
            videos: each a list of pictures, or uint8 `[T, H, W, 3]` or `[T, 3, H, W]`.
            do_sample_frames: take `num_frames` of each, evenly spaced, first and last included; else all.
            num_frames: how many.
            return_tensors: tensors are returned in any case.

        Raises:
            ValueError: a video without frames.
        """
        if any(len(video) == 0 for video in videos):
            raise ValueError("a video without frames")
        if do_sample_frames:
            videos = [[video[i] for i in frame_indices(len(video), num_frames)] for video in videos]
        frames = [opened(frame) for video in videos for frame in video]
        counts = torch.tensor([len(video) for video in videos])
        return BatchFeature(dict(pixel_values_videos=clip_pixels(frames, self.size), video_frames=counts))

    def to_dict(self) -> dict[str, Any]:
        """What its pixels depend on."""
        return dict(size=self.size, crop="centre", mean=MEAN, std=STD)
