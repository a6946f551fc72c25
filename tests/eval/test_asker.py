"""Answers of a wrapped model: those of stock `generate` where nothing is compressed, and what they are said to cost."""

from __future__ import annotations

import pytest
from transformers import BatchFeature

import mmkv
from mmkv.eval.asker import Asker
from mmkv.eval.inputs import inputs_of
from mmkv.eval.media import Clip, Media
from mmkv.eval.methods import method_of, methods_of
from mmkv.eval.task import Prompt, SkipSample
from mmkv.models import tiny
from mmkv.models.tiny import answer, world

SEED = 2**43 + 7


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def video():
    return world.make_video(SEED, 64, "easy")


def prompt_of(question) -> Prompt:
    parts = [{"type": "video"}, {"type": "text", "text": question.text}]
    return Prompt([{"role": "user", "content": parts}], choices=dict(zip("ABCD", question.options)))


def media_of(video) -> Media:
    return Media(Clip(video.frames, world.FPS))


def tell(loaded, video, method, questions, share=True, likely=False):
    with Asker(*loaded, method_of(method), share) as asker:
        return [asker.answer(prompt_of(q), media_of(video), likely, 4) for q in questions]


def test_dense_answers_are_those_of_generate(loaded, video):
    model, processor = loaded
    questions = video.questions[:4]
    stock = []
    with mmkv.wrapped(model, positions="trained"):
        for question in questions:
            inputs = inputs_of(model, processor, prompt_of(question), media_of(video))
            out = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
            stock.append(processor.tokenizer.decode(out, skip_special_tokens=True).strip())
    shared = tell(loaded, video, "dense", questions)
    apart = tell(loaded, video, "dense", questions, share=False)
    assert [row["response"] for row in shared] == [row["response"] for row in apart] == stock
    assert [row["shared_prefill"] for row in shared] == [False, True, True, True]
    assert not any(row["shared_prefill"] for row in apart)
    # prompt and all but the last token of the answer are in the cache, however they came there
    for row, other in zip(shared, apart):
        assert row["kv_bytes"] == other["kv_bytes"] == row["kv_bytes_dense"]
        assert row["tokens_held"] == row["prompt_tokens"] + row["new_tokens"] - 1
        assert row["vision_tokens"] == row["vision_tokens_held"] == 64 * 8


def test_likelihood_is_that_of_the_forced_text(loaded, video):
    model, processor = loaded
    question = next(q for q in video.questions if q.task == "where")  # options of two words each
    (row,) = tell(loaded, video, "dense", [question], likely=True)
    with mmkv.wrapped(model, positions="trained"):
        inputs = inputs_of(model, processor, prompt_of(question), media_of(video))
        chosen, scores = answer.choose(model, processor, BatchFeature(inputs), question.options)
    assert row["option_scores"] == pytest.approx(dict(zip("ABCD", scores)), abs=2e-3)
    assert question.options["ABCD".index(row["response"])] == chosen


@pytest.mark.parametrize("share", [True, False])
def test_no_token_of_an_answer_comes_from_the_dense_prefill(loaded, video, share):
    """The first word's scores are those over the compressed cache; a plain `generate` would take it from the dense prefill."""
    question = next(q for q in video.questions if q.task == "colour")  # options of one word each
    dense, packed = (tell(loaded, video, name, [question], share, likely=True)[0] for name in ("dense", "kivi-2"))
    assert any(abs(dense["option_scores"][c] - packed["option_scores"][c]) > 0.05 for c in "ABCD")
    model, processor = loaded
    with mmkv.wrapped(model, "kivi-2", positions="trained"):
        inputs = inputs_of(model, processor, prompt_of(question), media_of(video))
        scores = answer.choose(model, processor, BatchFeature(inputs), question.options)[1]
    assert scores == pytest.approx(list(dense["option_scores"].values()), abs=2e-3)


@pytest.mark.parametrize(
    "method", ["SnapKV(budget=0.25)", "FastV()", "vidkv-stp", "SnapKV(budget=0.5)+KIVI(residual=32)"]
)
def test_methods_that_read_the_question_get_it_and_prefill_anew(loaded, video, method):
    rows = tell(loaded, video, method, video.questions[:2])
    assert not any(row["shared_prefill"] for row in rows)
    for row in rows:
        text = row["prompt_tokens"] - row["vision_tokens"]
        assert row["vision_tokens_held"] <= row["tokens_held"] <= row["vision_tokens_held"] + text + row["new_tokens"]
    if method != "vidkv-stp":
        assert rows[0]["vision_tokens_held"] < rows[0]["vision_tokens"]


def test_other_media_are_not_taken_for_these(loaded, video):
    other = world.make_video(SEED + 1, 64, "easy")
    question = video.questions[0]
    with Asker(*loaded, method_of("dense"), True) as asker:
        asker.answer(prompt_of(question), media_of(video), True, 4)
        asker.forget()
        there = asker.answer(prompt_of(question), media_of(other), True, 4)
    assert there["option_scores"] == tell(loaded, other, "dense", [question], likely=True)[0]["option_scores"]
    assert not there["shared_prefill"]


def test_model_is_left_as_it_was(loaded):
    with pytest.raises(RuntimeError), Asker(*loaded, method_of("vidkv"), True):
        raise RuntimeError
    assert getattr(loaded[0], "_mmkv", None) is None


def test_messages_and_media_must_fit(loaded, video):
    with pytest.raises(ValueError, match="name 1 videos and 0 images, given are 0 and 0"):
        inputs_of(*loaded, prompt_of(video.questions[0]), Media())


def test_methods_of_a_list():
    found = methods_of("kivi-2, SnapKV(budget=0.25, window=16)+VidKV(),FastV(layer=1)")
    assert [m.name for m in found] == ["dense", "kivi-2", "SnapKV(budget=0.25, window=16)+VidKV()", "FastV(layer=1)"]
    assert [type(m).__name__ for m in found[2].cache] == ["SnapKV", "VidKV"] and found[2].cache[0].window == 16
    assert found[3].tokens and not found[3].cache
    assert [m.reads_question for m in found] == [False, False, True, True]
    assert [m.name for m in methods_of("kivi-2", baseline=False)] == ["kivi-2"]
    assert [m.name for m in methods_of("kivi-2,dense")] == ["kivi-2", "dense"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi-2,,vidkv", "an empty name"),
        ("kiwi-2", "did you mean 'kivi-2'"),
        ("kivi-2,kivi-2", "stands there twice"),
        ("SnapKV(budget=__import__('os'))", "malformed node"),
        ("SnapKV(0.25)", "options are given by name"),
        ("SnapKV(colour=1)", "colour"),
        ("SnapKV(budget=7.5)", "budget"),
    ],
)
def test_refused_methods(text, message):
    with pytest.raises(ValueError, match=message):
        methods_of(text)


def test_media_that_the_processor_refuses_skip_the_sample(loaded, video):
    with Asker(*loaded, method_of("dense"), True) as asker, pytest.raises(SkipSample, match="given are 0 and 0"):
        asker.answer(prompt_of(video.questions[0]), Media(), False, 4)
