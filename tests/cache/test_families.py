"""Every registered cache method on every family and in every way of generating; what is refused says why."""

from __future__ import annotations

from functools import cache

import pytest
import random_models as rm
import support
import torch

import mmkv

KEEPS_ALL = ("RazorAttention",)  # at the length of these prompts: sinks and the recent tokens are more
MEDIA = 200  # tokens; enough for the largest group behind the largest residual window

SPECIAL = dict(suppress_tokens=list(range(rm.FIRST_TEXT)))


def modes(family: str) -> tuple[str, ...]:
    return support.CACHE_MODES if family in rm.VLMS else support.TEXT_MODES


@cache
def prepared(family: str):
    """Of a family: a model, a prompt, a batch of two, and bytes without a method."""
    model = rm.make(family, **({} if family in rm.WINDOWED else dict(layers=2)))
    one = rm.default_prompt(model, 2 * MEDIA if family == "internvl" else MEDIA)  # half of what that reads is text
    alone, two = rm.inputs(model, [one]), rm.inputs(model, [one, rm.second_prompt(model, MEDIA)])
    with mmkv.wrapped(model):
        rm.generate(model, alone, new=2, **SPECIAL)
        return model, alone, two, mmkv.report(model).kv_bytes


@pytest.mark.filterwarnings("ignore:GUIKV. a prompt without images")
@pytest.mark.support("cache", modes=modes)
@pytest.mark.parametrize("name", support.CACHE)
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_every_method_on_every_family(family, name):
    """Several ways with a batch of two padded prompts, one alone, and a second turn of five words; in fewer bytes."""
    model, alone, two, full = prepared(family)
    with mmkv.wrapped(model, cache=[support.CACHE[name]()]):
        for mode in (mode for mode in ("beam", "returns", "lookup") if mode in modes(family)):
            given = alone if mode == "lookup" else two
            out = rm.generate(model, given, mode, new=3 if mode == "lookup" else 2, **SPECIAL)
            assert out.shape[0] == len(given["input_ids"]) * (2 if mode == "returns" else 1)
        turns = mmkv.Cache(model)
        first = rm.generate(model, alone, "greedy", new=2, past_key_values=turns, **SPECIAL)
        held = mmkv.report(model).kv_bytes
        ids = torch.cat([first, torch.tensor([rm.words(5, 9)])], 1)
        rm.generate(
            model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), new=2, past_key_values=turns, **SPECIAL
        )
        assert turns.get_seq_length() == ids.shape[1] + 1
    assert held < full or (name in KEEPS_ALL and held == full)


@pytest.mark.support("cache")
@pytest.mark.parametrize(("name", "family"), support.cache_refusals())
def test_refused_on_language_models(name, family, refused):
    from mmkv.parts.registry import METHODS

    with pytest.raises(ValueError, match="visual autoregressive") as caught:
        mmkv.wrap(rm.make(family), cache=[METHODS[name.lower()].method()])
    refused(caught.value)
