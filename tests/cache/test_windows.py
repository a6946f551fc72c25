"""Sliding windows, softcap and sink logits."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import KIVI8, METHODS, Bare, checked_attention, held
from transformers import DynamicCache

import mmkv

WINDOW = 24


@pytest.mark.parametrize("family", rm.WINDOWED)
@pytest.mark.parametrize("owner", ["generate", "mmkv.Cache", "forward"])
def test_dense_windows_are_freed(family, owner):
    model = rm.make(family)
    with mmkv.wrapped(model), torch.no_grad():
        for length in (30, 100, 300):
            given = rm.inputs(model, [rm.words(length)])
            if owner == "forward":
                cache = model(**given).past_key_values
                cache = model(input_ids=torch.tensor([[30]]), past_key_values=cache).past_key_values
            else:
                cache = mmkv.Cache(model) if owner == "mmkv.Cache" else DynamicCache(config=model.config)
                rm.generate(model, given, past_key_values=cache)
            for layer in cache.layers:
                if layer.window is not None:
                    assert layer.keys.shape[2] == WINDOW - 1
                    assert layer.keys.untyped_storage().nbytes() <= 2 * 16 * 4 * (WINDOW + 1)
                else:
                    assert layer.keys.shape[2] == layer.seen


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_packed_windows_are_freed(family):
    """A window wider than the residual: packed blocks behind it go, whatever the length."""
    model = rm.make(family, sliding_window=100)
    sizes = []
    with mmkv.wrapped(model, cache=[KIVI8]), torch.no_grad():
        cache = model(**rm.inputs(model, [rm.words(150), rm.words(140, 1)])).past_key_values
        mask = torch.ones(2, 150, dtype=torch.long)
        mask[1, :10] = 0
        for step in range(140):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with checked_attention() if step % 20 == 0 else torch.no_grad():
                model(input_ids=torch.tensor([[30 + step % 9], [40]]), attention_mask=mask, past_key_values=cache)
            layer = cache.layers[0]
            assert layer.window == 100
            assert layer.segments, "the test is about packed windows"
            sizes.append(mmkv._report.storage_bytes(layer.tensors()))
            at = held(layer, 0)[0]
            assert at.numel() <= 100 + 32 + 32
            assert len(layer.packed[0].keys) <= 2 * 2 * (100 // 32 + 2) / 0.75 + 1
    assert max(sizes[60:]) <= max(sizes[:60])


@pytest.mark.parametrize("family", rm.WINDOWED)
@pytest.mark.parametrize("window", [24, 60, 97])
def test_attention_past_a_window_is_exact(family, window):
    """Windows narrower and wider than the residual; several tokens at once across the border."""
    model = rm.make(family, sliding_window=window)
    with mmkv.wrapped(model, cache=[KIVI8]), checked_attention() as errors, torch.no_grad():
        cache = model(**rm.inputs(model, [rm.words(130)])).past_key_values
        for count in (1, 1, 40, 1, 90, 3, 1):
            model(input_ids=torch.tensor([rm.words(count, count)]), past_key_values=cache)
    assert errors


@pytest.mark.parametrize("name", ["kivi-2", "vidkv"])
@pytest.mark.parametrize("mode", ["beam", "lookup", "sample"])
def test_compressed_windows_in_every_mode(name, mode):
    model = rm.make("gemma3_text", sliding_window=80)
    rows = [rm.words(150)] + ([] if mode == "lookup" else [rm.words(60, 1)])
    with mmkv.wrapped(model, cache=[METHODS[name]]), checked_attention() as errors:
        rm.generate(model, rm.inputs(model, rows), mode, new=12)
    assert errors


def test_a_crop_past_the_window_is_refused_whole():
    """Layers that slide have lost what the crop would need: an error, and the cache is what it was."""
    for types in (["sliding_attention", "full_attention"], ["full_attention", "sliding_attention"]):
        model = rm.make("gemma3_text", layers=2, layer_types=types)
        given = rm.inputs(model, [rm.words(60)])
        with mmkv.wrapped(model), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(**given, past_key_values=cache)
            with pytest.raises(RuntimeError, match="window of 24") as caught:
                cache.crop(-3)
            assert "\n" not in str(caught.value)
            assert [layer.seen for layer in cache.layers] == [60, 60]
            model(input_ids=torch.tensor([[30]]), past_key_values=cache)
            assert cache.get_seq_length() == 61


def test_softcap_is_honoured():
    """Leaving the cap out would change the output far more than the 8 bits do."""
    model = rm.make("gemma2")
    given = rm.inputs(model, [rm.words(120)])
    with mmkv.wrapped(model, cache=[KIVI8]), checked_attention() as errors:
        rm.generate(model, given)
    assert errors
    assert model.config.attn_logit_softcapping == 3.0


@pytest.mark.parametrize("family", rm.WINDOWED)
def test_window_positions_with_scattered_tokens(family):
    """Two formats interleaved in a sliding layer: the window cuts by each token's own position."""
    model = rm.make(family, sliding_window=70)

    class Halves(mmkv.cache.VidKV):
        def mark(self, embeds, chunk):
            return torch.arange(len(chunk)).remainder(3).eq(0).to(torch.int8).expand(chunk.batch, -1).clone()

    with (
        mmkv.wrapped(model, cache=[Halves(stp=0.2, group=16, residual=32)]),
        checked_attention() as errors,
        torch.no_grad(),
    ):
        cache = model(**rm.inputs(model, [rm.words(130), rm.words(77, 1)])).past_key_values
        mask = torch.ones(2, 130, dtype=torch.long)
        mask[1, : 130 - 77] = 0
        for count in (1, 40, 1, 33, 1):
            mask = torch.nn.functional.pad(mask, (0, count), value=1)
            ids = torch.tensor([rm.words(count, count), rm.words(count, 50 + count)])
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        assert any(s.positions is not None for layer in cache.layers for s in layer.packed)
    assert errors


def test_bare_window_layer_keeps_what_it_can_see():
    bare = Bare(KIVI8, window=50)
    bare.state.window = 50
    for count in (10, 60, 1, 1, 200, 5):
        bare.feed(count)
        at = held(bare.layer, 0)[0]
        seen = bare.layer.seen
        assert set(range(max(seen - 49, 0), seen)) <= set(at.tolist())
