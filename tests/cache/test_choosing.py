"""Every method that chooses (evicts, merges, picks formats), on every family and in every way of generating.

Registering such a method puts it in here. Its own invariants are in a file of its own.
"""

from __future__ import annotations

from functools import cache

import pytest
import random_models as rm
import torch
from cache_reference import CHOOSING, Bare, checked_attention, held_by_head, keep_all
from transformers import DynamicCache

import mmkv
from mmkv._report import storage_bytes

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "qwen2", "llama", "gemma3_text")


def batch(model, mode, tokens=160):
    one = rm.default_prompt(model, tokens)
    return rm.inputs(model, [one] if mode == "lookup" else [one, rm.second_prompt(model, tokens) + rm.words(80, 9)])


@cache
def stock(family: str, mode: str) -> torch.Tensor:
    model = rm.make(family)
    return rm.generate(model, batch(model, mode), mode)


@pytest.mark.parametrize("mode", rm.MODES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHOOSING)
def test_keeping_everything_is_stock(name, family, mode):
    model = rm.make(family)
    with mmkv.wrapped(model, cache=[keep_all(CHOOSING[name])]):
        assert torch.equal(stock(family, mode), rm.generate(model, batch(model, mode), mode))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHOOSING)
def test_attention_over_what_is_held(name, family):
    """Padded batches, greedy and beams: exact over what is held, nothing held twice, the newest tokens held."""
    model = rm.make(family)
    with mmkv.wrapped(model, cache=[CHOOSING[name]]), checked_attention() as errors:
        rm.generate(model, batch(model, "greedy"), new=4)
        rm.generate(model, batch(model, "beam"), "beam", new=4)
    assert errors, "nothing was compressed"


@pytest.mark.parametrize("mode", ["sample", "lookup", "returns"])
@pytest.mark.parametrize("name", CHOOSING)
def test_other_modes(name, mode):
    model = rm.make("qwen2_5_vl")
    with mmkv.wrapped(model, cache=[CHOOSING[name]]), checked_attention() as errors:
        rm.generate(model, batch(model, mode), mode, new=5)
    assert errors


@pytest.mark.parametrize("name", CHOOSING)
def test_assisted(name):
    model, helper = rm.make("llama"), rm.make("llama", seed=1)
    given = rm.inputs(model, [rm.words(180)])
    with mmkv.wrapped(model, cache=[CHOOSING[name]]), checked_attention() as errors:
        plain = rm.generate(model, given, new=12)
        assisted = rm.generate(model, given, new=12, assistant_model=helper)
    assert errors
    assert plain.shape == assisted.shape


@pytest.mark.parametrize("name", CHOOSING)
def test_two_turns(name):
    """The second turn brings new media, the third text alone; each is given its new tokens only."""
    model = rm.make("qwen2_5_vl")
    prompts = [rm.default_prompt(model, 160), [*rm.words(9, 5), rm.Video(12, 8, 8), *rm.words(5, 6)], rm.words(40, 7)]
    with mmkv.wrapped(model, cache=[CHOOSING[name]]), checked_attention() as errors, torch.no_grad():
        cache, seen = mmkv.Cache(model), 0
        for prompt in prompts:
            given = rm.inputs(model, [prompt])
            length = given["input_ids"].shape[1]
            given.pop("attention_mask")
            positions = torch.arange(seen, seen + length).expand(3, 1, -1)
            model(**given, position_ids=positions, past_key_values=cache)
            seen += length
        assert cache.get_seq_length() == seen
    assert errors


@pytest.mark.parametrize("name", CHOOSING)
def test_a_batch_holds_what_its_rows_hold_alone(name):
    model = rm.make("qwen2")
    prompts = [rm.words(240), rm.words(150, 1)]
    with mmkv.wrapped(model, cache=[CHOOSING[name]]):
        keep = dict(new=1, return_dict_in_generate=True)
        both = rm.generate(model, rm.inputs(model, prompts), **keep).past_key_values
        for row, prompt in enumerate(prompts):
            alone = rm.generate(model, rm.inputs(model, [prompt]), **keep).past_key_values
            pad = 240 - len(prompt)
            for one, two in zip(alone.layers, both.layers):
                for head in range(2):
                    a, b = held_by_head(one, 0, head), held_by_head(two, row, head)
                    assert torch.equal(a[0], b[0] - pad)
                    assert torch.equal(a[3], b[3])
                    assert torch.allclose(a[1], b[1], atol=0.05, rtol=0.05)  # a code may tip over; positions may not


@pytest.mark.parametrize("name", CHOOSING)
def test_half_precision(name):
    model = rm.make("qwen2").to(torch.bfloat16)
    given = rm.inputs(model, [rm.words(180), rm.words(130, 1)])
    with mmkv.wrapped(model, cache=[CHOOSING[name]]), checked_attention(limit=4e-3) as errors:
        rm.generate(model, given, new=4)
    assert errors


@pytest.mark.parametrize("name", CHOOSING)
def test_report_counts_what_is_held(name):
    model = rm.make("qwen2_5_vl")
    with mmkv.wrapped(model, cache=[CHOOSING[name]]):
        cache = DynamicCache(config=model.config)
        rm.generate(model, batch(model, "greedy"), past_key_values=cache)
        report = mmkv.report(model)
        held = [
            sum(held_by_head(layer, row, head)[0].numel() for row in range(2) for head in range(2)) / 2
            for layer in cache.layers
        ]
        assert report.tokens_held == pytest.approx(sum(held) / len(held))
        assert report.kv_bytes == storage_bytes(t for layer in cache.layers for t in layer.tensors())


@pytest.mark.parametrize("name", CHOOSING)
def test_reorder_and_select(name):
    bare = Bare(CHOOSING[name], batch=3, layers=2)
    bare.feed(200)
    want = [[held_by_head(layer, row, head) for head in range(2)] for layer in bare.layers for row in range(3)]
    for layer in bare.layers:
        layer.reorder_cache(torch.tensor([2, 1, 1]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 5]))
    for i, layer in enumerate(bare.layers):
        for row, was in enumerate((2, 1)):
            for head in range(2):
                for a, b in zip(held_by_head(layer, row, head), want[3 * i + was][head]):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_crop_that_needs_evicted_tokens_is_refused(name):
    bare = Bare(CHOOSING[name]).feed(200)
    if not bare.layer.evicted_to[0]:
        pytest.skip("nothing was evicted")
    with pytest.raises(RuntimeError, match="evicted for good"):
        bare.layer.crop(-190)
    assert bare.layer.get_seq_length() == bare.state.seen == 200
    bare.layer.crop(-20)
    assert bare.layer.get_seq_length() == bare.state.seen == 180
    bare.feed(1)
    assert held_by_head(bare.layer, 0, 0)[0][-1] == 180
