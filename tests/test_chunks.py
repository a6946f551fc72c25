"""`prefill_chunk`: a prompt read in chunks gives what it gives in one piece, and the peak of the cache falls."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import checked_attention, held_by_head
from transformers import DynamicCache

import mmkv
from mmkv.cache import KIVI, SnapKV


def prompts(model, tokens=200):
    return [rm.default_prompt(model, tokens), rm.second_prompt(model, tokens) + rm.words(90, 9)]


@pytest.mark.parametrize("mode", ["greedy", "beam", "sample"])
@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision", "qwen2", "gemma3_text", "gpt_oss"]
)
def test_dense_chunks_are_stock(family, mode):
    """The same tokens; logits to rounding, since attention over other shapes sums in another order."""
    model = rm.make(family)
    given = rm.inputs(model, prompts(model))
    keep = dict(return_dict_in_generate=True, output_logits=True)
    stock = rm.generate(model, given, mode, **keep)
    with mmkv.wrapped(model, prefill_chunk=64):
        ours = rm.generate(model, given, mode, **keep)
    assert torch.equal(stock.sequences, ours.sequences)
    for a, b in zip(stock.logits, ours.logits):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)


def test_all_logits_of_a_plain_forward():
    model = rm.make("qwen3_vl")
    given = rm.inputs(model, prompts(model))
    with torch.no_grad():
        stock = model(**given).logits
        with mmkv.wrapped(model, prefill_chunk=70):
            ours = model(**given).logits
    assert ours.shape == stock.shape
    valid = given["attention_mask"].bool()
    assert torch.allclose(stock[valid], ours[valid], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llama"])
@pytest.mark.parametrize(
    "cache",
    [[KIVI(group=32, residual=32)], [SnapKV(budget=0.3)], [SnapKV(budget=0.3), KIVI(group=32, residual=32)]],
    ids=str,
)
def test_attention_between_chunks(family, cache):
    model = rm.make(family)
    with mmkv.wrapped(model, cache=cache, prefill_chunk=64), checked_attention() as errors:
        rm.generate(model, rm.inputs(model, prompts(model)), new=4)
        rm.generate(model, rm.inputs(model, prompts(model)), "beam", new=4)
    assert errors


@pytest.mark.parametrize("chunk", [64, 100, 400])
@pytest.mark.parametrize("budget", [0.25, 128])
def test_the_budget_is_that_of_the_whole_prompt(budget, chunk):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[SnapKV(budget=budget)], prefill_chunk=chunk), torch.no_grad():
        cache = model(torch.tensor([rm.words(1000)])).past_key_values
    for layer in cache.layers:
        for head in range(2):
            count = held_by_head(layer, 0, head)[0].numel()
            assert count == pytest.approx(250 if budget == 0.25 else 128, abs=8)


def test_the_tower_runs_once_and_the_peak_falls():
    model = rm.make("qwen2_5_vl", head_dim=64)
    given = rm.inputs(model, [[*rm.words(5), rm.Video(60, 8, 8), *rm.words(5)]])
    runs = []
    model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    peaks = {}
    for chunk in (None, 128):
        with mmkv.wrapped(model, cache=[SnapKV(budget=0.2), KIVI(group=32, residual=32)], prefill_chunk=chunk):
            runs.clear()
            rm.generate(model, given, new=2)
            assert len(runs) == 1
            report = mmkv.report(model)
            peaks[chunk] = report.kv_bytes_peak
            assert report.kv_bytes_peak >= report.kv_bytes
            dense = report.kv_bytes_dense
    assert peaks[None] > dense / len(model.model.language_model.layers)  # one layer's whole prompt
    assert peaks[128] < 0.5 * peaks[None]


@pytest.mark.parametrize("bad", [0, 63, 1.5, True, "64"])
def test_impossible_chunks(bad):
    with pytest.raises(ValueError, match="prefill_chunk"):
        mmkv.wrap(rm.make("qwen2"), prefill_chunk=bad)


def test_hidden_states_are_refused():
    model = rm.make("qwen2")
    with mmkv.wrapped(model, prefill_chunk=64), pytest.raises(ValueError, match="output_hidden_states"):
        model(torch.tensor([rm.words(200)]), output_hidden_states=True)


def test_a_failed_chunk_leaves_the_model_usable():
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(200)])
    with mmkv.wrapped(model, prefill_chunk=64), torch.no_grad():
        layer = model.model.layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            model(ids)
        hook.remove()
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 200


@pytest.mark.parametrize("chunk", [64, 100, 128, 300])
def test_survivors_of_small_chunks_fill_whole_blocks(chunk):
    """A few tokens survive each chunk; they wait for one another, so that no chunk leaves a block that is nearly empty."""
    model = rm.make("qwen2")
    sizes = {}
    for size in (None, chunk):
        with mmkv.wrapped(model, cache=[SnapKV(budget=0.3), KIVI(group=64, residual=32)], prefill_chunk=size):
            cache = model(torch.tensor([rm.words(1200)])).past_key_values
            sizes[size] = mmkv.report(model).kv_bytes
        for layer in cache.layers:
            for head in range(2):
                blocks = sum(int((s.count[head] > 0).sum()) for s in layer.packed)
                assert blocks <= 360 // 64 + 1
    assert sizes[chunk] < 1.15 * sizes[None]
