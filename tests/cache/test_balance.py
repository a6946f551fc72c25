"""Factors that even channels out before quantizing: what they are, where they go, and that they undo themselves."""

from __future__ import annotations

import pytest
import torch
from cache_reference import Bare, codes, held, same_codes

from mmkv.cache import CacheMethod, ChannelClass, Packer, PackFormat, Side
from mmkv.kernels import code, unpack_blocks

EIGHT = (ChannelClass(1.0, code("minmax", 8)),)


def packer(keys="none", values="none", batch=1, heads=2, dim=4, **more):
    form = PackFormat("test", Side("token", EIGHT, balance=keys, **more), Side("token", EIGHT, balance=values), 8)
    return Packer(form, batch, heads, dim, dim, "cpu")


def test_factors_by_hand():
    p = packer("query_key", "sqrt_max", heads=1)
    keys = torch.tensor([[[1.0, -8.0, 0.5, 0.0], [-4.0, 2.0, 0.25, 0.0]]])
    values = torch.tensor([[[0.25, 3.0, 0.0, 16.0], [-0.2, -9.0, 0.0, 1.0]]])
    queries = torch.tensor([[[1.0, 0.5, 2.0, 3.0]], [[-0.25, -2.0, 1.0, 3.0]]])  # two heads that share the KV head
    queries = torch.cat([queries, torch.zeros(2, 7, 4)], 1)
    p.fit(0, keys, values, queries)
    # max |k| = 4, 8, 0.5, 0; max |q| = 1, 2, 2, 3: sqrt(4 / 1), sqrt(8 / 2), sqrt(0.5 / 2), and 1 for a channel of zeros
    assert p.key_balance.tolist() == [[[2.0, 2.0, 0.5, 1.0]]]
    # max |v| = 0.25, 9, 0, 16
    assert p.value_balance.tolist() == [[[0.5, 3.0, 1.0, 4.0]]]
    assert p.stored_keys(keys, 0, torch.tensor([0]))[0, 0].tolist() == [0.5, -4.0, 1.0, 0.0]
    assert p.stored_values(values, 0, torch.tensor([0]))[0, 1].tolist() == pytest.approx([-0.4, -3.0, 0.0, 0.25])


@pytest.mark.parametrize("few", [None, torch.randn(4, 7, 4), torch.randn(4, 0, 4)], ids=["none", "seven", "zero"])
def test_without_enough_queries_keys_are_evened_by_themselves(few):
    a, b = packer("query_key"), packer("sqrt_max")
    keys = torch.randn(2, 20, 4) * torch.tensor([0.1, 1.0, 10.0, 30.0])
    a.fit(0, keys, queries=few)
    b.fit(0, keys, queries=torch.randn(4, 9, 4))
    assert torch.equal(a.key_balance, b.key_balance)
    assert torch.allclose(a.key_balance[0], keys.abs().amax(1).sqrt())


def test_scores_and_outputs_are_what_they_were():
    """q.k and p.v come out of the stored numbers once the factors are folded in, for every head its own."""
    p = packer("query_key", "sqrt_max")
    spread = torch.tensor([0.05, 1.0, 5.0, 40.0])
    keys, values = torch.randn(2, 8, 4) * spread, torch.randn(2, 8, 4) * spread.flip(0)
    queries = torch.randn(4, 9, 4)
    p.fit(0, keys, values, queries)
    heads = torch.arange(2)
    k, v = p.stored_keys(keys, 0, heads), p.stored_values(values, 0, heads)
    q = p.query(queries[None])[0]
    for head in range(4):
        assert torch.allclose(q[head] @ k[head // 2].T, queries[head] @ keys[head // 2].T, rtol=1e-4, atol=1e-4)
    weights = torch.rand(4, 9, 8)
    stored = torch.stack([weights[head] @ v[head // 2] for head in range(4)])[None]
    wanted = torch.stack([weights[head] @ values[head // 2] for head in range(4)])
    assert torch.allclose(p.output(stored)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_bad_number_changes_no_factor(bad):
    keys, broken = torch.rand(2, 8, 4) + 0.5, None
    keys[0, 3, 1] = 0.1
    broken = keys.clone()
    broken[0, 3, 1] = bad
    a, b = packer("query_key", "sqrt_max"), packer("query_key", "sqrt_max")
    a.fit(0, keys, keys, keys)
    b.fit(0, broken, broken, broken)
    assert torch.equal(a.key_balance, b.key_balance)
    assert torch.equal(a.value_balance, b.value_balance)


def test_silent_channels():
    """All zeros, all NaN, or next to nothing at first: the factor stays where later tokens can live with it."""
    p = packer("query_key", "sqrt_max", heads=1)
    values = torch.tensor([0.0, torch.nan, 1e-12, 6e4]).expand(1, 8, 4)
    p.fit(0, values, values, torch.ones(1, 8, 4))
    assert p.value_balance[0, 0].tolist() == pytest.approx([1, 1, 1 / 256, 6e4**0.5])
    assert p.key_balance.isfinite().all()
    p.fit(0, values, values, torch.zeros(1, 8, 4))
    assert p.key_balance[0, 0].tolist() == [1, 1, 1, 1]


def test_channels_are_ranked_by_what_is_stored():
    form = PackFormat(
        "test",
        Side("channel", (ChannelClass(0.5, EIGHT[0].code), ChannelClass(0.5, code("minmax", 2))), rank="range",
             balance="query_key"),
        Side("token", EIGHT), 8,
    )  # fmt: skip
    p = Packer(form, 1, 1, 4, 4, "cpu")
    keys = torch.tensor([[4.0, 3.0, 2.0, 1.0], [-4.0, -3.0, -2.0, -1.0]])[None]
    queries = torch.tensor([1.0, 1.0, 100.0, 100.0]).expand(1, 8, 4)  # k b: sqrt(4), sqrt(3), sqrt(200), sqrt(100)
    p.fit(0, keys, queries=queries)
    assert p.order[0, 0].tolist() == [2, 3, 0, 1]


class Balanced(CacheMethod):
    """Stores everything at 8 bits, balanced."""

    residual = 32

    def formats(self):
        return (
            PackFormat(
                "test", Side("channel", EIGHT, balance="sqrt_max"), Side("token", EIGHT, balance="sqrt_max"), 32
            ),
        )


def test_rows_bytes_and_later_tokens():
    """Factors go with their batch element, count as bytes, and hold for what is appended later."""
    bare = Bare(Balanced(), batch=3, dim=16)
    bare.feed(128, keys=torch.randn(3, 2, 128, 16) * torch.tensor([0.1, 1.0, 10.0])[:, None, None, None])
    (segment,) = bare.layer.packed
    was, blocks = segment.packer.key_balance.clone(), codes(bare.layer)
    assert (was[2] > 5 * was[0]).all()
    assert {id(t) for t in segment.packer.tensors()} == {
        id(segment.packer.key_balance),
        id(segment.packer.value_balance),
    }
    assert {id(t) for t in segment.packer.tensors()} < {id(t) for t in bare.layer.tensors()}
    bare.feed(64)
    assert torch.equal(segment.packer.key_balance, was)
    assert same_codes(blocks, codes(bare.layer))
    before = [held(bare.layer, row) for row in range(3)]
    for layer in bare.layers:
        layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(segment.packer.key_balance, was[[2, 0, 0]])
    for row, old in enumerate((2, 0, 0)):
        assert all(torch.equal(a, b) for a, b in zip(held(bare.layer, row), before[old]))


def test_the_factor_is_that_of_the_tokens_that_leave():
    bare = Bare(Balanced(), heads=1, dim=4)
    values = torch.ones(1, 1, 96, 4)
    values[0, 0, 5] = torch.tensor([4.0, 9.0, 1.0, 1.0])
    values[0, 0, 90] = 100.0  # stays in the residual window
    bare.feed(96, values=values)
    (segment,) = bare.layer.packed
    assert segment.packer.value_balance[0, 0].tolist() == [2.0, 3.0, 1.0, 1.0]
    stored = unpack_blocks(segment.values.select(torch.tensor([0])))[0, 5]
    assert torch.allclose(stored, torch.tensor([2.0, 3.0, 1.0, 1.0]), atol=1e-2)


def test_impossible_settings():
    with pytest.raises(ValueError, match="balance 'best': possible are"):
        Side("token", EIGHT, balance="best")
    with pytest.raises(ValueError, match="is for keys"):
        PackFormat("test", Side("token", EIGHT), Side("token", EIGHT, balance="query_key"), 32)
