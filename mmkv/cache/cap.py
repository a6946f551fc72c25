"""A hard limit on the bytes of a layer: what the prompt's end looked at least goes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmkv.cache.method import DENSE, MIN_RESIDUAL
from mmkv.cache.segment import PackedSegment
from mmkv.cache.summary import SummarySegment
from mmkv.parts.storage import storage_bytes

if TYPE_CHECKING:
    from mmkv.cache.layer import KVLayer

SLACK = 0.05  # dropped beyond what is needed, so that it is not needed again at once


def fit(layer: KVLayer, limit: float) -> None:
    """Drop packed blocks and stored tokens of a layer, those with the least attention first, until it holds `limit` bytes.

    Sinks stay, and so do the newest tokens; where even those are too many, the oldest of the tail go, down to 32.

    Raises:
        RuntimeError: the newest tokens alone are more than the limit.
    """
    held = storage_bytes(layer.tensors())
    if held <= limit:
        return
    _store_tail(layer)
    held = storage_bytes(layer.tensors())
    if held <= limit:
        return
    goal = limit * (1 - SLACK)
    layer.prune(at_once=True)
    held = storage_bytes(layer.tensors())
    while held > goal and _evict(
        layer, (held - goal) / 2
    ):  # by halves: their scores, tables and positions go with them
        layer.prune(at_once=True)
        held = storage_bytes(layer.tensors())
    if held > limit:
        _shorten_tail(layer, held - limit)
        held = storage_bytes(layer.tensors())
    if held > limit:
        raise RuntimeError(
            f"max_bytes: layer {layer.index} may hold {int(limit):,} bytes, its newest {layer.keys.shape[2]} tokens and sinks "
            f"take {held:,}; allow at least {held * layer.state.layers:,} bytes in all"
        )


def _store_tail(layer: KVLayer) -> None:
    """Pack all of the tail but the newest 32 tokens; where nothing is packed, move it where tokens can go one by one."""
    if layer.state.forms:
        layer.flush(MIN_RESIDUAL)
        return
    end = layer.seen - MIN_RESIDUAL
    valid = layer.state.layout.valid
    for row, packed_to in enumerate(layer.packed_to):
        first = max(packed_to, layer.start)
        columns = valid[row, first:end].nonzero()[:, 0] + first
        if columns.numel():
            at = (columns - layer.start).to(layer.device)
            layer.dense_segment().append(row, layer.keys[row, :, at], layer.values[row, :, at], columns)
        layer.packed_to[row] = max(end, packed_to)
    layer.trim(min(layer.packed_to))


def _evict(layer: KVLayer, excess: float) -> bool:
    """Free at least `excess` bytes of the segments, whole blocks and tokens; False where nothing is left to free."""
    segments = [s for s in layer.segments if not isinstance(s, SummarySegment) and not s.empty]
    units = [_blocks(layer, s) if isinstance(s, PackedSegment) else _tokens(layer, s) for s in segments]
    if not units:
        return False
    score = torch.cat([u[0] for u in units])
    size = torch.cat([torch.full_like(u[0], u[1]) for u in units])
    owner = torch.cat([torch.full(u[0].shape, i) for i, u in enumerate(units)])
    order = score.argsort(stable=True)
    order = order[score[order] < torch.inf]
    before = size[order].cumsum(0) - size[order]
    gone = torch.zeros_like(score, dtype=torch.bool)
    gone[order[before < excess]] = True
    for i, segment in enumerate(segments):
        mine = gone[owner == i]
        if not bool(mine.any()):
            continue
        if isinstance(segment, PackedSegment):
            held = (segment.count > 0).cpu().nonzero()
            segment.drop(*held[mine].unbind(1))
        else:
            segment.keep(~mine)
    layer.segments = [s for s in layer.segments if not s.empty]
    if bool(gone.any()):
        layer.evicted_to = list(layer.packed_to)
    return bool(gone.any())


def _blocks(layer: KVLayer, segment: PackedSegment) -> tuple[torch.Tensor, float]:
    """Mean score of each block in use, in the order of the table, and the bytes of one."""
    size = storage_bytes(segment.tensors()) / max(int((segment.count > 0).sum()), 1)
    rows, slots = (segment.count > 0).cpu().nonzero(as_tuple=True)
    at = segment.positions_of(rows, slots).cpu()  # [N, group]
    inside = torch.arange(at.shape[1]) < segment.count.cpu()[rows, slots][:, None]
    score = _score(layer, rows[:, None], at, segment.heads)
    return torch.where(inside, score, 0.0).sum(1) / inside.sum(1), size


def _tokens(layer: KVLayer, segment) -> tuple[torch.Tensor, float]:
    """Score of each stored token, +inf for sinks, and the bytes of one."""
    rows = torch.arange(len(segment.lengths)).repeat_interleave(torch.tensor(segment.lengths))
    score = _score(layer, rows, segment.positions.long(), segment.heads)
    marks = layer.state.marks
    if marks is not None:
        score = score.masked_fill(marks[rows // segment.heads, segment.positions.long()] == DENSE, torch.inf)
    return score, storage_bytes(segment.tensors()) / max(len(rows), 1)


def _score(layer: KVLayer, rows: torch.Tensor, at: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention mass of tokens at logical positions; those that came after the prompt count as its mean."""
    if layer.scores is None or not len(layer.scores.positions):
        return torch.zeros(at.shape)
    known, mass = layer.scores.positions, layer.scores.mass.cpu()
    at = at.to(known.dtype)
    place = torch.searchsorted(known, at.contiguous()).clamp(max=len(known) - 1)
    return torch.where(known[place] == at, mass[rows // heads, rows % heads, place], mass.mean())


def _shorten_tail(layer: KVLayer, excess: float) -> None:
    """Free the oldest tokens of the tail, down to the newest 32."""
    length = layer.keys.shape[2]
    per_token = storage_bytes([layer.keys, layer.values]) / max(length, 1)
    drop = min(int(-(-excess // per_token)) + MIN_RESIDUAL // 2, length - MIN_RESIDUAL)
    if drop > 0:
        start = layer.start + drop
        layer.packed_to = [max(p, start) for p in layer.packed_to]
        layer.evicted_to = list(layer.packed_to)
        layer.trim(start)
