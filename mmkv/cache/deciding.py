"""From a layer to what its method is told: builds the `Fill` and the first `Plan` of a batch element."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmkv.cache.fill import Asked, Fill, Plan
from mmkv.cache.method import DENSE
from mmkv.cache.scores import Scores
from mmkv.parts.saliency import per_kv_head

if TYPE_CHECKING:
    from mmkv.cache.layer import KVLayer


def fill_of(
    layer: KVLayer,
    row: int,
    asked: Asked | None,
    decoding: bool = False,
    residual: int | None = None,
    first: int | None = None,
    recall: bool = True,
) -> Fill | None:
    """What a method is told about batch element `row`, None where nothing has left the residual window.

    Args:
        asked: the attention that has just run.
        decoding: as `Fill.decoding`.
        residual: newest tokens that are not decided upon; the method's where None.
        first: logical position from which on the tail's tokens are meant; all that are not stored where None.
        recall: put stored tokens in front, where the method wants that.
    """
    state, method = layer.state, layer.state.method
    if residual is None:  # of an image nothing is ever rolled back
        residual = 0 if state.scales and state.recalls else method.residual_window
    valid = state.layout.valid[row]
    first = max(layer.packed_to[row], layer.start) if first is None else first
    columns = valid[first : layer.seen].nonzero()[:, 0] + first
    old = columns.numel() - residual
    if old <= 0:
        return None
    at = _at(columns - layer.start, layer.device)
    marks = None if state.marks is None else state.marks[row, columns[:old]]
    before = layer.seen - layer.new
    fresh = int((columns < before).sum())
    newest = columns[fresh:] - before
    norms = None
    if layer.index in state.norms:
        norms = torch.cat([torch.full((fresh,), torch.nan), state.norms[layer.index][row, newest].float().cpu()])
    chunks = state.chunk_of
    fill = Fill(
        layer=layer.index,
        layers=state.layers,
        place=layer.index - sum(i < layer.index for i in state.sliding),
        places=state.layers - len(state.sliding),
        columns=columns,
        old=old,
        fresh=fresh,
        keys=layer.keys[row, :, at],
        values=layer.values[row, :, at],
        query=None if asked is None else asked.query[row][:, _at(newest, asked.query.device)],
        layout=state.layout.rows(torch.tensor([row])).take(columns),
        protected=torch.zeros(old, dtype=torch.bool) if marks is None else marks == DENSE,
        boundary=int(columns[old]) if old < columns.numel() else layer.seen,
        seen=columns.numel() if any(s.tokens[row] for s in layer.packed) else int(valid[: layer.seen].sum()),
        scale=1.0 if asked is None else asked.scale,
        softcap=None if asked is None else asked.softcap,
        causal=asked is None or asked.causal,
        bytes_per_token=_bytes_per_token(layer),
        norms=norms,
        prompt=None if chunks is None else chunks.modality[row, chunks.valid[row]],
        prompt_before=0
        if chunks is None
        else int(chunks.valid[row, : max(int(columns[0]) - state.chunk_base, 0)].sum()),
        bytes_beyond=(columns.numel() - old) * (_dense_bytes(layer) - _bytes_per_token(layer)),
        decoding=decoding,
        scales=state.scales if state.recalls else (),
    )
    if recall and state.recalls:
        fill = _recall(layer, row, fill)
    if layer.scores is not None:
        fill.scores = layer.scores.of(row, fill.columns)
    return fill


def plan_of(layer: KVLayer, row: int, fill: Fill) -> Plan:
    """Keep everything, as the marks say: where methods begin."""
    state = layer.state
    form = torch.zeros(fill.old, dtype=torch.int8)
    if not state.forms:
        form = torch.full_like(form, DENSE)
    elif state.marks is not None:
        form = state.marks[row, fill.columns[..., : fill.old].clamp(min=0)]
    return Plan.everything(fill, form)


def keeps_all(fill: Fill, plan: Plan) -> bool:
    """Whether a plan drops no token."""
    return bool(plan.keep.all() if fill.present is None else plan.keep.equal(fill.present))


def changes(fill: Fill, plan: Plan) -> bool:
    """Whether a plan is anything but keeping everything as the marks say."""
    as_marked = not plan.split_formats or bool((plan.form == DENSE).all())
    return bool(plan.summaries) or not as_marked or not keeps_all(fill, plan)


def attending(layer: KVLayer, asked: Asked) -> list[torch.Tensor] | None:
    """Sparse prefill: of each batch element, the logical positions int64 that attend and are attended to; None for all.

    Only where a prompt came, all that is held is dense, and the method wants it for every batch element.
    """
    method = layer.state.method
    if method is None or not method.sparse_prefill or layer.window is not None or not all(layer.state.prompted):
        return None
    chosen = []
    for row in range(layer.keys.shape[0]):
        fill = fill_of(layer, row, asked)
        found = None if fill is None or fill.fresh else method.attends(fill)
        if found is None:
            return None
        asked.fills[row] = fill
        chosen.append(fill.columns[found.cpu()])
    return chosen


def look(layer: KVLayer, asked: Asked) -> None:
    """Leave what ran in this layer's attention to a token method that is asked behind it."""
    root = layer.state.root
    if layer.index in root.watched and any(layer.state.prompted):
        rows = range(layer.keys.shape[0])
        root.looked[layer.index] = [fill_of(layer, row, asked, residual=0, recall=False) for row in rows]


def accumulate(layer: KVLayer, asked: Asked, which) -> None:
    """Add the attention of new tokens to each key's mass, `layer.scores`.

    Args:
        which: rows to count, `CacheMethod.counted_rows` or `recent` of `mmkv.parts.probe_rows`.
    """
    batch, heads = layer.keys.shape[:2]
    if layer.scores is None:
        layer.scores = Scores(batch, heads, layer.device)
    layer.scores.extend(layer.seen, layer.new)
    for row in range(batch):
        fill = fill_of(layer, row, asked, residual=0)
        if fill is None:  # padding alone
            continue
        mass = per_kv_head(fill.mass(which(fill.length, first=fill.fresh)).sum, heads)
        layer.scores.add(row, fill.columns, mass)


def _at(columns: torch.Tensor, device) -> slice | torch.Tensor:
    """The same tokens as a slice where they are contiguous: a view in place of a copy."""
    first, last = (int(columns[0]), int(columns[-1])) if columns.numel() else (0, -1)
    return slice(first, last + 1) if last - first + 1 == columns.numel() else columns.to(device)


def _bytes_per_token(layer: KVLayer) -> float:
    """Of one token over all layers, KV heads and batch elements, as it will be stored: numbers, position, score."""
    d, dv, forms = layer.keys.shape[-1], layer.values.shape[-1], layer.state.forms
    size = layer.keys.element_size() * (d + dv)
    if forms:
        key_bits, value_bits = forms[0].bits(d, dv)
        size = (key_bits * d + value_bits * dv) / 8
    beside = 4 + 4 * (layer.scores is not None)
    return (size + beside) * layer.keys.shape[0] * layer.keys.shape[1] * layer.state.layers


def _dense_bytes(layer: KVLayer) -> float:
    """Of one token in the tail, over all layers, KV heads and batch elements."""
    batch, heads, _, d = layer.keys.shape
    return layer.keys.element_size() * (d + layer.values.shape[-1]) * batch * heads * layer.state.layers


def _recall(layer: KVLayer, row: int, fill: Fill) -> Fill:
    """Put the tokens that each head stores dense in front of those of the tail."""
    stored = layer.dense_segment(make=False)
    if stored is None or not stored.tokens[row]:
        return fill
    keys, values, before = stored.padded(row)
    most = before.shape[1]
    columns = torch.cat([before, fill.columns.expand(fill.heads, -1)], 1)
    layout = layer.state.layout.rows(torch.full((fill.heads,), row))
    sinks = torch.zeros_like(before, dtype=torch.bool)
    if layer.state.marks is not None:
        sinks = (layer.state.marks[row][before.clamp(min=0)] == DENSE) & (before >= 0)
    return replace(
        fill,
        columns=columns,
        old=fill.old + most,
        fresh=fill.fresh + most,
        keys=torch.cat([keys, fill.keys], 1),
        values=torch.cat([values, fill.values], 1),
        layout=layout.gather(columns.clamp(min=0)),
        protected=torch.cat([sinks, fill.protected.expand(fill.heads, -1)], 1),
        present=torch.nn.functional.pad(before >= 0, (0, fill.old), value=True).to(layer.device),
        recalled=most,
        norms=None if fill.norms is None else torch.nn.functional.pad(fill.norms, (most, 0), value=torch.nan),
    )
