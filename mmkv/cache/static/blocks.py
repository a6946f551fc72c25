"""`StaticBlocks`: a packed segment with room for more blocks, which the device fills and counts."""

from __future__ import annotations

import torch

from mmkv.cache.segment import PackedSegment
from mmkv.kernels import Blocks


class StaticBlocks:
    """Lends a `PackedSegment` pools and a table that are larger than what it holds, until `close`.

    Each row (batch element, KV head) owns `room + 1` blocks behind those in use; the one after the last is never read: rows
    that have no block to add write theirs to the next free place, where it is overwritten later.

    Args:
        segment: the segment.
        room: blocks that each row may add.
        mine: batch elements whose newest segment this is; the others add nothing.
    """

    def __init__(self, segment: PackedSegment, room: int, mine: list[bool]):
        self.segment, self.room = segment, room
        device, rows = segment.block.device, len(segment.block)
        self.before = segment.block, segment.count, segment.start
        self.used = len(segment.keys)
        self.base = self.used + torch.arange(rows, device=device) * (room + 1)  # int64 [R], the first block of each row
        self.slot = (segment.count > 0).sum(1)  # int64 [R], its first free place in the table
        self.added = torch.zeros(rows, dtype=torch.int64, device=device)
        self.mine = torch.tensor(mine, device=device).repeat_interleave(segment.heads)
        segment.keys, segment.values = (_roomy(b, rows * (room + 1)) for b in (segment.keys, segment.values))
        width = int(self.slot.max()) + room + 1 - segment.block.shape[1] if rows else 0
        segment.block, segment.count, segment.start = (
            torch.nn.functional.pad(t, (0, max(width, 0))) for t in self.before
        )
        steps = torch.arange(room + 1, device=device)
        segment.block.scatter_(1, self.slot[:, None] + steps, (self.base[:, None] + steps).to(torch.int32))

    def append(self, keys: torch.Tensor, values: torch.Tensor, due: torch.Tensor) -> None:
        """Pack a block of each row, and enter it where the row is due.

        Args:
            keys, values: `[B * Hkv, group, D]`, `[B * Hkv, group, Dv]`.
            due: bool `[B * Hkv]`.
        """
        segment, due = self.segment, due & self.mine
        at = self.base + self.added
        for pool, new in zip((segment.keys, segment.values), segment.packer.pack_all(keys, values)):
            for held, tensor in zip(pool.tensors(), new.tensors()):
                held.index_copy_(0, at, tensor)
        count = due.to(torch.int32) * keys.shape[1]
        segment.count.scatter_(1, (self.slot + self.added)[:, None], count[:, None])
        self.added += due

    def close(self, positions: list[torch.Tensor]) -> None:
        """Give the segment back as if it had packed the blocks itself, without what is not used.

        Args:
            positions: int64 `[n_b, group]` by batch element on the CPU, logical positions of the tokens of the blocks it added.
        """
        segment = self.segment
        # copies can be written to here, where what was made in torch.inference_mode cannot
        segment.block, segment.count, segment.start = (t.clone() for t in self.before)
        segment.positions = None if segment.positions is None else segment.positions.clone()
        base = self.base.cpu().view(-1, segment.heads)
        new = [(base[row][:, None] + torch.arange(len(at))).flatten() for row, at in enumerate(positions)]
        ids = torch.cat([torch.arange(self.used), *new]).to(segment.block.device)
        segment.keys, segment.values = segment.keys.select(ids), segment.values.select(ids)
        first = self.used
        for row, at in enumerate(positions):
            if len(at):
                heads = torch.arange(segment.heads).repeat_interleave(len(at))
                counts = torch.full((len(heads),), at.shape[1])
                segment.enter(row, first, counts, heads, at[None])
            first += segment.heads * len(at)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor it holds beside the segment's own."""
        return [*self.before, self.base, self.slot, self.added, self.mine]


def _roomy(blocks: Blocks, more: int) -> Blocks:
    """The pool in a larger one."""
    held = len(blocks)
    made = Blocks.empty(blocks.spec, held + more, blocks.device)
    for old, new in zip(blocks.tensors(), made.tensors()):
        new[:held].copy_(old)
        new[held:].zero_()
    return made
