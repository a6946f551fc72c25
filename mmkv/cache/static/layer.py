"""`StaticLayer`: one `KVLayer` while single tokens are decoded, and what its attention is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmkv.cache.fill import Asked
from mmkv.cache.segment import PackedSegment
from mmkv.cache.static.blocks import StaticBlocks
from mmkv.cache.static.tail import StaticTail
from mmkv.cache.view import View

if TYPE_CHECKING:
    from mmkv.cache.layer import KVLayer


class StaticLayer:
    """Lends a layer a tail and segments whose tensors stay where they are, until `close`.

    Args:
        layer: the layer; it must hold tokens, and no forward may be running.
        room: steps that it has to have room for.
    """

    def __init__(self, layer: KVLayer, room: int):
        self.layer = layer
        self.columns = held_columns(layer)
        forms = layer.state.forms if packs(layer) else ()
        self.group = forms[0].group if forms else 0
        self.residual = layer.state.method.residual_window if forms else 0
        self.flushing = False  # whether this step packs what leaves the residual window
        longest = max(map(len, self.columns))
        self.ready = [packs_at_once(layer, row, at) for row, at in enumerate(self.columns)]
        capacity = longest + room if not all(self.ready) else max(longest + 1, self.residual + self.group)
        self.blocks: list[StaticBlocks] = []
        if any(self.ready):
            newest = [newest_segment(layer, row) if ready else None for row, ready in enumerate(self.ready)]
            wanted = room // self.group + 1
            self.blocks = [
                StaticBlocks(segment, wanted, [segment is mine for mine in newest])
                for segment in layer.packed
                if any(segment is mine for mine in newest)
            ]
        columns = [at - layer.start for at in self.columns]
        self.tail = StaticTail(layer.keys, layer.values, columns, capacity)
        layer.keys, layer.values, layer.static = self.tail.keys, self.tail.values, self

    def first_flushes(self) -> list[tuple[int, int]]:
        """(step, group) by batch element that packs: at which step it packs for the first time, and after how many again."""
        return [
            (self.residual + self.group - len(at), self.group) for at, ready in zip(self.columns, self.ready) if ready
        ]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> StaticView:
        """Add a token `[B, Hkv, 1, D]`; returns what attends to all that is held."""
        self.tail.append(keys, values)
        return StaticView(self.layer, 1)

    def flush(self) -> None:
        """Pack a block of the rows whose tail has outgrown the residual window by one."""
        if not self.blocks:
            return
        due = self.tail.counts >= self.residual + self.group
        keys, values = (t[:, :, : self.group].flatten(0, 1) for t in (self.tail.keys, self.tail.values))
        added = torch.zeros_like(due)
        for blocks in self.blocks:
            blocks.append(keys, values, due)
            added |= blocks.mine
        self.tail.drop(self.group, due & added)

    def close(self, steps: int) -> None:
        """Give the layer its own tail and segments back, as if it had decoded the steps itself.

        Args:
            steps: tokens that were appended; the layout knows of them already.
        """
        layer, tail = self.layer, self.tail
        seen = layer.seen
        new = torch.arange(seen, seen + steps)
        columns = [torch.cat([at, new]) for at in self.columns]
        flushed = [self._flushed(row, len(at)) for row, at in enumerate(columns)]
        for blocks in self.blocks:
            mine = blocks.mine.view(-1, blocks.segment.heads)[:, 0].tolist()
            blocks.close(
                [
                    at[: (count if own else 0) * self.group].view(-1, self.group)
                    for at, count, own in zip(columns, flushed, mine)
                ]
            )
        width = seen + steps - layer.start
        batch, heads, _, d = tail.keys.shape
        layer.keys = tail.keys.new_zeros(batch, heads, width, d)
        layer.values = tail.values.new_zeros(batch, heads, width, tail.values.shape[-1])
        for row, (at, count) in enumerate(zip(columns, flushed)):
            rest = at[count * self.group :]
            if count:
                layer.packed_to[row] = int(rest[0]) if len(rest) else seen + steps
            place = (rest - layer.start).to(tail.keys.device)
            layer.keys[row].index_copy_(1, place, tail.keys[row, :, : len(rest)])
            layer.values[row].index_copy_(1, place, tail.values[row, :, : len(rest)])
        layer.static = None
        layer.stepped(steps)

    def packed_tokens(self, steps: int) -> int:
        """Tokens that were packed in so many steps, summed over the batch."""
        return self.group * sum(self._flushed(row, len(at) + steps) for row, at in enumerate(self.columns))

    def _flushed(self, row: int, held: int) -> int:
        """Blocks that a batch element packed, which would hold so many tokens in its tail had it packed none."""
        return max(held - self.residual, 0) // self.group if self.ready[row] else 0

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor it holds beside the layer's segments."""
        return self.tail.tensors() + [t for blocks in self.blocks for t in blocks.tensors()]


class StaticView(View):
    """`View` of a layer that is lent static buffers: no length enters from the host."""

    def attend(self, stock, stock_name: str, module, query: torch.Tensor, mask, *, scaling=None, **kwargs):
        """As `View.attend`, of one new token `[B, Hq, 1, D]`."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = self._merged(query, mask, Asked(query, scale), **kwargs)
        if self.layer.static.flushing:
            self.layer.static.flush()
        return out, None

    def _positions(self, query) -> None:
        """Nobody asks for them: a new token sees all that is held."""

    def _tail(self, query, positions, causal, options) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.static.tail.attend(query, **options)


def packs(layer: KVLayer) -> bool:
    """Whether the layer packs decoded tokens."""
    return bool(layer.state.forms) and layer.state.method.packs_undecided(False)


def held_columns(layer: KVLayer) -> list[torch.Tensor]:
    """int64 `[n_b]` by batch element: logical positions of the tokens that its tail holds, ascending."""
    valid = layer.state.layout.valid
    firsts = [max(packed, layer.start) for packed in layer.packed_to]
    return [valid[row, first : layer.seen].nonzero()[:, 0] + first for row, first in enumerate(firsts)]


def newest_segment(layer: KVLayer, row: int) -> PackedSegment | None:
    """The segment that decoded tokens of a batch element join, None before it has one."""
    return next((s for s in reversed(layer.packed) if s.role == 0 and s.tokens[row]), None)


def packs_at_once(layer: KVLayer, row: int, columns: torch.Tensor) -> bool:
    """Whether what a batch element packs next can be packed on the device: tokens of the main format, in a segment it has."""
    if not packs(layer) or newest_segment(layer, row) is None:
        return False
    return layer.state.marks is None or not bool(layer.state.marks[row, columns].any())


def steps_alone(layer: KVLayer, row: int, columns: torch.Tensor) -> int | None:
    """Steps that a batch element can go without packing anything, where it cannot be packed on the device; None: no limit."""
    if not packs(layer) or packs_at_once(layer, row, columns):
        return None
    group, residual = layer.state.forms[0].group, layer.state.method.residual_window
    marks = layer.state.marks
    main = torch.ones(len(columns), dtype=torch.bool) if marks is None else marks[row, columns] == 0
    main = torch.cat([main, torch.ones(group, dtype=torch.bool)]).cumsum(0)
    last = int((main < group).sum())  # index of the token that makes a group of the main format whole
    return max(last + residual - len(columns), 0)
