"""Pixels of the resized screenshot, relative coordinates, pixels of the screen: one to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmkv.agents.action import Point

MAX_ASPECT = 200  # longer side over shorter side, above which Qwen's processor refuses a picture


@dataclass(frozen=True)
class Resize:
    """How a Qwen image processor sizes a screenshot, whose pixels are the coordinates that the model writes.

    Spec: `smart_resize` of transformers' Qwen2-VL image processor. With other limits than the processor's every click is off.

    Args:
        min_pixels: least area of the resized picture, in pixels; the default is OpenCUA's and Qwen2.5-VL's.
        max_pixels: most area, in pixels.
        factor: sides are multiples of it: patch size x merge size.
    """

    min_pixels: int = 3136
    max_pixels: int = 12845056
    factor: int = 28

    def __post_init__(self):
        for name in ("min_pixels", "max_pixels", "factor"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; possible are whole numbers of pixels from 1")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}; give less")

    @classmethod
    def of(cls, processor) -> Resize:
        """The limits of a processor (or of an image processor alone).

        Raises:
            ValueError: it is not sized by an area of pixels, as Qwen's are.
        """
        images = getattr(processor, "image_processor", processor)
        size = dict(getattr(images, "size", None) or {})
        least = size.get("shortest_edge") or getattr(images, "min_pixels", None)
        most = size.get("longest_edge") or getattr(images, "max_pixels", None)
        patch, merge = getattr(images, "patch_size", None), getattr(images, "merge_size", None)
        if not (least and most and patch and merge):
            raise ValueError(
                f"{type(images).__name__} has no limits of pixels and patches; give Resize(min_pixels, max_pixels, factor)"
            )
        return cls(int(least), int(most), int(patch) * int(merge))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing.

        Raises:
            ValueError: an empty picture, or one side over 200 times the other.
        """
        check_size((width, height))
        wide, high = (round(side / self.factor) * self.factor for side in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (
                max(self.factor, math.floor(side / shrink / self.factor) * self.factor) for side in (width, height)
            )
        elif wide * high < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(side * grow / self.factor) * self.factor for side in (width, height))
        return wide, high

    def relative(self, x: float, y: float, size: tuple[int, int]) -> Point:
        """Pixels of the resized picture as relative coordinates; `size` is the original width and height."""
        wide, high = self.size(*size)
        return x / wide, y / high

    def pixels(self, point: Point, size: tuple[int, int]) -> tuple[float, float]:
        """Relative coordinates as pixels of the resized picture; `size` is the original width and height."""
        wide, high = self.size(*size)
        return point[0] * wide, point[1] * high


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError for a width and height that no processor takes."""
    width, height = size
    if type(width) is not int or type(height) is not int or width < 1 or height < 1:
        raise ValueError(f"a screenshot of {width} x {height} pixels; possible are whole numbers from 1")
    if max(size) / min(size) > MAX_ASPECT:
        raise ValueError(f"a screenshot of {width} x {height} pixels; one side is over {MAX_ASPECT} times the other")


def to_screen(point: Point, size: tuple[int, int]) -> tuple[int, int]:
    """The pixel of a screen of `size` (width, height) that holds a relative point; one outside goes to the nearest edge."""
    check_size(size)
    return tuple(min(max(math.floor(p * side), 0), side - 1) for p, side in zip(point, size))  # type: ignore[return-value]


def from_screen(pixel: tuple[int, int], size: tuple[int, int]) -> Point:
    """The middle of a pixel of a screen of `size`, relative."""
    check_size(size)
    return (pixel[0] + 0.5) / size[0], (pixel[1] + 0.5) / size[1]
