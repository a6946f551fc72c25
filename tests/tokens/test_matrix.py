"""Every registered token method on every family: keeping everything is stock, and at work it runs however it is generated."""

from __future__ import annotations

import pytest
import random_models as rm
import support
import torch
from support import TOKENS

import mmkv
from mmkv._wrap import session
from mmkv.cache import VidKV

# settings that do something to the tiny prompts of the tests, where the defaults are made for more tokens or layers
AT_WORK = {
    "DiffRate": lambda tower, n: TOKENS["DiffRate"](
        prune=(n - 2,) * len(tower), merge=(n - 4,) * len(tower), scores="cls" if tower.has_cls else "received"
    ),
    "SparseVLM": lambda tower, n: TOKENS["SparseVLM"](layers=(0, 1), keep=(0.6, 0.4)),
    "VisionZip": lambda tower, n: TOKENS["VisionZip"](dominant=0.3, contextual=0.1),
}
CASES = support.token_cases()


def setting(name: str, model):
    """The method at work on a model."""
    if name in AT_WORK:
        tower = session(mmkv.wrap(model, tokens=[TOKENS["Uniform"]()])).looking.tower
        mmkv.unwrap(model)
        patches = 36 if model.config.model_type == "llava" else 16
        n = patches + tower.prefix
        return AT_WORK[name](tower, n)
    return TOKENS[name]()


def batch(model):
    return rm.inputs(model, [rm.default_prompt(model, 64), rm.second_prompt(model, 64)])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_keeping_everything_is_stock(name, family):
    """Greedy, beams, sampled, drafts; a padded batch of two; to the bit, and after unwrapping as well."""
    model = rm.make(family)
    given, alone = batch(model), rm.inputs(model, [rm.default_prompt(model, 64)])
    method = setting(name, model).keeping_everything()
    for mode in rm.MODES:
        some = alone if mode == "lookup" else given
        want = rm.generate(model, some, mode, suppress_tokens=list(range(rm.FIRST_TEXT)))
        with mmkv.wrapped(model, tokens=[method]):
            got = rm.generate(model, some, mode, suppress_tokens=list(range(rm.FIRST_TEXT)))
        assert torch.equal(got, want), mode
    with torch.no_grad():
        want = model(**given).logits
        with mmkv.wrapped(model, tokens=[method]):
            assert torch.equal(model(**given).logits, want)
        assert torch.equal(model(**given).logits, want)


@pytest.mark.support("tokens", modes=tuple(rm.MODES))
@pytest.mark.parametrize(("name", "family"), CASES)
def test_at_work(name, family):
    """Fewer tokens go through the decoder, or through the tower; a row alone answers as it does beside another."""
    model = rm.make(family)
    given, alone = batch(model), rm.inputs(model, [rm.default_prompt(model, 64)])
    length = given["input_ids"].shape[1]
    special = list(range(rm.FIRST_TEXT))
    with mmkv.wrapped(model, tokens=[setting(name, model)]):
        answers = {}
        for mode in rm.MODES:
            some = alone if mode == "lookup" else given
            answers[mode] = rm.generate(model, some, mode, suppress_tokens=special)
            assert answers[mode].shape[1] == some["input_ids"].shape[1] + 8
        single = rm.generate(model, alone, suppress_tokens=special)
        assert torch.equal(answers["lookup"], single)
        assert torch.equal(answers["greedy"][0, length:], single[0, alone["input_ids"].shape[1] :])
        found = mmkv.report(model)
        hooks = session(model).looking.hooks
        if (name, family) in support.IDLE:
            assert not session(model).dropping.trace.kept
        merged = name in support.IN_TOWER and hooks.state.tokens_per_block[-1] < hooks.state.n0
        assert merged or found.tokens_per_layer[-1] < found.tokens_seen


@pytest.mark.support("tokens", modes=("turns",))
@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_second_turn_feeds_new_tokens_only(name, family):
    model = rm.make(family)
    alone = rm.inputs(model, [rm.default_prompt(model, 64)])
    special = list(range(rm.FIRST_TEXT))
    with mmkv.wrapped(model, tokens=[setting(name, model)]):
        cache = mmkv.Cache(model)
        first = model.generate(
            **alone, max_new_tokens=3, do_sample=False, suppress_tokens=special, past_key_values=cache
        )
        held = [layer.keys.shape[2] for layer in cache.layers]
        ids = torch.cat([first, torch.tensor([rm.words(5, 9)])], 1)
        more = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        second = model.generate(**more, suppress_tokens=special, past_key_values=cache)
        grown = [layer.keys.shape[2] - n for layer, n in zip(cache.layers, held)]
    assert second.shape[1] == ids.shape[1] + 3
    assert set(grown) == {8}  # the last token of the first answer, five words, two of the second answer


@pytest.mark.parametrize(("name", "family"), CASES)
def test_with_a_cache_method(name, family):
    """Tokens and cache in one call: the cache method stores the tokens that are left, in fewer bytes."""
    model = rm.make(family, head_dim=32)
    given = rm.inputs(model, [rm.default_prompt(model, 1600)])
    method = setting(name, model)
    reports = []
    for options in (dict(tokens=[method]), dict(tokens=[method], cache=[VidKV()])):
        with mmkv.wrapped(model, **options):
            rm.generate(model, given)
            reports.append(mmkv.report(model))
    tokens, both = reports
    assert both.tokens_held == tokens.tokens_held
    assert both.tokens_per_layer == tokens.tokens_per_layer
    if tokens.tokens_held >= 512:  # fewer fill no group behind the residual window
        assert both.packed_bits is not None
        assert both.kv_bytes < 0.8 * tokens.kv_bytes
    else:
        assert both.kv_bytes <= tokens.kv_bytes


@pytest.mark.support("tokens")
@pytest.mark.parametrize(("name", "family"), support.token_refusals())
def test_towers_that_hold_on_to_every_patch(name, family, refused):
    model = rm.make(family)
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(model, tokens=[TOKENS[name]()])
    assert "\n" not in str(caught.value)
    refused(caught.value)
