"""Which maps an image is made of, by aspect ratio and size (spec: FoundationVision/Infinity, dynamic resolution table)."""

from __future__ import annotations

from dataclasses import dataclass

PIXELS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # how many scales of the table an image of that size has


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(map(int, size.split("x"))) for size in text.split())


_TALL = {
    1.0: _sizes("1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64"),
    1.25: _sizes("1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56"),
    1.333: _sizes("1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54"),
    1.5: _sizes("1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52"),
    1.75: _sizes("1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48"),
    2.0: _sizes("1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45"),
    2.5: _sizes("1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40"),
    3.0: _sizes("1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37"),
}


def _both_ways() -> dict[float, tuple[tuple[int, int], ...]]:
    """Rows of the table by height over width, wide ones as the tall ones turned; 1 / 1.333 is called 0.75."""
    table = dict(_TALL)
    for ratio, sizes in _TALL.items():
        if ratio != 1:
            table[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in sizes)
    return dict(sorted(table.items()))


SCALES = _both_ways()


@dataclass(frozen=True)
class Schedule:
    """The maps that an image is made of, from 1 x 1 to the last.

    Args:
        sizes: (rows, columns) of tokens of each scale.
        extent: (rows, columns) of the finest map of the table; the rotary embedding counts places on it, whatever the size.
    """

    sizes: tuple[tuple[int, int], ...]
    extent: tuple[int, int]

    def __post_init__(self):
        numbers = [number for size in (*self.sizes, self.extent) for number in size]
        if not self.sizes or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"{self!r}: needed are rows and columns, whole numbers from 1, for at least one scale")

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each scale has."""
        return tuple(rows * columns for rows, columns in self.sizes)

    @property
    def finest(self) -> tuple[int, int]:
        """(rows, columns) of the last scale."""
        return self.sizes[-1]

    def doubled(self) -> Schedule:
        """Twice the rows and columns: what the autoencoder sees where each token is a patch of 2 x 2."""
        return Schedule(tuple((2 * h, 2 * w) for h, w in self.sizes), tuple(2 * n for n in self.extent))


def scale_schedule(ratio: float = 1.0, pixels: str = "1M") -> Schedule:
    """The maps of an image of this shape and size.

    Args:
        ratio: height over width, one of `SCALES` (0.333 to 3.0).
        pixels: "0.06M" (256 x 256 and alike), "0.25M" (512), "0.60M" (768) or "1M" (1024).

    Raises:
        ValueError: another ratio or size.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio not in SCALES:
        raise ValueError(f"ratio {ratio!r}: possible are {', '.join(map(str, SCALES))} (height over width)")
    if not isinstance(pixels, str) or pixels not in PIXELS:
        raise ValueError(f"pixels {pixels!r}: possible are {', '.join(map(repr, PIXELS))}")
    return Schedule(SCALES[ratio][: PIXELS[pixels]], SCALES[ratio][-1])
