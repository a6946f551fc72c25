"""A packed segment: tokens of one layer in one format, attended to without being unpacked."""

from __future__ import annotations

from typing import ClassVar

import torch

from mmkv.cache.formats import Packer
from mmkv.kernels import Blocks, Table, attend_packed

_NOWHERE = 2**31 - 1  # position of the unused end of a partial block: after every token, so no crop counts it


class PackedSegment:
    """Immutable blocks of codes, and per row (batch element, KV head) a table of which blocks it holds.

    Blocks are shared by beams that come from one prompt: reordering moves table rows, never codes. Padding is never
    stored. Heads may hold different tokens and different numbers of them. Tokens carry their logical position in the
    sequence: a block's first one where its tokens are contiguous, else all of them (`positions`).
    """

    packer_class: ClassVar[type[Packer]] = Packer  # what makes its blocks

    def __init__(self, packer: Packer, role: int, batch: int, device):
        self.role = role  # index of its format among the method's
        self.packer, self.batch, self.heads = packer, batch, packer.heads
        self.keys: Blocks | None = None
        self.values: Blocks | None = None
        empty = torch.zeros(batch * self.heads, 0, dtype=torch.int32, device=device)
        self.block, self.count, self.start = empty, empty.clone(), empty.clone()
        # int32 [B * 1 or Hkv, S, group] where tokens are scattered; once per batch element while its heads hold the same
        self.positions: torch.Tensor | None = None
        self.held = (
            [0] * batch * self.heads
        )  # tokens of each row; on the host, so that counting never waits for a device

    @property
    def tokens(self) -> list[float]:
        """Tokens that each batch element holds, averaged over its heads."""
        return [sum(self.held[i : i + self.heads]) / self.heads for i in range(0, len(self.held), self.heads)]

    def append(self, row: int, keys, values, columns, mask=None) -> None:
        """Pack tokens of batch element `row` behind those it has.

        Args:
            keys, values: `[Hkv, n, D]`, the tokens.
            columns: int64 `[n]` or `[Hkv, n]` on the CPU, their logical positions, ascending.
            mask: bool `[Hkv, n]`, the tokens that each head keeps; None for all.
        """
        group, n, device = self.packer.form.group, columns.shape[-1], keys.device
        if (
            mask is None and columns.dim() == 1
        ):  # the same tokens for every head, without a gather where they fill blocks
            slots = -(-n // group)
            pad = slots * group - n
            if pad:  # a partial block: its end is masked by `count` and enters no statistic
                keys = torch.nn.functional.pad(keys, (0, 0, 0, pad))
                values = torch.nn.functional.pad(values, (0, 0, 0, pad))
            keys, values = (t.reshape(self.heads * slots, group, t.shape[-1]) for t in (keys, values))
            count = torch.full((slots,), group)
            count[-1] = group - pad
            at = torch.nn.functional.pad(columns, (0, pad), value=_NOWHERE).view(1, slots, group)
            counts, heads = count.repeat(self.heads), torch.arange(self.heads).repeat_interleave(slots)
        else:
            index, counts, heads = _blocks_of(torch.ones(self.heads, n).bool() if mask is None else mask.cpu(), group)
            flat = index.to(device)
            keys, values = keys.reshape(-1, keys.shape[-1])[flat], values.reshape(-1, values.shape[-1])[flat]
            outside = torch.arange(group) >= counts[:, None]
            at = columns.expand(self.heads, n).reshape(-1)[index].masked_fill(outside, _NOWHERE)
        packed = self.packer.pack(row, keys, values, heads.to(device), counts.to(device, torch.int32))
        first = 0 if self.keys is None else len(self.keys)
        self.keys = packed[0] if self.keys is None else self.keys.cat(packed[0])
        self.values = packed[1] if self.values is None else self.values.cat(packed[1])
        self.enter(row, first, counts, heads, at)

    def enter(self, row: int, first: int, counts: torch.Tensor, heads: torch.Tensor, at: torch.Tensor) -> None:
        """Enter new blocks into the table.

        Args:
            first: id of the first of them; they are sorted by head.
            counts, heads: int64 `[N]` on the CPU, tokens and KV head of each.
            at: int64 `[N, group]`, positions of their tokens; `[1, slots, group]` where all heads hold the same.
        """
        device = self.block.device
        shared = at.dim() == 3
        rows = row * self.heads + heads
        used = (self.count[row * self.heads : (row + 1) * self.heads] > 0).sum(1).cpu()
        places = torch.arange(len(heads)) - torch.searchsorted(heads, heads) + used[heads]  # behind those of its head
        missing = int(places.max()) + 1 - self.block.shape[1]
        if missing > 0:
            grow = lambda t: torch.nn.functional.pad(t, (0, missing))  # noqa: E731
            self.block, self.count, self.start = grow(self.block), grow(self.count), grow(self.start)
            if self.positions is not None:
                self.positions = torch.nn.functional.pad(self.positions, (0, 0, 0, missing))
        starts = at[..., 0].reshape(-1)
        starts = starts.repeat(self.heads) if shared else starts
        where = (rows.to(device), places.to(device))
        self.block[where] = torch.arange(first, first + len(heads), dtype=torch.int32).to(device)
        self.count[where] = counts.to(device, torch.int32)
        self.start[where] = starts.to(device, torch.int32)
        for r, count in zip(rows.tolist(), counts.tolist()):
            self.held[r] += count
        last = at.masked_fill(at == _NOWHERE, -1).amax(-1).reshape(-1)
        last = last.repeat(self.heads) if shared else last
        if self.positions is None and shared and bool((last - starts == counts - 1).all()):
            return
        self._scatter(apart=not shared)
        at = at.to(device, torch.int32)
        if not shared:
            self.positions[where] = at
        elif len(self.positions) == self.batch:
            self.positions[row, places[: at.shape[1]].to(device)] = at[0]
        else:
            self.positions[where] = at[0].repeat(self.heads, 1)

    def _scatter(self, apart: bool) -> None:
        """Go from one position per block to one per token, `apart` for every head."""
        if self.positions is None:
            group = self.packer.form.group
            offsets = torch.arange(group, dtype=torch.int32, device=self.start.device)
            start = self.start if apart else self.start[:: self.heads]
            self.positions = start[:, :, None] + offsets
        elif apart:
            self.positions = self._by_row()

    def _by_row(self) -> torch.Tensor:
        """Positions int32 `[B * Hkv, S, group]`."""
        repeats = len(self.block) // max(len(self.positions), 1)
        return self.positions.repeat_interleave(repeats, 0) if repeats > 1 else self.positions

    def attend(
        self, q, *, scale, softcap=None, q_positions=None, window=None, merged=True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries over this segment's tokens, all of which precede the queries.

        Args:
            q: `[B, Hq, Tq, D]`.
            scale, softcap: as in `mmkv.kernels.attend_packed`.
            q_positions: int `[B, Tq]`, needed with `window` alone.
            window: sliding window in tokens, None for full attention.
            merged: False for S parts, whose number a GPU's size decides, that are yet to be merged.

        Returns:
            output fp32 `[B, Hq, Tq, Dv]` in the model's channels, logsumexp fp32 `[B, Hq, Tq]`; not merged, output
            `[S, B, Hq, Tq, Dv]` and logsumexp `[S, B, Hq, Tq]`.
        """
        table = Table(self.block, self.count, self.start, self._block_positions() if window is not None else None)
        packer = self.packer
        found = attend_packed(
            packer.query(q),
            self.keys,
            self.values,
            table,
            scale=scale,
            softcap=softcap,
            q_positions=q_positions if window is not None else None,
            window=window,
            exact=q.dtype == torch.float32,  # a change of basis makes fp32 of any
            merged=merged,
        )
        return packer.output(found[0]), found[1]

    def _block_positions(self) -> torch.Tensor | None:
        """Positions by block id, int32 `[NB, group]`, as the kernel wants them where tokens are scattered."""
        if self.positions is None:
            return None
        held = self.count > 0
        by_block = self.positions.new_zeros(len(self.keys), self.packer.form.group)
        by_block[self.block[held].long()] = self._by_row()[held]
        return by_block

    def crop(self, length: int) -> None:
        """Drop the tokens at logical positions >= length: whole blocks, and the end of the last one."""
        if self.positions is None:
            keep = length - self.start
        else:
            keep = (self._by_row() < length).sum(-1)
        self.count = torch.minimum(self.count, keep.clamp(min=0).to(torch.int32))
        self._compact()

    def drop_before(self, position: int) -> None:
        """Drop the blocks whose tokens all lie before a logical position (sliding windows)."""
        last = self.start + self.count - 1 if self.positions is None else self._last_positions()
        self.count = torch.where(last < position, torch.zeros_like(self.count), self.count)
        self._compact()

    def drop(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Drop whole blocks, int64 `[N]` table rows and slots, and free them at once."""
        if self.positions is not None:
            self._scatter(apart=True)
        self.count[rows.to(self.count.device), slots.to(self.count.device)] = 0
        self._compact(unused=0.0)

    def positions_of(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Logical positions int64 `[N, group]` of blocks; past a block's count they mean nothing."""
        rows, slots = rows.to(self.start.device), slots.to(self.start.device)
        if self.positions is not None:
            return self._by_row()[rows, slots].long()
        return self.start[rows, slots].long()[:, None] + torch.arange(self.packer.form.group, device=self.start.device)

    def _last_positions(self) -> torch.Tensor:
        last = (self.count.long() - 1).clamp(min=0)
        return self._by_row().gather(-1, last[..., None])[..., 0]

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements. Codes stay where they are until most of them are unused."""
        index = index.to(self.block.device)
        heads = torch.arange(self.heads, device=index.device)
        table_rows = (index[:, None] * self.heads + heads).flatten()
        self.block, self.count, self.start = (t[table_rows] for t in (self.block, self.count, self.start))
        if self.positions is not None:
            shared = len(self.positions) == self.batch
            self.positions = self.positions[index if shared else table_rows]
        self.packer.rows(index)
        self.batch = index.numel()
        self._compact()

    def _compact(self, unused: float = 0.25) -> None:
        """Free table columns that no row uses, and blocks once more than a share `unused` of them is."""
        held = self.count > 0
        # slots in use come first in every row
        order = (~held).to(torch.int8).argsort(dim=1, stable=True)
        width = int(held.sum(1).max()) if held.numel() else 0
        order = order[:, :width]
        self.block, self.count, self.start = (t.gather(1, order) for t in (self.block, self.count, self.start))
        if self.positions is not None:
            step = len(order) // max(len(self.positions), 1)
            by_row = order[::step, :, None].expand(-1, -1, self.positions.shape[-1])
            self.positions = self.positions.gather(1, by_row)
        self.held = self.count.sum(1).tolist()
        held = self.count > 0
        used = self.block[held].unique()
        if self.keys is not None and used.numel() < (1 - unused) * len(self.keys):
            renumber = torch.zeros(len(self.keys), dtype=torch.int32, device=used.device)
            renumber[used.long()] = torch.arange(used.numel(), dtype=torch.int32, device=used.device)
            self.block = torch.where(held, renumber[self.block.long()], torch.zeros_like(self.block))
            self.keys, self.values = self.keys.select(used.long()), self.values.select(used.long())

    @property
    def empty(self) -> bool:
        return not any(self.held)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this segment holds: codes, scales, zero points, tables, channel orders."""
        held = [self.block, self.count, self.start] + self.packer.tensors()
        for blocks in (self.keys, self.values):
            held += blocks.tensors() if blocks is not None else []
        return held + ([] if self.positions is None else [self.positions])


def _blocks_of(mask: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the chosen tokens of each head into blocks.

    Args:
        mask: bool `[Hkv, n]` on the CPU.
        group: tokens per block.

    Returns:
        int64 `[N, group]` indices into Hkv * n tokens (any token past the end of a block), int64 `[N]` tokens and int64
        `[N]` head of each block, sorted by head.
    """
    n = mask.shape[1]
    chosen = [row.nonzero()[:, 0] + head * n for head, row in enumerate(mask)]
    index, counts, owner = [], [], []
    for head, tokens in enumerate(chosen):
        slots = -(-tokens.numel() // group)
        index.append(torch.nn.functional.pad(tokens, (0, slots * group - tokens.numel())).view(slots, group))
        counts += [min(group, tokens.numel() - i * group) for i in range(slots)]
        owner += [head] * slots
    return torch.cat(index), torch.tensor(counts, dtype=torch.int64), torch.tensor(owner, dtype=torch.int64)
