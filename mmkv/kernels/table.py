"""Which blocks a row (one KV head of one batch element) attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """R = B * Hkv rows (batch-major) of S slots. Rows may share blocks (beams); unused slots may lie anywhere.

    Args:
        block: int32 [R, S], block id, valid in both the key and the value pool.
        count: int32 [R, S], valid tokens of that slot, a prefix of the block; 0 = unused slot.
        start: int32 [R, S], logical position of the slot's first token; a block's tokens are consecutive.
        positions: int32 [NB, group], logical positions per token, which then override `start`.
    """

    block: Tensor
    count: Tensor
    start: Tensor
    positions: Tensor | None = None

    def __post_init__(self):
        if self.block.dim() != 2 or not self.block.shape == self.count.shape == self.start.shape:
            shapes = [tuple(t.shape) for t in (self.block, self.count, self.start)]
            raise ValueError(f"block, count and start must all be [rows, slots], got {shapes}")
        for name in ("block", "count", "start", "positions"):
            t = getattr(self, name)
            if t is not None and t.dtype != torch.int32:
                raise TypeError(f"table.{name} must be int32, not {t.dtype}")

    @property
    def rows(self) -> int:
        return self.block.shape[0]

    @property
    def slots(self) -> int:
        return self.block.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.block, self.count, self.start, self.positions) if t is not None)

    def select(self, rows: Tensor) -> Table:
        """The given rows (int [n]), in that order; repeats share blocks."""
        rows = rows.to(self.block.device)
        return Table(self.block[rows], self.count[rows], self.start[rows], self.positions)

    def to(self, device: torch.device | str) -> Table:
        move = [None if t is None else t.to(device) for t in (self.block, self.count, self.start, self.positions)]
        return Table(*move)
