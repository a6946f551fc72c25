"""`Pool`: rows of bytes in one tier, the least recently used given up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

PINNED_SLAB = 1 << 26  # bytes; a power of two, since pinned memory is handed out in such


class Pool:
    """At most `limit` rows of `size` bytes, by name (layer, frame).

    A row that `get` returns stays what it is until the next `put`: copy it before.
    Rows lie in slabs. Pageable and device slabs are as large as what they were made for, pinned ones 64 MiB.

    Args:
        size: bytes per row.
        limit: most rows.
        device: where they lie.
        pinned: page-locked, for copies to a GPU.
    """

    def __init__(self, size: int, limit: int, device: torch.device, pinned: bool = False):
        self.size, self.limit, self.device, self.pinned = size, limit, device, pinned
        self.slabs: list[Tensor] = []
        self._free: list[Tensor] = []
        self._held: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._made = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: tuple[int, int]) -> Tensor | None:
        """The row uint8 `[size]`, now the most recently used; None where it is not held."""
        row = self._held.get(name)
        if row is not None:
            self._held.move_to_end(name)
        return row

    def has(self, name: tuple[int, int]) -> bool:
        """Whether a row is held; it is no use of it."""
        return name in self._held

    def reserve(self, rows: int) -> None:
        """Allocate, within the limit, what so many further rows take."""
        wanted = min(rows, self.limit - len(self._held)) - len(self._free)
        while wanted > 0:
            count = wanted
            if self.pinned:
                count = min(max(PINNED_SLAB // self.size, 1), self.limit - self._made)
            slab = torch.empty(count, self.size, dtype=torch.uint8, device=self.device, pin_memory=self.pinned)
            self.slabs.append(slab)
            self._free.extend(slab)
            self._made += count
            wanted -= count

    def put(self, names: Sequence[tuple[int, int]], rows: Tensor | Sequence[Tensor]) -> None:
        """Keep copies of rows uint8 `[N, size]`; of more than the limit, the last ones."""
        new = [i for i, name in enumerate(names) if name not in self._held][-self.limit :] if self.limit else []
        self.reserve(len(new))
        for i in new:
            row = self._free.pop() if self._free else self._held.popitem(last=False)[1]
            row.copy_(rows[i])
            self._held[names[i]] = row

    def clear(self) -> None:
        """Give up all memory."""
        self._held.clear()
        self._free.clear()
        self.slabs.clear()
        self._made = 0
