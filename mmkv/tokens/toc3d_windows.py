"""A grid of tokens cut into attention windows without pads or masks: windows of one size lie in one region."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Region:
    """A part of a grid that is cut into equal windows of `height` x `width` tokens; a grid has at most four."""

    rows: slice
    cols: slice
    height: int
    width: int

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, ...]` -> `[B * windows, height * width, ...]`."""
        x = x[:, self.rows, self.cols]
        batch, high, wide, *rest = x.shape
        x = x.reshape(batch, high // self.height, self.height, wide // self.width, self.width, *rest)
        return x.transpose(2, 3).reshape(-1, self.height * self.width, *rest)

    def join(self, windows: torch.Tensor, batch: int) -> torch.Tensor:
        """The inverse of `cut`, of this region alone: `[B, rows, cols, ...]`."""
        high, wide = self.rows.stop - self.rows.start, self.cols.stop - self.cols.start
        down, along, rest = high // self.height, wide // self.width, windows.shape[2:]
        x = windows.reshape(batch, down, along, self.height, self.width, *rest).transpose(2, 3)
        return x.reshape(batch, high, wide, *rest)

    def places(self, window: int, device=None) -> torch.Tensor:
        """int64 `[height * width]`: the tokens' indices in a whole window of `window` x `window`."""
        rows = torch.arange(self.height, device=device)[:, None] * window
        return (rows + torch.arange(self.width, device=device)).flatten()

    def all_places(self, x: torch.Tensor, window: int) -> torch.Tensor:
        """`places`, for each row that `cut` makes of a grid `[B, H, W, ...]`: `[B * windows, height * width]`."""
        places = self.places(window, x.device)
        area = (self.rows.stop - self.rows.start) * (self.cols.stop - self.cols.start)
        return places.expand(x.shape[0] * area // len(places), -1)


def regions(height: int, width: int, window: int) -> Iterator[Region]:
    """A grid's windows by size, from the top left: so that none needs a pad or a mask, whatever the grid."""
    down, right = height // window * window, width // window * window
    for rows, high in ((slice(0, down), window), (slice(down, height), height - down)):
        for cols, wide in ((slice(0, right), window), (slice(right, width), width - right)):
            if rows.start < rows.stop and cols.start < cols.stop:
                yield Region(rows, cols, high, wide)


def lay_out(parts: list[tuple[Region, torch.Tensor]], batch: int) -> torch.Tensor:
    """The windows of all regions back on their grid: `[B, H, W, ...]`."""
    rows: dict[int, list[torch.Tensor]] = {}
    for region, windows in parts:
        rows.setdefault(region.rows.start, []).append(region.join(windows, batch))
    return torch.cat([torch.cat(row, 2) for row in rows.values()], 1)
