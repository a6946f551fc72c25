"""Misuse that a fresh reader of the README came up with: one clear line each."""

from __future__ import annotations

import pytest
import random_models as rm
import torch

import mmkv
from mmkv.cache import KIVI, VidKV


@pytest.fixture
def model():
    return rm.make("qwen2")


def test_another_attention_implementation_while_wrapped(model):
    """It would hand our views to a function that knows nothing of them; the user's choice survives the unwrap."""
    mmkv.wrap(model, "vidkv")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"after mmkv\.wrap"):
        model(torch.tensor([[5, 6, 7]]))
    mmkv.unwrap(model)
    assert model.config._attn_implementation == "eager"
    model(torch.tensor([[5, 6, 7]]))


def test_a_cache_keeps_to_the_method_that_filled_it(model):
    with mmkv.wrapped(model, "vidkv"), torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
    with mmkv.wrapped(model, "kivi-2"), pytest.raises(ValueError, match=r"VidKV.*KIVI"):
        model(torch.tensor([[8]]), past_key_values=cache)
    with mmkv.wrapped(model, "vidkv"), torch.no_grad():
        model(torch.tensor([[8]]), past_key_values=cache)
        assert cache.get_seq_length() == 4


def test_a_cache_of_a_wrapped_model_says_so_elsewhere(model):
    with mmkv.wrapped(model, "vidkv"), torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
    with pytest.raises(RuntimeError, match=r"belongs to a model that mmkv\.wrap has wrapped"):
        model(torch.tensor([[8]]), past_key_values=cache)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KIVI(residual="a"), lambda: KIVI(residual=64.5), lambda: KIVI(sinks=True), lambda: KIVI(residual=True),
        lambda: VidKV(key_bits="a"), lambda: VidKV(stp="x"), lambda: VidKV(gamma=None),
    ],
)  # fmt: skip
def test_options_of_the_wrong_type(make):
    with pytest.raises(ValueError, match=r"possible are|a number is needed") as error:
        make()
    assert "\n" not in str(error.value)


def test_a_list_of_presets(model):
    with pytest.raises(TypeError, match="a preset is a name"):
        mmkv.wrap(model, ["vidkv"])
    assert not hasattr(model, "_mmkv")


def test_a_report_before_any_forward(model):
    with mmkv.wrapped(model, "vidkv"):
        assert "no forward yet" in str(mmkv.report(model))
        assert mmkv.report(model).kv_bytes == 0


def test_no_embeddings_are_made_for_a_method_that_reads_none(model, monkeypatch):
    calls = []
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[5, 6, 7]])
    for preset, expected in (("kivi-2", 1), ("vidkv", 1), ("vidkv-stp", 2)):
        calls.clear()
        with mmkv.wrapped(model, preset), torch.no_grad():
            model(ids)
        assert len(calls) == expected, preset
