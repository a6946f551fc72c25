"""benchmarks/streaming.py: its stories, its ways to remember, and rows that go on from a log."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmkv
from mmkv.cache import KIVI, InfiniPotV
from mmkv.models import tiny
from mmkv.models.tiny import answer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memories
import streaming
from fixed_budget import FixedBudget
from stories import WORLDS, Story


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.mark.parametrize("kind", WORLDS)
def test_an_event_is_where_it_is_said_to_be(kind):
    """Its colour is on the screen in its frames, and in no other; answers differ, so that a question means one event."""
    story = Story(kind, 0, 128)
    pictures = np.concatenate(list(story)).astype(int)
    assert len(pictures) == 256
    found = list(story.questions())
    assert len(found) == len({q for q, _, _ in found}) == 16
    rgb = {shape: np.array(story._thing(shape, colour, 8.5, 0, 0).rgb) for shape, colour in story.events.values()}
    for question, shape, frames in found[1::2]:
        near = (np.abs(pictures - rgb[shape]).sum(-1) < 40).sum((1, 2)) >= 30
        seen = {f for f in range(128) if near[2 * f : 2 * f + 2].all()}
        assert frames == seen, question


def test_full_attention_in_chunks_answers_as_the_model(loaded):
    model, processor = loaded
    story = Story("quiet", 1, 32)
    memory = FixedBudget(model, processor, [], fps=2.0, chunk=64)
    memory.watch(story)
    pictures = np.concatenate(list(story))
    for question, _, frames in story.questions():
        want = answer.ask(model, processor, pictures, question, 2.0)
        assert memory.answer(question, 4)[0] == want
        assert memory.kept(frames) == 1.0
    held = memory.bytes()
    assert memory.answer(question, 2)[0] == want.split()[0]
    assert memory.bytes() == held
    assert not hasattr(model, "_mmkv")


def test_a_fixed_budget_does_not_grow(loaded):
    model, processor = loaded
    sizes = []
    for frames in (32, 64):
        memory = FixedBudget(model, processor, [InfiniPotV(budget={"video": 128})], fps=2.0, chunk=128)
        memory.watch(Story("quiet", 1, frames))
        sizes.append(memory.bytes())
        assert memory.kept(set(range(frames))) == pytest.approx(128 / (16 * frames))
    assert sizes[0] == sizes[1]


def test_repacked_is_what_a_stream_that_packs_has_stored(loaded):
    model, processor = loaded
    options = dict(window=300, fps=2.0)
    with (
        mmkv.stream(model, processor, **options) as one,
        mmkv.stream(model, processor, cache=[KIVI(bits=4)], **options) as two,
    ):
        for pictures in Story("busy", 0, 32):
            one.watch(pictures)
            two.watch(pictures)
        packed = memories.repacked(one.store, "int4")
        for layer in (0, 5):
            for a, b in zip(packed.fetch(layer, range(32)), two.store.fetch(layer, range(32))):
                assert torch.equal(a, b)
        assert packed.bytes()["ram"] == pytest.approx(two.store.bytes()["ram"], rel=0.05)  # but for room to grow
        assert torch.equal(packed.index, two.store.index) and packed.times == two.times


def test_a_stopped_run_goes_on(loaded, tmp_path, monkeypatch):
    """Rows of what is in the log; nothing there is measured again."""
    asked = []

    def memory(model, processor, story, tick):
        asked.append((story.kind, story.seed))
        right = 16 if story.seed else 8
        row = dict(questions=16, right=right, recall=0.5, first_token=0.1, pictures_per_second=9.0, archive_bytes=0)
        return {"": row | dict(device_bytes=7, device_flat=True)}

    monkeypatch.setattr(streaming, "MEMORIES", {"one way": memory})
    monkeypatch.setattr(streaming, "MOST", {"other": 1})
    options = Namespace(
        sizes=[16], seeds=1, worlds=["quiet"], memories=["one way"], stop=5, log=str(tmp_path / "log.jsonl")
    )
    assert streaming.measure(options)["rows"][0]["accuracy"] == 0.5
    options.seeds = 2
    row = streaming.measure(options)["rows"][0]
    assert asked == [("quiet", 0), ("quiet", 1)]
    assert (row["way"], row["frames"], row["videos"], row["questions"]) == ("one way", 16, 2, 32)
    assert row["accuracy"] == 0.75
    assert row["error"] == pytest.approx((0.75 * 0.25 / 32) ** 0.5)
    options.seeds, options.stop = 3, 0
    assert streaming.measure(options)["rows"] == [row]
