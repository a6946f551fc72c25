"""`KVLayer`: one layer's cache, a list of packed segments and a dense tail."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from mmkv import compat
from mmkv.cache.cap import fit
from mmkv.cache.deciding import accumulate, changes, fill_of, keeps_all, plan_of
from mmkv.cache.dense import DenseSegment
from mmkv.cache.fill import Asked, Fill, Plan
from mmkv.cache.method import DENSE, MIN_RESIDUAL, split
from mmkv.cache.scores import Scores
from mmkv.cache.segment import PackedSegment
from mmkv.cache.state import CacheState
from mmkv.cache.summary import SummarySegment
from mmkv.cache.view import View
from mmkv.parts.probe_rows import recent
from mmkv.parts.storage import storage_bytes

if TYPE_CHECKING:
    from mmkv.cache.static.layer import StaticLayer


class KVLayer(CacheLayerMixin):
    """Keys and values of one decoder layer.

    `keys`, `values` `[B, Hkv, T, D]` are the dense tail: the tokens at logical positions `start ... seen - 1`. Batch element
    b holds those before `packed_to[b]` elsewhere (or, left of its padding, nowhere). Everything older lies in
    `segments`. Keys are stored as the model hands them over, rotated.

    Args:
        state: shared by the layers of the cache.
        index: layer index; the first layer with a state moves it when the cache is cropped or reordered.
        window: sliding window in tokens, None for full attention.
    """

    is_croppable = True

    def __init__(self, state: CacheState, index: int, window: int | None = None):
        super().__init__()
        self.state, self.index, self.window = state, index, window
        self.is_sliding = window is not None
        self.seen = self.logical = 0  # tokens that came here; tokens that came at all, those dropped before included
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.start = 0
        self.segments: list[PackedSegment | DenseSegment | SummarySegment] = []
        self.packed_to: list[int] = []
        self.evicted_to: list[int] = []  # tokens before this position may be gone for good
        self.decided_to: list[int] = []  # tokens before this position were decided upon, stored or not
        self.scores: Scores | None = None  # attention mass so far, where the method or a limit of bytes wants it
        self.new = 0  # tokens of the last update
        self._pending = False
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # the tail before a forward of which none stays
        # from the attention to the end of the forward, where layers decide jointly
        self.asked: Asked | None = None
        self.waits = False
        self.static: StaticLayer | None = None  # buffers that do not move, while single tokens are decoded in a graph
        self._dropped = 0  # blocks that end before this position were freed (sliding windows)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.packed_to = [0] * key_states.shape[0]
        self.evicted_to = [0] * key_states.shape[0]
        self.decided_to = [0] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `[B, Hkv, T, D]` keys and values; returns a `View` twice, which attends to all that is held."""
        if self.static is not None:
            there = self.static.append(key_states, value_states)
            return there, there
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        new = key_states.shape[2]
        if self.seen + new != self.state.seen:
            raise RuntimeError(
                f"layer {self.index} was given {new} tokens after {self.seen}, but {self.state.seen} were announced: this cache "
                "belongs to a model that mmkv.wrap has wrapped and is filled by calling that whole model, or a forward failed "
                "half-way; start a new cache"
            )
        self._before = (self.keys, self.values) if self.state.last else None
        # a first fill is adopted, not copied, as transformers' own layer would
        self.keys = torch.cat([self.keys, key_states], dim=2) if self.keys.shape[2] else key_states
        self.values = torch.cat([self.values, value_states], dim=2) if self.values.shape[2] else value_states
        self.seen, self.new = self.seen + new, new
        self.logical = self.state.root.seen
        self._pending = True
        if any(self.state.prompted):
            self.state.count(self.index, self.nbytes)
        view = View(self, new)
        return view, view

    @torch.no_grad()
    def settle(self, asked: Asked | None = None) -> None:
        """Decide on and store what has left the residual window, and drop what no window can see.

        Args:
            asked: the attention that has just run over the new tokens; None where none did.
        """
        if not self._pending:
            return
        if self._before is not None:
            self._let_go()
            return
        method = self.state.method
        if asked is not None and self.window is None:
            if method is not None and method.accumulates:
                accumulate(self, asked, method.counted_rows)
            elif self.state.max_bytes is not None and any(self.state.prompted):
                accumulate(self, asked, recent)  # so that what the prompt's end looks at least can go first
        jointly = method is not None and method.joint and self.window is None and any(self.state.prompted)
        if asked is not None and (jointly or self.index in self.state.root.deferred):
            self.asked, self.waits = asked, True  # goes on when the forward ends
            return
        self.finish(asked)

    def _let_go(self) -> None:
        """Be as before the tokens of this forward, which nobody will ask for again."""
        (self.keys, self.values), self._before, self._pending = self._before, None, False
        self.seen -= self.new
        self.logical = self.seen
        self.state.count(self.index, self.nbytes)

    def finish(self, asked: Asked | None = None) -> None:
        """Store what is not decided upon, or not any more."""
        self._pending = self.waits = False
        self.asked = None
        if self.state.method is not None:
            self._pack(asked)
        if self.window is not None and not self.state.record_past:
            self._slide()
        self.prune()
        if self.state.max_bytes is not None:
            fit(self, self.state.max_bytes / self.state.layers)
        if any(self.state.prompted):
            self.state.count(self.index, self.nbytes)

    def _pack(self, asked: Asked | None) -> None:
        plans = [self._decide(row, asked) for row in range(len(self.packed_to))]
        stored = self.apply(plans)
        for row, done in enumerate(stored):
            if not done:
                self._flush(row, asked)
        self._free()

    def _decide(self, row: int, asked: Asked | None) -> tuple[Fill, Plan] | None:
        """Let the method decide on a batch element, where a prompt came or enough tokens were decoded."""
        method = self.state.method
        if not method.decides or method.joint or self.window is not None:
            return None
        prompted = bool(self.state.prompted and self.state.prompted[row])
        first = max(self.packed_to[row], self.start)
        if not prompted:
            if method.interval is None:
                return None
            if not self.state.recalls:  # what was decided upon is settled, wherever it is
                first = max(first, self.decided_to[row])
            waiting = int(self.state.layout.valid[row, first : self.seen].sum())
            if waiting < method.residual_window + method.interval:
                return None
        fill = asked.fills.get(row) if asked is not None else None
        fill = fill_of(self, row, asked, decoding=not prompted, first=first) if fill is None else fill
        if fill is None:
            return None
        plan = plan_of(self, row, fill)
        method.decide(fill, plan)
        return fill, plan

    def apply(self, plans: list[tuple[Fill, Plan] | None]) -> list[bool]:
        """Store what was planned for each batch element; those are stored are told.

        A plan to keep everything as it is leaves the tail alone, unless another batch element's tokens leave it.
        """
        changed = [found is not None and changes(*found) for found in plans]
        stored = []
        for row, found in enumerate(plans):
            stored.append(changed[row] or (found is not None and any(changed) and not self.state.forms))
            if stored[row]:
                self._apply(row, *found)
            if found is not None:
                self.decided_to[row] = found[0].boundary
        return stored

    def _apply(self, row: int, fill: Fill, plan: Plan) -> None:
        """Store a batch element's old tokens as planned."""
        columns = fill.columns[..., : fill.old]
        self._settle_before(row, int(fill.columns[..., fill.recalled :].min()))
        if fill.recalled:
            self.dense_segment().take(row)
        for role in (DENSE, *range(len(self.state.forms))):
            mask = plan.keep & (plan.form == role)
            if not bool(mask.any()):
                continue
            if role == DENSE:
                self.dense_segment().append(row, plan.keys, plan.values, columns, mask)
            else:
                self._fill_blocks(row, role, plan.keys, plan.values, columns, mask, fill.query)
        for summary in plan.summaries:
            self._summary_segment().append(row, *summary)
        self.packed_to[row] = fill.boundary
        if not keeps_all(fill, plan):
            self.evicted_to[row] = self.packed_to[row]

    def _settle_before(self, row: int, position: int) -> None:
        """Store as they are the tail's tokens before a position: an earlier decision kept them all."""
        first = max(self.packed_to[row], self.start)
        columns = self.state.layout.valid[row, first:position].nonzero()[:, 0] + first
        if columns.numel():
            at = (columns - self.start).to(self.device)
            self.dense_segment().append(row, self.keys[row, :, at], self.values[row, :, at], columns)
            self.packed_to[row] = position

    def _free(self) -> None:
        """Free the tail up to the first token that any batch element still has there."""
        furthest = max(self.packed_to)
        if self.segments or any(self.evicted_to):
            valid = self.state.layout.valid
            for row, position in enumerate(self.packed_to):
                if position < furthest:  # padding is nothing to keep
                    waiting = valid[row, position : self.seen].nonzero()
                    self.packed_to[row] = position + int(waiting[0]) if len(waiting) else self.seen
        self.trim(min(self.packed_to))

    def prune(self, at_once: bool = False) -> None:
        """Let go of the scores of tokens that no head holds any more, once those are the most, or at once."""
        if self.scores is None:
            return
        held = self.keys.shape[2] + sum(sum(s.lengths) for s in self.segments if isinstance(s, DenseSegment))
        held += sum(sum(s.held) for s in self.packed)
        if not at_once and len(self.scores.positions) < 2 * held + MIN_RESIDUAL:
            return
        positions = [torch.arange(self.start, self.seen)]
        for segment in self.segments:
            if isinstance(segment, DenseSegment):
                positions.append(segment.positions.long())
            elif isinstance(segment, PackedSegment):
                positions.append(segment.positions_of(*(segment.count > 0).nonzero(as_tuple=True)).flatten().cpu())
        self.scores.keep(torch.cat(positions))

    def _fill_blocks(self, row: int, role: int, keys, values, columns, mask, queries) -> None:
        """Pack the chosen tokens of each head, and those that have waited; what fills no block waits if that takes less.

        Args:
            keys, values: `[Hkv, n, D]`.
            columns: int64 `[n]` or `[Hkv, n]` on the CPU; mask: bool `[Hkv, n]`.
            queries: `[Hq, T, D]` of the forward, None where there were none.
        """
        waiting = self.dense_segment(role)
        if waiting.tokens[row]:
            old_keys, old_values, before = waiting.padded(row)
            columns = torch.cat([before, columns.expand(len(before), -1)], 1)
            keys, values = torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)
            mask = torch.cat([(before >= 0).to(mask.device), mask], 1)
            waiting.take(row)
        segment = self._segment(row, role, keys, queries)
        form, (d, dv) = segment.packer.form, (keys.shape[-1], values.shape[-1])
        key_bits, value_bits = form.bits(d, dv)
        block = (key_bits * d + value_bits * dv) / 8 * form.group
        rest = mask.sum(1) % form.group
        waits = (rest * keys.element_size() * (d + dv) < block) | self.state.more
        whole = mask & (mask.cumsum(1) <= (mask.sum(1) - rest * waits)[:, None])
        if bool(whole.any()):
            if not segment.tokens[row]:
                segment.packer.fit(row, keys, values, queries)
            segment.append(row, keys, values, columns, whole)
        waiting.append(row, keys, values, columns, mask & ~whole)
        self.segments = [s for s in self.segments if not s.empty]

    def _flush(self, row: int, asked: Asked | None, residual: int | None = None) -> None:
        """Store whole groups that have left the residual window, as the marks say."""
        forms = self.state.forms
        residual = self.state.method.residual_window if residual is None else residual
        if not forms or self.keys.shape[2] < residual + forms[0].group:
            return
        if not self.state.method.packs_undecided(self.window is not None):
            return
        first = max(self.packed_to[row], self.start)
        held = self.state.layout.valid[row, first : self.seen].nonzero()[:, 0] + first
        columns = held[: max(held.numel() - residual, 0)]
        marks = None if self.state.marks is None else self.state.marks[row, columns]
        parts, cut = split(columns, marks, forms)
        for part in parts:
            self._store(row, part.form, part.columns, asked)
        # padding before the first token that waits is nothing to keep
        waiting = held[held >= cut]
        self.packed_to[row] = int(waiting[0]) if waiting.numel() else self.seen

    def stepped(self, steps: int) -> None:
        """Go on from where `steps` single tokens were decoded in static buffers."""
        self.seen, self.new = self.seen + steps, 1
        self.logical = self.state.root.seen
        self._free()

    def flush(self, residual: int) -> None:
        """Store whole groups of all but the newest `residual` tokens."""
        self.state.end_stretch()
        for row in range(len(self.packed_to)):
            self._flush(row, None, residual)
        self._free()

    def _store(self, row: int, role: int, columns: torch.Tensor, asked: Asked | None) -> None:
        """Pack the tokens at these logical positions of a batch element, in the format of their role."""
        at = (columns - self.start).to(self.device)
        span = int(columns[-1] - columns[0]) + 1
        if span == columns.numel():  # contiguous: a slice, not a copy
            at = slice(int(columns[0]) - self.start, int(columns[-1]) + 1 - self.start)
        keys, values = self.keys[row, :, at], self.values[row, :, at]
        if role == DENSE:
            self.dense_segment().append(row, keys, values, columns)
            return
        # new media shape the segment they open; old tokens that had waited in the tail do not
        recent = int((columns < self.seen - self.new).sum())
        typical = keys[:, recent:] if columns.numel() - recent >= self.state.forms[role].group else keys
        queries = None
        if asked is not None:
            new = self.state.layout.valid[row, self.seen - self.new : self.seen]
            queries = asked.query[row] if bool(new.all()) else asked.query[row][:, new.to(asked.query.device)]
        segment = self._segment(row, role, typical, queries)
        if not segment.tokens[row]:
            segment.packer.fit(row, typical, values[:, values.shape[1] - typical.shape[1] :], queries)
        segment.append(row, keys, values, columns)

    @property
    def packed(self) -> list[PackedSegment]:
        """The segments that hold codes."""
        return [segment for segment in self.segments if isinstance(segment, PackedSegment)]

    def dense_segment(self, role: int = DENSE, make: bool = True) -> DenseSegment | None:
        """The segment of tokens that stay as they are, or of those that wait until they fill a block of format `role`.

        Args:
            make: make it where there is none; else None is returned.
        """
        for segment in self.segments:
            if isinstance(segment, DenseSegment) and segment.role == role:
                return segment
        if not make:
            return None
        made = DenseSegment(self.keys.shape[0], self.keys.shape[1], role)
        self.segments.append(made)
        return made

    def _summary_segment(self) -> SummarySegment:
        for segment in self.segments:
            if isinstance(segment, SummarySegment):
                return segment
        made = SummarySegment(self.keys.shape[0])
        self.segments.append(made)
        return made

    def _segment(self, row: int, role: int, keys: torch.Tensor, queries: torch.Tensor | None) -> PackedSegment:
        """The segment that batch element `row` appends to: the last it has, or another one where new media came."""
        mine = [s for s in self.packed if s.role == role and s.tokens[row]]
        if mine and not (self.state.fresh and self.state.fresh[row]):
            return mine[-1]
        form = self.state.method.adapt(self.state.forms[role], keys, queries)
        for segment in reversed(self.packed):  # one that other batch elements opened serves as well
            if segment.role == role and segment.packer.form == form and not segment.tokens[row]:
                return segment
        batch, heads = self.keys.shape[0], self.keys.shape[1]
        kind = self.state.method.segment_class
        packer = kind.packer_class(form, batch, heads, self.keys.shape[-1], self.values.shape[-1], self.device)
        made = kind(packer, role, batch, self.device)
        self.segments.append(made)
        return made

    def narrow(self, state: CacheState, columns: torch.Tensor) -> None:
        """Let go of all but some tokens, while all of them are in the tail and wait to be stored.

        Args:
            state: to which the others never came.
            columns: int64 `[B, n]`, the tokens that stay; -1 for padding.
        """
        if self.asked is not None:
            before = self.seen - self.new
            self.new = int((columns >= before).any(0).sum())
            mine = (columns[:, columns.shape[1] - self.new :] - before).clamp(min=0).to(self.device)[:, None, :, None]
            query = self.asked.query
            query = query.gather(2, mine.expand(-1, query.shape[1], -1, query.shape[3]))
            self.asked = replace(self.asked, query=query, fills={})
        at = columns.clamp(min=0).to(self.device)[:, None, :, None]
        self.keys = self.keys.gather(2, at.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, at.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self.state, self.seen = state, columns.shape[1]
        self.packed_to = [0] * len(self.packed_to)
        self.evicted_to, self.decided_to = list(self.packed_to), list(self.packed_to)

    def trim(self, start: int) -> None:
        """Free the tail's tokens before a logical position."""
        if start > self.start:
            # clone, or the view would keep the whole prompt alive
            self.keys = self.keys[:, :, start - self.start :].clone()
            self.values = self.values[:, :, start - self.start :].clone()
            self.start = start

    def _slide(self) -> None:
        """Free what no later query can see. A crop past the window raises then, as in transformers' own sliding layer."""
        first = self.seen - self.window + 1
        if first > self.start:
            drop = first - self.start
            # a view of the newest tokens of a long prompt would keep all of it alive
            own = torch.clone if drop > self.keys.shape[2] // 4 else lambda view: view
            self.keys, self.values = own(self.keys[:, :, drop:]), own(self.values[:, :, drop:])
            self.start = first
        if self.segments and first - self._dropped >= (self.state.forms[0].group if self.state.forms else 1):
            for segment in self.segments:
                segment.drop_before(first)
            self.segments = [s for s in self.segments if not s.empty]
            self._dropped = first

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.get_seq_length() + compat.query_length(query_length), 0

    def get_seq_length(self) -> int:
        """Logical length: tokens ever seen, by any layer."""
        stretch = self.state.root.stretch
        return self.logical if stretch is None else stretch.seen + stretch.steps

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # its name before 5.3

    def crop(self, argument: int) -> None:
        """Cut the newest tokens: a negative count to remove, or (transformers 5.2) the length to keep."""
        self.state.root.end_stretch()
        whole = compat.crop_target(argument, self.logical)
        length = self.state.kept_before(whole)
        self.settle()
        window = self.state.window
        if length < self.seen and window is not None and self.seen >= window and not self.state.record_past:
            raise RuntimeError(
                f"cannot crop {self.seen - length} tokens: a layer's sliding window of {window} is full and older tokens "
                "are gone; call cache.activate_past_recording() before the prompt"
            )
        if length < max(self.evicted_to, default=0):
            raise RuntimeError(
                f"cannot crop to {length} tokens: of the first {max(self.evicted_to)} some are evicted for good; start a new "
                "cache, or crop no deeper than the newest tokens"
            )
        if self.state.seen != (self.seen if self._leads else length):
            raise RuntimeError(
                f"layer {self.index} has seen {self.seen} tokens, other layers have not: a forward failed half-way; start a "
                "new cache"
            )
        if self._leads:
            self.state.crop(length)
        if self.index == 0 and self.state.root is not self.state:
            self.state.root.crop(whole)
        self.logical = whole
        if not self.is_initialized:
            return
        if length < self.seen:
            self._cut(length)
        if self.window is not None and self.state.record_past:
            self._slide()

    def _cut(self, length: int) -> None:
        if self.scores is not None:
            self.scores.crop(length)
        if length < self.start or any(length < packed for packed in self.packed_to):
            for segment in self.segments:
                segment.crop(length)
            self.segments = [s for s in self.segments if not s.empty]
            self.packed_to = [min(packed, length) for packed in self.packed_to]
        self.decided_to = [min(decided, length) for decided in self.decided_to]
        keep = max(length - self.start, 0)
        self.keys, self.values = self.keys[:, :, :keep], self.values[:, :, :keep]
        self.start = min(self.start, length)
        self.seen = length

    def _rows(self, index: torch.Tensor) -> None:
        self.state.root.end_stretch()
        self.settle()
        if self._leads:
            self.state.rows(index)
        if self.index == 0 and self.state.root is not self.state:
            self.state.root.rows(index)
        if not self.is_initialized:
            return
        at = index.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)
        self.packed_to = [self.packed_to[i] for i in index.tolist()]
        self.evicted_to = [self.evicted_to[i] for i in index.tolist()]
        self.decided_to = [self.decided_to[i] for i in index.tolist()]
        if self.scores is not None:
            self.scores.rows(index)
        for segment in self.segments:
            segment.rows(index)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = torch.as_tensor(indices)
        self._rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Keep what a sliding window would drop, so that it can be cropped back."""
        self.state.record_past = self.state.root.record_past = True

    def reset(self) -> None:
        self.state = self.state.root
        if self.state.stretch is not None:
            self.state.stretch.abandon()
        if self.index == 0:
            self.state.reset()
        self.seen = self.logical = 0
        self._clear()

    def offload(self) -> None:
        raise RuntimeError("mmkv's cache does not offload layers; unset cache_implementation='offloaded'")

    prefetch = offload

    @property
    def _leads(self) -> bool:
        """Whether this layer moves the state that it shares with others."""
        return self.index == self.state.leader

    @property
    def batch_size(self) -> int:
        return len(self.packed_to)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        return storage_bytes(self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this layer holds."""
        tail = [] if self.keys is None else [self.keys, self.values]
        tail += [] if self.scores is None else self.scores.tensors()
        tail += [] if self.static is None else self.static.tensors()
        return tail + [t for segment in self.segments for t in segment.tensors()]
