"""FastV: the last token's attention ranks the vision tokens before one layer."""

from __future__ import annotations

import pytest
import torch
from decoder_views import random_attention, view

from mmkv.tokens.fastv import FastV
from mmkv.tokens.method import TowerFacts


def last_row(values: list[float]) -> torch.Tensor:
    """Attention [1, m, m] whose last row is this."""
    out = torch.zeros(1, len(values), len(values))
    out[0, -1] = torch.tensor(values)
    return out


def test_hand_computed():
    #            T    I    I    I    I    T
    attention = last_row([0.3, 0.1, 0.05, 0.2, 0.15, 0.2])
    choice = FastV().in_decoder(view("TIIIIT", attention))
    assert choice.keep.tolist() == [True, False, False, True, True, True]
    assert choice.features is None and choice.into is None
    assert FastV(ratio=0.75).in_decoder(view("TIIIIT", attention)).keep.tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]


def test_heads_are_averaged():
    attention = torch.cat([last_row([0.0, 0.9, 0.0, 0.1]), last_row([0.0, 0.0, 0.92, 0.08])])
    assert FastV().in_decoder(view("TIIT", attention)).keep.tolist() == [True, False, True, True]


def test_against_a_naive_ranking():
    attention = random_attention(4, 60, seed=3)
    kinds = "T" * 7 + "I" * 41 + "T" * 12
    for ratio in (0.1, 0.5, 0.75, 0.97):
        score = [sum(float(attention[h, 59, j]) for h in range(4)) / 4 for j in range(7, 48)]
        best = sorted(range(41), key=lambda j: -score[j])[: round(41 * (1 - ratio))]
        expected = {*range(7), *(7 + j for j in best), *range(48, 60)}
        keep = FastV(ratio=ratio).in_decoder(view(kinds, attention)).keep
        assert set(keep.nonzero()[:, 0].tolist()) == expected


def test_ties_go_to_the_earlier_token():
    assert FastV().in_decoder(view("IIIIT", last_row([0.2] * 5))).keep.tolist() == [True, True, False, False, True]


def test_media_together_or_each_its_share():
    #            I    I    T    V    V    V    V    T
    attention = last_row([0.01, 0.02, 0.2, 0.1, 0.2, 0.3, 0.05, 0.12])
    together = FastV().in_decoder(view("IITVVVVT", attention)).keep
    assert together.tolist() == [False, False, True, True, True, True, False, True]
    each = FastV(per_medium=True).in_decoder(view("IITVVVVT", attention)).keep
    assert each.tolist() == [False, True, True, False, True, True, False, True]


def test_without_a_ratio_or_an_image_all_stay():
    assert FastV(ratio=0).in_decoder(view("TIIT")) is None
    assert FastV().keeping_everything().in_decoder(view("TIIT")) is None
    assert FastV().in_decoder(view("TTT")) is None


def test_one_token_stays_of_a_tiny_image_and_the_image_may_come_last():
    assert FastV(ratio=0.9).in_decoder(view("TIT", last_row([0.5, 0.1, 0.4]))).keep.all()
    assert FastV().in_decoder(view("TII", last_row([0.5, 0.3, 0.2]))).keep.tolist() == [True, True, False]


def test_layers():
    assert FastV().decoder_layers(32) == (1,)
    assert FastV(layer=3).decoder_layers(4) == (2,)
    FastV(layer=3).check(TowerFacts(layers=4))
    with pytest.raises(ValueError, match="behind layer 2 of a decoder of 3 layers; possible are layers 0 to 1"):
        FastV(layer=3).check(TowerFacts(layers=3))
    with pytest.raises(ValueError, match="decoder of 0 layers"):
        FastV().check(TowerFacts())


@pytest.mark.parametrize(
    "options", [{"layer": 0}, {"layer": True}, {"layer": 2.0}, {"ratio": 1}, {"ratio": -0.1}, {"ratio": True}]
    + [{"per_medium": 1}, {"position_ids": "new"}],
)  # fmt: skip
def test_refusals(options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}=.*possible are [^\n]*$"):
        FastV(**options)
