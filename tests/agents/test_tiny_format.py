"""The tiny agent's format: a clause a step, screenshots where they are still shown, UI-TARS' answers."""

from __future__ import annotations

import pytest

from mmkv.agents import Action, PastStep, Resize, get_format

TASK = "click the star, then scroll down, then finish"


def said(turns: list[dict]) -> list[tuple]:
    """Role, whether there is a picture, and the words of each turn."""
    return [
        (turn["role"], [p["type"] for p in turn["content"]].count("image"), turn["content"][-1]["text"])
        for turn in turns
    ]


@pytest.mark.parametrize(("done", "clause"), [(0, "click the star"), (1, "scroll down"), (2, "finish"), (5, "finish")])
def test_each_step_has_its_clause(done, clause):
    past = [PastStep("picture", "answer")] * done
    turns = said(get_format("tiny").messages(TASK, past, "picture"))
    assert turns[-1] == ("user", 1, clause) and len(turns) == 2 * done + 1


def test_older_steps_are_told_without_their_screenshots():
    past = [PastStep(None, "one"), PastStep("picture", "two")]
    assert said(get_format("tiny").messages(TASK, past, "picture")) == [
        ("user", 0, "click the star"),
        ("assistant", 0, "one"),
        ("user", 1, "scroll down"),
        ("assistant", 0, "two"),
        ("user", 1, "finish"),
    ]


def test_answers_are_read_in_pixels_of_the_processor():
    """A 320 x 256 screenshot is resized to 160 x 128, so (40, 32) is a quarter of each side."""
    reader = get_format("tiny", resize=Resize(128 * 96, 160 * 128, 16))
    parsed = reader.parse(
        "Thought: the field is red\nAction: click(point='<point>40 32</point>')\n\ntype(content='cat')", (320, 256)
    )
    assert parsed.thought == "the field is red" and not parsed.problems
    click, write = parsed.actions
    assert click.type == "click" and click.point == (0.25, 0.25)
    assert write == Action("write", {"text": "cat"}, "type(content='cat')")
