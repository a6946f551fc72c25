"""The stream against the model itself: the spec sheet's identities (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmkv
from mmkv.models import tiny
from mmkv.models.tiny import answer, world
from mmkv.streaming.chooser import Chooser
from mmkv.streaming.reading import Answering, Retrieving

QUESTION = "which colour appears first?"


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def video():
    return world.make_video(2**42, frames=32)


def stock(model, processor, frames, question, fps=2.0):
    """Logits of the last prompt token of the plain model, at the positions it was trained with."""
    inputs = answer.prepare(processor, frames, question, fps)
    with torch.no_grad(), mmkv.wrapped(model, positions="trained"):
        return model(**inputs).logits[0, -1]


def first_logits(stream, question):
    """Logits with which a stream's answer begins, and the frames of each layer."""
    decoder, positions = stream.decoder, stream._writing.positions
    chooser = Chooser(stream.store, stream.choice, question)
    retrieving = Retrieving(decoder.rotary, positions, chooser.bring, stream._writing.init)
    with torch.no_grad():
        decoder.run(decoder.embeds(stream.reader.ids(question)), retrieving)
        answering = Answering(decoder.rotary, positions, retrieving.contexts, [len(f) for f in retrieving.frames])
        out = decoder.run(decoder.embeds(stream.reader.prompt(question)[1]), answering)
        return stream.model.lm_head(out[0, -1]), retrieving.frames


@pytest.mark.support("modes", family="qwen2_5_vl", name="streaming")
@pytest.mark.parametrize("encode", [1, 3, 8])
def test_a_short_clip_is_answered_as_by_the_model(loaded, video, encode):
    """Check 1: window and retrieval hold all there is; logits equal one causal pass over [prompt, frames, question]."""
    model, processor = loaded
    want = stock(model, processor, video.frames, QUESTION)
    with mmkv.stream(model, processor, window=4000, retrieve=64, fps=2.0, encode=encode) as stream:
        assert stream.watch(video.frames) == 16
        got, frames = first_logits(stream, QUESTION)
    assert frames == [list(range(16))] * len(frames)
    assert torch.allclose(got, want, atol=2e-4)
    assert int(got.argmax()) == int(want.argmax())


def test_it_answers_what_the_model_answers(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, fps=2.0) as stream:
        stream.watch(video.frames)
        for question in video.questions[:12]:
            want = answer.ask(model, processor, video.frames, question.text)
            assert stream.answer(question.text, max_new_tokens=4).text == want


def test_two_questions_answer_as_each_alone(loaded, video):
    """Check 7: nothing of a question stays in the memory, also between two pictures of a frame."""
    model, processor = loaded
    texts = [q.text for q in video.questions[:4]]
    alone = []
    for text in texts:
        with mmkv.stream(model, processor, window=300, retrieve=4, fps=2.0) as stream:
            stream.watch(video.frames)
            alone.append(stream.answer(text))
    with mmkv.stream(model, processor, window=300, retrieve=4, fps=2.0) as stream:
        stream.watch(video.frames[:11])
        stream.answer(texts[0])
        stream.watch(video.frames[11:])
        before = stream.bytes()
        together = [stream.answer(text) for text in texts]
        assert stream.bytes() == before
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.frames for a in together] == [a.frames for a in alone]


def test_calls_of_any_size_write_the_same(loaded, video):
    model, processor = loaded
    memories = []
    for encode, calls in ((1, 32), (4, 4), (8, 1)):
        with mmkv.stream(model, processor, window=120, retrieve=8, fps=2.0, encode=encode) as stream:
            for part in np.array_split(video.frames, calls):
                stream.watch(part)
            memories.append([stream.store.fetch(layer, range(16)) for layer in range(6)])
    for other in memories[1:]:
        for (keys, values), (more_keys, more_values) in zip(memories[0], other):
            assert torch.allclose(keys, more_keys, atol=1e-4)
            assert torch.allclose(values, more_values, atol=1e-4)


def test_keys_are_stored_unrotated(loaded, video):
    """Check 6: one frame stored once is rotated to where it is read: after another frame, or first."""
    model, processor = loaded

    class Told:
        def see(self, pictures, times):
            """Nothing to keep."""

        def choose(self, question, count):
            return self.frames

    told = Told()
    with mmkv.stream(model, processor, window=4000, fps=2.0, by=told) as stream:
        stream.watch(video.frames)
        contexts = {}
        for frames in ([3, 9], [9]):
            told.frames = frames
            chooser = Chooser(stream.store, stream.choice, QUESTION)
            retrieving = Retrieving(
                stream.decoder.rotary, stream._writing.positions, chooser.bring, stream._writing.init
            )
            q = torch.randn(1, 4, 2, 64)
            k = v = torch.randn(1, 2, 2, 64)
            retrieving.attend(0, q, k, v, 0.1)
            contexts[len(frames)] = retrieving.contexts[0]
        n = stream.store.tokens_per_frame
        assert torch.equal(contexts[2][1][:, :, -n:], contexts[1][1][:, :, -n:])  # values alike
        assert not torch.allclose(contexts[2][0][:, :, -n:], contexts[1][0][:, :, -n:])  # keys turned further


def test_memory_on_the_device_is_bounded_by_the_window(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=200, retrieve=4, fps=2.0) as stream:
        sizes = []
        for i in range(12):
            stream.watch(np.roll(video.frames, i, axis=0))
            sizes.append(stream.bytes()["window"])
        assert len(set(sizes[1:])) == 1
        assert stream.frames == 192
        assert stream.answer(QUESTION).text


def test_text_comes_as_it_is_written(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, fps=2.0) as stream:
        stream.watch(video.frames)
        reply = stream.ask("where is the circle?", max_new_tokens=4)
        pieces = list(reply)
        found = reply.answer()
    assert "".join(pieces).strip() == found.text
    assert found.tokens >= 1
    assert found.seconds["retrieve"] <= found.seconds["first_token"] <= found.seconds["answer"]
    assert [f.frame for f in found.frames] == sorted({f.frame for f in found.frames})
    assert all(f.time == f.frame * 1.0 for f in found.frames)  # two pictures of 0.5 s


def test_plain_generation_goes_on_beside_streams(loaded, video):
    """Two streams and stock generation share a model; the last stream takes its hooks along."""
    model, processor = loaded
    want = answer.ask(model, processor, video.frames, QUESTION)
    one = mmkv.stream(model, processor, window=4000, fps=2.0)
    two = mmkv.stream(model, processor, window=300, retrieve=4, fps=2.0)
    one.watch(video.frames)
    two.watch(world.make_video(2**42 + 5, frames=32).frames)
    assert answer.ask(model, processor, video.frames, QUESTION) == want
    assert one.answer(QUESTION, max_new_tokens=4).text == want
    two.answer(QUESTION)
    assert one.answer(QUESTION, max_new_tokens=4).text == want
    with pytest.raises(ValueError, match="unwrap"):
        mmkv.wrap(model, "kivi-2")
    one.close()
    assert two.answer(QUESTION).text
    two.close()
    assert not hasattr(model, "_mmkv")
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    assert answer.ask(model, processor, video.frames, QUESTION) == want


@pytest.mark.parametrize("by", ["cosine", "dot", "uniform", "recent"])
def test_ways_to_choose(loaded, video, by):
    model, processor = loaded
    with mmkv.stream(model, processor, window=4000, retrieve=4, by=by, fps=2.0) as stream:
        stream.watch(video.frames)
        found = stream.answer(QUESTION)
    layers = sum(f.layers for f in found.frames)
    assert layers == 4 * 6
    if by == "recent":
        assert [f.frame for f in found.frames] == [12, 13, 14, 15]
    if by == "uniform":
        assert [f.frame for f in found.frames] == [2, 6, 10, 14]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(window=0), "window=0"),
        (dict(retrieve=True), "retrieve=True"),
        (dict(fps=0), "fps=0"),
        (dict(by="best"), "possible are cosine"),
        (dict(group=9, retrieve=8), "group=9"),
        (dict(encode=1.5), "encode=1.5"),
    ],
)
def test_impossible_options(loaded, options, said):
    model, processor = loaded
    with pytest.raises(ValueError, match=said) as caught:
        mmkv.stream(model, processor, **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_mmkv")


def test_bad_input(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=100, fps=2.0) as stream:
        for call, said in (
            (lambda: stream.ask(QUESTION), "before any frame"),
            (lambda: stream.watch("video.mp4"), "open_video"),
            (lambda: stream.watch(video.frames.astype(np.float32)), "uint8"),
            (lambda: stream.watch(video.frames[..., :2]), "uint8"),
        ):
            with pytest.raises(ValueError, match=said) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert stream.watch(video.frames[:4], times=[0, 1, 2, 3]) == 2
        for call, said in (
            (lambda: stream.watch(video.frames[0], times=3.0), "ascend"),
            (lambda: stream.watch(video.frames[:2], times=[9.0, 8.0]), "ascend"),
            (lambda: stream.watch(video.frames[:2], times=[20.0]), "fewer times"),
            (lambda: stream.watch(video.frames[:1], times=[30.0, 31.0]), "more times"),
            (lambda: stream.watch(np.zeros((32, 32, 3), np.uint8)), "resize"),
            (lambda: stream.ask(" "), "empty"),
            (lambda: stream.ask("red " * 200), "shorten"),
        ):
            with pytest.raises(ValueError, match=said) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert stream.answer(QUESTION).text  # the memory is as it was
    with pytest.raises(ValueError, match="closed"):
        stream.watch(video.frames)


def test_a_window_smaller_than_a_frame(loaded, video):
    model, processor = loaded
    with mmkv.stream(model, processor, window=8, fps=2.0) as stream, pytest.raises(ValueError, match="window=8"):
        stream.watch(video.frames)


def test_models_that_cannot_be_streamed(loaded):
    import random_models as rm

    for family, said in (("llama", "possible are Qwen2-VL"), ("qwen3_vl", "a timestamp of 6 to 10 tokens")):
        model = rm.make(family)
        with pytest.raises(ValueError, match=f"cannot be streamed.*{said}") as caught:
            mmkv.stream(model, loaded[1])
        assert "\n" not in str(caught.value)
        assert not hasattr(model, "_mmkv")


def test_a_folder_goes_on_as_if_never_closed(loaded, video, tmp_path):
    """Closed in the middle and opened again, the window is rebuilt from what was stored: later frames are the same to the bit."""
    model, processor = loaded
    options = dict(window=100, retrieve=4, fps=2.0, video="one")
    with mmkv.stream(model, processor, store=f"disk:{tmp_path / 'straight'}", **options) as stream:
        stream.watch(video.frames[:20])
        stream.watch(video.frames[20:])
        want = [stream.store.fetch(layer, range(16)) for layer in range(6)]
        answer_ = stream.answer(QUESTION)
        times = list(stream.times)
    with mmkv.stream(model, processor, store=f"disk:{tmp_path / 'broken'}", **options) as stream:
        stream.watch(video.frames[:20])
    with mmkv.stream(model, processor, store=f"disk:{tmp_path / 'broken'}", **options) as stream:
        assert stream.frames == 10
        assert stream.answer(QUESTION).text
        stream.watch(video.frames[20:])
        assert stream.times == times
        for (keys, values), (more_keys, more_values) in zip(want, [stream.store.fetch(i, range(16)) for i in range(6)]):
            assert torch.equal(keys, more_keys)
            assert torch.equal(values, more_values)
        assert stream.answer(QUESTION).text == answer_.text
    with pytest.raises(ValueError, match="another video"):
        mmkv.stream(model, processor, store=f"disk:{tmp_path / 'broken'}", **{**options, "video": "two"})
    with pytest.raises(ValueError, match="another preprocessing"):
        mmkv.stream(model, processor, store=f"disk:{tmp_path / 'broken'}", **{**options, "window": 200})
    assert not hasattr(model, "_mmkv")


def test_one_writes_and_another_reads(loaded, video, tmp_path):
    model, processor = loaded
    where = f"disk:{tmp_path / 'memory'}"
    with pytest.raises(ValueError, match="holds no store"):
        mmkv.stream(model, processor, store=where, mode="read")
    with mmkv.stream(model, processor, store=where, window=4000, fps=2.0) as writer:
        writer.watch(video.frames[:16])
        with mmkv.stream(model, processor, store=where, mode="read") as reader:
            assert reader.frames == 8
            assert reader.answer(QUESTION).text == writer.answer(QUESTION).text
            writer.watch(video.frames[16:])
            assert (reader.refresh(), reader.frames) == (8, 16)
            assert reader.answer(QUESTION).frames == writer.answer(QUESTION).frames
            with pytest.raises(ValueError, match="only reads"):
                reader.watch(video.frames)


def test_a_damaged_frame_is_passed_over(loaded, video, tmp_path):
    model, processor = loaded
    where = tmp_path / "memory"
    with mmkv.stream(model, processor, store=f"disk:{where}", window=4000, fps=2.0, encode=2) as stream:
        stream.watch(video.frames)
    chunks = sorted(where.rglob("*.safetensors"), key=lambda path: path.name)
    assert len(chunks) == 8
    data = bytearray(chunks[3].read_bytes())
    data[len(data) // 2] ^= 1
    chunks[3].write_bytes(data)
    with mmkv.stream(model, processor, store=f"disk:{where}", mode="read") as stream:
        with pytest.warns(UserWarning, match="frame"):
            found = stream.answer(QUESTION)
        damaged = stream.store.damaged
    assert damaged
    assert set(damaged) <= {6, 7}
    assert found.text
    fully = {f.frame for f in found.frames if f.layers == 6}
    assert fully >= set(range(16)) - {6, 7}


def test_a_full_disk_leaves_the_memory_intact(loaded, video, tmp_path, monkeypatch):
    model, processor = loaded
    with mmkv.stream(model, processor, store=f"disk:{tmp_path / 'memory'}", window=100, fps=2.0) as stream:
        stream.watch(video.frames[:16])
        before = stream.bytes(), stream.answer(QUESTION).text
        append = stream.store.append

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(stream.store, "append", full)
        with pytest.raises(OSError, match="No space"):
            stream.watch(video.frames[16:])
        monkeypatch.setattr(stream.store, "append", append)
        assert (stream.bytes(), stream.answer(QUESTION).text) == before
        assert stream.frames == 8
