"""RazorAttention: which tokens local heads hold, mean tokens that make attention exact, and the search for retrieval heads."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head

import mmkv
from mmkv.cache import KIVI, RazorAttention, RetrievalHeads
from mmkv.cache.summary import SummarySegment
from mmkv.kernels import attend_dense, merge
from mmkv.parts.retrieval_heads import repeated_tokens


def kept(bare, head=0, row=0, layer=0):
    return held_by_head(bare.layers[layer], row, head)[0].tolist()


def summary(bare) -> SummarySegment | None:
    return next((s for s in bare.layer.segments if isinstance(s, SummarySegment)), None)


def attention(bare, query):
    """Fp32 output `[B, Hq, 1, D]` of the layer's own attention over all it holds."""
    layer = bare.layer
    parts = [segment.attend(query, scale=0.25) for segment in layer.segments]
    start = layer.packed_to[0] - layer.start
    return merge([*parts, attend_dense(query, layer.keys[:, :, start:], layer.values[:, :, start:], scale=0.25)])[0]


def full_attention(bare, query):
    """Fp64, over everything that was ever fed."""
    keys, values = (t[0].double().repeat_interleave(2, 1) for t in (bare.keys, bare.values))
    return (query.double() @ keys.mT / 4).softmax(-1) @ values


# --- what is held


def test_by_hand():
    """100 tokens, 4 sinks, a buffer of 40: 56 tokens become one in the local head, none in the retrieval head."""
    bare = Bare(RazorAttention(heads=((0, 1),), least=40)).feed(100)
    assert kept(bare, 0) == [*range(4), *range(60, 100)]
    assert kept(bare, 1) == list(range(100))
    one = summary(bare)
    assert one.counts[0, :, 0].tolist() == [56, 0]
    for held, fed in ((one.keys, bare.keys[0]), (one.values, bare.values[0])):
        assert held.shape[2] == 1
        assert torch.allclose(held[0, 0, 0].double(), fed[0, 0, 4:60].double().mean(0), atol=1e-6)


def test_heads_belong_to_their_layer():
    bare = Bare(RazorAttention(heads=((1, 0),), least=40), layers=2).feed(100)
    lengths = [[len(kept(bare, head, layer=layer)) for head in range(2)] for layer in range(2)]
    assert lengths == [[44, 44], [100, 44]]


@pytest.mark.parametrize(("least", "local"), [(0, 100), (32, 100), (160, 160), (4000, 500)])
def test_a_buffer_is_a_share_or_the_least(least, local):
    bare = Bare(RazorAttention(least=least, sinks=0)).feed(500)
    assert kept(bare, 0) == kept(bare, 1) == list(range(500 - local, 500))


def test_padding_is_neither_held_nor_averaged():
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[0, :100] = False
    bare = Bare(RazorAttention(least=40), batch=2).feed(300, valid)
    assert kept(bare, 0, row=0) == [*range(100, 104), *range(260, 300)]
    assert kept(bare, 0, row=1) == [*range(4), *range(240, 300)]
    assert summary(bare).counts[:, 0, 0].tolist() == [156, 236]
    mean = bare.keys[0][0, :, 104:260].double().mean(1)
    assert torch.allclose(summary(bare).keys[0, :, 0].double(), mean, atol=1e-6)


def test_decoding_keeps_its_tokens_and_the_mean():
    bare = Bare(RazorAttention(least=40)).feed(100)
    before = [t.clone() for t in summary(bare).tensors()]
    for _ in range(80):
        bare.feed(1)
    assert kept(bare, 0) == [*range(4), *range(60, 180)]
    assert all(torch.equal(a, b) for a, b in zip(before, summary(bare).tensors()))


def test_a_later_prompt_shortens_the_buffers_and_leaves_another_mean():
    bare = Bare(RazorAttention(heads=((0, 1),), least=40)).feed(100).feed(300)
    assert kept(bare, 0) == [*range(4), *range(320, 400)]  # a fifth of 400
    assert kept(bare, 1) == list(range(400))
    one = summary(bare)
    assert one.counts[0].tolist() == [[56, 260], [0, 0]]
    want = torch.stack([bare.keys[0][0, 0, 4:60].double().mean(0), bare.keys[0][0, 0, 60:320].double().mean(0)])
    assert torch.allclose(one.keys[0, 0].double(), want, atol=1e-6)


@pytest.mark.parametrize("chunk", [64, 400])
def test_a_prompt_in_chunks_ends_with_the_same_tokens(chunk):
    """The newest fifth of the whole prompt, not of each chunk; every dropped token is in one of the means."""
    model = rm.make("llama")
    method = RazorAttention(heads=((1, 0),), least=32)
    with mmkv.wrapped(model, cache=[method], prefill_chunk=chunk), torch.no_grad():
        cache = model(torch.tensor([rm.words(1000)])).past_key_values
    for i, layer in enumerate(cache.layers):
        means = next(s for s in layer.segments if isinstance(s, SummarySegment))
        for head in range(2):
            at, whole = held_by_head(layer, 0, head)[0].tolist(), (i, head) == (1, 0)
            assert at == list(range(1000)) if whole else at == [*range(4), *range(800, 1000)]
            assert int(means.counts[0, head].sum()) == 1000 - len(at)


def test_bytes_are_freed():
    """Of 4 heads one is kept whole; the others hold 4 sinks, 400 of 2000 tokens and a mean."""
    bare = Bare(RazorAttention(heads=((0, 2),), least=40), heads=4, dim=64, dtype=torch.bfloat16).feed(2000)
    held = sum(t.untyped_storage().nbytes() for t in bare.layer.tensors())
    tokens = 2000 + 3 * 404
    positions = 4 * (tokens - 4 * 32)
    assert held == tokens * 2 * 64 * 2 + positions + 4 * (2 * 64 * 2 + 4)


# --- attention


def test_identical_dropped_keys_are_exact():
    """Their mean is the key of each, and N exp(q.k) what they weigh: attention is that over all tokens; not so without it."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 100, 16, generator=generator)
    keys[:, :, 4:60] = torch.randn(1, 2, 1, 16, generator=generator)
    query = torch.randn(1, 4, 1, 16, generator=generator)
    bare = Bare(RazorAttention(least=40)).feed(100, keys=keys)
    assert torch.allclose(attention(bare, query).double(), full_attention(bare, query), atol=1e-6)
    bare.feed(1)  # with the same means while decoding
    assert torch.allclose(attention(bare, query).double(), full_attention(bare, query), atol=1e-6)
    without = Bare(RazorAttention(least=40, compensate=False)).feed(100, keys=keys)
    assert summary(without) is None
    assert (attention(without, query).double() - full_attention(without, query)).abs().max() > 0.05


def test_retrieval_heads_are_exact():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 1, 16, generator=generator)
    bare = Bare(RazorAttention(heads=((0, 1),), least=40)).feed(100)
    out, want = attention(bare, query).double(), full_attention(bare, query)
    assert torch.allclose(out[:, 2:], want[:, 2:], atol=1e-6)
    assert (out[:, :2] - want[:, :2]).abs().max() > 0.01


@pytest.mark.parametrize("method", [RazorAttention(least=100), RazorAttention(buffer=1.0, least=0), RazorAttention()])
def test_nothing_dropped_is_stock(method):
    bare = Bare(method).feed(100)
    assert not bare.layer.segments
    assert kept(bare) == list(range(100))


# --- the search


def planted(period, times, seed=0):
    """Keys `[1, 2, T, D]` and queries `[1, 4, T, D]` of repeated tokens: query head 1 looks at equal tokens, head 2 at
    what followed them (KV head 1 tells of each token which one came before it), the others anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = repeated_tokens(1000, period, times)
    table = torch.nn.functional.normalize(torch.randn(1000, 64, generator=generator), dim=-1)
    own, before = table[tokens], table[tokens.roll(1)]
    keys = torch.stack([own, before])[None]
    noise = torch.randn(2, len(tokens), 64, generator=generator)
    strong = 30 * 64**0.5
    return keys, torch.stack([noise[0], strong * own, strong * own, noise[1]])[None]


def test_planted_heads_are_found():
    keys, queries = planted(50, 4)
    probe = RetrievalHeads(period=50)
    Bare(probe, dim=64).feed(200, keys=keys, queries=queries)
    # the last 50 queries see three earlier equals and themselves; for the echo head that is a quarter lost
    assert probe.echo[0][1] == pytest.approx(0.75, abs=0.01)
    assert probe.induction[0][2] == pytest.approx(1.0, abs=0.02)
    assert probe.echo[0][[0, 2, 3]].max() < 0.1
    assert probe.induction[0][[0, 1, 3]].max() < 0.1
    assert probe.heads() == ((0, 0), (0, 1))
    assert probe.heads(echo_share=0.0) == ((0, 1),)
    assert probe.heads(induction_share=0.0) == ((0, 0),)


def test_the_probe_changes_nothing_and_reads_every_layer():
    model = rm.make("llama")
    given = dict(input_ids=20 + repeated_tokens(rm.VOCAB - 20, 40, 3)[None])
    probe = RetrievalHeads(period=40, rows=16)
    with torch.no_grad():
        stock = model(**given).logits
        with mmkv.wrapped(model, cache=[probe]):
            assert torch.equal(model(**given).logits, stock)
    heads = probe.heads(induction_share=0.5)
    assert sorted(probe.echo) == sorted(probe.induction) == [0, 1, 2]
    assert all(0 <= layer < 3 and 0 <= head < 2 for layer, head in heads)
    with mmkv.wrapped(model, cache=[RazorAttention(heads=heads, least=32)]):
        cache = rm.generate(model, given, new=2, return_dict_in_generate=True).past_key_values
    for i, layer in enumerate(cache.layers):
        for head in range(2):
            whole = len(held_by_head(layer, 0, head)[0]) == layer.get_seq_length()
            assert whole == ((i, head) in heads)


def test_a_probe_that_was_given_too_little():
    with pytest.raises(ValueError, match="nothing was read"):
        RetrievalHeads().heads()
    with pytest.raises(ValueError, match="more than 150 tokens"):
        Bare(RetrievalHeads(period=150)).feed(100)


# --- settings


def test_heads_of_another_model():
    for pair in ((2, 0), (0, 2)):
        with pytest.raises(ValueError, match="2 layers of 2 KV heads"):
            Bare(RazorAttention(heads=(pair,), least=32), layers=2).feed(100)


@pytest.mark.parametrize("pair", [(3, 0), (0, 2)])
@pytest.mark.parametrize("others", [(), (KIVI(),)], ids=["alone", "packed"])
def test_heads_of_another_model_are_refused_by_wrap(pair, others):
    model = rm.make("qwen2")
    with pytest.raises(
        ValueError, match=rf"heads \({pair[0]}, {pair[1]}\): this model has 3 layers of 2 KV heads"
    ) as caught:
        mmkv.wrap(model, cache=[RazorAttention(heads=((0, 1), pair)), *others])
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_mmkv")
    assert model.config.get_text_config()._attn_implementation != "mmkv"
    mmkv.unwrap(mmkv.wrap(model, cache=[RazorAttention(heads=((2, 1),)), *others]))


def test_heads_may_be_a_list():
    assert RazorAttention(heads=[[0, 1], (3, 2)]).heads == ((0, 1), (3, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RazorAttention(buffer=0), lambda: RazorAttention(buffer=1.5), lambda: RazorAttention(buffer="a"),
        lambda: RazorAttention(least=-1), lambda: RazorAttention(least=2.5), lambda: RazorAttention(least=True),
        lambda: RazorAttention(heads=(1, 2)), lambda: RazorAttention(heads=((0, -1),)), lambda: RazorAttention(heads=3),
        lambda: RazorAttention(heads=((0, True),)), lambda: RazorAttention(heads=((0, 1, 2),)),
        lambda: RazorAttention(compensate=1), lambda: RazorAttention(residual=8), lambda: RazorAttention(sinks=-1),
        lambda: RetrievalHeads(period=1), lambda: RetrievalHeads(rows=0), lambda: RetrievalHeads(period=2.5),
    ],
)  # fmt: skip
def test_impossible_settings(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
