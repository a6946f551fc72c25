"""Methods set by a keep ratio: the share of vision tokens that the last decoder layer reads is the one asked for."""

from __future__ import annotations

import decoder_views
import pytest
import torch
from visions import video

from mmkv.parts.registry import METHODS
from mmkv.tokens.at_ratio import BY_THRESHOLD, RATED, at_ratio
from mmkv.tokens.method import TokenMethod
from mmkv.tokens.mustdrop import MustDrop

FRAMES, SIDE = 8, 6
TOKENS = FRAMES * SIDE * SIDE


def left(method: TokenMethod, layers: int = 32, seed: int = 0) -> int:
    """Vision tokens of a video of 8 frames of 6 x 6 that enter the last layer, with random features and attention."""
    torch.manual_seed(seed)
    seen = video(torch.randn(FRAMES, SIDE, SIDE, 16), visionzip=torch.rand(FRAMES, SIDE, SIDE))
    choice = method.before_decoder(seen)
    count = TOKENS if choice is None else int(choice.keep.sum())
    view = decoder_views.view("T" + "V" * count + "TTT", layers=layers)
    for layer in method.decoder_layers(layers):
        view.layer = layer
        choice = method.in_decoder(view)
        if choice is not None:
            attention = decoder_views.random_attention(4, int(choice.keep.sum()), seed=layer)
            view = decoder_views.after(view, choice, attention, layer)
    return int(view.visual.sum())


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25, 0.2, 0.1])
@pytest.mark.parametrize("name", [name for name in RATED if name not in BY_THRESHOLD])
def test_the_share_is_met_within_a_token_a_frame(name, keep):
    if name == "dycoke" and keep < 0.25:
        pytest.skip("DyCoke keeps a quarter at least")
    count = left(at_ratio(name, keep))
    if name == "evs":
        keep = max(keep, 1 / FRAMES)  # the first frame stays whole
    assert abs(count - keep * TOKENS) <= FRAMES


def test_evs_never_keeps_less_than_the_first_frame():
    assert left(at_ratio("evs", 0.05)) == SIDE * SIDE


@pytest.mark.parametrize("layers", [4, 6, 16])
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_shallow_decoders_too(layers, keep):
    for name in ("fastv", "sparsevlm"):
        assert abs(left(at_ratio(name, keep), layers) - keep * TOKENS) <= FRAMES


@pytest.mark.parametrize("name", RATED)
def test_all_of_them(name):
    method = at_ratio(name, 1)
    assert isinstance(method, METHODS[name].method)
    if name not in BY_THRESHOLD:
        assert left(method) == TOKENS


def test_mustdrop_takes_the_nearest_official_thresholds():
    assert at_ratio("MustDrop", 0.5) == MustDrop.for_tokens(192)
    assert at_ratio("mustdrop", 0.2) == MustDrop.for_tokens(128)
    assert at_ratio("mustdrop", 0.01) == MustDrop.for_tokens(64)


def test_every_token_method_is_rated_or_refused():
    for key, entry in METHODS.items():
        if entry.kind == "tokens" and key not in RATED:
            with pytest.raises(ValueError, match=f"{entry.name} .*takes one of dycoke, evs"):
                at_ratio(entry.name, 0.5)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, True, "0.5", float("nan")])
def test_bad_shares(keep):
    with pytest.raises(ValueError, match="above 0, at most 1"):
        at_ratio("uniform", keep)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="did you mean 'fastv'"):
        at_ratio("fasttv", 0.5)
    with pytest.raises(ValueError, match=r"DyCoke keeps one of each four frames whole; possible are shares from 0.25"):
        at_ratio("dycoke", 0.2)
