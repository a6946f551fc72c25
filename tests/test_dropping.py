"""Tokens dropped before and between decoder layers, on every family: equal to hiding their keys, whatever `generate` does."""

from __future__ import annotations

import copy

import pytest
import torch
from dropping import Behind, EveryNth, hidden_from, kept_masks, positions
from random_models import FIRST_TEXT, Image, Video, inputs, make, words

import mmkv
from mmkv._wrap import session
from mmkv.cache import KIVI, SnapKV
from mmkv.parts.registry import METHODS

FAMILIES = ("qwen2_5_vl", "llava_onevision", "qwen2_vl", "qwen3_vl", "longva", "internvl", "opencua")
SPECIAL = list(range(FIRST_TEXT))  # a placeholder in an answer would want features
DROPS = {
    "before": [EveryNth(3)],
    "behind": [Behind((0,))],
    "twice": [Behind((0, 1))],
    "all": [EveryNth(2), Behind((0, 1), 3)],
}


def prompts(model):
    """Two prompts of different length: one with a video, one with a video and an image."""
    video = Video(16 if model.config.model_type == "longva" else 4, 8, 8)
    image = Image(8, 12) if model.config.model_type.startswith("qwen") else Image(16, 24)
    return inputs(
        model, [words(5) + [video] + words(7, 1), words(3, 2) + [image] + words(4, 3) + [video] + words(6, 4)]
    )


def one(model):
    return inputs(model, [words(5) + [Video(4, 8, 8)] + words(7, 1)])


def generate(model, given, **options):
    torch.manual_seed(0)
    return model.generate(
        **copy.deepcopy(given), max_new_tokens=8, **{"do_sample": False, "suppress_tokens": SPECIAL, **options}
    )


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_hiding_the_keys(family, drop):
    """Original positions survive: the logits of what is left are those of a stock model whose later layers see no dropped key."""
    model = make(family)
    given = prompts(model)
    ids = positions(model, given)
    with torch.no_grad(), mmkv.wrapped(model, tokens=DROPS[drop]):
        got = model(**given, position_ids=ids).logits
        trace = session(model).dropping.trace
    kept = kept_masks(trace)
    assert len(kept) == {"before": 1, "behind": 1, "twice": 2, "all": 3}[drop]
    want = hidden_from(model, given, kept, ids)
    left = kept[max(kept)]
    assert int(left.sum()) < int(given["attention_mask"].sum())
    assert torch.allclose(got[left], want[left], atol=1e-4)
    assert not bool(got[~left & given["attention_mask"].bool()].any())  # a dropped token says nothing


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_goes_on_as_if_the_keys_were_hidden(family, drop):
    model = make(family)
    given = prompts(model)
    with mmkv.wrapped(model, tokens=DROPS[drop]):
        got = generate(model, given)
        kept = kept_masks(session(model).dropping.trace)
    length = given["input_ids"].shape[1]
    new = got[:, length:-1]  # teacher-forced
    longer = dict(given)
    longer["input_ids"] = got[:, :-1]
    longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(new)], 1)
    kept = {i: torch.nn.functional.pad(mask, (0, new.shape[1]), value=True) for i, mask in kept.items()}
    ids = positions(model, given)
    steps = torch.arange(1, new.shape[1] + 1)
    ids = torch.cat([ids, ids[..., -1:] + steps], -1)
    want = hidden_from(model, longer, kept, ids)[:, length - 1 :, FIRST_TEXT:].argmax(-1) + FIRST_TEXT
    assert got[:, length:].tolist() == want.tolist()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_beams=3),
        dict(do_sample=True, top_k=5),
        dict(do_sample=True, num_return_sequences=2),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=["greedy", "beam", "sampled", "two answers", "assisted"],
)
@pytest.mark.parametrize(
    "methods", [[EveryNth(1)], [Behind((0, 1), 1)], [EveryNth(1), Behind((0,), 1, trims_cache=True)]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_nothing_is_stock(family, methods, options):
    model = make(family)
    given = one(model) if "prompt_lookup_num_tokens" in options else prompts(model)
    want = generate(model, given, **options)
    with mmkv.wrapped(model, tokens=methods):
        got = generate(model, given, **options)
        assert session(model).dropping.trace.kept == {}
    assert torch.equal(got, want)
    assert torch.equal(generate(model, given, **options), want)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_rows_and_drafts_follow(family, drop):
    """One beam, one row of a batch and drafts that are rejected give what the prompt alone gives."""
    model = make(family)
    alone = one(model)
    both = {name: torch.cat([value] * 2) for name, value in alone.items()}
    with mmkv.wrapped(model, tokens=DROPS[drop]):
        want = generate(model, alone)
        new = want[:, alone["input_ids"].shape[1] :]
        assert torch.equal(generate(model, both)[:, both["input_ids"].shape[1] :], new.repeat(2, 1))
        assert torch.equal(generate(model, alone, prompt_lookup_num_tokens=3), want)
        beams = generate(model, alone, num_beams=3)
        pair = generate(model, both, num_beams=3)
    assert torch.equal(pair, beams.repeat(2, 1))


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, drop):
    model = make(family)
    prompt = words(5) + [Video(4, 8, 8)] + words(7, 1)
    plain, padded = inputs(model, [prompt]), inputs(model, [prompt], pad_to=150)
    with mmkv.wrapped(model, tokens=DROPS[drop]):
        a = generate(model, plain)[:, plain["input_ids"].shape[1] :]
        b = generate(model, padded)[:, padded["input_ids"].shape[1] :]
    assert torch.equal(a, b)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_brings_new_tokens_only(family, drop):
    """Text, then text again, on a cache that holds a part; then another video, of which again a part is kept."""
    model = make(family)
    given = one(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=DROPS[drop]):
        cache = mmkv.Cache(model)
        first = model.generate(**given, max_new_tokens=4, do_sample=False, past_key_values=cache)
        seen = cache.get_seq_length()
        assert seen == first.shape[1] - 1  # logical: dropped tokens count
        held = [layer.keys.shape[2] for layer in cache.layers]
        text = torch.tensor([words(5, 9)])
        ids = torch.cat([first, text], 1)
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        assert [layer.keys.shape[2] - n for layer, n in zip(cache.layers, held)] == [9] * len(held)
        assert cache.get_seq_length() == second.shape[1] - 1
        cache.crop(seen)
        assert [layer.keys.shape[2] for layer in cache.layers] == held
        again = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        assert torch.equal(again, second)
        more = inputs(model, [[Video(4, 8, 8)] + words(4, 11)], seed=5)
        before = [layer.keys.shape[2] for layer in cache.layers]
        total = cache.get_seq_length()
        length = more["input_ids"].shape[1]
        mask = torch.ones(1, total + length, dtype=torch.int64)
        ids = torch.arange(total, total + length).expand(3, 1, -1) if family.startswith("qwen") else None
        model(**{**more, "attention_mask": mask}, past_key_values=cache, position_ids=ids)
        grown = [layer.keys.shape[2] - n for layer, n in zip(cache.layers, before)]
        assert cache.get_seq_length() == total + length
        assert grown[-1] < length and grown == sorted(grown, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_into_the_video_keeps_what_was_kept_before_it(family):
    model = make(family)
    given = one(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2)]):
        cache = mmkv.Cache(model)
        model(**given, past_key_values=cache)
        kept = session(model).dropping.trace.kept[0][0]
        cache.crop(20 - cache.get_seq_length())
        assert cache.get_seq_length() == 20
        assert cache.layers[0].keys.shape[2] == int((kept < 20).sum())


def test_a_crop_into_prompts_that_kept_different_numbers_is_refused():
    model = make("qwen2_5_vl")
    given = prompts(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2)]):
        cache = mmkv.Cache(model)
        model(**given, past_key_values=cache)
        kept = session(model).dropping.trace.kept[0]
        length = next(n for n in range(cache.get_seq_length(), 0, -1) if len(set((kept >= n).sum(1).tolist())) == 2)
        with pytest.raises(RuntimeError, match="no deeper than the text"):
            cache.crop(length - cache.get_seq_length())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_what_was_kept(family):
    model = make(family)
    given = prompts(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[Behind((0,), 4)]):
        out = model(**given, use_cache=True)
        trace = session(model).dropping.trace
        held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        found = mmkv.report(model)
    assert held == [given["input_ids"].shape[1]] + [trace.kept[1].shape[1]] * 2
    assert found.tokens_per_layer == tuple(trace.computed())
    assert found.kv_bytes < 0.9 * found.kv_bytes_dense
    assert "tokens computed" in str(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_trimmed_layers_hold_what_survived_the_last_drop(family):
    """And decode as if the earlier layers' keys were hidden from then on; the prefill is not changed by it."""
    model = make(family)
    given = prompts(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[Behind((0, 1))]):
        want = model(**given, use_cache=True)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[Behind((0, 1), trims_cache=True)]):
        got = model(**given, use_cache=True)
        trace = session(model).dropping.trace
        out = generate(model, given)
    assert torch.equal(got.logits[:, -1], want.logits[:, -1])
    survivors = trace.kept[2]
    for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers):
        assert mine.keys.shape[2] == survivors.shape[1]
        for row, columns in enumerate(survivors):
            there = columns >= 0
            origin = theirs.state.places()[row]
            at = torch.stack([(origin == c).nonzero()[0, 0] for c in columns[there]])
            assert torch.equal(mine.keys[row][:, there], theirs.keys[row][:, at])
    assert out.shape[1] == given["input_ids"].shape[1] + 8


def test_renumbered_positions_count_what_is_left():
    """LLaVA, one axis: the later layers rotate by 0, 1, 2 ... of what they hold, in the prompt and behind it."""
    model = make("llava_onevision")
    given = one(model)
    seen = []

    def look(module, args, kwargs):
        seen.append((module.layer_idx, kwargs["position_embeddings"]))

    hooks = [
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.language_model.layers
    ]
    with mmkv.wrapped(model, tokens=[Behind((0,), position_ids="renumbered")]):
        generate(model, given)
        left = session(model).dropping.trace.computed()[-1]
    for hook in hooks:
        hook.remove()
    rotary = model.model.language_model.rotary_emb
    x = torch.zeros(1)
    cos, sin = rotary(x, torch.arange(left)[None])
    prompt = next(p for layer, p in seen if layer == 2)
    assert torch.equal(prompt[0], cos) and torch.equal(prompt[1], sin)
    step = [p for layer, p in seen if layer == 2][1]
    assert torch.equal(step[0], rotary(x, torch.tensor([[left]]))[0])
    first = [p for layer, p in seen if layer == 0][1]
    assert torch.equal(first[0], rotary(x, torch.tensor([[given["input_ids"].shape[1]]]))[0])


@pytest.mark.parametrize("drop", DROPS)
def test_chunks_of_a_prompt_drop_the_same(drop):
    """Methods before the decoder see the whole prompt whatever its chunks are; those between layers need it in one piece."""
    model = make("qwen3_vl")
    given = inputs(model, [words(5) + [Video(8, 8, 8)] + words(7, 1)])
    if drop != "before":
        with pytest.raises(ValueError, match="prefill_chunk"):
            mmkv.wrap(model, tokens=DROPS[drop], prefill_chunk=64)
        return
    with mmkv.wrapped(model, tokens=DROPS[drop]):
        want = generate(model, given)
        kept = session(model).dropping.trace.kept[0]
    with mmkv.wrapped(model, tokens=DROPS[drop], prefill_chunk=64):
        got = generate(model, given)
        assert torch.equal(session(model).dropping.trace.kept[0], kept)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_cache_compose(family):
    model = make(family)
    given = prompts(model)
    sizes = {}
    for name, options in {
        "tokens": dict(tokens=[EveryNth(2)]),
        "cache": dict(cache=[SnapKV(budget=0.5), KIVI(bits=2, group=32, residual=32)]),
        "both": dict(tokens=[EveryNth(2)], cache=[SnapKV(budget=0.5), KIVI(bits=2, group=32, residual=32)]),
        "behind": dict(tokens=[Behind((0,))], preset="vidkv"),
    }.items():
        with mmkv.wrapped(model, options.pop("preset", None), **options):
            generate(model, given)
            generate(model, given, num_beams=2)
            sizes[name] = mmkv.report(model).kv_bytes
    assert sizes["both"] < sizes["tokens"]


def test_no_cache_asked_for_none_given():
    model = make("qwen2_5_vl")
    given = one(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2)]):
        out = model(**given, use_cache=False)
        cached = model(**given, use_cache=True)
    assert out.past_key_values is None
    assert torch.equal(out.logits, cached.logits)


def test_a_prompt_without_images_is_stock():
    model = make("qwen2_5_vl")
    given = inputs(model, [words(40)])
    want = generate(model, given)
    with mmkv.wrapped(model, tokens=[EveryNth(2), Behind((0, 1))]):
        assert torch.equal(generate(model, given), want)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(tokens=[EveryNth]), TypeError, "give an instance"),
        (dict(tokens="fastv"), TypeError, "is a name"),
        (dict(tokens=[KIVI()]), TypeError, "not a token method"),
        (dict(tokens=[Behind((0,), position_ids="renumbered")]), ValueError, "3 axes"),
    ],
)
def test_refused_at_wrap(options, error, said):
    model = make("qwen2_5_vl")
    with pytest.raises(error, match=said) as caught:
        mmkv.wrap(model, **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_mmkv")


def test_refused_models_without_eyes_and_with_windows():
    with pytest.raises(ValueError, match="sees no images"):
        mmkv.wrap(make("llama"), tokens=[EveryNth(2)])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (dict(labels=True), "labels"),
        (dict(output_hidden_states=True), "output_hidden_states"),
        (dict(attention_mask="4d"), "2-D padding mask"),
    ],
)
def test_refused_at_the_forward(extra, said):
    model = make("llava_onevision")
    given = one(model)
    length = given["input_ids"].shape[1]
    if "labels" in extra:
        extra = dict(labels=given["input_ids"])
    if "attention_mask" in extra:
        given["attention_mask"] = torch.zeros(1, 1, length, length)
        extra = {}
    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2)]), pytest.raises(ValueError, match=said):
        model(**given, **extra)


def test_training_is_refused():
    model = make("llava_onevision").train()
    with mmkv.wrapped(model, tokens=[EveryNth(2)]), pytest.raises(ValueError, match="inference"):
        model(**one(model))


def test_unwrapping_leaves_nothing():
    model = make("qwen2_5_vl")
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    mmkv.unwrap(mmkv.wrap(model, tokens=[EveryNth(2), Behind((0,))]))
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == before


CACHE_METHODS = {e.name: e.method for e in METHODS.values() if e.kind == "cache" and not e.method.next_scale}


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_every_cache_method_stores_what_is_left(name):
    """Layers hold different tokens, some let go of theirs late; greedy, beams, a padded batch and a second turn go on."""
    model = make("qwen2_5_vl", head_dim=32)
    given = inputs(model, [words(5) + [Video(40, 8, 8)] + words(40, 1), words(9, 2) + [Video(30, 8, 8)] + words(50, 4)])
    tokens = [EveryNth(2), Behind((0, 1), 2, trims_cache=True)]
    with mmkv.wrapped(model, tokens=tokens):
        generate(model, given)
        most = mmkv.report(model)
    with mmkv.wrapped(model, tokens=tokens, cache=[CACHE_METHODS[name]()]):
        generate(model, given, num_beams=2)
        cache = mmkv.Cache(model)
        out = model.generate(**given, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL, past_key_values=cache)
        found = mmkv.report(model)
        ids = torch.cat([out, torch.tensor([words(5, 9)] * 2)], 1)
        mask = torch.cat([given["attention_mask"], torch.ones_like(ids[:, given["attention_mask"].shape[1] :])], 1)
        more = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=SPECIAL,
            past_key_values=cache,
        )
    assert found.tokens_per_layer == most.tokens_per_layer
    assert found.tokens_held <= most.tokens_held + 1e-6
    assert more.shape[1] == ids.shape[1] + 4


def test_a_limit_of_bytes_holds_with_dropped_tokens():
    model = make("qwen2_5_vl", head_dim=32)
    given = inputs(model, [words(5) + [Video(40, 8, 8)] + words(40, 1)])
    with mmkv.wrapped(model, tokens=[EveryNth(2), Behind((0,), 2)], max_bytes=150_000):
        generate(model, given)
        assert mmkv.report(model).kv_bytes <= 150_000


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava"])
@pytest.mark.parametrize("name", ["EVS", "FastV", "VisionZip", "MustDrop", "Uniform"])
def test_a_deep_copy_drops_as_the_original_does(family, name):
    import random_models as rm

    model = make(family)
    given = inputs(model, [rm.default_prompt(model, 64)])
    mmkv.wrap(model, tokens=[METHODS[name.lower()].method()])
    want = generate(model, given)
    counts = mmkv.report(model).tokens_per_layer
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():  # nothing of the copy leads back to the original
            weight.zero_()
    assert torch.equal(generate(other, given), want)
    assert mmkv.report(other).tokens_per_layer == counts
    mmkv.unwrap(other)
    assert not hasattr(other, "_mmkv")
    assert hasattr(model, "_mmkv")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_without_its_head_drops_too(family):
    model = make(family)
    given = one(model)
    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2), Behind((0,))]):
        want = model(**given, output_hidden_states=False)
        counts = mmkv.report(model).tokens_per_layer
        got = model.model(**given).last_hidden_state
        assert mmkv.report(model).tokens_per_layer == counts
        assert mmkv.report(model).tokens["image" if family in ("internvl", "opencua") else "video"] > 0
    assert torch.equal(model.lm_head(got), want.logits)


def test_a_forward_after_a_failed_one():
    model = make("qwen2_5_vl")
    given = one(model)

    def boom(*_):
        raise RuntimeError("boom")

    with torch.no_grad(), mmkv.wrapped(model, tokens=[EveryNth(2), Behind((0,))]):
        want = model(**given).logits
        for module in (model.model.language_model.layers[1], model.model.visual.blocks[1], model.lm_head):
            hook = module.register_forward_hook(boom)
            with pytest.raises(RuntimeError, match="boom"):
                model(**given, use_cache=False)
            hook.remove()
            out = model(**given, past_key_values=mmkv.Cache(model))
            assert out.past_key_values is not None
            assert torch.equal(out.logits, want)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava"])
@pytest.mark.parametrize("name", ["VisionZip", "MustDrop", "FastV"])
def test_generating_without_a_cache(family, name):
    """Every step reads the whole prompt anew, and drops anew."""
    import random_models as rm

    model = make(family)
    given = inputs(model, [rm.default_prompt(model, 64)])
    with mmkv.wrapped(model, tokens=[METHODS[name.lower()].method()]):
        got = generate(model, given, use_cache=False)
    assert got.shape[1] == given["input_ids"].shape[1] + 8


def test_the_report_after_a_prompt_of_text():
    model = make("qwen2_5_vl")
    with mmkv.wrapped(model, tokens=[EveryNth(2)]):
        generate(model, one(model))
        assert mmkv.report(model).tokens_per_layer
        generate(model, inputs(model, [words(14)]))
        assert mmkv.report(model).tokens_per_layer == ()
