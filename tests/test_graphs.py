"""`wrap(graphs=True)`: recorded decode steps give what plain ones do. Here on a tape; on a GPU in CUDA graphs."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import random_models as rm
import torch
from tape import Tape, taped
from transformers import DynamicCache

import mmkv
from mmkv import compat
from mmkv._recorders import CudaRecorder
from mmkv.cache import GEAR, GUIKV, H2O, KIVI, SnapKV, StreamingLLM, VidKV, WaterfillKV, ZipCache, state_of
from mmkv.cache.static import refusal
from mmkv.cache.static.layer import StaticLayer
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
            if not bool(used.any()):
                continue
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
    "tokens",
    [[EVS(ratio=0.5)], [VisionZip(dominant=0.5, contextual=2), FastV(layer=1, ratio=0.5)], [FastV(layer=2, ratio=0.5)]],
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
        with mmkv.wrapped(model, cache=[VidKV(residual=32, group=32)], graphs=graphs):
            cache = mmkv.Cache(model)
            given = rm.inputs(model, [rm.default_prompt(model, 160)])
            ids = rm.generate(model, {**given, "past_key_values": cache}, new=40)
            with torch.no_grad():
                more = torch.tensor([rm.words(30, 8)])
                logits = [model(input_ids=more, past_key_values=cache).logits]
                for k in range(20):
                    logits.append(model(input_ids=more[:, k : k + 1], past_key_values=cache).logits)
            turns.append((ids, torch.cat(logits, 1), cache, mmkv.report(model)))
    (ids, logits, cache, report), (plain_ids, plain_logits, plain, _) = turns
    assert ids.tolist() == plain_ids.tolist()
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


def test_stretches_that_begin_anew_in_turn(recorder, monkeypatch):
    """Each reads its inputs where its own recordings do: caches of different batches, and a copy of one of them."""
    monkeypatch.setattr("mmkv.cache.static.stretch.possible.__defaults__", (16,))
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(80), rm.words(80, 1)])
    logits = {}
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            caches = [mmkv.Cache(model), mmkv.Cache(model)]
            model(input_ids=ids, past_key_values=caches[0])
            model(input_ids=ids[:1], past_key_values=caches[1])
            found = []
            for k in range(75):
                if k == 20:
                    caches.append(copy.deepcopy(caches[0]))
                cache = caches[k * k % len(caches)]
                new = ids[: cache.layers[0].batch_size, k : k + 1]
                found.append(model(input_ids=new, past_key_values=cache).logits.flatten())
            logits[graphs] = torch.cat(found)
            if graphs:
                assert mmkv.report(model).replayed_steps > 20
    assert torch.allclose(logits[True], logits[False], atol=1e-3)


def test_ids_and_embeddings_in_turn(recorder):
    """A recording knows one way in which the decoder is called."""
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(80)])
    logits = {}
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            found = [model(input_ids=ids, past_key_values=cache).logits]
            for k in range(60):
                new = ids[:, k : k + 1]
                given = {"inputs_embeds": model.model.embed_tokens(new)} if k // 10 % 2 else {"input_ids": new}
                found.append(model(**given, past_key_values=cache).logits)
            logits[graphs] = torch.cat(found, 1)
            if graphs:
                assert mmkv.report(model).replayed_steps > 20
    assert torch.allclose(logits[True], logits[False], atol=1e-3)


def test_positions_that_hold_for_all_rows(recorder):
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(80), rm.words(80, 1)])
    found = []
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            model(input_ids=ids, past_key_values=cache)
            logits = [
                model(input_ids=ids[:, k : k + 1], position_ids=torch.tensor([[80 + k]]), past_key_values=cache).logits
                for k in range(50)
            ]
            found.append((torch.cat(logits, 1), cache))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    state_of(found[0][1]).end_stretch()
    same(found[0][1], found[1][1])


def test_padding_that_no_mask_hides_runs_as_ever(recorder):
    """Stock attention sees it where a step brings no mask."""
    model = rm.make("llama")
    ids = torch.tensor([[rm.PAD] * 9 + rm.words(71), rm.words(80, 1)])
    logits = {}
    for graphs in (True, False):
        with mmkv.wrapped(model, graphs=graphs), torch.no_grad():
            cache = mmkv.Cache(model)
            model(input_ids=ids, attention_mask=(ids != rm.PAD).long(), past_key_values=cache)
            found = [model(input_ids=ids[:, k + 9 : k + 10], past_key_values=cache).logits for k in range(20)]
            logits[graphs] = torch.cat(found, 1)
    assert torch.equal(logits[True], logits[False])


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_inference_mode_that_comes_and_goes(first, recorder, monkeypatch):
    def replay(tape, plain=Tape.replay):
        with torch.inference_mode():  # the tape writes to what a step made, a CUDA graph does not ask
            plain(tape)

    monkeypatch.setattr(Tape, "replay", replay)
    then = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    model = rm.make("qwen2")
    ids = torch.tensor([rm.words(80)])
    found = []
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs):
            cache, logits = mmkv.Cache(model), []
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache)
            for mode, span in ((first, range(20)), (then, range(20, 50)), (first, range(50, 75))):
                with mode():
                    logits += [model(input_ids=ids[:, k : k + 1], past_key_values=cache).logits for k in span]
            cache.crop(-2)  # in neither mode
            with torch.inference_mode():
                found.append((torch.cat(logits, 1), cache))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    same(found[0][1], found[1][1])


def test_recordings_go_with_their_stretch(recorder):
    """And not with the cache, which may see many turns."""
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        recordings = model._mmkv.stepper.recordings
        ids = torch.tensor([rm.words(80)])
        for _ in range(3):
            model(input_ids=ids, past_key_values=cache)
            for k in range(5):
                model(input_ids=ids[:, k : k + 1], past_key_values=cache)
            assert len(recordings) == 1
        cache.crop(-1)
        assert len(recordings) == 0


def test_a_cache_goes_on_without_graphs(recorder):
    method, ids, found = KIVI(bits=4, residual=32, group=32), torch.tensor([rm.words(80)]), []
    for graphs in (True, False):
        model, cache, logits = rm.make("qwen2"), DynamicCache(), []
        for wrapped in (graphs, False):
            with mmkv.wrapped(model, cache=[method], graphs=wrapped), torch.no_grad():
                for k in range(45):
                    new = ids if not k and not logits else ids[:, k : k + 1]
                    logits.append(model(input_ids=new, past_key_values=cache).logits)
        found.append((torch.cat(logits, 1), cache))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    same(found[0][1], found[1][1])


@pytest.mark.parametrize("moment", ["__init__", "close"])
def test_memory_that_does_not_suffice_for_the_buffers(moment, recorder, monkeypatch):
    """Half of the layers have changed over then."""

    plain = getattr(StaticLayer, moment)

    def fails(static, *args):
        layer = args[0] if moment == "__init__" else static.layer
        if layer.index == 1:
            raise torch.OutOfMemoryError("no memory")
        plain(static, *args)

    def run(cache):
        for k in range(6):
            model(input_ids=ids if k in (0, 5) else ids[:, :1], past_key_values=cache)

    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        ids = torch.tensor([rm.words(80)])
        with monkeypatch.context() as patched:
            patched.setattr(StaticLayer, moment, fails)
            with pytest.raises(torch.OutOfMemoryError):
                run(cache)
        for more in (1, 2):
            with pytest.raises(RuntimeError, match="half-way; start a new cache"):
                model(input_ids=ids[:, :more], past_key_values=cache)
        held = weakref.ref(cache.layers[0].keys)
        recorder.tapes.clear()
        gc.disable()
        try:
            del cache
            assert held() is None
        finally:
            gc.enable()


def test_a_model_that_has_moved_since(monkeypatch):
    """Nothing is recorded there; each device has a stream for it."""
    streams = []
    nothing = lambda *args, **kwargs: streams.append(kwargs.get("stream")) or nullcontext()  # noqa: E731
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr("torch.cuda.device", nothing)
    monkeypatch.setattr("torch.cuda.graph", nothing)
    monkeypatch.setattr("mmkv._recorders._side_stream", str)
    with pytest.raises(RuntimeError, match="the model has moved from cuda:1 to cpu since it was wrapped"):
        CudaRecorder(torch.device("cuda:1")).record(lambda: torch.zeros(1))
    assert "cuda:1" in streams


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


@pytest.mark.parametrize("how", ["keyword", "config"])
def test_hidden_states_are_given_as_ever(how, recorder):
    model, ids = rm.make("qwen2"), torch.tensor([rm.words(80)])
    model.config.output_hidden_states = how == "config"
    asked = {"output_hidden_states": True} if how == "keyword" else {}
    with mmkv.wrapped(model, graphs=True), torch.no_grad():
        cache = mmkv.Cache(model)
        model(input_ids=ids, past_key_values=cache)
        for k in range(6):
            out = model(input_ids=ids[:, k : k + 1], past_key_values=cache, **asked)
            assert len(out.hidden_states) == 1 + len(model.model.layers)
        assert mmkv.report(model).replayed_steps == 0


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


def stepped(model, cache, steps, ids=None):
    """A prompt of 80 tokens and some steps."""
    ids = torch.tensor([rm.words(80)]) if ids is None else ids
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        for k in range(steps):
            logits = model(input_ids=ids[:, k : k + 1], past_key_values=cache).logits
    return logits


def test_reports_of_two_caches_in_turn(recorder):
    model = rm.make("qwen2")
    found = []
    for graphs in (True, False):
        with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=graphs):
            caches = [mmkv.Cache(model), mmkv.Cache(model)]
            stepped(model, caches[0], 20)
            stepped(model, caches[1], 10)
            with torch.no_grad():
                model(input_ids=torch.tensor([[30]]), past_key_values=caches[0])
            found.append(mmkv.report(model))
    assert (found[0].tokens_seen, found[0].tokens_held) == (found[1].tokens_seen, found[1].tokens_held) == (101, 101)
    assert found[0].decode_tokens == found[1].decode_tokens


def test_a_copy_goes_on_without_graphs(recorder):
    """The copy of a cache that is in a stretch, in a model that is wrapped without."""
    method = [KIVI(bits=4, residual=32, group=32)]
    model, plain = rm.make("qwen2"), rm.make("qwen2")
    with mmkv.wrapped(model, cache=method, graphs=True), mmkv.wrapped(plain, cache=method):
        cache, other = mmkv.Cache(model), mmkv.Cache(plain)
        stepped(model, cache, 12)
        stepped(plain, other, 12)
        new = torch.tensor([[31]])
        with torch.no_grad():
            mine = plain(input_ids=new, past_key_values=copy.deepcopy(cache)).logits
            theirs = plain(input_ids=new, past_key_values=other).logits
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_reset_in_the_middle(recorder):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[KIVI(bits=4, residual=32, group=32)], graphs=True):
        cache = mmkv.Cache(model)
        first = stepped(model, cache, 12)
        assert cache.layers[0].static is not None
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].static is None
        assert torch.allclose(stepped(model, cache, 12), first, atol=1e-5)
        state_of(cache).stretch.failed = True
        cache.reset()
        assert torch.allclose(stepped(model, cache, 12), first, atol=1e-5)


def test_under_autocast_it_runs_as_ever(recorder):
    model = rm.make("qwen2")
    with mmkv.wrapped(model, graphs=True), torch.autocast("cpu", torch.bfloat16):
        stepped(model, mmkv.Cache(model), 6)
        assert mmkv.report(model).replayed_steps == 0


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
