"""What one question may choose for itself, how frames are packed, and the limit of the RAM tier."""

from __future__ import annotations

import pytest
import torch

import mmkv
from mmkv.cache import KIVI, SnapKV, VidKV
from mmkv.models import tiny
from mmkv.models.tiny import world

QUESTION = "which colour appears first?"


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def video():
    return world.make_video(2**42, frames=32)


def test_a_question_may_choose_for_itself(loaded, video):
    """`ask(retrieve=, by=, group=)`: that question alone; the stream's own settings stay."""
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, retrieve=4, fps=2.0) as stream:
        stream.watch(video.frames)
        before = stream.answer(QUESTION)
        found = stream.answer(QUESTION, retrieve=2, by="recent")
        assert [f.frame for f in found.frames] == [14, 15]
        assert [f.frame for f in stream.answer(QUESTION, retrieve=5, by="uniform").frames] == [1, 4, 8, 11, 14]
        pairs = {f.frame for f in stream.answer(QUESTION, group=2).frames}
        assert all(f ^ 1 in pairs for f in pairs)
        after = stream.answer(QUESTION)
        assert (after.text, after.frames) == (before.text, before.frames)
        assert sum(f.layers for f in after.frames) == 4 * 6
        with mmkv.stream(model, processor, window=4000, retrieve=2, by="recent", fps=2.0) as other:
            other.watch(video.frames)
            assert other.answer(QUESTION).text == found.text
        for options, said in (
            (dict(retrieve=0), "retrieve=0"),
            (dict(by="best"), "possible are cosine"),
            (dict(by=7), "by=7"),
            (dict(group=5), "group=5 with retrieve=4"),
            (dict(by=SeesNothing()), "has not seen the frames"),
        ):
            with pytest.raises(ValueError, match=said) as caught:
                stream.ask(QUESTION, **options)
            assert "\n" not in str(caught.value)


class SeesNothing:
    def see(self, pictures, times):
        """Nothing to keep."""

    def choose(self, question, count):
        return [0]


def test_a_retriever_of_the_stream_and_a_similarity_for_one_question(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, retrieve=4, by=SeesNothing(), fps=2.0) as stream:
        stream.watch(video.frames)
        assert [f.frame for f in stream.answer(QUESTION).frames] == [0]
        assert [f.frame for f in stream.answer(QUESTION, by="recent").frames] == [12, 13, 14, 15]
        assert [f.frame for f in stream.answer(QUESTION, by=stream.choice.by).frames] == [0]


@pytest.mark.parametrize("method", [KIVI(bits=8), KIVI(bits=4), KIVI(bits=2), VidKV()], ids=repr)
def test_frames_are_packed_by_a_cache_method(loaded, video, method, tmp_path):
    """The stored bytes are those of the format, and the folder remembers it."""
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, fps=2.0) as stream:
        stream.watch(video.frames)
        dense, keys = stream.bytes()["ram"], stream.store.fetch(3, range(16))[0]
    where = f"disk:{tmp_path / 'memory'}"
    with mmkv.stream(model, processor, window=4000, cache=[method], fps=2.0, store=where) as stream:
        stream.watch(video.frames)
        assert stream.bytes()["ram"] < 0.45 * dense
        got = stream.store.fetch(3, range(16))[0]
        assert (got - keys).square().mean() < (0.001 if method == KIVI(bits=8) else 0.6) * keys.square().mean()
        want = stream.answer(QUESTION).text
    with mmkv.stream(model, processor, store=where, mode="read") as stream:
        assert torch.equal(stream.store.fetch(3, range(16))[0], got)
        assert stream.answer(QUESTION).text == want
    with pytest.raises(ValueError, match="another kind of memory"):
        mmkv.stream(model, processor, window=4000, fps=2.0, store=where)


@pytest.mark.parametrize("store", ["tape", "disk:", "disk", ""])
def test_a_store_that_is_none_is_refused_before_anything_is_watched(loaded, store):
    with pytest.raises(ValueError, match=r"possible are|disk:") as caught:
        mmkv.stream(*loaded, store=store)
    assert "\n" not in str(caught.value) and repr(store) in str(caught.value)


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ([SnapKV()], "SnapKV.* cannot pack the frames"),
        ([KIVI(bits=1)], r"KIVI\(bits=1\) cannot pack"),
        ([KIVI(bits=4, group=32)], r"KIVI\(bits=4, group=32\) cannot pack"),
        ([VidKV(key_bits=1.25)], r"VidKV\(key_bits=1.25\) cannot pack"),
        ([SnapKV(), KIVI(bits=4)], "SnapKV.* and KIVI.*possible is one of"),
        ("int4", "give a list"),
        (KIVI(), "give a list"),
        ([KIVI], "not a cache method"),
        (["int4"], "not a cache method"),
    ],
)
def test_methods_that_cannot_pack_a_frame(loaded, cache, said):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        mmkv.stream(*loaded, cache=cache)
    assert "\n" not in str(caught.value) and "KIVI(bits=8)" in str(caught.value)
    assert not hasattr(loaded[0], "_mmkv")


def test_a_limit_of_ram(loaded, video, tmp_path):
    """Without a folder frames beyond it are refused and the memory answers on; over a folder they are read from disk."""
    model, processor = loaded
    with mmkv.stream(model, processor, window=300, retrieve=4, fps=2.0, encode=1) as stream:
        stream.watch(video.frames)
        row = (stream.bytes()["ram"] - stream.store.index.numel() * 4) // 16
        want = stream.answer(QUESTION)
    with mmkv.stream(model, processor, window=300, retrieve=4, fps=2.0, encode=1, ram_bytes=10 * row) as stream:
        with pytest.raises(MemoryError, match="ram_bytes") as caught:
            stream.watch(video.frames)
        assert "\n" not in str(caught.value)
        assert stream.frames == 10
        assert stream.answer(QUESTION).text
    where = f"disk:{tmp_path / 'memory'}"
    options = dict(window=300, retrieve=4, fps=2.0, encode=1, ram_bytes=3 * row, store=where)
    with mmkv.stream(model, processor, **options) as stream:
        stream.watch(video.frames)
        assert stream.store.bytes()["ram"] <= 3 * row + 2 * stream.store.index.numel() * 4
        found = stream.answer(QUESTION)
        assert (found.text, found.frames) == (want.text, want.frames)
        assert stream.store.counters()["bytes_from_disk"]
    for bad in (0, True, 1.5, "many"):
        with pytest.raises(ValueError, match="ram_bytes"):
            mmkv.stream(model, processor, ram_bytes=bad)
