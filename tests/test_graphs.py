"""`wrap(graphs=True)`: recorded decode steps give what plain ones do. Here on a tape; on a GPU in CUDA graphs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import random_models as rm
import torch
from tape import taped
from transformers import DynamicCache

import mmkv
from mmkv import compat
from mmkv.cache import GEAR, GUIKV, H2O, KIVI, SnapKV, StreamingLLM, VidKV, WaterfillKV, ZipCache, state_of
from mmkv.cache.static import refusal
from mmkv.tokens import EVS, FastV, VisionZip

METHODS = {
    "dense": (),
    "vidkv": (VidKV(residual=32, group=32),),
    "vidkv, marks": (VidKV(residual=64, group=32, stp=0.2),),
    "kivi-2": (KIVI(bits=2, residual=32, group=32),),
    "waterfill": (WaterfillKV(),),
    "snapkv": (SnapKV(budget=0.5),),
    "snapkv x kivi": (SnapKV(budget=0.5), KIVI(bits=4, residual=32, group=32)),
    "guikv": (GUIKV(budget=0.5),),
}


@pytest.fixture
def recorder(monkeypatch):
    with taped(monkeypatch) as made:
        yield made


def both(name, given, new=70, family="qwen2_5_vl", mode="greedy", **options):
    """(ids, cache, report) with and without graphs; `name` of `METHODS`, or methods."""
    found = []
    for graphs in (True, False):
        model = rm.make(family)
        with mmkv.wrapped(model, cache=METHODS.get(name, name), graphs=graphs, **options):
            cache = mmkv.Cache(model)
            torch.manual_seed(3)
            ids = rm.generate(model, {**given(model), "past_key_values": cache}, mode, new=new)
            found.append((ids, cache, mmkv.report(model)))
    return found


def prompts(model):
    one = rm.default_prompt(model, 160)
    return rm.inputs(model, [one, rm.second_prompt(model, 160) + rm.words(20, 9)])


@pytest.mark.parametrize("name", METHODS)
def test_same_tokens_and_same_cache(name, recorder):
    (ids, cache, report), (plain_ids, plain, plain_report) = both(name, prompts)
    assert ids.tolist() == plain_ids.tolist()
    assert report.replayed_steps > 40 and plain_report.replayed_steps is None
    assert report.tokens_seen == plain_report.tokens_seen
    assert report.tokens_held == plain_report.tokens_held
    assert report.tokens == plain_report.tokens
    assert report.kv_bytes_dense == plain_report.kv_bytes_dense
    assert report.kv_bytes >= plain_report.kv_bytes  # room for more
    state_of(cache).end_stretch()
    same(cache, plain)


@pytest.mark.parametrize("name", [entry.name for entry in mmkv.methods() if entry.kind == "cache"])
def test_every_method_is_the_same_or_refused(name, recorder):
    method = next(entry.method() for entry in mmkv.methods() if entry.name == name)
    why = refusal(method)
    if why is not None:
        with pytest.raises(ValueError) as caught:
            mmkv.wrap(rm.make("qwen2_5_vl"), cache=[method], graphs=True)
        assert why in str(caught.value) or "visual autoregressive" in str(caught.value)
        return
    (ids, cache, report), (plain_ids, plain, _) = both((method,), prompts, new=24)
    assert ids.tolist() == plain_ids.tolist()
    assert report.replayed_steps > 10
    state_of(cache).end_stretch()
    same(cache, plain)


def same(cache, plain):
    """The caches hold the same: tokens, where they stand, codes within what a rounding may turn."""
    assert cache.get_seq_length() == plain.get_seq_length()
    a, b = state_of(cache), state_of(plain)
    for field in ("modality", "medium", "frame", "row", "col", "valid", "positions"):
        assert torch.equal(getattr(a.layout, field), getattr(b.layout, field)), field
    for mine, other in zip(cache.layers, plain.layers):
        assert (mine.start, mine.seen, mine.logical) == (other.start, other.seen, other.logical)
        assert mine.packed_to == other.packed_to
        assert mine.evicted_to == other.evicted_to
        for row, first in enumerate(mine.packed_to):
            first = max(first - mine.start, 0)
            valid = mine.state.layout.valid[row, mine.start + first :]
            assert torch.allclose(mine.keys[row, :, first:][:, valid], other.keys[row, :, first:][:, valid], atol=1e-4)
        assert len(mine.segments) == len(other.segments)
        for one, two in zip(mine.packed, other.packed):
            assert one.held == two.held
            assert torch.equal(one.count, two.count)
            assert torch.equal(one.start, two.start)
            used = one.count > 0
            assert sum(t.nbytes for t in one.tensors()) == sum(t.nbytes for t in two.tensors())
            codes = [s.keys.codes[s.block[used].long()] for s in (one, two)]
            assert (codes[0] != codes[1]).float().mean() < 0.01


@pytest.mark.parametrize("mode", ["greedy", "sample", "beam", "lookup", "returns"])
def test_every_way_of_generating(mode, recorder):
    """Beams are reordered and drafts are several tokens: such steps run as ever, and results stay the same."""
    given = prompts if mode != "lookup" else lambda model: rm.inputs(model, [rm.default_prompt(model, 160)])
    (ids, _, report), (plain_ids, _, _) = both("vidkv", given, new=24, mode=mode)
    assert ids.tolist() == plain_ids.tolist()
    assert (report.replayed_steps > 10) == (mode in ("greedy", "sample", "returns"))


@pytest.mark.parametrize("family", sorted(rm.FAMILIES))
def test_every_family(family, recorder):
    model = rm.make(family)
    if any(window is not None for window in compat.layer_windows(model.config.get_text_config())):
        with pytest.raises(ValueError, match="sliding windows"):
            mmkv.wrap(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True)
        return
    mmkv.wrap(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True)
    one = rm.default_prompt(model, 100)
    ids = rm.generate(model, rm.inputs(model, [one]), new=50)
    assert mmkv.report(model).replayed_steps > 20
    mmkv.unwrap(model)
    assert "forward" not in model.__dict__
    mmkv.wrap(model, cache=[KIVI(bits=4, residual=32, group=32)])
    assert ids.tolist() == rm.generate(model, rm.inputs(model, [one]), new=50).tolist()


@pytest.mark.parametrize(
    "tokens", [[EVS(ratio=0.5)], [VisionZip(dominant=0.5, contextual=2), FastV(layer=1, ratio=0.5)], [FastV(layer=2, ratio=0.5)]]
)
@pytest.mark.parametrize("name", ["dense", "vidkv", "snapkv x kivi"])
def test_behind_token_methods(name, tokens, recorder):
    """Layers that see a part of the tokens each have their own places."""
    (ids, cache, report), (plain_ids, plain, plain_report) = both(name, prompts, tokens=tokens)
    assert ids.tolist() == plain_ids.tolist()
    assert report.replayed_steps > 40
    assert (report.tokens_held, report.tokens_per_layer) == (plain_report.tokens_held, plain_report.tokens_per_layer)
    state_of(cache).end_stretch()
    same(cache, plain)
    for mine, other in zip(cache.layers, plain.layers):
        assert torch.equal(mine.state.places(), other.state.places())
        assert torch.equal(mine.state.layout.valid, other.state.layout.valid)


def test_two_turns(recorder):
    turns = []
    for graphs in (True, False):
        model = rm.make("qwen2_5_vl")
        first = rm.default_prompt(model, 160)
        second = [*first, *rm.words(9, 5), rm.Video(20, 8, 8), *rm.words(5, 6)]
        with mmkv.wrapped(model, cache=[VidKV(residual=32, group=32)], graphs=graphs):
            cache = mmkv.Cache(model)
            out = []
            for prompt in (first, second):
                given = rm.inputs(model, [prompt])
                seen = cache.get_seq_length()
                if seen:  # the answer stands between the turns
                    given["input_ids"] = torch.cat([out[-1], given["input_ids"][:, len(first) :]], 1)
                    continue
                out.append(rm.generate(model, {**given, "past_key_values": cache}, new=40))
            with torch.no_grad():
                more = torch.tensor([rm.words(30, 8)])
                logits = [model(input_ids=more, past_key_values=cache).logits]
                for k in range(20):
                    logits.append(model(input_ids=more[:, k : k + 1], past_key_values=cache).logits)
            turns.append((out, torch.cat(logits, 1), cache, mmkv.report(model)))
    (ids, logits, cache, report), (plain_ids, plain_logits, plain, _) = turns
    assert ids[0].tolist() == plain_ids[0].tolist()
    assert torch.allclose(logits, plain_logits, atol=1e-3)
    assert report.replayed_steps > 50
    state_of(cache).end_stretch()
    same(cache, plain)


def test_crop_and_reorder_in_the_middle(recorder):
    found = []
    for graphs in (True, False):
        model = rm.make("qwen2")
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            ids = torch.tensor([rm.words(80), rm.words(80, 1)])
            model(input_ids=ids, past_key_values=cache)
            logits = []
            for k in range(60):
                logits.append(model(input_ids=ids[:, k : k + 1], past_key_values=cache).logits)
                if k == 20:
                    cache.crop(-5)
                if k == 40:
                    cache.reorder_cache(torch.tensor([1, 0]))
            found.append((torch.cat(logits, 1), cache))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    state_of(found[0][1]).end_stretch()
    same(found[0][1], found[1][1])


def test_a_stretch_that_runs_out_of_room(recorder, monkeypatch):
    monkeypatch.setattr("mmkv.cache.static.stretch.possible.__defaults__", (16,))
    (ids, cache, report), (plain_ids, plain, _) = both("vidkv", prompts)
    assert ids.tolist() == plain_ids.tolist()
    assert len(recorder.tapes) >= 4
    assert 20 < report.replayed_steps < 66
    state_of(cache).end_stretch()
    same(cache, plain)


def test_a_copy_of_the_cache_goes_its_own_way(recorder):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        ids = torch.tensor([rm.words(80)])
        model(input_ids=ids, past_key_values=cache)
        step = lambda held, k: model(input_ids=ids[:, k : k + 1], past_key_values=held).logits  # noqa: E731
        for k in range(10):
            step(cache, k)
        other = copy.deepcopy(cache)
        assert other.get_seq_length() == cache.get_seq_length() == 90
        mine = torch.cat([step(cache, k) for k in range(10, 30)], 1)
        theirs = torch.cat([step(other, k) for k in range(10, 30)], 1)
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_two_caches_in_turn(recorder):
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(80)])
    logits = {}
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            caches = [mmkv.Cache(model), mmkv.Cache(model)]
            model(input_ids=ids, past_key_values=caches[0])
            model(input_ids=ids.flip(1), past_key_values=caches[1])
            logits[graphs] = torch.cat(
                [model(input_ids=ids[:, k : k + 1], past_key_values=caches[k % 2]).logits for k in range(40)], 1
            )
    assert torch.allclose(logits[True], logits[False], atol=1e-3)


def test_a_cache_that_is_dropped_is_freed_at_once(recorder):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True), torch.no_grad():
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([rm.words(80)])
        for k in range(12):
            model(input_ids=ids if not k else ids[:, :1], past_key_values=cache)
        held = weakref.ref(cache.layers[0].keys)
        assert cache.layers[0].static is not None
        recorder.tapes.clear()  # which hold the tensors, as a CUDA graph does not
        gc.disable()
        try:
            del cache
            assert held() is None
        finally:
            gc.enable()


def test_a_step_that_fails(recorder, monkeypatch):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        ids = torch.tensor([rm.words(80)])
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr(type(model.model.layers[1].mlp), "forward", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(input_ids=ids[:, :1], past_key_values=cache)
        for more in (1, 2):
            with pytest.raises(RuntimeError, match="half-way; start a new cache"):
                model(input_ids=ids[:, :more], past_key_values=cache)


def test_what_cannot_be_recorded_says_so(recorder, monkeypatch):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        ids = torch.tensor([rm.words(80)])
        monkeypatch.setattr(recorder, "record", lambda step: (_ for _ in ()).throw(RuntimeError("waits\nand more")))
        for new in (ids, ids[:, :1], ids[:, :1]):
            model(input_ids=new, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"a decode step of Qwen2ForCausalLM cannot be recorded \(waits\)"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_trained_positions(recorder):
    (ids, cache, report), (plain_ids, plain, _) = both("vidkv", prompts, new=40, positions="trained")
    assert ids.tolist() == plain_ids.tolist()
    state_of(cache).end_stretch()
    same(cache, plain)
    assert report.replayed_steps > 10


@pytest.mark.parametrize("masked", [False, True])
def test_padding_among_decoded_tokens_runs_as_ever(masked, recorder):
    found = []
    for graphs in (True, False):
        model = rm.make("qwen2")
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            ids = torch.tensor([rm.words(80), rm.words(80, 1)])
            mask = torch.ones_like(ids)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            logits = []
            for k in range(50):
                new = torch.ones(2, 1, dtype=mask.dtype)
                new[1] = int(not (masked and k == 20))
                mask = torch.cat([mask, new], 1)
                logits.append(model(input_ids=ids[:, k : k + 1], attention_mask=mask, past_key_values=cache).logits)
            found.append((torch.cat(logits, 1), cache))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    state_of(found[0][1]).end_stretch()
    same(found[0][1], found[1][1])


def test_with_gradients_it_runs_as_ever(recorder):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, graphs=True):
        cache = mmkv.Cache(model)
        ids = torch.tensor([rm.words(80)])
        for k in range(6):
            out = model(input_ids=ids if not k else ids[:, :1], past_key_values=cache)
        assert out.logits.requires_grad
        assert mmkv.report(model).replayed_steps == 0


REFUSED = [
    (dict(cache=[H2O(budget=0.5)]), "H2O"),
    (dict(cache=[StreamingLLM(recent=64)]), "decides again every 32"),
    (dict(cache=[ZipCache()]), "every 100 decoded tokens"),
    (dict(cache=[GEAR()]), "every block"),
    (dict(preset="vidkv", max_bytes="1MiB"), "max_bytes"),
    (dict(tokens=[FastV(position_ids="renumbered")]), "FastV.*possible is 'original'"),
    (dict(graphs=1), "possible are True and False"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=str)
def test_refused_when_wrapped(options, says, recorder):
    model = rm.make("llava_onevision")
    with pytest.raises(ValueError, match=says) as caught:
        mmkv.wrap(model, **{"graphs": True, **options})
    assert "\n" not in str(caught.value)
    assert "forward" not in model.model.language_model.__dict__
    with pytest.raises(ValueError, match="not wrapped"):
        mmkv.unwrap(model)


def test_refused_without_cuda():
    model = rm.make("qwen2")
    with pytest.raises(ValueError, match="graphs=True on cpu: CUDA graphs need the whole model on one CUDA device"):
        mmkv.wrap(model, "vidkv", graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu(name, dtype):
    """The same in real CUDA graphs."""
    found = []
    for graphs in (True, False):
        model = rm.make("qwen2_5_vl").to("cuda", dtype)
        given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in prompts(model).items()}
        with mmkv.wrapped(model, cache=METHODS[name], graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            model(**given, past_key_values=cache)
            ids = torch.tensor([rm.words(80), rm.words(80, 1)], device="cuda")
            logits = [model(input_ids=ids[:, k : k + 1], past_key_values=cache).logits for k in range(80)]
            found.append((torch.cat(logits, 1).float(), mmkv.report(model)))
    (mine, report), (plain, _) = found
    assert report.replayed_steps > 40
    assert (mine - plain).norm() / plain.norm() < (1e-3 if dtype == torch.float32 else 3e-2)
