"""`StaticTail`: a layer's dense tail in buffers of fixed capacity, its lengths counted on the device."""

from __future__ import annotations

import torch

from mmkv.kernels import attend_ragged


class StaticTail:
    """Keys `[B, Hkv, N, D]` and values `[B, Hkv, N, Dv]`, each row's tokens at its beginning, behind them room for more.

    Args:
        keys, values: `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`, a layer's tail.
        columns: int64 `[n_b]` by batch element, which of the T tokens it holds, ascending.
        capacity: N, tokens that a row may come to hold.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: list[torch.Tensor], capacity: int):
        batch, heads, _, d = keys.shape
        self.capacity = capacity
        self.keys = keys.new_zeros(batch, heads, capacity, d)
        self.values = values.new_zeros(batch, heads, capacity, values.shape[-1])
        for row, at in enumerate(columns):
            at = at.to(keys.device)
            self.keys[row, :, : len(at)] = keys[row].index_select(1, at)
            self.values[row, :, : len(at)] = values[row].index_select(1, at)
        held = torch.tensor([len(at) for at in columns], dtype=torch.int32).repeat_interleave(heads)
        self.counts = held.to(keys.device)  # int32 [B * Hkv]
        self.first = torch.arange(batch * heads, device=keys.device) * capacity  # int64 [B * Hkv], where a row begins

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add one token to each row: `[B, Hkv, 1, D]`, `[B, Hkv, 1, Dv]`."""
        at = self.first + self.counts
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, at, new.reshape(-1, new.shape[-1]))
        self.counts += 1

    def attend(self, q: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the newest token's queries `[B, Hq, 1, D]` over all that is held; options as `attend_ragged` has them."""
        return attend_ragged(
            q, self.keys.view(-1, self.keys.shape[-1]), self.values.view(-1, self.values.shape[-1]), self.first,
            counts=self.counts, longest=self.capacity, **options,
        )  # fmt: skip

    def drop(self, count: int, due: torch.Tensor) -> None:
        """Let go of the oldest `count` tokens of the rows that are `due`, bool `[B * Hkv]`; what is behind moves up."""
        here = due.view(self.keys.shape[0], -1, 1, 1)
        for buffer in (self.keys, self.values):
            buffer.copy_(torch.where(here, buffer.roll(-count, 2), buffer))
        self.counts -= due.to(torch.int32) * count

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor it holds."""
        return [self.keys, self.values, self.counts, self.first]
