"""A dense segment: tokens of one layer kept as they are, apart from the tail (attention sinks, survivors of an eviction)."""

from __future__ import annotations

from itertools import accumulate

import torch

from mmkv.cache.method import DENSE
from mmkv.kernels import attend_ragged


class DenseSegment:
    """Keys `[N, D]` and values `[N, Dv]` in the model's dtype, flat over tokens: those of batch element 0, KV head 0, then
    those of its head 1, and so on, never padded. `lengths` says how many each (batch element, KV head) has.

    The same calls as `PackedSegment`.

    Args:
        batch, heads: B and Hkv.
        role: `DENSE` for tokens that stay as they are; the index of a format for those that wait until they fill a block.
    """

    def __init__(self, batch: int, heads: int, role: int = DENSE):
        self.heads, self.role = heads, role
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions = torch.zeros(0, dtype=torch.int32)  # [N], logical, on the CPU; ascending within a row
        self.lengths = [0] * (batch * heads)
        self._placed: torch.Tensor | None = None  # the positions where the queries are, made for sliding windows
        self._rows: torch.Tensor | None = None  # int64 [2, B * Hkv] there: each row's first token, and how many it has

    def append(self, row: int, keys, values, columns, mask=None) -> None:
        """Add tokens of batch element `row` behind those it has.

        Args:
            keys, values: `[Hkv, n, D]`.
            columns: int64 `[n]` or `[Hkv, n]` on the CPU, their logical positions.
            mask: bool `[Hkv, n]`, the tokens that each head keeps; None for all.
        """
        n = keys.shape[1]
        columns = columns.expand(self.heads, n)
        if mask is None:
            mask = torch.ones(self.heads, n, dtype=torch.bool)
        if self.keys is None:
            self.keys, self.values = keys.new_zeros(0, keys.shape[-1]), values.new_zeros(0, values.shape[-1])
        counts = mask.sum(1).tolist()
        place, mask = mask.to(keys.device), mask.cpu()
        new = (keys[place], values[place], columns[mask].to(torch.int32))
        self.keys, self.values, self.positions = (
            _insert(old, more, self.offsets, row * self.heads, counts)
            for old, more in zip((self.keys, self.values, self.positions), new)
        )
        for head, count in enumerate(counts):
            self.lengths[row * self.heads + head] += count
        self._placed = self._rows = None

    @property
    def offsets(self) -> list[int]:
        """Where each (batch element, KV head) begins, and the end."""
        return [0, *accumulate(self.lengths)]

    @property
    def tokens(self) -> list[float]:
        """Tokens that each batch element holds, averaged over its heads."""
        return [sum(self.lengths[i : i + self.heads]) / self.heads for i in range(0, len(self.lengths), self.heads)]

    def attend(
        self, q, *, scale, softcap=None, q_positions=None, window=None, merged=True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PackedSegment.attend`."""
        if window is not None and (self._placed is None or self._placed.device != q.device):
            self._placed = self.positions.to(q.device)
        if self._rows is None or self._rows.device != q.device:
            self._rows = torch.tensor([self.offsets[:-1], self.lengths], device=q.device)
        return attend_ragged(
            q, self.keys, self.values, self._rows[0], counts=self._rows[1], longest=max(self.lengths), scale=scale,
            softcap=softcap, positions=self._placed if window is not None else None, q_positions=q_positions,
            window=window, merged=merged,
        )  # fmt: skip

    def of(self, row: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """All tokens of a batch element: per KV head keys `[n, D]`, values `[n, Dv]`, positions int32 `[n]`."""
        offsets, first = self.offsets, row * self.heads
        at = [slice(offsets[r], offsets[r + 1]) for r in range(first, first + self.heads)]
        return [self.keys[s] for s in at], [self.values[s] for s in at], [self.positions[s] for s in at]

    def padded(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same as one tensor each: keys `[Hkv, m, D]`, values `[Hkv, m, Dv]`, positions int64 `[Hkv, m]` on the CPU; heads
        that hold fewer have places with position -1.
        """
        keys, values, positions = self.of(row)
        return _padded(keys), _padded(values), _padded(positions, -1).long()

    def take(self, row: int) -> None:
        """Let go of all tokens of a batch element."""
        offsets, first = self.offsets, row * self.heads
        keep = torch.ones(self.positions.shape[0], dtype=torch.bool)
        keep[offsets[first] : offsets[first + self.heads]] = False
        self.keep(keep)

    def crop(self, length: int) -> None:
        """Drop the tokens at logical positions >= length."""
        self.keep(self.positions < length)

    def drop_before(self, position: int) -> None:
        """Drop the tokens before a logical position (sliding windows)."""
        self.keep(self.positions >= position)

    def keep(self, mask: torch.Tensor) -> None:
        """Keep the tokens of a bool `[N]` on the CPU, and free the others."""
        if bool(mask.all()):
            return
        offsets = self.offsets
        self.lengths = [int(mask[a:b].sum()) for a, b in zip(offsets, offsets[1:])]
        self._index(mask.nonzero()[:, 0])

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements."""
        offsets = self.offsets
        rows = [r * self.heads + head for r in index.tolist() for head in range(self.heads)]
        parts = [torch.arange(offsets[r], offsets[r + 1]) for r in rows]
        self.lengths = [self.lengths[r] for r in rows]
        self._index(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64))

    def _index(self, at: torch.Tensor) -> None:
        self._placed = self._rows = None
        self.positions = self.positions[at]
        if self.keys is not None:
            at = at.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)

    @property
    def empty(self) -> bool:
        return not any(self.lengths)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this segment holds."""
        held = [] if self.keys is None else [self.keys, self.values, self.positions]
        return held + [t for t in (self._placed, self._rows) if t is not None]


def _insert(old: torch.Tensor, new: torch.Tensor, offsets: list[int], first: int, counts: list[int]) -> torch.Tensor:
    """Rows `[N, ...]` with `counts[i]` new ones put behind row `first + i`."""
    pieces, at, taken = [], 0, 0
    for i, count in enumerate(counts):
        end = offsets[first + i + 1]
        pieces += [old[at:end], new[taken : taken + count]]
        at, taken = end, taken + count
    return torch.cat([*pieces, old[at:]])


def _padded(parts: list[torch.Tensor], value: int = 0) -> torch.Tensor:
    """Rows `[n_i, ...]` of different lengths as one tensor `[H, max n, ...]`."""
    most = max(len(p) for p in parts)
    pads = [(0, 0) * (p.dim() - 1) + (0, most - len(p)) for p in parts]
    return torch.stack([torch.nn.functional.pad(p, pad, value=value) for p, pad in zip(parts, pads)])
