"""ZipVL: how many tokens matter, which, what attends in the prefill, and what is stored of them."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head

import mmkv
from mmkv.cache import ZipVL
from mmkv.cache.deciding import fill_of
from mmkv.cache.fill import Asked
from mmkv.cache.view import View
from mmkv.layout import VIDEO, TokenLayout

PLAIN = dict(text=False, sinks=0, group=32)


def important(method, keys, queries, chunk=None):
    """bool [n] of a prompt of one row."""
    bare = Bare(method, heads=keys.shape[1], dim=keys.shape[3], group=queries.shape[1] // keys.shape[1])
    n = keys.shape[2]
    bare.state.extend(TokenLayout.text(1, n) if chunk is None else chunk, None)
    bare.layer.update(keys, keys)
    return method.important(fill_of(bare.layer, 0, Asked(queries, keys.shape[3] ** -0.5)))


def naive(keys, queries, rows, tau):
    """The paper's rule in fp64: p by the plain attention of the probe rows, the p best by the normalized one."""
    n = keys.shape[2]
    attention, seen = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    group = queries.shape[1] // keys.shape[1]
    for row in rows:
        seen[: row + 1] += 1
        for head in range(queries.shape[1]):
            score = keys[0, head // group, : row + 1].double() @ queries[0, head, row].double() / keys.shape[3] ** 0.5
            attention[: row + 1] += score.softmax(0) / queries.shape[1]
    ranked = attention.sort(descending=True).values.cumsum(0)
    p = int((ranked < tau * attention.sum()).sum()) + 1
    return set((attention / seen.clamp(min=1)).topk(p).indices.tolist()) | {n - 1}


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.975])
def test_against_a_naive_loop(tau):
    torch.manual_seed(2)
    keys, queries = torch.randn(1, 2, 90, 16) * 2, torch.randn(1, 4, 90, 16) * 2
    got = important(ZipVL(tau=tau, recent=90, random=0, **PLAIN), keys, queries)
    assert set(got.nonzero()[:, 0].tolist()) == naive(keys, queries, range(90), tau)
    got = important(ZipVL(tau=tau, recent=20, random=0, **PLAIN), keys, queries)
    assert set(got.nonzero()[:, 0].tolist()) == naive(keys, queries, range(70, 90), tau)


def test_the_number_grows_with_tau():
    torch.manual_seed(3)
    keys, queries = torch.randn(1, 2, 200, 16), torch.randn(1, 4, 200, 16)
    counts = [int(important(ZipVL(tau=t, **PLAIN), keys, queries).sum()) for t in (0.01, 0.5, 0.9, 0.96, 0.999, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 200


def test_uniform_attention_needs_tau_of_the_tokens_and_a_sink_needs_one():
    n = 256
    zeros, queries = torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
    # the last row alone sees all tokens alike: p = ceil(tau n), and the last token is among them
    uniform = int(important(ZipVL(tau=0.5, recent=1, random=0, **PLAIN), zeros, queries).sum())
    assert uniform in (128, 129)
    sink = zeros.clone()
    sink[0, 0, 0, 0], queries[..., 0] = 50.0, 50.0
    assert important(ZipVL(**PLAIN), sink, queries).nonzero()[:, 0].tolist() == [0, n - 1]


def test_text_and_sinks_always_matter():
    n = 256
    keys, queries = torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
    keys[0, 0, 100, 0], queries[..., 0] = 50.0, 50.0
    chunk = TokenLayout.text(1, n)
    chunk.modality[0, 20:240], chunk.medium[0, 20:240] = VIDEO, 0
    got = important(ZipVL(random=0), keys, queries, chunk).nonzero()[:, 0].tolist()
    assert got == [*range(20), 100, *range(240, n)]
    got = important(ZipVL(random=0, text=False), keys, queries).nonzero()[:, 0].tolist()
    assert got == [0, 1, 2, 3, 100, n - 1]


def test_sparse_prefill_is_causal_attention_among_the_important():
    """The output of the others is zero; computed here row by row in fp64."""
    torch.manual_seed(4)
    n, method = 150, ZipVL(tau=0.7, **PLAIN)
    keys, values, queries = torch.randn(1, 2, n, 16) * 2, torch.randn(1, 2, n, 16), torch.randn(1, 4, n, 16) * 2
    bare = Bare(method)
    bare.state.extend(TokenLayout.text(1, n), None)
    view, _ = bare.layer.update(keys, values)
    assert isinstance(view, View)
    chosen = important(method, keys, queries)
    out, _ = view.attend(None, "sdpa", None, queries, None, scaling=0.25)
    assert 10 < int(chosen.sum()) < 140
    at = chosen.nonzero()[:, 0]
    for head in range(4):
        for token in range(n):
            got = out[0, token, head].double()
            if not chosen[token]:
                assert (got == 0).all()
                continue
            before = at[at <= token]
            weights = (keys[0, head // 2, before].double() @ queries[0, head, token].double() * 0.25).softmax(0)
            assert torch.allclose(got, weights @ values[0, head // 2, before].double(), atol=1e-5)
    # and what was important is stored at the better bits
    stored = {segment.packer.form.name: segment for segment in bare.layer.packed}
    assert set(stored) == {"zipcache-4", "zipcache-2"}
    best = stored["zipcache-4"]
    rows, slots = (best.count[:1] > 0).nonzero(as_tuple=True)
    positions = best.positions_of(rows, slots)[torch.arange(32) < best.count[rows, slots][:, None]]
    assert positions.tolist() == [i for i in at.tolist() if i < n - 32]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sparse_with_everything_important_is_dense(softcap):
    torch.manual_seed(5)
    keys, queries = torch.randn(1, 2, 120, 16), torch.randn(1, 4, 120, 16)
    outs = []
    for method in (ZipVL(tau=0.9999999, **PLAIN), None):
        bare = Bare(method)
        bare.state.extend(TokenLayout.text(1, 120), None)
        view, _ = bare.layer.update(keys, keys)
        if method is None:
            scores = queries.unflatten(1, (2, 2)) @ keys[:, :, None].transpose(-1, -2) / 4
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            scores = scores.masked_fill(~torch.ones(120, 120).tril().bool(), -torch.inf)
            outs.append((scores.softmax(-1) @ keys[:, :, None]).flatten(1, 2).transpose(1, 2))
        else:
            outs.append(view.attend(None, "sdpa", None, queries, None, scaling=0.25, softcap=softcap)[0])
    assert torch.allclose(*outs, atol=1e-4)


def test_version_2_keeps_what_is_important_alone():
    torch.manual_seed(6)
    keys, queries = torch.randn(1, 2, 300, 16) * 2, torch.randn(1, 4, 300, 16) * 2
    method = ZipVL(store="evict", tau=0.6, **PLAIN)
    want = important(method, keys, queries)[:268].nonzero()[:, 0].tolist() + list(range(268, 300))
    bare = Bare(method).feed(300, keys=keys, queries=queries)
    assert held_by_head(bare.layer, 0, 0)[0].tolist() == held_by_head(bare.layer, 0, 1)[0].tolist() == want
    assert not bare.layer.packed


def test_decoded_tokens_are_decided_upon_every_interval():
    bare = Bare(ZipVL(store="evict", tau=0.5, interval=40, **PLAIN)).feed(100)
    lengths = []
    for _ in range(170):
        bare.feed(1)
        lengths.append(bare.layer.keys.shape[2])
    assert max(lengths) <= 32 + 40
    assert bare.layer.evicted_to[0] > 200


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma2", "gpt_oss"])
def test_padded_batches_and_unusual_attention(family):
    """Softcap and sink logits go through the sparse prefill too; a batch gives what its rows give alone."""
    model = rm.make(family)
    prompts = [rm.default_prompt(model, 200), rm.second_prompt(model) + rm.words(90, 9)]
    keep = dict(return_dict_in_generate=True, output_logits=True, new=4)
    with mmkv.wrapped(model, cache=[ZipVL(tau=0.7, text=False)]):
        both = rm.generate(model, rm.inputs(model, prompts), **keep)
        given, alone = rm.inputs(model, prompts), rm.inputs(model, prompts[:1])
        if family == "qwen2_5_vl":
            alone["pixel_values_videos"] = given["pixel_values_videos"][: alone["pixel_values_videos"].shape[0]]
        one = rm.generate(model, alone, **keep)
    assert torch.equal(one.sequences[0, -4:], both.sequences[0, -4:])
    assert torch.allclose(torch.stack(one.logits)[:, 0], torch.stack(both.logits)[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        dict(tau=0),
        dict(tau=1.1),
        dict(tau="a"),
        dict(store="drop"),
        dict(recent=0),
        dict(random=-1),
        dict(interval=0),
        dict(high=3),
        dict(seed=1.5),
        dict(seed=True),
        dict(sparse="no"),
        dict(text="no"),
        dict(text=1),
    ],
    ids=str,
)
def test_impossible_options(bad):
    with pytest.raises(ValueError) as caught:
        ZipVL(**bad)
    assert "\n" not in str(caught.value)
    assert next(iter(bad)) in str(caught.value)
