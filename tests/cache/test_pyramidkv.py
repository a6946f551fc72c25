"""PyramidKV: layer budgets by hand, the mean met exactly, SnapKV's choice in each layer."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head

import mmkv
from mmkv.cache import PyramidKV, SnapKV
from mmkv.layout import VIDEO, TokenLayout


def kept(bare, layer, head=0):
    return held_by_head(bare.layers[layer], 0, head)[0].tolist()


@pytest.mark.parametrize(
    ("budget", "want"),
    [
        # beside the newest 32: b = 40, the last layer b / 20 = 2, the first 80 - 2 = 78, steps of 76 / 3
        (72, [78, 52, 28, 2]),
        # 174 of 232: b = 142, 2 b - b / 20 = 277 are more than the 200 there are, so 200 and 284 - 200 = 84
        (0.75, [200, 161, 123, 84]),
    ],
)
def test_layer_budgets_by_hand(budget, want):
    bare = Bare(PyramidKV(budget=budget), layers=4).feed(232)
    for layer, count in enumerate(want):
        for head in range(2):
            assert len(kept(bare, layer, head)) == 32 + count
            assert kept(bare, layer, head)[-32:] == list(range(200, 232))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 28])
@pytest.mark.parametrize("budget", [0.2, 0.33, 0.5, 0.9, 37, 151])
def test_the_mean_is_the_budget(layers, budget):
    bare = Bare(PyramidKV(budget=budget), layers=layers).feed(200)
    counts = [len(kept(bare, layer)) for layer in range(layers)]
    assert sum(counts) == layers * (budget if isinstance(budget, int) else int(budget * 200 + 1e-6))
    assert counts == sorted(counts, reverse=True)
    assert max(counts) <= 200


def test_each_layer_chooses_as_snapkv_does():
    bare = Bare(PyramidKV(budget=72, window=8), layers=4).feed(232)
    for layer, count in enumerate([110, 84, 60, 34]):
        alone = Bare(SnapKV(budget=count, window=8), layers=4).feed(232)
        assert all(kept(bare, layer, head) == kept(alone, layer, head) for head in range(2))


def test_beta_1_is_snapkv():
    pyramid, snap = (Bare(method, layers=3).feed(150) for method in (PyramidKV(budget=0.4, beta=1), SnapKV(budget=0.4)))
    assert all(kept(pyramid, layer) == kept(snap, layer) for layer in range(3))


def test_by_modality():
    """20 of 100 video tokens on average: 20 + 19, and steps of 38 / 3; text stays whole in every layer."""
    chunk = TokenLayout.text(1, 200)
    chunk.modality[0, 20:120], chunk.medium[0, 20:120] = VIDEO, 0
    bare = Bare(PyramidKV(budget={"video": 0.2}), layers=4).feed(200, chunk=chunk)
    for layer, want in enumerate([39, 26, 14, 1]):
        at = torch.tensor(kept(bare, layer))
        video = (at >= 20) & (at < 120)
        assert (int(video.sum()), int((~video).sum())) == (want, 100)


@pytest.mark.parametrize("beta", [0.5, 0, -1, True, "20", None, float("nan")])
def test_impossible_settings(beta):
    with pytest.raises(ValueError, match="beta") as caught:
        PyramidKV(beta=beta)
    assert "\n" not in str(caught.value)


def test_layers_with_a_sliding_window_are_no_part_of_the_line():
    """Gemma 3's full-attention layers share the budget among themselves."""
    model = rm.make(
        "gemma3_text",
        layers=7,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"] + ["full_attention"] * 3,
    )
    with mmkv.wrapped(model, cache=[PyramidKV(budget=0.3)]), torch.no_grad():
        cache = model(torch.tensor([rm.words(400)])).past_key_values
    counts = [held_by_head(cache.layers[i], 0, 0)[0].numel() for i in (2, 4, 5, 6)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == 4 * 120
