"""Every method holds the bytes it promises: tokens held x bits of their format, plus what its description names, within 2 %."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cache_reference import Bare

import mmkv
from mmkv._report import storage_bytes
from mmkv.cache import KIVI, SnapKV, WaterfillKV, ZipVL, pipeline
from mmkv.cache.dense import DenseSegment
from mmkv.cache.eviction import Eviction
from mmkv.cache.segment import PackedSegment
from mmkv.cache.summary import SummarySegment

HEADS, DIM, TOKENS = 2, 128, 8192
METHODS = {e.name: e.method() for e in mmkv.methods() if e.kind == "cache" and not e.method.next_scale}
MIXES = {
    "SnapKV x KIVI": pipeline((SnapKV(budget=0.25), KIVI())),
    "SnapKV x WaterfillKV": pipeline((SnapKV(budget=0.5), WaterfillKV())),
    "ZipVL that evicts": ZipVL(store="evict", text=False, tau=0.9),
}


def promised(bare) -> float:
    """Bytes of what one layer holds, from counts of tokens and the bits of their formats."""
    layer, total = bare.layer, 0.0
    total += 2 * HEADS * 2 * DIM * layer.keys.shape[2]  # the tail, bf16
    for segment in layer.segments:
        if isinstance(segment, DenseSegment):
            total += sum(segment.lengths) * (2 * 2 * DIM + 4)  # bf16 and a position
        elif isinstance(segment, SummarySegment):
            total += segment.counts.numel() * (2 * 2 * DIM + 4)
        else:
            assert isinstance(segment, PackedSegment)
            form = segment.packer.form
            key_bits, value_bits = segment.bits if hasattr(segment, "bits") else form.bits(DIM)
            blocks = int((segment.count > 0).sum())  # a block that is not full takes the space of a full one
            total += blocks * form.group * DIM * (key_bits + value_bits) / 8 + 12 * blocks
            if segment.positions is not None:
                total += 4 * segment.positions.numel()
    if layer.scores is not None:
        total += 4 * layer.scores.mass.numel() + 4 * len(layer.scores.positions)
    return total


@pytest.mark.parametrize("name", METHODS | MIXES)
def test_bytes(name):
    method = (METHODS | MIXES)[name]
    bare = Bare(method, heads=HEADS, dim=DIM, dtype=torch.bfloat16).feed(TOKENS)
    held = storage_bytes(bare.layer.tensors())
    assert held == pytest.approx(promised(bare), rel=0.02)
    assert held < HEADS * 2 * DIM * 2 * TOKENS, "it compresses"


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1, 1024])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m, Eviction)])
def test_tokens(name, budget):
    """A budget is kept within 2 %, on average over heads and layers."""
    method = dataclasses.replace(METHODS[name], budget=budget)
    bare = Bare(method, heads=HEADS, dim=32, layers=3).feed(4096)
    held = [
        sum(sum(s.tokens) for s in layer.segments) + layer.seen - max(layer.packed_to[0], layer.start)
        for layer in bare.layers
    ]
    want = budget if isinstance(budget, int) else budget * 4096
    assert sum(held) / 3 == pytest.approx(want, rel=0.02)
