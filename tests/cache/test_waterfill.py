"""WaterfillKV: where the bits go, by hand and by its promise of a smaller error."""

from __future__ import annotations

import pytest
import torch
from cache_reference import Bare, held

from mmkv.cache import VidKV, WaterfillKV
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
    ],
    ids=repr,
)
def test_impossible_settings(options):
    with pytest.raises(ValueError, match="possible"):
        WaterfillKV(**options)
