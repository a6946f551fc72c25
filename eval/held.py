"""How many vision tokens a cache still holds."""

from __future__ import annotations

import torch

from mmkv.cache.dense import DenseSegment
from mmkv.cache.segment import PackedSegment


def vision_tokens_held(cache) -> float:
    """Image and video tokens that a cache holds, batch element 0, averaged over layers and KV heads."""
    return sum(_of_layer(layer) for layer in cache.layers) / len(cache.layers)


def _of_layer(layer) -> float:
    layout = layer.state.layout
    visual = (layout.visual & layout.valid)[0]
    heads = layer.keys.shape[1]
    held = float(visual[max(layer.start, layer.packed_to[0]) :].sum())
    for segment in layer.segments:
        if isinstance(segment, DenseSegment):
            held += sum(int(visual[at.long()].sum()) for at in segment.of(0)[2]) / heads
        elif isinstance(segment, PackedSegment):
            held += _of_packed(segment, visual, heads) / heads
    return held


def _of_packed(segment: PackedSegment, visual: torch.Tensor, heads: int) -> int:
    rows, slots = torch.nonzero(segment.count[:heads] > 0, as_tuple=True)
    at = segment.positions_of(rows, slots).cpu()
    counts = segment.count[rows, slots].cpu()
    inside = torch.arange(at.shape[1]) < counts[:, None]
    return int(visual[at[inside].long()].sum())
