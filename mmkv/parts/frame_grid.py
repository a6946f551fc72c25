"""`FrameGrid`: where vision tokens stand in their frames, for scores that compare or average places over time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.layout import TokenLayout


@dataclass(frozen=True)
class FrameGrid:
    """Frame, row and column of tokens that may be a selection, another one in each head.

    Args:
        on: bool `[R, n]`, tokens that lie on a frame's grid; R is 1, or KV heads where they hold different tokens.
        age: int64 `[R, n]`, how many frames back a token's frame is, 0 for the newest; of all frames that any head holds.
        row, col: int64 `[R, n]`; 0 for tokens on no grid.
        sizes: frames, rows and columns there are.
    """

    on: torch.Tensor
    age: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, layout: TokenLayout, present: torch.Tensor, device) -> FrameGrid:
        """Of the tokens of a layout `[R, n]`, of which bool `[n]` or `[R, n]` are there; on a device."""
        on = layout.visual & (layout.row >= 0) & present
        frame = (layout.medium.long() << 32) + layout.frame.long()
        known, number = frame[on].unique(return_inverse=True)  # ascending: media and frames in the order they came
        age = torch.zeros_like(frame)
        age[on] = len(known) - 1 - number
        row, col = (x.long().masked_fill(~on, 0) for x in (layout.row, layout.col))
        sizes = (max(len(known), 1), int(row.max()) + 1, int(col.max()) + 1) if on.numel() else (1, 1, 1)
        return cls(on.to(device), age.to(device), row.to(device), col.to(device), sizes)

    def frames_worth(self) -> float:
        """How many whole frames the tokens on the grid would fill, mean over the heads."""
        return float(self.on.sum()) / len(self.on) / (self.sizes[1] * self.sizes[2])

    def mean_of_place(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """`[H, n, D]`: for each token the mean of x fp32 `[H, n, D]` over the chosen tokens bool `[R, n]` of its head at its
        row and column; zeros where none is chosen there."""
        heads, dim = x.shape[0], x.shape[2]
        place = (self.row * self.sizes[2] + self.col).expand(heads, -1)
        weight = chosen.expand(heads, -1).to(x.dtype)
        total = x.new_zeros(heads, self.sizes[1] * self.sizes[2], dim)
        total.scatter_add_(1, place[..., None].expand(-1, -1, dim), x * weight[..., None])
        count = weight.new_zeros(total.shape[:2]).scatter_add_(1, place, weight)
        mean = total / count.clamp(min=1)[..., None]
        return mean.gather(1, place[..., None].expand(-1, -1, dim))

    def averaged(self, x: torch.Tensor, kernel: tuple[int, int, int]) -> torch.Tensor:
        """x fp32 `[H, n]` averaged over the tokens within a kernel of odd (frames, rows, columns); tokens on no grid stay."""
        heads = len(x)
        place = ((self.age * self.sizes[1] + self.row) * self.sizes[2] + self.col).expand(heads, -1)
        weight = self.on.expand(heads, -1).to(x.dtype)
        both = x.new_zeros(2, heads, self.sizes[0] * self.sizes[1] * self.sizes[2])
        both[0].scatter_add_(1, place, x * weight)
        both[1].scatter_add_(1, place, weight)
        around = [
            k // 2 for k in reversed(kernel) for _ in range(2)
        ]  # padded here: the pool itself takes no grid below its size
        padded = torch.nn.functional.pad(both.unflatten(2, self.sizes), around)
        pooled = torch.nn.functional.avg_pool3d(padded, kernel, stride=1)
        mean = (pooled[0] / pooled[1].clamp(min=1e-12)).flatten(1).gather(1, place)
        return torch.where(self.on, mean, x)
