"""Wrapping with nothing is stock, token for token and bit for bit, in every way of generating and for every family."""

from __future__ import annotations

import gc

import pytest
import random_models as rm
import support
import torch
from transformers import DynamicCache

import mmkv
from mmkv.models import adapter_for

MAIN = ("qwen2_5_vl", "llava_onevision")


def both(model, run):
    """What `run()` gives stock and wrapped with nothing."""
    stock = run()
    with mmkv.wrapped(model):
        return stock, run()


def prompts(model, mode):
    one = rm.default_prompt(model)
    return [one] if mode == "lookup" else [one, rm.second_prompt(model)]


@pytest.mark.support("modes", by="mode")
@pytest.mark.parametrize("mode", rm.MODES)
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_generate_is_stock(family, mode):
    """All modes; the batch of two is padded on the left, and mixes an image and a video for VLMs."""
    model = rm.make(family)
    given = rm.inputs(model, prompts(model, mode))
    stock, wrapped = both(model, lambda: rm.generate(model, given, mode))
    assert torch.equal(stock, wrapped)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_logits_are_stock_to_the_bit(family, attn):
    if family in ("gpt_oss", "gemma2") and attn == "sdpa":
        attn = None  # not to be had, or not in every version: what the family takes by itself
    model = rm.make(family, attn=attn)
    given = rm.inputs(model, prompts(model, "greedy"))
    with torch.no_grad():
        stock, wrapped = both(model, lambda: model(**given).logits)
    assert torch.equal(stock, wrapped)
    keep = dict(output_logits=True, return_dict_in_generate=True)
    a, b = both(model, lambda: torch.stack(rm.generate(model, given, **keep).logits))
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", rm.TEXTS)
def test_assisted_is_stock(family):
    model = rm.make(family)
    helper = rm.make(family, seed=1, layers=4 if family == "gpt_oss" else 3)
    with torch.no_grad():  # an assistant that is right half of the time
        for a, b in zip(helper.parameters(), model.parameters()):
            a.copy_(b + 0.01 * torch.randn_like(b))
    given = rm.inputs(model, [rm.words(60)])
    stock, wrapped = both(model, lambda: rm.generate(model, given, new=24, assistant_model=helper))
    assert torch.equal(stock, wrapped)
    with mmkv.wrapped(helper):  # the assistant may be wrapped as well
        assert torch.equal(stock, rm.generate(model, given, new=24, assistant_model=helper))


def turns(model, cache, count=3):
    """Several turns on one cache; each feeds all ids so far, and new media come with the second one."""
    given = rm.inputs(model, [rm.default_prompt(model)])
    tokens, out = [], None
    history = given
    for turn in range(count):
        out = rm.generate(model, history, past_key_values=cache, new=6)
        tokens.append(out)
        extra = torch.tensor([rm.words(7, 20 + turn)])
        ids = torch.cat([out, extra], dim=1)
        history = {k: v for k, v in history.items() if not k.startswith("pixel")}
        history |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in history:
            kinds = history["mm_token_type_ids"]
            history["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
    return tokens


@pytest.mark.support("modes", name="turns")
@pytest.mark.parametrize("owner", ["mmkv.Cache", "DynamicCache"])
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_turns_on_one_cache_are_stock(family, owner):
    model = rm.make(family)
    stock = turns(model, DynamicCache(config=model.config))
    with mmkv.wrapped(model):
        cache = mmkv.Cache(model) if owner == "mmkv.Cache" else DynamicCache(config=model.config)
        wrapped = turns(model, cache)
        assert cache.get_seq_length() == wrapped[-1].shape[1] - 1  # the last token was not fed
    for a, b in zip(stock, wrapped):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", rm.TEXTS)
def test_plain_dynamic_cache_without_a_config(family):
    """`DynamicCache()` knows no windows; results are those of stock all the same."""
    model = rm.make(family)
    stock = turns(model, DynamicCache())
    with mmkv.wrapped(model):
        wrapped = turns(model, DynamicCache())
    for a, b in zip(stock, wrapped):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", rm.FAMILIES)
def test_prefill_chunk_size_is_stock(family):
    model = rm.make(family)
    given = rm.inputs(model, prompts(model, "greedy"))
    try:
        stock = rm.generate(model, given, prefill_chunk_size=16)
    except Exception as problem:
        pytest.skip(f"stock cannot: {problem}")
    with mmkv.wrapped(model):
        assert torch.equal(stock, rm.generate(model, given, prefill_chunk_size=16))


def embedded(model, given):
    """inputs_embeds with vision features in place, and the positions of the whole prompt."""
    captured = {}

    def hook(module, args, kwargs):
        captured.update(kwargs)

    text = model.model.language_model if rm.is_vlm(model) else model.model
    handle = text.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**given)
    handle.remove()
    embeds = captured.get("inputs_embeds")
    if embeds is None:
        embeds = text.get_input_embeddings()(given["input_ids"])
    return embeds, captured.get("position_ids")


def chunks(model, embeds, positions, sizes=(40, 1, 33, 100)):
    """Logits of each chunk of a prompt that is fed in pieces through `model.forward`."""
    cache, start, out = DynamicCache(config=model.config), 0, []
    with torch.no_grad():
        for size in sizes:
            part = embeds[:, start : start + size]
            if not part.shape[1]:
                break
            more = {} if positions is None else dict(position_ids=positions[..., start : start + part.shape[1]])
            out.append(model(inputs_embeds=part, past_key_values=cache, use_cache=True, **more).logits)
            start += part.shape[1]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    "family", sorted(set(rm.FAMILIES) - {"qwen3_vl"})
)  # deepstack features do not travel with embeds
def test_manual_chunks_are_stock(family):
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model)])
    embeds, positions = embedded(model, given)
    stock = chunks(model, embeds, positions)
    with mmkv.wrapped(model):
        assert torch.equal(stock, chunks(model, embeds, positions))


@pytest.mark.parametrize("family", MAIN)
def test_inputs_embeds_generate_is_stock(family):
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model)])
    embeds, positions = embedded(model, given)
    more = dict(inputs_embeds=embeds, attention_mask=given["attention_mask"])
    if positions is not None and positions.dim() == 3:
        more["position_ids"] = positions
    stock, wrapped = both(model, lambda: rm.generate(model, more))
    assert torch.equal(stock, wrapped)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen2", "gemma3_text"])
def test_without_a_cache_is_stock(family):
    model = rm.make(family)
    given = rm.inputs(model, prompts(model, "greedy"))
    stock, wrapped = both(model, lambda: rm.generate(model, given, use_cache=False, new=4))
    assert torch.equal(stock, wrapped)
    with torch.no_grad():
        a, b = both(model, lambda: model(**given, use_cache=False))
    assert torch.equal(a.logits, b.logits)
    assert b.past_key_values is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", MAIN)
def test_half_precision_is_stock(family, dtype):
    model = rm.make(family).to(dtype)
    given = rm.inputs(model, prompts(model, "greedy"))
    given = {k: v.to(dtype) if v.is_floating_point() and k.startswith("pixel") else v for k, v in given.items()}
    stock, wrapped = both(model, lambda: rm.generate(model, given))
    assert torch.equal(stock, wrapped)


def footprint(model) -> dict:
    """Everything that a wrap could leave behind on the modules of a model and in its configs."""
    found = {}
    for name, module in model.named_modules():
        found[name] = sorted(k for k in module.__dict__ if not k.startswith("__"))
        found[name, "hooks"] = [
            len(v)
            for k, v in sorted(module.__dict__.items())
            if k.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))
        ]
    for name in ("", "text_config", "vision_config"):
        config = getattr(model.config, name, None) if name else model.config
        found["config", name] = None if config is None else (sorted(config.__dict__), config._attn_implementation)
    found["config dict"] = model.config.to_json_string(use_diff=False)
    found["generation"] = model.generation_config.to_json_string(use_diff=False)
    found["state"] = list(model.state_dict())
    return found


@pytest.mark.parametrize("family", rm.FAMILIES)
def test_unwrap_leaves_nothing(family):
    model, other = rm.make(family), rm.make(family)
    given = rm.inputs(model, prompts(model, "greedy"))
    with torch.no_grad():
        stock = model(**given).logits
    before, untouched = footprint(model), footprint(other)
    assert mmkv.wrap(model, cache=[mmkv.cache.KIVI(bits=2, group=32, residual=32)]) is model
    assert footprint(other) == untouched
    rm.generate(model, given, new=3)
    assert mmkv.unwrap(model) is model
    assert footprint(model) == before
    assert footprint(other) == untouched
    gc.collect()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, stock)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_the_text_configuration_is_named(attn):
    """The vision tower keeps its attention; other configs do not hear of mmkv."""
    model = rm.make("qwen2_5_vl", attn=attn)
    with mmkv.wrapped(model):
        assert model.model.language_model.config._attn_implementation == "mmkv"
        assert model.model.visual.config._attn_implementation == attn
        assert model.config._attn_implementation == attn
    assert model.model.language_model.config._attn_implementation == attn


def test_a_stock_model_beside_a_wrapped_one():
    """Two models in one process: the stock one and its caches see no difference."""
    one, two = rm.make("qwen2"), rm.make("llama")
    given = rm.inputs(two, [rm.words(50), rm.words(20, 1)])
    before = rm.generate(two, given)
    with mmkv.wrapped(one, "kivi-2"):
        out = rm.generate(two, given, return_dict_in_generate=True)
    assert torch.equal(before, out.sequences)
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"DynamicLayer"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_left_padding_far_wider_than_a_row(family):
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model), rm.words(3)])
    stock, wrapped = both(model, lambda: rm.generate(model, given, "beam"))
    assert torch.equal(stock, wrapped)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("mode", ["greedy", "beam", "sample", "lookup"])
def test_far_past_a_sliding_window(family, mode):
    """Prompts shorter and longer than the window of 24, decoded far past it."""
    model = rm.make(family)
    for length in (22, 23, 24, 60):
        given = rm.inputs(model, [rm.words(length)])
        stock, wrapped = both(model, lambda given=given: rm.generate(model, given, mode, new=10))
        assert torch.equal(stock, wrapped), f"prompt of {length}"


@pytest.mark.support("modes", name="streaming")
@pytest.mark.parametrize("family", support.NOT_STREAMED)
def test_families_that_cannot_be_streamed(family, refused):
    with pytest.raises(ValueError, match="cannot be streamed") as caught:
        adapter_for(rm.make(family)).frames_reader(None)
    refused(caught.value)
