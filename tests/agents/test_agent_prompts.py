"""What two prompts share, where pictures stand in them, and their position ids."""

from __future__ import annotations

import agent_models as am
import numpy as np
import pytest
import random_models as rm
import torch
from PIL import Image

from mmkv.agents.positions import mrope_positions
from mmkv.agents.prompt import Prompt, Span, content_of, find_spans, picture


def prompt(*parts) -> Prompt:
    """Ints are text; ("a", 3) is a picture of 3 tokens."""
    ids, spans = [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            spans.append(Span(len(ids), len(ids) + part[1], part[0]))
            ids += [rm.IMAGE] * part[1]
    return Prompt(ids, tuple(spans))


OLD = prompt(1, 2, ("a", 3), 3, ("b", 2), 4)  # pictures at 2..5 and 6..8


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (OLD, 9),
        (prompt(1, 2, ("a", 3), 3, ("b", 2), 4, 5), 9),
        (prompt(1, 2, ("a", 3), 3, ("b", 2)), 8),
        (prompt(1, 2, ("a", 3), 3, ("c", 2), 4), 6),  # another picture of the same size
        (prompt(1, 2, ("c", 3), 3, ("b", 2), 4), 2),
        (prompt(1, 2, ("a", 3), 3, ("b", 3), 4), 6),  # never a part of a picture
        (prompt(1, 2, ("a", 2), 3), 2),
        (prompt(1, 2, ("a", 3), 9), 5),
        (prompt(1, 7, ("a", 3)), 1),
        (prompt(("a", 3)), 0),
        (prompt(), 0),
        (prompt(1, 2, ("b", 2), 4), 2),  # the first picture is gone
    ],
)
def test_agrees(other, same):
    assert OLD.agrees(other) == other.agrees(OLD) == same
    assert OLD.first(same).agrees(other) == same


def test_first():
    assert OLD.first(5) == prompt(1, 2, ("a", 3))
    assert OLD.first(4) == Prompt([1, 2, rm.IMAGE, rm.IMAGE])  # half a picture is none
    assert OLD.first(0) == Prompt([])


def test_find_spans():
    """Two pictures side by side are told apart by their numbers of tokens."""
    ids = torch.tensor([1, rm.IMAGE, rm.IMAGE, rm.IMAGE, 2, rm.IMAGE])
    assert find_spans(ids, rm.IMAGE, [2, 1, 1], ["a", "b", "c"]) == (Span(1, 3, "a"), Span(3, 4, "b"), Span(5, 6, "c"))
    with pytest.raises(ValueError, match="4 placeholders"):
        find_spans(ids, rm.IMAGE, [2, 1], ["a", "b"])


def test_positions_by_hand():
    """3 tokens of text, a picture of 2 x 3 tokens, one token, a picture of 1 x 1, two tokens."""
    found = mrope_positions(prompt(1, 2, 3, ("a", 6), 4, ("b", 1), 5, 6), [(2, 3), (1, 1)])
    assert found[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_positions_are_the_librarys():
    """What the installed transformers gives the decoder for the same prompt."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(
        model, [[*rm.words(4), rm.Image(8, 12), *rm.words(2), rm.Image(4, 4), rm.Image(16, 4), *rm.words(3)]]
    )
    seen = {}
    model.model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    rm.generate(model, given, new=1)
    spans = find_spans(given["input_ids"][0], rm.IMAGE, [24, 4, 16], ["a", "b", "c"])
    found = mrope_positions(Prompt(given["input_ids"][0].tolist(), spans), [(4, 6), (2, 2), (8, 2)])
    assert torch.equal(seen["position_ids"][-3:], found)


def test_pictures_of_all_kinds(tmp_path):
    pixels = np.array(am.screen(3))
    am.screen(3).save(tmp_path / "screen.png")
    same = [am.screen(3), pixels, torch.from_numpy(pixels), tmp_path / "screen.png", str(tmp_path / "screen.png")]
    assert len({content_of(picture(x)) for x in same}) == 1
    turned = pixels.reshape(pixels.shape[1], pixels.shape[0], 3)  # the same bytes of another shape
    others = [am.screen(4), turned, pixels[::-1].copy()]
    assert len({content_of(picture(x)) for x in [same[0], *others]}) == 4
    clear = Image.new("RGBA", (9, 9), (1, 2, 3, 0))
    assert picture(clear).mode == "RGB"
    with pytest.raises(FileNotFoundError, match=r"gone\.png: there is no such screenshot") as caught:
        picture(tmp_path / "gone.png")
    assert "\n" not in str(caught.value)


def test_ids_and_pixels_are_the_processors():
    """With a real Qwen2.5-VL processor: what it makes of text and pictures in one call."""
    from mmkv.agents.encoding import Encoder
    from mmkv.models import adapter_for, tiny

    model, processor = tiny.load()
    pictures = [am.screen(1, 112, 84), am.screen(2, 60, 140)]
    parts = [[{"type": "image", "image": p}, {"type": "text", "text": "where is the circle?"}] for p in pictures]
    chat = [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": "top left"}]
    chat.append({"role": "user", "content": parts[1]})
    found, inputs = Encoder(adapter_for(model), processor).encode(chat)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    want = processor(text=[text], images=pictures, return_tensors="pt")
    assert [found.ids] == want["input_ids"].tolist()
    given = inputs(0)
    assert torch.equal(given["pixel_values"], want["pixel_values"])
    assert torch.equal(given["image_grid_thw"], want["image_grid_thw"])
    second = inputs(found.spans[0].end)
    assert torch.equal(second["image_grid_thw"], want["image_grid_thw"][1:])
    assert "pixel_values" not in inputs(len(found.ids) - 1)
