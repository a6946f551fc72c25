"""transformers' cache operations on our layers, dense and packed."""

from __future__ import annotations

import inspect

import pytest
import random_models as rm
import torch
from cache_reference import KIVI8, METHODS, Bare, checked_attention, codes, held, same_codes
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import mmkv
from mmkv import compat

ALL = {"dense": None} | METHODS
TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # transformers 5.2


@pytest.mark.parametrize("name", ALL)
def test_lengths_are_logical(name):
    bare = Bare(ALL[name], batch=2)
    assert bare.layer.get_seq_length() == 0
    assert bare.layer.get_mask_sizes(7) == (7, 0)
    for count, total in ((150, 150), (1, 151), (40, 191)):
        bare.feed(count)
        assert bare.layer.get_seq_length() == total
        assert bare.layer.get_mask_sizes(5) == (total + 5, 0)  # a count, newer versions
        assert bare.layer.get_mask_sizes(torch.arange(total, total + 5)) == (total + 5, 0)  # positions, before 5.3
    assert bare.layer.get_max_length() == -1
    assert bare.layer.batch_size == 2


def test_crop_arguments():
    assert compat.crop_target(-3, 10) == 7
    assert compat.crop_target(-30, 10) == 0
    assert compat.crop_target(4, 10) == 4
    assert compat.crop_target(40, 10) == 10
    assert compat.crop_target(0, 10) == (0 if TAKES_LENGTH else 10)


def argument(target: int, seen: int) -> int:
    """What this version of transformers would pass to crop."""
    return target if TAKES_LENGTH and target else target - seen


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", [210, 178, 161, 160, 129, 95, 33, 1, 0])
def test_crop_keeps_the_rest_bit_for_bit(name, target):
    """Into the dense tail, to group borders, and deep into packed groups, which are shortened and never requantized."""
    valid = torch.ones(2, 211, dtype=torch.bool)
    valid[1, :70] = False
    bare = Bare(ALL[name], batch=2, layers=2)
    marks = torch.zeros(2, 211, 8)
    bare.feed(211, valid, medium=0, embeds=marks)
    before = [[held(layer, row) for row in range(2)] for layer in bare.layers]
    old = [codes(layer) for layer in bare.layers]
    for layer in bare.layers:
        layer.crop(argument(target, 211))
        assert layer.get_seq_length() == target
    assert bare.state.seen == target
    for layer, rows, was in zip(bare.layers, before, old):
        for row, (at, keys, values, packed) in enumerate(rows):
            keep = at < target
            now = held(layer, row)
            assert torch.equal(now[0], at[keep])
            assert torch.equal(now[1], keys[:, keep])
            assert torch.equal(now[2], values[:, keep])
            assert torch.equal(now[3], packed[keep])
        assert same_codes(codes(layer), was)


@pytest.mark.parametrize("name", ALL)
def test_crop_then_feed_again(name):
    """After a deep crop the cache goes on: what remained keeps its codes, new groups form behind it."""
    bare = Bare(ALL[name], layers=2)
    bare.feed(211)
    for layer in bare.layers:
        layer.crop(argument(100, 211))
    was = codes(bare.layer)
    for layer, i in zip(bare.layers, range(2)):
        bare.keys[i], bare.values[i] = bare.keys[i][:, :, :100], bare.values[i][:, :, :100]
        assert layer.get_seq_length() == 100
    for count in (1, 80, 1, 30):
        bare.feed(count)
    assert torch.equal(held(bare.layer, 0)[0], torch.arange(212))
    now = codes(bare.layer)
    assert same_codes(was, now)
    tail = held(bare.layer, 0)
    assert torch.equal(tail[1][:, ~tail[3]], bare.keys[0][0].double()[:, ~tail[3]])
    assert not tail[3][-32:].any()


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-stp", "vidkv-paper"])
def test_crop_inside_generation(name):
    """Attention after crops of every depth equals dense attention over the unpacked codes."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.default_prompt(model, 192)])
    with mmkv.wrapped(model, cache=[METHODS[name]]), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**given, past_key_values=cache)
        for remove in (1, 20, 45, 60):
            cache.crop(-remove)
            with checked_attention() as errors:
                positions = torch.full((3, 1, 1), cache.get_seq_length())
                model(input_ids=torch.tensor([[30]]), position_ids=positions, past_key_values=cache)
            assert len(errors) == 3 or not cache.layers[0].segments


@pytest.mark.parametrize("name", ALL)
def test_reorder_repeat_select(name):
    valid = torch.ones(3, 150, dtype=torch.bool)
    valid[1, :40] = False
    bare = Bare(ALL[name], batch=3, layers=2)
    bare.feed(150, valid, medium=0, embeds=torch.randn(3, 150, 8))
    before = [[held(layer, row) for row in range(3)] for layer in bare.layers]

    def check(rows):
        for layer, was in zip(bare.layers, before):
            assert layer.batch_size == layer.keys.shape[0] == len(rows)
            for now, then in enumerate(rows):
                for a, b in zip(held(layer, now), was[then]):
                    assert torch.equal(a, b)
        assert bare.state.layout.batch == len(rows)

    def every(call):
        for layer in bare.layers:
            call(layer)

    every(lambda layer: layer.reorder_cache(torch.tensor([2, 1, 1])))
    check([2, 1, 1])
    every(lambda layer: layer.batch_repeat_interleave(2))
    check([2, 2, 1, 1, 1, 1])
    every(lambda layer: layer.batch_select_indices(torch.tensor([0, 2, 5])))
    check([2, 1, 1])
    every(lambda layer: layer.batch_select_indices(torch.tensor([False, True, False])))
    check([1])


@pytest.mark.parametrize("name", METHODS)
def test_rows_go_their_own_way_after_a_reorder(name):
    """Beams share the prompt's blocks, then append their own."""
    bare = Bare(METHODS[name], batch=2)
    bare.feed(150)
    bare.layer.batch_repeat_interleave(2)
    bare.batch = 4
    bare.keys[0], bare.values[0] = bare.keys[0].repeat_interleave(2, 0), bare.values[0].repeat_interleave(2, 0)
    bare.feed(70)
    for row in range(4):
        at, keys, _, packed = held(bare.layer, row)
        assert torch.equal(at, torch.arange(220))
        assert torch.equal(keys[:, ~packed], bare.keys[0][row].double()[:, ~packed])
    a, b = held(bare.layer, 0), held(bare.layer, 1)
    assert torch.equal(a[1][:, :100], b[1][:, :100])
    assert not torch.equal(a[1][:, 150:188], b[1][:, 150:188])


@pytest.mark.parametrize("name", METHODS)
def test_beams_share_the_prompt(name):
    bare = Bare(METHODS[name], heads=2, dim=64)
    bare.feed(1056)

    def pool():
        return sum(
            t.untyped_storage().nbytes() for s in bare.layer.packed for b in (s.keys, s.values) for t in b.tensors()
        )

    one = pool()
    bare.layer.batch_repeat_interleave(4)
    assert pool() == one
    bare.layer.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert pool() == one


@pytest.mark.parametrize("name", METHODS)
def test_blocks_of_lost_beams_are_freed(name):
    bare = Bare(METHODS[name], batch=4)
    bare.feed(200)
    pool = lambda: sum(len(s.keys) for s in bare.layer.packed)  # noqa: E731
    four = pool()
    bare.layer.batch_select_indices(torch.tensor([1]))
    assert pool() * 4 == four


@pytest.mark.parametrize("name", ALL)
def test_reset_and_reuse(name):
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(120)])
    with mmkv.wrapped(model, cache=() if ALL[name] is None else [ALL[name]]):
        cache = mmkv.Cache(model)
        first = rm.generate(model, given, past_key_values=cache)
        bytes_ = mmkv.report(model).kv_bytes
        cache.reset()
        assert cache.get_seq_length() == 0
        assert sum(t.numel() for layer in cache.layers for t in layer.tensors()) == 0
        assert torch.equal(first, rm.generate(model, given, past_key_values=cache))
        assert mmkv.report(model).kv_bytes == bytes_


@pytest.mark.parametrize("mode", ["helper", "lookup"])
def test_rejected_drafts_never_touch_codes(mode, monkeypatch):
    """Assisted decoding cuts the dense tail alone: no crop reaches a packed group."""
    from mmkv.cache.segment import PackedSegment

    cropped = []
    monkeypatch.setattr(PackedSegment, "crop", lambda self, length: cropped.append(length))
    model = rm.make("llama")
    given = rm.inputs(model, [rm.words(150)])
    more = dict(assistant_model=rm.make("llama", seed=5)) if mode == "helper" else {}
    with mmkv.wrapped(model, cache=[KIVI8]):
        rm.generate(model, given, "greedy" if mode == "helper" else "lookup", new=40, **more)
    assert cropped == []


def test_whole_cache_operations_through_transformers():
    """The methods of `Cache` itself, as generate calls them."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(150), rm.words(100, 1)])
    with mmkv.wrapped(model, cache=[KIVI8]), torch.no_grad():
        cache = model(**given).past_key_values
        assert isinstance(cache, DynamicCache)
        assert len(cache) == 3
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.layers[0].state.layout.valid.sum(1).tolist() == [100, 150]
        cache.batch_repeat_interleave(3)
        assert cache.layers[2].keys.shape[0] == 6
        cache.batch_select_indices(torch.tensor([0, 5]))
        cache.crop(-5)
        assert cache.get_seq_length() == 145
        mask = torch.cat([given["attention_mask"].flip(0)[:, :145], torch.ones(2, 1, dtype=torch.long)], 1)
        with checked_attention() as errors:
            model(input_ids=torch.tensor([[30], [31]]), attention_mask=mask, past_key_values=cache)
        assert len(errors) == 6


def test_offloading_is_refused():
    bare = Bare(None).feed(3)
    with pytest.raises(RuntimeError, match="offload"):
        bare.layer.offload()
