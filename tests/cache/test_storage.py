"""What is held in memory: appended and never requantized, counted from storages, freed when it is no longer needed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import random_models as rm
import torch
from cache_reference import KIVI8, METHODS, Bare, codes, held, same_codes
from transformers import DynamicCache

import mmkv
from mmkv._presets import PRESETS
from mmkv._report import Meter


def walk(thing, found=None, visited=None, skip=()) -> dict[int, int]:
    """Storages (address -> bytes) of all tensors reachable from an object through attributes and containers."""
    found, visited = {} if found is None else found, set() if visited is None else visited
    if id(thing) in visited or isinstance(thing, (str, int, float, bool, type(None), torch.nn.Module, type)):
        return found
    visited.add(id(thing))
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
        walk(thing.grad_fn, found, visited, skip)
        return found
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    else:
        parts = [v for k, v in getattr(thing, "__dict__", {}).items() if k not in skip]
        parts += [getattr(thing, k) for k in getattr(type(thing), "__slots__", ()) if hasattr(thing, k)]
    for part in parts:
        walk(part, found, visited, skip)
    return found


@pytest.mark.parametrize("name", [None, *METHODS], ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_text"])
def test_report_is_what_is_held(family, name):
    """`kv_bytes` equals a count of the storages behind everything reachable from the layers."""
    model = rm.make(family)
    media = dict(prompts=[rm.default_prompt(model, 160), rm.second_prompt(model, 160) + rm.words(90, 9)])
    given = rm.inputs(model, **media)
    with mmkv.wrapped(model, cache=[] if name is None else [METHODS[name]]):
        cache = DynamicCache(config=model.config)
        for more in ({}, dict(num_beams=3)):
            cache = DynamicCache(config=model.config)
            rm.generate(model, given, past_key_values=cache, **more)
            walked = walk(cache.layers, skip=("state",))
            if more:  # beams are reordered once more after the last forward
                continue
            assert sum(walked.values()) == mmkv.report(model).kv_bytes
        # beside the layers there are the layout and the marks alone: a few bytes a token, shared by all layers
        rest = sum(walk(cache).values()) - sum(walked.values())
        assert rest <= 40 * cache.layers[0].state.layout.modality.numel()
        assert not cache.layers[0].state.scratch


@pytest.mark.parametrize("name", METHODS)
def test_no_dense_copy_of_packed_tokens(name):
    bare = Bare(METHODS[name], heads=2, dim=64, dtype=torch.bfloat16)
    bare.feed(2000)
    tail = bare.layer.keys.untyped_storage().nbytes()
    assert tail == bare.layer.keys.nbytes == 2 * 64 * 2 * bare.layer.keys.shape[2]
    assert bare.layer.keys.shape[2] < 64
    total = sum(walk(bare.layer, skip=("state",)).values())
    assert total < 0.45 * 2 * bare.keys[0].nbytes


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_kept_by_autograd(name):
    """A forward without no_grad in evaluation mode: packed blocks belong to no graph, so the prompt is freed."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(200)])
    with mmkv.wrapped(model, cache=[METHODS[name]]):
        cache = model(**given).past_key_values
        model(input_ids=torch.tensor([[30]]), past_key_values=cache)
        for layer in cache.layers:
            assert not any(t.requires_grad for s in layer.packed for t in s.tensors())


@pytest.mark.parametrize("name", METHODS)
def test_appends_never_requantize(name):
    """Over many flushes the bytes of earlier blocks stay what they were, and so does the order of the channels."""
    bare = Bare(METHODS[name], batch=2)
    valid = torch.ones(2, 130, dtype=torch.bool)
    valid[1, :45] = False
    bare.feed(130, valid)
    order = [s.packer.order if s.packer.order is None else s.packer.order.clone() for s in bare.layer.packed]
    was = codes(bare.layer)
    for _ in range(140):
        bare.feed(1)
        now = codes(bare.layer)
        assert same_codes(was, now)
        was = now
        for row in range(2):
            at, keys, _, packed = held(bare.layer, row)
            assert not packed[-32:].any()
            first = METHODS[name].dense_sinks
            assert packed[first : -(32 + 32)].all()
            assert not packed[:first].any()
            assert torch.equal(keys[:, ~packed], bare.keys[0][row][:, at[~packed]].double())
    for before, segment in zip(order, bare.layer.packed):
        assert before is None or torch.equal(before, segment.packer.order)
    assert len(bare.layer.packed) == len(order)


@pytest.mark.parametrize("name", METHODS)
def test_any_split_of_the_same_tokens_keeps_the_residual_window(name):
    for sizes in ((64,), (63, 1), (1,) * 70, (40, 40, 40), (97, 200, 2)):
        bare = Bare(METHODS[name])
        for size in sizes:
            bare.feed(size)
            packed = held(bare.layer, 0)[3]
            assert not packed[-32:].any()
            assert int(packed.sum()) % 32 == 0


def test_new_media_open_a_segment_with_its_own_order():
    bare = Bare(METHODS["vidkv"], batch=2, dim=16)
    wide = torch.ones(16)
    wide[:8] = 10
    bare.feed(300, medium=0, keys=torch.randn(2, 2, 300, 16) * wide)
    assert len(bare.layer.packed) == 1
    first = codes(bare.layer)[0]
    bare.feed(300, medium=1, keys=torch.randn(2, 2, 300, 16) * wide.flip(0))
    one, two = bare.layer.packed
    for row in range(2):
        assert set(one.packer.order[row, 0, :8].tolist()) == set(range(8))
        assert set(two.packer.order[row, 0, :8].tolist()) == set(range(8, 16))
    assert same_codes([first], codes(bare.layer)[:1])
    bare.feed(200)  # text joins the newest segment, in its order
    assert len(bare.layer.packed) == 2
    assert list(two.tokens) == [two.tokens[0]] * 2
    bare.feed(20, medium=2)  # a small picture is no reason for a segment
    bare.feed(100)
    assert len(bare.layer.packed) == 2


def test_new_media_in_one_row_of_a_batch():
    bare = Bare(METHODS["vidkv"], batch=2)
    bare.feed(200)
    valid = torch.ones(2, 300, dtype=torch.bool)
    medium = torch.full((2, 300), -1, dtype=torch.int32)
    medium[1] = 0
    from mmkv.layout import VIDEO, TokenLayout

    chunk = TokenLayout.text(2, 300, start=200)
    chunk.medium, chunk.valid = medium, valid
    chunk.modality[1] = VIDEO
    bare.state.extend(chunk, None)
    keys = torch.randn(2, 2, 300, 16) * torch.linspace(0.1, 5, 16)
    bare.layer.update(keys, keys)
    bare.layer.settle()
    one, two = bare.layer.packed
    assert list(one.tokens) == [448, 160]
    assert list(two.tokens) == [0, 288]
    bare.feed(100)
    at, _, _, _ = held(bare.layer, 0)
    assert torch.equal(at, torch.arange(600))
    assert torch.equal(two.packer.order[0], one.packer.order[0]) or two.tokens[0] == 0


@pytest.mark.parametrize("name", [None, "kivi-2", "vidkv-stp"], ids=str)
def test_the_model_pins_no_cache(name):
    """When generate has returned, nothing but the caller holds the cache; the report's numbers remain."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.default_prompt(model, 160)])
    with mmkv.wrapped(model, cache=[] if name is None else [METHODS[name]]):
        out = rm.generate(model, given, return_dict_in_generate=True)
        refs = [weakref.ref(out.past_key_values.layers[0]), weakref.ref(out.past_key_values.layers[0].keys)]
        del out
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
        assert mmkv.report(model).kv_bytes > 0
        assert mmkv._wrap.session(model)._inputs == {}


def test_spare_capacity_counts():
    """A tail that was cropped still owns its storage until the next token comes; the count says so."""
    model = rm.make("qwen2")
    with mmkv.wrapped(model), torch.no_grad():
        cache = model(**rm.inputs(model, [rm.words(100)])).past_key_values
        full = mmkv.report(model).kv_bytes
        cache.crop(-90)
        assert mmkv._report.storage_bytes([t for layer in cache.layers for t in layer.tensors()]) == full


@pytest.mark.parametrize("extra", [0, 1, 31, 63, 64, 127])
@pytest.mark.parametrize(("name", "packed", "whole"), [("vidkv", 1.9, 2.0), ("kivi-2", 2.5, 2.8)])
def test_true_bits_of_a_16k_prompt(name, packed, whole, extra):
    """bf16, head size 128: codes, scales, zero points, tables and channel orders over the elements they stand for."""
    length = 16384 + extra
    bare = Bare(PRESETS[name].cache[0], heads=2, dim=128, dtype=torch.bfloat16)
    chunk_keys = torch.randn(1, 2, length, 128)
    bare.feed(length, medium=0, keys=chunk_keys)
    meter = Meter()
    meter.read(bare.layers, bare.state)
    report = meter.report()
    held_tokens = held_count(bare.layer)
    assert held_tokens == length == report.tokens_held
    total = sum(walk(bare.layer, skip=("state",)).values())
    assert report.kv_bytes == total
    assert report.kv_bits == pytest.approx(8 * total / (length * 2 * 2 * 128))
    assert report.kv_bytes_dense == length * 2 * 2 * 128 * 2
    in_segments = sum(bare.layer.packed[0].tokens)
    segment_bytes = sum(walk(bare.layer.packed).values())  # positions of the tokens included
    assert report.packed_bits == pytest.approx(8 * segment_bytes / (in_segments * 2 * 2 * 128))
    assert report.packed_bits <= packed
    assert report.kv_bits <= whole
    assert report.tail_bytes == total - segment_bytes


def held_count(layer) -> int:
    return sum(sum(s.tokens) for s in layer.segments) + layer.seen - layer.packed_to[0]


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-stp"])
def test_a_cache_can_be_copied(name):
    """The usual way to share a prompt: a deep copy of its cache goes on by itself; so does a pickled one."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.default_prompt(model, 160)])
    with mmkv.wrapped(model, cache=[METHODS[name]]), torch.no_grad():
        cache = model(**given).past_key_values
        positions = torch.full((3, 1, 1), cache.get_seq_length())
        step = dict(input_ids=torch.tensor([[30]]), position_ids=positions)
        others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        want = model(**step, past_key_values=cache).logits
        for other in others:
            assert other.get_seq_length() == cache.get_seq_length() - 1
            assert torch.equal(want, model(**step, past_key_values=other).logits)
            assert len({id(layer.state) for layer in other.layers}) == 1


@pytest.mark.parametrize("name", ["kivi-2", "vidkv"])
def test_bytes_grow_by_the_packed_size(name):
    """Decoding n more groups costs n packed groups: no slack that grows, no table that is quadratic."""
    bare = Bare(METHODS[name], dim=64)
    sizes = []
    for _ in range(12):
        bare.feed(32 * 4)
        sizes.append(sum(walk(bare.layer, skip=("state",)).values()))
    growth = [b - a for a, b in zip(sizes, sizes[1:])]
    assert len(set(growth)) == 1


def test_dense_eight_bit_window_of_everything():
    """With a residual window longer than the sequence nothing is packed, and generate is stock."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(100)])
    stock = rm.generate(model, given)
    with mmkv.wrapped(model, cache=[mmkv.cache.KIVI(residual=256)]):
        assert torch.equal(stock, rm.generate(model, given))
        assert mmkv.report(model).packed_bits is None
    assert KIVI8.bits == 8
