"""What a fresh reader broke: rows of a batch that hold others back, limits over long sessions, chunks of small budgets."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, held_by_head

import mmkv
from mmkv._report import storage_bytes
from mmkv.cache import H2O, KIVI, KVMerger, RazorAttention, SnapKV, StreamingLLM, WaterfillKV, ZipCache, ZipVL

EVICTING = [
    SnapKV(budget=0.1),
    SnapKV(budget=32),
    H2O(budget=0.1),
    StreamingLLM(budget=0.1, sinks=0),
    KVMerger(budget=0.1),
]


def held(cache) -> int:
    return storage_bytes(t for layer in cache.layers for t in layer.tensors())


@pytest.mark.parametrize("method", EVICTING, ids=lambda m: type(m).__name__)
def test_evicted_tokens_are_not_seen_because_another_row_is_short(method):
    """The short row keeps the tail long; what the long row dropped is still in it, and must not be attended to."""
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[method]), checked_attention():
        alone = rm.generate(model, rm.inputs(model, [rm.words(200)]), new=12)
        both = rm.generate(model, rm.inputs(model, [rm.words(200), rm.words(10, 4)]), new=12)
    assert torch.equal(alone[0, -12:], both[0, -12:])


@pytest.mark.parametrize("short", [1, 10, 40, 100])
@pytest.mark.parametrize(
    "method",
    [SnapKV(budget=0.25), StreamingLLM(), mmkv.cache.PrefixKV(), ZipVL(store="evict", tau=0.7, text=False)],
    ids=lambda m: type(m).__name__,
)
def test_a_short_row_does_not_keep_a_long_one_in_memory(method, short):
    model = rm.make("qwen2")
    sizes = []
    for prompts in ([rm.words(2000)], [rm.words(2000), rm.words(short, 1)]):
        with mmkv.wrapped(model, cache=[method]):
            out = rm.generate(model, rm.inputs(model, prompts), new=2, return_dict_in_generate=True)
            sizes.append(held(out.past_key_values))
    tail = 3 * 2 * 2 * 2 * 16 * 4 * (32 + short + 1)  # layers, rows, heads, keys and values, numbers, bytes, tokens
    assert sizes[1] <= sizes[0] + tail


@pytest.mark.parametrize("chunk", [64, 100])
def test_a_chunk_that_is_all_padding(chunk):
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(300), rm.words(60, 1)])
    with mmkv.wrapped(model, cache=[H2O()], prefill_chunk=chunk), checked_attention() as errors:
        rm.generate(model, given, new=6)
    assert errors


@pytest.mark.parametrize("method", [SnapKV, StreamingLLM, KVMerger])
@pytest.mark.parametrize("budget", [64, 90, 96])
def test_a_small_budget_is_met_through_many_chunks(method, budget):
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(6400)])
    with mmkv.wrapped(model, cache=[method(budget=budget, sinks=0)], prefill_chunk=64), torch.no_grad():
        cache = model(ids).past_key_values
    for layer in cache.layers:
        assert held_by_head(layer, 0, 0)[0].numel() == pytest.approx(budget, abs=2)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("method", [SnapKV, H2O])
def test_a_budget_in_bytes_is_no_less_than_what_is_held(method, chunk):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[method(budget="120KiB")], prefill_chunk=chunk), torch.no_grad():
        cache = model(torch.tensor([rm.words(1500)])).past_key_values
    scores = 2 if method is H2O else 1  # positions of the scores, until they are pruned
    assert 0.7 * 120 * 1024 <= held(cache) <= 120 * 1024 * (1.0 if scores == 1 else 1.3)


@pytest.mark.parametrize("cache", [[], [H2O()], [SnapKV(budget=0.5)], [KIVI(group=32, residual=32)]], ids=str)
def test_a_limit_holds_over_a_long_session(cache):
    """60 turns of 300 tokens: what is known of evicted tokens goes with them."""
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=cache, max_bytes="100KiB"), torch.no_grad():
        mine = mmkv.Cache(model)
        for turn in range(60):
            seen = mine.get_seq_length()
            mask = torch.ones(1, seen + 300, dtype=torch.long)
            model(input_ids=torch.tensor([rm.words(300, turn)]), attention_mask=mask, past_key_values=mine)
            assert held(mine) <= 100 * 1024
        for layer in mine.layers:
            assert held_by_head(layer, 0, 0)[0].numel() >= 45
            assert layer.scores is None or len(layer.scores.positions) < 3000


def test_h2o_forgets_the_scores_of_what_it_dropped():
    bare = Bare(H2O(budget=64)).feed(200)
    for _ in range(600):
        bare.feed(1)
    assert len(bare.layer.scores.positions) < 500


def test_a_limit_packs_the_tail_before_it_drops_what_is_packed():
    bare = Bare(KIVI(residual=256, group=32), heads=2, dim=64)
    bare.state.max_bytes = 160_000  # 500 tokens are 512,000 dense, about 90,000 packed with 32 dense
    bare.feed(500, queries=torch.randn(1, 4, 500, 64))
    assert held_by_head(bare.layer, 0, 0)[0].numel() == 500


@pytest.mark.parametrize(
    "methods", [[H2O(), ZipVL()], [RazorAttention(least=0), ZipCache()], [SnapKV(), H2O()]], ids=str
)
def test_methods_that_decide_anew_want_to_be_alone(methods):
    model = rm.make("qwen2")
    with pytest.raises(ValueError, match="decides anew") as caught:
        mmkv.wrap(model, cache=methods)
    assert "\n" not in str(caught.value)


def test_a_failed_forward_is_told():
    model = rm.make("qwen2")
    with mmkv.wrapped(model), torch.no_grad():
        cache = mmkv.Cache(model)
        model(torch.tensor([rm.words(100)]), past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            model(torch.tensor([[30]]), past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="failed half-way"):
            model(torch.tensor([[30]]), past_key_values=cache)
        with pytest.raises(RuntimeError, match="failed half-way"):
            cache.crop(-1)


def test_decode_time_decisions_leave_the_prompts_alone():
    """A prompt whose text all stays is not decided upon anew when decoding begins."""
    bare = Bare(ZipVL(store="evict", interval=20)).feed(300)
    assert held_by_head(bare.layer, 0, 0)[0].numel() == 300
    for _ in range(80):
        bare.feed(1)
    assert set(range(268)) <= set(held_by_head(bare.layer, 0, 0)[0].tolist())


def test_h2o_with_a_count_keeps_to_it_whatever_the_prompt():
    for prompt in (100, 400, 600):
        bare = Bare(H2O(budget=512)).feed(prompt)
        for _ in range(700 - prompt):
            bare.feed(1)
        assert 480 <= held_by_head(bare.layer, 0, 0)[0].numel() <= 512 + 32


def test_a_limit_given_later_holds_for_an_old_cache():
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[WaterfillKV(residual=32)]), torch.no_grad():
        cache = mmkv.Cache(model)
        model(torch.tensor([rm.words(1000)]), past_key_values=cache)
        before = held(cache)
    with mmkv.wrapped(model, cache=[WaterfillKV(residual=32)], max_bytes=before // 2), torch.no_grad():
        model(torch.tensor([[30]]), past_key_values=cache)
        assert held(cache) <= before // 2
