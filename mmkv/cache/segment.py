"""A packed segment: tokens of one layer in one format, attended to without being unpacked."""

from __future__ import annotations

import torch

from mmkv.cache.formats import Packer
from mmkv.kernels import Blocks, Table, attend_packed

_NOWHERE = 2**31 - 1  # position of the unused end of a partial block: after every token, so no crop counts it


class PackedSegment:
    """Immutable blocks of codes, and per row (batch element, KV head) a table of which blocks it holds.

    Blocks are shared by beams that come from one prompt: reordering moves table rows, never codes. Padding is never
    stored. Tokens carry their logical position in the sequence: a block's first one where its tokens are contiguous,
    else all of them (`positions`, kept once per batch element).
    """

    def __init__(self, packer: Packer, role: int, batch: int, device):
        self.role = role  # index of its format among the method's
        self.packer, self.batch, self.heads = packer, batch, packer.heads
        self.keys: Blocks | None = None
        self.values: Blocks | None = None
        empty = torch.zeros(batch * self.heads, 0, dtype=torch.int32, device=device)
        self.block, self.count, self.start = empty, empty.clone(), empty.clone()
        self.positions: torch.Tensor | None = None  # int32 [B, S, group] where tokens are scattered
        self.tokens = [0] * batch  # held by each batch element; on the host, so that counting never waits for a device

    def append(self, row: int, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
        """Pack tokens of batch element `row` behind those it has.

        Args:
            keys, values: `[Hkv, n, D]`, the tokens.
            columns: int64 `[n]` on the CPU, their logical positions, ascending.
        """
        group, n = self.packer.form.group, columns.numel()
        slots = -(-n // group)
        pad = slots * group - n
        if pad:  # a partial block: its tail is masked by `count` and enters no statistic
            keys = torch.nn.functional.pad(keys, (0, 0, 0, pad))
            values = torch.nn.functional.pad(values, (0, 0, 0, pad))
        count = torch.full((slots,), group, dtype=torch.int32)
        count[-1] = group - pad
        device = keys.device
        packed = self.packer.pack(
            row,
            keys.unflatten(1, (slots, group)),
            values.unflatten(1, (slots, group)),
            count.to(device),
        )
        first = 0 if self.keys is None else len(self.keys)
        self.keys = packed[0] if self.keys is None else self.keys.cat(packed[0])
        self.values = packed[1] if self.values is None else self.values.cat(packed[1])
        self._enter(row, first, count.to(device), columns, slots, group)
        self.tokens[row] += n

    def _enter(self, row, first, count, columns, slots, group) -> None:
        device = self.block.device
        rows = slice(row * self.heads, (row + 1) * self.heads)
        used = int((self.count[row * self.heads] > 0).sum())
        missing = used + slots - self.block.shape[1]
        if missing > 0:
            grow = lambda t: torch.nn.functional.pad(t, (0, missing))  # noqa: E731
            self.block, self.count, self.start = grow(self.block), grow(self.count), grow(self.start)
            if self.positions is not None:
                self.positions = torch.nn.functional.pad(self.positions, (0, 0, 0, missing))
        at = slice(used, used + slots)
        ids = torch.arange(self.heads * slots, dtype=torch.int32, device=device).view(self.heads, slots) + first
        starts = columns[::group]
        self.block[rows, at], self.count[rows, at] = ids, count
        self.start[rows, at] = starts.to(device=device, dtype=torch.int32)
        last = torch.cat([columns[group - 1 :: group], columns[-1:]])[:slots]
        contiguous = bool((last - starts == count.cpu() - 1).all())
        if not contiguous or self.positions is not None:
            self._scatter()
            padded = torch.nn.functional.pad(columns, (0, slots * group - columns.numel()), value=_NOWHERE)
            self.positions[row, at] = padded.view(slots, group).to(device=device, dtype=torch.int32)

    def _scatter(self) -> None:
        """Go from one position per block to one per token."""
        if self.positions is None:
            group = self.packer.form.group
            offsets = torch.arange(group, dtype=torch.int32, device=self.start.device)
            start = self.start[:: self.heads]  # all heads of a batch element hold the same tokens
            self.positions = start[:, :, None] + offsets

    def attend(self, q, *, scale, softcap=None, q_positions=None, window=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries over this segment's tokens, all of which precede the queries.

        Args:
            q: `[B, Hq, Tq, D]`.
            scale, softcap: as in `mmkv.kernels.attend_packed`.
            q_positions: int `[B, Tq]`, needed with `window` alone.
            window: sliding window in tokens, None for full attention.

        Returns:
            output fp32 `[B, Hq, Tq, Dv]` in the model's channels, logsumexp fp32 `[B, Hq, Tq]`.
        """
        table = Table(self.block, self.count, self.start, self._block_positions() if window is not None else None)
        out, lse = attend_packed(
            self.packer.query(q),
            self.keys,
            self.values,
            table,
            scale=scale,
            softcap=softcap,
            q_positions=q_positions if window is not None else None,
            window=window,
        )
        return self.packer.output(out), lse

    def _block_positions(self) -> torch.Tensor | None:
        """Positions by block id, int32 `[NB, group]`, as the kernel wants them where tokens are scattered."""
        if self.positions is None:
            return None
        held = self.count > 0
        by_block = self.positions.new_zeros(len(self.keys), self.packer.form.group)
        by_block[self.block[held].long()] = self.positions.repeat_interleave(self.heads, 0)[held]
        return by_block

    def crop(self, length: int) -> None:
        """Drop the tokens at logical positions >= length: whole blocks, and the end of the last one."""
        if self.positions is None:
            keep = length - self.start
        else:
            keep = (self.positions < length).sum(-1).repeat_interleave(self.heads, 0)
        self.count = torch.minimum(self.count, keep.clamp(min=0).to(torch.int32))
        self._compact()

    def drop_before(self, position: int) -> None:
        """Drop the blocks whose tokens all lie before a logical position (sliding windows)."""
        last = self.start + self.count - 1 if self.positions is None else self._last_positions()
        self.count = torch.where(last < position, torch.zeros_like(self.count), self.count)
        self._compact()

    def _last_positions(self) -> torch.Tensor:
        last = (self.count[:: self.heads].long() - 1).clamp(min=0)
        return self.positions.gather(-1, last[..., None])[..., 0].repeat_interleave(self.heads, 0)

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements. Codes stay where they are until most of them are unused."""
        index = index.to(self.block.device)
        heads = torch.arange(self.heads, device=index.device)
        table_rows = (index[:, None] * self.heads + heads).flatten()
        self.block, self.count, self.start = (t[table_rows] for t in (self.block, self.count, self.start))
        if self.positions is not None:
            self.positions = self.positions[index]
        self.packer.rows(index)
        self.batch = index.numel()
        self._compact()

    def _compact(self) -> None:
        """Free table columns that no row uses, and blocks once a quarter of them is unused."""
        held = self.count > 0
        # slots in use come first in every row
        order = (~held).to(torch.int8).argsort(dim=1, stable=True)
        width = int(held.sum(1).max()) if held.numel() else 0
        order = order[:, :width]
        self.block, self.count, self.start = (t.gather(1, order) for t in (self.block, self.count, self.start))
        if self.positions is not None:
            by_row = order[:: self.heads, :, None].expand(-1, -1, self.positions.shape[-1])
            self.positions = self.positions.gather(1, by_row)
        self.tokens = self.count[:: self.heads].sum(1).tolist()
        held = self.count > 0
        used = self.block[held].unique()
        if self.keys is not None and used.numel() < 0.75 * len(self.keys):
            renumber = torch.zeros(len(self.keys), dtype=torch.int32, device=used.device)
            renumber[used.long()] = torch.arange(used.numel(), dtype=torch.int32, device=used.device)
            self.block = torch.where(held, renumber[self.block.long()], torch.zeros_like(self.block))
            self.keys, self.values = self.keys.select(used.long()), self.values.select(used.long())

    @property
    def empty(self) -> bool:
        return not any(self.tokens)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this segment holds: codes, scales, zero points, tables, channel orders."""
        held = [self.block, self.count, self.start] + self.packer.tensors()
        for blocks in (self.keys, self.values):
            held += blocks.tensors() if blocks is not None else []
        return held + ([] if self.positions is None else [self.positions])
