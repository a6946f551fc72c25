"""SnapKV, StreamingLLM and H2O: hand-computed choices, budgets kept, bytes freed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head

import mmkv
from mmkv.cache import H2O, KIVI, SnapKV, StreamingLLM, VidKV
from mmkv.layout import IMAGE, VIDEO, TokenLayout


def looked_at(tokens, strong, dim=16, heads=2, group=2):
    """Keys and queries such that the queries attend to the tokens `strong[h]` of head h, the earlier in the list the more."""
    keys = torch.zeros(1, heads, tokens, dim)
    queries = torch.zeros(1, heads * group, tokens, dim)
    queries[..., 0] = 4.0
    for head, chosen in enumerate(strong):
        for rank, token in enumerate(chosen):
            keys[0, head, token, 0] = 9.0 - rank
    return keys, queries


def kept(bare, head, row=0, layer=0):
    return held_by_head(bare.layers[layer], row, head)[0].tolist()


# --- SnapKV


def test_snapkv_keeps_what_the_last_queries_look_at():
    keys, queries = looked_at(100, [[10, 50], [20, 61]])
    bare = Bare(SnapKV(budget=34, kernel=1)).feed(100, keys=keys, queries=queries)
    newest = list(range(68, 100))
    assert kept(bare, 0) == [10, 50, *newest]
    assert kept(bare, 1) == [20, 61, *newest]


def test_snapkv_pools_votes():
    """With a kernel of 3 the neighbours of a strong token come with it; the average of three is the same for all of them."""
    keys, queries = looked_at(100, [[10], [20]])
    bare = Bare(SnapKV(budget=35, kernel=3)).feed(100, keys=keys, queries=queries)
    assert kept(bare, 0)[:3] == [9, 10, 11]
    assert kept(bare, 1)[:3] == [19, 20, 21]


def test_snapkv_against_a_naive_loop():
    """Window votes by a full softmax in fp64, GQA mean, average pooling, top-k per KV head."""
    torch.manual_seed(0)
    n, window, kernel, budget = 150, 8, 5, 60
    keys, queries = torch.randn(1, 2, n, 16), torch.randn(1, 4, n, 16)
    bare = Bare(SnapKV(budget=budget, window=window, kernel=kernel)).feed(n, keys=keys, queries=queries)
    for head in range(2):
        votes = torch.zeros(n, dtype=torch.float64)
        for q_head in (2 * head, 2 * head + 1):
            for t in range(n - window, n):
                scores = keys[0, head, : t + 1].double() @ queries[0, q_head, t].double() / 4
                votes[: t + 1] += scores.softmax(0) / 2
        votes = votes[: n - 32]
        padded = torch.nn.functional.pad(votes, (2, 2))
        pooled = torch.stack([padded[i : i + kernel].mean() for i in range(n - 32)])
        want = sorted(pooled.topk(budget - 32).indices.tolist()) + list(range(n - 32, n))
        assert kept(bare, head) == want


@pytest.mark.parametrize("method", [SnapKV, H2O])
@pytest.mark.parametrize(("budget", "count"), [(0.5, 100), (0.25, 50), (0.9, 180), (64, 64), (32, 32), (500, 200)])
def test_budgets(method, budget, count):
    bare = Bare(method(budget=budget), batch=2)
    valid = torch.ones(2, 260, dtype=torch.bool)
    valid[0, :60] = False  # 200 real tokens and 260
    bare.feed(260, valid)
    for head in range(2):
        assert len(kept(bare, head)) == count
        real = 260 if budget == 500 else count if isinstance(budget, int) else int(budget * 260 + 1e-6)
        assert len(kept(bare, head, row=1)) == real


def test_a_budget_in_bytes_is_one_of_the_whole_cache():
    """All layers, heads and batch elements share it: 4 layers x 2 rows x 2 heads x 16 + 16 fp32 numbers a token."""
    per_token = 4 * 2 * 2 * (32 * 4 + 4)  # and a position each
    bare = Bare(SnapKV(budget=f"{per_token * 70}B"), batch=2, layers=4).feed(300)
    assert all(len(kept(bare, h, r, i)) == 70 for h in range(2) for r in range(2) for i in range(4))


def test_a_prompt_shorter_than_the_newest_is_left_alone():
    bare = Bare(SnapKV(budget=0.1)).feed(30)
    assert kept(bare, 0) == list(range(30))
    assert not bare.layer.segments


def test_by_modality():
    chunk = TokenLayout.text(1, 240)
    chunk.modality[0, 10:110], chunk.medium[0, 10:110] = VIDEO, 0
    chunk.modality[0, 110:150], chunk.medium[0, 110:150] = IMAGE, 1
    bare = Bare(SnapKV(budget={"video": 0.2, "image": 0.5})).feed(240, chunk=chunk)
    at = torch.tensor(kept(bare, 0))
    assert ((at >= 10) & (at < 110)).sum() == 20
    assert ((at >= 110) & (at < 150)).sum() == 20
    assert ((at < 10) | (at >= 150)).sum() == 100


def test_decoded_tokens_stay_and_a_text_turn_drops_nothing():
    bare = Bare(SnapKV(budget=64)).feed(200)
    first = kept(bare, 0)
    for _ in range(50):
        bare.feed(1)
    bare.feed(100)  # a question: no media, shorter than a prompt
    assert kept(bare, 0) == first + list(range(200, 350))
    bare.feed(300)  # a long text
    after = kept(bare, 0)
    assert after[: len(first) - 32] == first[:-32]
    assert len(after) == len(first) - 32 + 64


def test_new_media_are_decided_upon():
    bare = Bare(SnapKV(budget=0.5)).feed(100)
    bare.feed(40, medium=1)
    assert len(kept(bare, 0)) == 50 - 32 + (32 + 40) // 2


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bytes_are_freed(kv_heads):
    """16-bit survivors: bytes follow the budget within 2 %, per KV head and not per query head."""
    bare = Bare(SnapKV(budget=0.25), heads=kv_heads, dim=128, dtype=torch.bfloat16, group=7)
    bare.feed(4000)
    held = sum(t.untyped_storage().nbytes() for t in bare.layer.tensors())
    assert held == pytest.approx(0.25 * 4000 * kv_heads * 256 * 2, rel=0.02)


@pytest.mark.parametrize("store", [KIVI(bits=4), VidKV()], ids=["kivi-4", "vidkv"])
def test_bytes_of_a_mix(store):
    """Survivors of an eviction at the bits of the format; blocks that are not full, positions and the tail are all there is
    beside them.
    """
    mix = [SnapKV(budget=0.25), store]
    bare = Bare(mmkv.cache.pipeline(mix), heads=2, dim=128, dtype=torch.bfloat16).feed(16384)
    held = sum(t.untyped_storage().nbytes() for t in bare.layer.tensors())
    tail = store.residual + store.sinks
    key_bits, value_bits = store.formats()[0].bits(128)
    packed = 2 * (4096 - tail) * 128 * (key_bits + value_bits) / 8
    positions = 2 * (4096 - tail) * 4
    block = 2 * store.group * 128 * (key_bits + value_bits) / 8
    assert held <= 1.02 * (packed + positions + block + tail * 2 * 256 * 2)
    assert held < 0.25 * (5.0 if store.formats()[0].name == "kivi-4" else 2.2) / 16 * 16384 * 2 * 256 * 2


# --- StreamingLLM


def test_streaming_keeps_sinks_and_the_newest():
    bare = Bare(StreamingLLM(budget=64)).feed(200)
    assert kept(bare, 0) == kept(bare, 1) == [0, 1, 2, 3, *range(140, 200)]


def test_streaming_forever():
    """The cache never holds more than sinks, `recent` and one interval; what is recent is whole."""
    bare = Bare(StreamingLLM(recent=64)).feed(100)
    for step in range(300):
        bare.feed(1)
        at = kept(bare, 0)
        assert at[:4] == [0, 1, 2, 3]
        assert at[-64:] == list(range(101 + step - 64, 101 + step))
        assert len(at) <= 4 + 64 + 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(recent=5), "^recent 5: possible are whole numbers of tokens from 32, and None"),
        (dict(recent=True), "^recent True: "),
        (dict(recent=64.0), "^recent 64.0: "),
        (dict(recent=64, residual=128), "^residual 128 with recent 64: "),
        (dict(recent=64, residual=48), "^residual 48 with recent 64: "),
    ],
)
def test_impossible_recent(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        StreamingLLM(**options)
    assert "\n" not in str(caught.value)


def test_recent_is_the_residual_window():
    assert StreamingLLM(recent=64).residual_window == StreamingLLM(recent=64, residual=64).residual_window == 64
    assert StreamingLLM(residual=48).residual_window == 48
    assert replace(StreamingLLM(recent=64), recent=96).residual_window == 96


# --- H2O


def test_h2o_against_a_naive_loop():
    """Mass summed over all queries and both query heads of a KV head; half of the budget is recent."""
    torch.manual_seed(1)
    n, budget = 120, 60
    keys, queries = torch.randn(1, 2, n, 16), torch.randn(1, 4, n, 16)
    bare = Bare(H2O(budget=budget, recent=0.6)).feed(n, keys=keys, queries=queries)
    for head in range(2):
        mass = torch.zeros(n, dtype=torch.float64)
        for q_head in (2 * head, 2 * head + 1):
            for t in range(n):
                mass[: t + 1] += (keys[0, head, : t + 1].double() @ queries[0, q_head, t].double() / 4).softmax(0)
        heavy = mass[: n - 36].topk(24).indices.sort().values.tolist()
        assert kept(bare, head) == heavy + list(range(n - 36, n))
        assert torch.allclose(bare.layer.scores.mass[0, head].double() * 2, mass, rtol=1e-4)


def test_h2o_keeps_its_size_while_decoding():
    bare = Bare(H2O(budget=64)).feed(200)
    for _ in range(200):
        bare.feed(1)
        assert 64 <= len(kept(bare, 0)) < 64 + 32
        assert kept(bare, 0)[-32:] == list(range(bare.state.seen - 32, bare.state.seen))


def test_h2o_sums_go_on_while_decoding():
    """A token that later queries look at overtakes one that the prompt looked at."""
    keys, queries = looked_at(100, [[10], [20]])
    bare = Bare(H2O(budget=40, recent=0.0)).feed(100, keys=keys, queries=queries)
    assert 10 in kept(bare, 0)
    look = torch.zeros(1, 4, 1, 16)
    look[..., 5] = 30.0
    special = torch.zeros(1, 2, 1, 16)
    special[..., 5] = 5.0
    bare.feed(1, keys=special, queries=look)  # token 100
    for _ in range(80):
        bare.feed(1, keys=torch.zeros(1, 2, 1, 16), queries=look)
    assert 100 in kept(bare, 0)
    assert len(kept(bare, 0)) < 40 + 32


def test_h2o_wants_one_budget():
    with pytest.raises(ValueError, match="one budget"):
        H2O(budget={"video": 0.2})


# --- what is refused


@pytest.mark.parametrize(
    "make",
    [
        lambda: SnapKV(budget=0), lambda: SnapKV(budget=1.2), lambda: SnapKV(budget=16), lambda: SnapKV(budget=33, sinks=4),
        lambda: SnapKV(window=0), lambda: SnapKV(kernel=4), lambda: SnapKV(pooling="sum"), lambda: SnapKV(residual=8),
        lambda: SnapKV(budget=True), lambda: H2O(recent=1.0), lambda: H2O(recent="a"), lambda: StreamingLLM(recent=5),
        lambda: StreamingLLM(recent=64, budget=0.5),
        lambda: StreamingLLM(sinks=-1),
    ],
)  # fmt: skip
def test_impossible_options(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([KIVI(), SnapKV()], "packed already"),
        ([KIVI(), VidKV()], "stored once"),
        ([SnapKV(), VidKV(), KIVI()], "stored once"),
        ([VidKV(), H2O(), KIVI()], "packed already"),
    ],
    ids=str,
)
def test_orders_that_make_no_sense(methods, reason):
    model = rm.make("qwen2")
    with pytest.raises(ValueError, match=reason) as caught:
        mmkv.wrap(model, cache=methods)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_mmkv")


def test_two_evictions_follow_one_another():
    """The second takes half of what the first left."""
    bare = Bare(mmkv.cache.pipeline([StreamingLLM(budget=0.5, sinks=0), SnapKV(budget=0.5)])).feed(400)
    for head in range(2):
        at = kept(bare, head)
        assert len(at) == 100
        assert min(at) >= 200


def test_a_window_longer_than_the_prompt_is_the_prompt():
    keys, queries = torch.randn(1, 2, 80, 16), torch.randn(1, 4, 80, 16)
    long = Bare(SnapKV(budget=40, window=1000)).feed(80, keys=keys, queries=queries)
    whole = Bare(SnapKV(budget=40, window=80)).feed(80, keys=keys, queries=queries)
    assert kept(long, 0) == kept(whole, 0)
