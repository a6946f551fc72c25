"""Sinks: the first tokens of a sequence stay dense, in a segment of their own."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, held

import mmkv
from mmkv.cache import KIVI, VidKV, WaterfillKV

SINKS = KIVI(bits=2, group=32, residual=32, sinks=4)


def test_the_first_valid_tokens_are_kept_to_the_bit():
    """Of each batch element, behind its padding; however the prompt is split."""
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, :45] = False
    for sizes in ((150,), (2, 148), (1, 1, 1, 1, 1, 145)):
        bare, at = Bare(SINKS, batch=2), 0
        for size in sizes:
            bare.feed(size, valid[:, at : at + size])
            at += size
        for row, first in enumerate((0, 45)):
            positions, keys, values, packed = held(bare.layer, row)
            assert positions.tolist() == list(range(first, 150))
            assert not packed[:4].any()
            assert packed[4 : 4 + 32].all()
            assert torch.equal(keys[:, :4], bare.keys[0][row, :, first : first + 4].double())
            assert torch.equal(values[:, :4], bare.values[0][row, :, first : first + 4].double())


@pytest.mark.parametrize("target", [140, 60, 3, 0])
def test_crop_reaches_the_sinks(target):
    bare = Bare(SINKS).feed(150)
    bare.layer.crop(target - 150)
    if target:
        positions, keys, _, _ = held(bare.layer, 0)
        assert positions.tolist() == list(range(target))
        kept = min(target, 4)
        assert torch.equal(keys[:, :kept], bare.keys[0][0, :, :kept].double())
    bare = bare if target else Bare(SINKS)
    bare.keys[0], bare.values[0] = bare.keys[0][:, :, :target], bare.values[0][:, :, :target]
    bare.feed(150 - target)
    assert held(bare.layer, 0)[0].tolist() == list(range(150))


def test_rows_move_with_the_batch():
    bare = Bare(SINKS, batch=2).feed(150)
    want = [held(bare.layer, row) for row in (1, 0, 1)]
    bare.layer.reorder_cache(torch.tensor([1, 0, 1]))
    for row, (positions, keys, _, _) in enumerate(want):
        got = held(bare.layer, row)
        assert torch.equal(got[0], positions)
        assert torch.equal(got[1], keys)


def test_a_sliding_window_lets_go_of_them():
    bare = Bare(SINKS, window=64).feed(40)
    for _ in range(200):
        bare.feed(1)
    assert sum(sum(s.tokens) for s in bare.layer.segments if s not in bare.layer.packed) == 0


@pytest.mark.parametrize("mode", ["greedy", "beam", "lookup"])
@pytest.mark.parametrize("method", [SINKS, VidKV(group=32, residual=32), WaterfillKV(group=32, residual=32)], ids=repr)
def test_attention_sees_them(method, mode):
    model = rm.make("qwen2_5_vl")
    prompts = [rm.default_prompt(model), rm.second_prompt(model)]
    given = rm.inputs(model, prompts[:1] if mode == "lookup" else prompts)
    with mmkv.wrapped(model, cache=[method]), checked_attention() as errors:
        rm.generate(model, given, mode, new=8)
    assert errors


@pytest.mark.parametrize("sinks", [-1, 2.5, 5000])
@pytest.mark.parametrize("method", [KIVI, VidKV, WaterfillKV])
def test_impossible_sinks(method, sinks):
    with pytest.raises(ValueError, match="sinks"):
        method(sinks=sinks)
