"""WaterfillKV: where the bits go, by hand and by its promise of a smaller error."""

from __future__ import annotations

import pytest
import torch
from cache_reference import Bare, held

from mmkv.cache import Packer, VidKV, WaterfillKV
from mmkv.cache.formats import weighed_variance
from mmkv.cache.waterfill import DISTORTION, waterfill


def test_by_hand():
    """Gain per bit: 16 * .8825 / 2 first; then 1 * .8825 / 2 = .441 against 16 * .108 / 2 = .864: the widest gets 4 bits."""
    assert waterfill(torch.tensor([16.0, 1.0, 0.01, 0.01]), 1.0, (0, 2, 4)) == [4, 0, 0, 0]
    assert waterfill(torch.tensor([16.0, 1.0, 0.01, 0.01]), 1.5, (0, 2, 4)) == [4, 2, 0, 0]
    assert waterfill(torch.tensor([1.0, 1.0, 1.0, 1.0]), 1.0, (0, 1, 2, 4)) == [1, 1, 1, 1]
    assert waterfill(torch.zeros(4), 1.0, (0, 2)) == [0, 0, 0, 0]


@pytest.mark.parametrize("average", [0.5, 1.0, 1.5, 2.75, 4.0])
def test_spends_no_more_and_orders_by_variance(average):
    variance = torch.rand(64, generator=torch.Generator().manual_seed(0)).pow(4).sort(descending=True).values
    bits = waterfill(variance, average, (0, 1, 2, 4))
    assert sum(bits) <= average * 64
    assert bits == sorted(bits, reverse=True)


def test_is_the_best_split_of_small_cases():
    """Against all assignments of bits within the budget."""
    from itertools import product

    variance = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.04])
    for budget in (3, 5, 8):
        bits = waterfill(variance, budget / 5, (0, 1, 2))
        error = lambda b: sum(float(v) * DISTORTION[n] for v, n in zip(variance, b))  # noqa: E731
        best = min(error(b) for b in product((0, 1, 2), repeat=5) if sum(b) <= budget)
        assert error(bits) == pytest.approx(best)


def outlier_keys(tokens=256, dim=128, heads=2):
    generator = torch.Generator().manual_seed(3)
    width = torch.rand(heads, 1, dim, generator=generator).pow(6) * 8 + 0.05
    return torch.randn(1, heads, tokens, dim, generator=generator) * width


def error(method) -> tuple[float, float]:
    """Relative squared error of the packed keys and their true bits."""
    keys = outlier_keys()
    bare = Bare(method, heads=2, dim=128).feed(256, keys=keys)
    at, got, _, packed = held(bare.layer, 0)
    want = keys[0].double()[:, at]
    return float((got - want)[:, packed].square().sum() / want[:, packed].square().sum()), bare.layer.packed[
        0
    ].packer.key_spec.bits


def test_less_error_at_fewer_bits_where_channels_differ():
    ours, bits = error(WaterfillKV(group=128, residual=64, sinks=0))
    theirs, more = error(VidKV(group=128, residual=64, sinks=0, fft=False))
    assert bits <= more
    assert ours < theirs / 3


def test_sizes_are_a_layers_and_channels_a_heads():
    bare = Bare(WaterfillKV(group=128, residual=64, sinks=0), heads=2, dim=128).feed(256, keys=outlier_keys())
    packer = bare.layer.packed[0].packer
    assert packer.order.shape == (1, 2, 128)
    widths = [width for width, _ in packer.key_spec.classes]
    assert sum(widths) == 128
    assert all(width % 8 == 0 for width in widths)
    for head in range(2):
        spread = outlier_keys()[0, head, :128].std(0)[packer.order[0, head].long()]
        first = widths[0]
        assert spread[:first].min() >= spread[first:].max()


def test_rows_of_a_batch_choose_for_themselves():
    """Two videos with different channel statistics in one batch: each gets the classes it would get alone."""
    wide, flat = outlier_keys(), torch.randn(1, 2, 256, 128, generator=torch.Generator().manual_seed(1))
    method = WaterfillKV(group=128, residual=64, sinks=0)
    both = Bare(method, batch=2, heads=2, dim=128).feed(256, keys=torch.cat([wide, flat]))
    for row, keys in enumerate((wide, flat)):
        alone = Bare(method, heads=2, dim=128).feed(256, keys=keys)
        assert torch.equal(held(both.layer, row)[1], held(alone.layer, 0)[1])


@pytest.mark.parametrize(
    "options",
    [
        dict(key_bits=0),
        dict(key_bits=5),
        dict(value_bits=3),
        dict(levels=(2, 0)),
        dict(levels=(0, 3)),
        dict(levels=()),
        dict(step=0),
        dict(aim="values"),
    ],
    ids=repr,
)
def test_impossible_settings(options):
    with pytest.raises(ValueError, match="possible"):
        WaterfillKV(**options)


def asking(keys, seed=5):
    """Queries `[1, 4, T, D]` that multiply the even channels by a hundredth."""
    queries = torch.randn(1, 4, *keys.shape[2:], generator=torch.Generator().manual_seed(seed))
    queries[..., ::2] *= 0.01
    return queries


def test_channels_that_no_query_looks_at_get_no_bits():
    keys = torch.randn(1, 2, 256, 128, generator=torch.Generator().manual_seed(3))
    method = WaterfillKV(key_bits=1, group=128, residual=64, sinks=0)
    bare = Bare(method, heads=2, dim=128).feed(256, keys=keys)
    assert not set(bare.layer.packed[0].packer.order[0, 0, :64].tolist()) <= set(range(1, 128, 2))
    packer = Packer(method.formats()[0], 1, 2, 128, 128, "cpu")
    form = method.adapt(method.formats()[0], keys[0], asking(keys)[0])
    packer = Packer(form, 1, 2, 128, 128, "cpu")
    packer.fit(0, keys[0], queries=asking(keys)[0])
    coded = [width for width, code in packer.key_spec.classes if len(code.levels) > 1]
    assert sum(coded) == 64  # 2 bits each, over 64 of 128 channels
    for head in range(2):
        assert set(packer.order[0, head, :64].tolist()) == set(range(1, 128, 2))


def test_weighed_variance_by_hand():
    """Variances 1 and 4; query heads 0, 1 ask KV head 0 with mean squares (1, 9) and (3, 1): 2 and 5 on average."""
    keys = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    queries = torch.tensor([[[1.0, 3.0], [-1.0, 3.0]], [[3**0.5, 1.0], [3**0.5, -1.0]]]).repeat(1, 4, 1)
    torch.testing.assert_close(weighed_variance(keys, queries), torch.tensor([[2.0**0.5, 4 * 5.0**0.5]]))
    torch.testing.assert_close(weighed_variance(keys, None), torch.tensor([[1.0, 4.0]]))
    torch.testing.assert_close(weighed_variance(keys, queries[:, :7]), torch.tensor([[1.0, 4.0]]))  # too few to tell


def test_a_prompts_queries_reach_the_choice_and_padding_does_not():
    import transformers

    import mmkv

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 200))
    padded = torch.cat([torch.full((1, 9), 3), ids], 1)
    mask = (torch.arange(209) >= 9).long()[None]
    orders = {}
    for aim in ("scores", "keys"):
        with mmkv.wrapped(model, cache=WaterfillKV(group=32, residual=32, sinks=0, aim=aim)), torch.no_grad():
            plain = model(ids).past_key_values.layers[0].packed[0].packer
            with_pad = model(padded, attention_mask=mask, position_ids=mask.cumsum(1) - 1).past_key_values
            assert torch.equal(with_pad.layers[0].packed[0].packer.order, plain.order)
            orders[aim] = plain.order
    assert not torch.equal(orders["scores"], orders["keys"])
