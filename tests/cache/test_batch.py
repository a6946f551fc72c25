"""A batch gives what its elements give alone, and padding is in nothing."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import METHODS, Bare, codes, held
from transformers import DynamicCache

import mmkv

NAMES = ["kivi-2", "kivi-4", "vidkv", "vidkv-stp", "vidkv-paper", "vidkv-official"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(200, 131), (200, 60), (97, 400)], ids=str)
def test_packed_codes_of_a_batch_are_those_of_its_rows(name, lengths):
    """Left padding full of extreme values, infinities and NaN changes no code, scale, channel order or bit."""
    method, longest = METHODS[name], max(lengths)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(1, 2, n, 16, generator=generator) * torch.rand(16, generator=generator) * 5 for n in lengths]
    embeds = [torch.randn(1, n, 8, generator=generator) for n in lengths]
    medium = [torch.where(torch.arange(n) < n // 2, 0, -1) for n in lengths]
    alone = [
        feed(method, k, e, m, torch.ones(1, k.shape[2], dtype=torch.bool)) for k, e, m in zip(rows, embeds, medium)
    ]
    for poison in (1e4, -1e30, torch.inf, torch.nan):
        pad = [longest - n for n in lengths]
        keys = torch.cat([torch.nn.functional.pad(k, (0, 0, p, 0), value=poison) for k, p in zip(rows, pad)])
        both = torch.cat([torch.nn.functional.pad(e, (0, 0, p, 0), value=poison) for e, p in zip(embeds, pad)])
        kinds = torch.stack([torch.nn.functional.pad(m, (p, 0), value=0) for m, p in zip(medium, pad)])
        valid = torch.stack([torch.arange(longest) >= p for p in pad])
        batch = feed(method, keys, both, kinds, valid)
        for row, single in enumerate(alone):
            at, k, v, packed = held(batch.layer, row)
            at0, k0, v0, packed0 = held(single.layer, 0)
            assert torch.equal(at - pad[row], at0)
            assert torch.equal(packed, packed0)
            assert torch.equal(k, k0)
            assert torch.equal(v, v0)
            theirs = {(h, s): p for part in codes(single.layer) for (_, h, s), p in part.items()}
            ours = {(h, s - pad[row]): p for part in codes(batch.layer) for (r, h, s), p in part.items() if r == row}
            if single.state.marks is None:
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(x, y) for key in theirs for x, y in zip(ours[key], theirs[key]))
            for s, t in zip(batch.layer.packed, single.layer.packed):
                if s.packer.order is not None and packed.any():
                    assert torch.equal(s.packer.order[row], t.packer.order[0])


def feed(method, keys, embeds, medium, valid):
    bare = Bare(method, batch=keys.shape[0])
    from mmkv.layout import TEXT, VIDEO, TokenLayout

    chunk = TokenLayout.text(keys.shape[0], keys.shape[2])
    chunk.valid = valid
    chunk.medium = medium.expand(keys.shape[0], -1).to(torch.int32).clone()
    chunk.modality = torch.where(chunk.medium >= 0, VIDEO, TEXT).to(torch.int8)
    bare.state.extend(chunk, embeds)
    bare.layer.update(keys, keys * 0.5 + 0.1)
    bare.layer.settle()
    return bare


@pytest.mark.parametrize("name", ["kivi-2", "vidkv", "vidkv-stp"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2", "gpt_oss"])
def test_logits_of_a_batch_are_those_of_its_rows(family, name):
    model = rm.make(family)
    prompts = [rm.default_prompt(model, 160), rm.second_prompt(model) + rm.words(90, 9)]
    keep = dict(return_dict_in_generate=True, output_logits=True, new=8)
    with mmkv.wrapped(model, cache=[METHODS[name]]):
        batch = rm.generate(model, rm.inputs(model, prompts), **keep)
        for row, prompt in enumerate(prompts):
            given = rm.inputs(model, prompts)
            alone = rm.inputs(model, [prompt])
            if family == "qwen2_5_vl":  # the same pixels as in the batch
                media = given["video_grid_thw"].prod(-1).tolist()
                alone["pixel_values_videos"] = given["pixel_values_videos"].split(media)[row]
                if row:
                    alone["pixel_values"] = given["pixel_values"]
            single = rm.generate(model, alone, **keep)
            assert torch.equal(single.sequences[0, -8:], batch.sequences[row, -8:])
            ours, theirs = torch.stack(batch.logits, 1)[row], torch.stack(single.logits, 1)[0]
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["kivi-2", "vidkv"])
@pytest.mark.parametrize("poison", [rm.EOS, rm.VOCAB - 1])
def test_the_token_used_as_padding_does_not_matter(name, poison):
    model = rm.make("qwen2")
    with torch.no_grad():  # the padding token's embedding is enormous
        model.get_input_embeddings().weight[poison] *= 1000
    given = rm.inputs(model, [rm.words(150), rm.words(100, 1)])
    given = {k: torch.where(v == poison, 30, v) if k == "input_ids" else v for k, v in given.items()}
    other = dict(given, input_ids=torch.where(given["attention_mask"].bool(), given["input_ids"], poison))
    with mmkv.wrapped(model, cache=[METHODS[name]]), torch.no_grad():
        a, b = model(**given).past_key_values, model(**other).past_key_values
    for x, y in zip(a.layers, b.layers):
        for row in range(2):
            for p, q in zip(held(x, row), held(y, row)):
                assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_row_does_not_pin_the_others_dense_tokens(name):
    """A row too short to pack anything leaves no dense copy of the long row's packed tokens behind."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(1000), rm.words(50, 1)])
    with mmkv.wrapped(model, cache=[METHODS[name]]):
        cache = DynamicCache(config=model.config)
        rm.generate(model, given, past_key_values=cache)
        for layer in cache.layers:
            assert layer.keys.shape[2] <= 32 + 32 + 50
            assert layer.keys.untyped_storage().nbytes() <= 2 * 2 * 16 * 4 * (32 + 32 + 50)
        for row, length in ((0, 1000), (1, 50)):
            assert held(cache.layers[0], row)[0].numel() == length + 7


def test_right_padding_between_turns():
    """Padding may also lie between the turns of a batch; it is neither stored nor attended to."""
    bare = Bare(METHODS["vidkv"], batch=2)
    first = torch.ones(2, 120, dtype=torch.bool)
    first[1, :50] = False
    second = torch.ones(2, 90, dtype=torch.bool)
    second[0, :33] = False
    bare.feed(120, first).feed(90, second).feed(60)
    valid = bare.state.layout.valid
    for row in range(2):
        at, _, _, packed = held(bare.layer, row)
        assert torch.equal(at, valid[row].nonzero()[:, 0])
        assert not packed[-32:].any()
        assert packed.sum() > 100


def test_row_order_does_not_matter():
    bare, swapped = Bare(METHODS["vidkv"], batch=2), Bare(METHODS["vidkv"], batch=2)
    keys = torch.randn(2, 2, 140, 16)
    bare.feed(140, keys=keys)
    swapped.generator.manual_seed(0)
    swapped.feed(140, keys=keys.flip(0))
    assert torch.equal(held(bare.layer, 0)[1], held(swapped.layer, 1)[1])
    assert torch.equal(held(bare.layer, 1)[1], held(swapped.layer, 0)[1])
