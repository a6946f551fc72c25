"""docs/models.md holds what the registries and the tests of `support` hold; `make support` writes it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from support import Cell
from support_page import page, read_back

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_page_is_up_to_date():
    """A new method or family, or one that is refused now, makes this fail: run `make support`."""
    found, wanted = read_back(PAGE.read_text()), support.declared()
    assert sorted(set(wanted.items()) - set(found.items())) == [], "run `make support`"
    assert sorted(set(found.items()) - set(wanted.items())) == [], "run `make support`"


def test_a_page_reads_back_what_it_shows():
    cells = [
        Cell("modes", "qwen2", "greedy"),
        Cell("modes", "qwen3_vl", "streaming", refused="Qwen3VLForConditionalGeneration cannot be streamed"),
        Cell("modes", "internvl", "lookup"),
        Cell("cache", "qwen2", "KIVI", ("greedy", "beam")),
        Cell("cache", "qwen2", "SnapKV", ("greedy", "beam")),
        Cell("cache", "llama", "KIVI", ("greedy",)),
        Cell("cache", "llava", "VidKV", ("greedy",)),
        Cell("tokens", "qwen2_5_vl", "ToMe", refused="no"),
        Cell("tokens", "llava", "ToMe", ("turns",)),
    ]
    text = page(cells)
    assert read_back(text) == {(c.kind, c.family, c.name): not c.refused for c in cells}
    assert "✓ (greedy)" in text
    assert "1. this model cannot be streamed" in text


def test_modes_of_several_tests_add_up():
    recorder = support.Recorder("")
    recorder.add(Cell("tokens", "llava", "ToMe", ("greedy", "beam")))
    recorder.add(Cell("tokens", "llava", "ToMe", ("turns", "beam")))
    assert list(recorder.cells.values()) == [Cell("tokens", "llava", "ToMe", ("greedy", "beam", "turns"))]


def test_every_family_is_said_to_stream_or_not():
    """Qwen2-VL alone has no test of its own: its reader is Qwen2.5-VL's."""
    import random_models as rm

    assert {*support.STREAMED, *support.NOT_STREAMED, "qwen2_vl"} == set(rm.VLMS)


@pytest.mark.support("tokens", family="x", name="y", modes=("a",))
def test_what_a_test_says_of_itself(request):
    assert support.cells_of(request.node, "") == [Cell("tokens", "x", "y", ("a",))]
