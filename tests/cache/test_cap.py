"""`max_bytes`: a hard limit, however long the answer."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import CHOOSING, METHODS, checked_attention, held_by_head

import mmkv
from mmkv._report import storage_bytes
from mmkv.cache import KIVI, SnapKV

CASES = {name: METHODS[name] for name in ("kivi-2", "vidkv-sinks", "registered WaterfillKV")} | {
    name: CHOOSING[name] for name in ("SnapKV", "H2O", "snapkv-kivi", "StreamingLLM")
}


def held(cache) -> int:
    return storage_bytes(t for layer in cache.layers for t in layer.tensors())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [None, *CASES], ids=str)
def test_never_exceeded_however_long_the_answer(name, batch):
    """After every single forward of a prompt and 100 tokens of answer; attention stays exact over what is held."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(300), rm.words(220, 1)][:batch])
    limit = 100_000 * batch
    with (
        mmkv.wrapped(model, cache=[] if name is None else [CASES[name]], max_bytes=limit),
        checked_attention() as errors,
        torch.no_grad(),
    ):
        cache, mask = mmkv.Cache(model), given["attention_mask"]
        model(**given, past_key_values=cache)
        assert held(cache) <= limit
        for step in range(100):
            mask = torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], 1)
            model(input_ids=torch.full((batch, 1), 30 + step % 90), attention_mask=mask, past_key_values=cache)
            assert held(cache) <= limit
            assert mmkv.report(model).kv_bytes == held(cache)
        newest = held_by_head(cache.layers[0], 0, 0)[0][-32:]
        assert newest.tolist() == list(range(368, 400))
    assert errors


def test_what_the_end_of_the_prompt_looked_at_stays():
    """Of a packed prompt the blocks with the least attention go; those looked at stay."""
    from cache_reference import Bare

    bare = Bare(KIVI(group=32, residual=32), heads=1, dim=16, group=1)
    bare.state.max_bytes = 100_000
    keys = torch.randn(1, 1, 1000, 16) * 0.1
    queries = torch.zeros(1, 1, 1000, 16)
    keys[0, 0, 320:352] = 0
    keys[0, 0, 320:352, 3], queries[..., 3] = 8.0, 8.0  # one block that every query looks at
    bare.feed(1000, keys=keys, queries=queries)
    assert bare.layer.evicted_to[0] == 0
    bare.state.max_bytes = 14_000
    bare.feed(1)
    at = held_by_head(bare.layer, 0, 0)[0].tolist()
    assert set(range(320, 352)) <= set(at)
    assert len(at) < 700


def test_sinks_stay():
    from cache_reference import Bare

    bare = Bare(KIVI(group=32, residual=32, sinks=4), heads=2, dim=16)
    bare.state.max_bytes = 24_000
    bare.feed(800, queries=torch.randn(1, 4, 800, 16))
    for head in range(2):
        at = held_by_head(bare.layer, 0, head)[0].tolist()
        assert at[:4] == [0, 1, 2, 3]
        assert len(at) < 700


def test_too_little_for_the_newest_tokens():
    model = rm.make("qwen2")
    with mmkv.wrapped(model, cache=[SnapKV()], max_bytes=1000), pytest.raises(RuntimeError, match="allow at least"):
        model(torch.tensor([rm.words(200)]))


def test_text_for_bytes():
    model = rm.make("qwen2")
    with mmkv.wrapped(model, max_bytes="96KiB"), torch.no_grad():
        cache = model(torch.tensor([rm.words(400)])).past_key_values
    assert held(cache) <= 96 * 1024


@pytest.mark.parametrize("bad", [0, -5, "5 apples", "0MiB", "0.0001B", 1.5, True, "MiB"])
def test_impossible_limits(bad):
    model = rm.make("qwen2")
    with pytest.raises(ValueError, match=r"max_bytes .*a whole number of bytes above 0, or text such as '64MiB'"):
        mmkv.wrap(model, max_bytes=bad)
    assert not hasattr(model, "_mmkv")
