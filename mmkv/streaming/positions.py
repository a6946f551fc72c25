"""Positions inside a window: contiguous, so that they stay small however long the stream is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Positions:
    """Position ids of an initial prompt, then frames, then text: `[A, T]`, counted from the first token there is.

    With one axis tokens count 0, 1, 2 ... With three (time, height, width) a frame is `step` behind the one before it, and text
    goes on behind the largest id so far: the rule that Qwen2-VL and Qwen2.5-VL were trained with.

    Args:
        axes: 1 or 3.
        init: tokens of the initial prompt.
        grid: rows and columns of a frame.
        step: positions between frames on the time axis, may be a fraction.
    """

    axes: int
    init: int
    grid: tuple[int, int]
    step: float = 1.0

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    def prompt(self) -> torch.Tensor:
        """Of the initial prompt."""
        return torch.arange(self.init).expand(self.axes, -1)

    def frames(self, count: int, first: int = 0) -> torch.Tensor:
        """Of `count` frames, the first of which is number `first` behind the prompt."""
        if self.axes == 1:
            start = self.init + first * self.per_frame
            return torch.arange(start, start + count * self.per_frame)[None]
        time = (torch.arange(first, first + count, dtype=torch.float64) * self.step).long()
        cells = torch.cartesian_prod(time, torch.arange(self.grid[0]), torch.arange(self.grid[1]))
        return cells.view(-1, 3).T + self.init

    def text(self, frames: int, count: int, before: int = 0) -> torch.Tensor:
        """Of `count` text tokens behind that many frames and `before` text tokens."""
        start = self.init
        if frames:
            start = int(self.frames(1, frames - 1).max()) + 1
            start = max(start, self.init + max(self.grid)) if self.axes > 1 else start
        return torch.arange(start + before, start + before + count).expand(self.axes, -1)
