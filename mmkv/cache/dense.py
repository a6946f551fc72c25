"""A dense segment: a few tokens of one layer kept as they are, apart from the tail (attention sinks)."""

from __future__ import annotations

import torch

from mmkv.kernels import attend_dense

_NOWHERE = -1  # position of a place that holds no token


class DenseSegment:
    """Keys and values `[B, Hkv, n, D]` in the model's dtype, with the logical position of each token.

    The same calls as `PackedSegment`. Batch elements that hold fewer tokens than others have empty places.
    """

    def __init__(self, batch: int):
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions = torch.full((batch, 0), _NOWHERE)  # int64 [B, n], on the CPU
        self._placed: torch.Tensor | None = None  # the positions where the queries are
        self.tokens = [0] * batch

    def append(self, row: int, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
        """Add tokens `[Hkv, n, D]` of batch element `row` at the logical positions `columns` int64 `[n]`."""
        batch, n = self.positions.shape[0], columns.numel()
        if self.keys is None:
            self.keys = keys.new_zeros(batch, keys.shape[0], 0, keys.shape[-1])
            self.values = values.new_zeros(batch, values.shape[0], 0, values.shape[-1])
        missing = self.tokens[row] + n - self.positions.shape[1]
        if missing > 0:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, missing))
            self.positions = torch.nn.functional.pad(self.positions, (0, missing), value=_NOWHERE)
        at = slice(self.tokens[row], self.tokens[row] + n)
        self.keys[row, :, at], self.values[row, :, at] = keys, values
        self.positions[row, at] = columns
        self._placed = None
        self.tokens[row] += n

    def attend(self, q, *, scale, softcap=None, q_positions=None, window=None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PackedSegment.attend`."""
        if self._placed is None or self._placed.device != q.device:
            self._placed = self.positions.to(q.device)
        positions = self._placed
        mask = (positions >= 0)[:, None, None, :]
        if window is not None:
            mask = mask & (positions[:, None, None, :] > q_positions[:, None, :, None] - window)
        return attend_dense(q, self.keys, self.values, scale=scale, mask=mask, softcap=softcap)

    def crop(self, length: int) -> None:
        """Drop the tokens at logical positions >= length."""
        self._keep(self.positions < length)

    def drop_before(self, position: int) -> None:
        """Drop the tokens before a logical position (sliding windows)."""
        self._keep(self.positions >= position)

    def _keep(self, keep: torch.Tensor) -> None:
        held = keep & (self.positions >= 0)
        order = (~held).to(torch.int8).argsort(dim=1, stable=True)  # tokens in use come first in every row
        self.tokens = held.sum(1).tolist()
        width = max(self.tokens, default=0)
        self._placed = None
        self.positions = torch.where(held, self.positions, _NOWHERE).gather(1, order)[:, :width]
        if self.keys is not None:
            index = order[:, None, :width, None].to(self.keys.device)
            self.keys = self.keys.gather(2, index.expand(*self.keys.shape[:2], -1, self.keys.shape[3]))
            self.values = self.values.gather(2, index.expand(*self.values.shape[:2], -1, self.values.shape[3]))

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements."""
        self._placed = None
        self.positions, self.tokens = self.positions[index.cpu()], [self.tokens[i] for i in index.tolist()]
        if self.keys is not None:
            at = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)

    @property
    def empty(self) -> bool:
        return not any(self.tokens)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this segment holds."""
        held = [] if self.keys is None else [self.keys, self.values, self.positions]
        return held if self._placed is None else [*held, self._placed]
