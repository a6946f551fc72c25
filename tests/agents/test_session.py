"""`mmkv.agent`: a session equals encoding each prompt anew, and keeps what it can; with GUIKV its bytes fall."""

from __future__ import annotations

import agent_models as am
import numpy as np
import pytest
import random_models as rm
import torch
from PIL import Image

import mmkv
from mmkv.agents import AgentFormat, OpenCUA, PastStep, UITars, recent

FORMATS = {"qwen2_5_vl": "ui_tars", "opencua": "opencua"}
SHORT = {"qwen2_5_vl": UITars(prompt="grounding"), "opencua": OpenCUA(level="grounding")}  # of 270 letters, not of 1300
SIZES = ((40, 24), (48, 24), (24, 56), (41, 23))  # screens that change their size, odd ones too
TASK = "open the menu"


def session(family="qwen2_5_vl", **options):
    model, processor = am.make(family)
    return (
        model,
        processor,
        mmkv.agent(model, processor, **{"format": SHORT[family], "max_new_tokens": 10, **options}),
    )


def screens(count, sizes=SIZES):
    return [am.screen(k, *sizes[k % len(sizes)]) for k in range(count)]


@pytest.mark.support("modes", name="agent")
@pytest.mark.parametrize("wrapped", [False, True], ids=["stock", "wrapped"])
@pytest.mark.parametrize("family", FORMATS)
def test_every_step_equals_encoding_from_scratch(family, wrapped):
    """Token for token, with screens of all sizes, while the window of three screenshots fills and then slides."""
    model, processor, agent = session(family, format=FORMATS[family], screenshots=3, **am.SAMPLED)
    answers = []
    if wrapped:
        mmkv.wrap(model)
    for k, shot in enumerate(screens(6)):
        told = agent.format.messages(TASK, recent(agent.past, 3), shot)
        text, length = am.from_scratch(model, processor, told, 10, seed=k)
        torch.manual_seed(k)
        step = agent.step(shot, TASK if k == 0 else None)
        assert step.text == text
        answers.append(text)
        assert step.reused + step.new == length and step.tokens == 10
        assert step.screenshots == min(k + 1, 3) and step.size == shot.size
        if 0 < k < 3:
            assert step.reused > step.new and not step.note
        if k >= 3:
            assert step.note.startswith("encoded again from token") and "oldest screenshot left" in step.note
            assert step.reused > 0
    assert len(set(answers)) == 6 and all(len(set(answer)) > 4 for answer in answers)


@pytest.mark.parametrize("family", FORMATS)
def test_what_is_kept(family):
    """The next step feeds its own tokens alone: everything up to the last screenshot stays, and most of the answer."""
    model, _, agent = session(family, format=FORMATS[family])
    fed = []
    text = model.model.language_model
    text.register_forward_pre_hook(lambda m, a, kw: fed.append(kw["inputs_embeds"].shape[1]), with_kwargs=True)
    seen = []
    model.model.visual.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["grid_thw"].shape[0]), with_kwargs=True
    )
    first, second = (agent.step(shot, TASK) for shot in screens(2))
    prompts = [n for n in fed if n > 1]
    assert prompts == [first.new, second.new] and second.new < 260
    assert seen == [1, 1]  # each picture went through the tower once
    assert second.reused > first.new - 160  # of OpenCUA's prompt all but the instruction behind the screenshot


def test_the_answer_is_cut_where_its_text_encodes_otherwise():
    """A random model writes tokens that no text encodes to; what stays agrees with the next prompt."""
    _, processor, agent = session(**am.SAMPLED)
    torch.manual_seed(0)
    first = agent.step(am.screen(0), TASK)
    held = agent.memory.held
    answer = held.ids[first.reused + first.new :]
    again = processor.tokenizer(first.text, add_special_tokens=False)["input_ids"]
    assert answer != again[: len(answer)]
    second = agent.step(am.screen(1))
    assert first.new <= second.reused < len(held.ids)


def big(count):
    """Screens of 600 tokens."""
    return [am.screen(k, 200, 192) for k in range(count)]


BIG = dict(least=8 * 8 * 500, most=8 * 8 * 600)


def test_guikv_holds_a_fifth():
    model, processor = am.make("qwen2_5_vl", **BIG)
    dense = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=4)
    whole = [dense.step(shot, TASK).kv_bytes for shot in big(4)]
    with mmkv.wrapped(model, cache=[mmkv.cache.GUIKV(budget=0.2)]):
        agent = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=4)
        steps = [agent.step(shot, TASK) for shot in big(4)]
        assert mmkv.report(model).kv_bytes == steps[-1].kv_bytes == agent.kv_bytes
    assert all(step.reused for step in steps[1:]) and not any(step.note for step in steps)
    for step, all_of_it in zip(steps, whole):
        assert 0.16 * all_of_it < step.kv_bytes < 0.23 * all_of_it
    # each screenshot is compressed when it comes: bytes grow by about a fifth of what comes
    for (a, b), (few, more) in zip(zip(whole, whole[1:]), zip(steps, steps[1:])):
        assert 0.15 * (b - a) < more.kv_bytes - few.kv_bytes < 0.25 * (b - a)


def test_the_first_step_with_guikv_is_guikv():
    """A session's first step is one call of generate."""
    model, processor = am.make("qwen2_5_vl", **BIG)
    with mmkv.wrapped(model, cache=[mmkv.cache.GUIKV(budget=0.2)]):
        agent = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=8)
        shot = big(1)[0]
        text, _ = am.from_scratch(model, processor, agent.format.messages(TASK, [], shot), 8)
        assert agent.step(shot, TASK).text == text


def test_evicted_tokens_are_encoded_again_and_it_is_said():
    """OpenCUA's instruction stands behind the screenshot and goes: a longer residual window keeps what precedes it."""
    model, processor = am.make("opencua", **BIG)
    with mmkv.wrapped(model, cache=[mmkv.cache.GUIKV(budget=0.2)]):
        agent = mmkv.agent(model, processor, format="opencua", max_new_tokens=4)
        agent.step(big(1)[0], TASK)
        step = agent.step(big(2)[1])
    assert step.reused == 0 and step.note.startswith("encoded from scratch: of the last") and "residual=" in step.note
    needed = int(step.note.partition("residual=")[2].split()[0])
    with mmkv.wrapped(model, cache=[mmkv.cache.GUIKV(budget=0.2, residual=-(-needed // 64) * 64)]):
        agent = mmkv.agent(model, processor, format="opencua", max_new_tokens=4)
        steps = [agent.step(shot, TASK) for shot in big(3)]
    assert all(s.reused > s.new and not s.note for s in steps[1:])


def test_a_window_that_slides_over_evicted_tokens():
    model, processor = am.make("qwen2_5_vl", **BIG)
    with mmkv.wrapped(model, cache=[mmkv.cache.GUIKV(budget=0.2)]):
        agent = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=4, screenshots=2)
        steps = [agent.step(shot, TASK) for shot in big(3)]
        assert steps[1].reused and steps[2].reused == 0
        assert (
            "from scratch: the oldest screenshot left the prompt, and some tokens behind it were evicted"
            in steps[2].note
        )
        agent = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=4, screenshots=2, slack=2)
        steps = [agent.step(shot, TASK) for shot in big(6)]
    assert [s.screenshots for s in steps] == [1, 2, 3, 4, 2, 3]
    assert [bool(s.note) for s in steps] == [False, False, False, False, True, False]


def test_reset():
    _, _, agent = session()
    shots = screens(3)
    first = [agent.step(shot, TASK).text for shot in shots]
    agent.reset()
    assert agent.kv_bytes == 0 and agent.past == []
    with pytest.raises(ValueError, match="no instruction yet"):
        agent.step(shots[0])
    again = [agent.step(shot, TASK) for shot in shots]
    assert [s.text for s in again] == first and again[0].reused == 0
    agent.reset("something else")
    assert agent.step(shots[0]).reused == 0
    with pytest.raises(ValueError, match="possible is a text"):
        agent.reset("  ")


def test_another_instruction_and_a_screen_that_stays():
    _, processor, agent = session()
    shot = am.screen(1)
    agent.step(shot, TASK)
    same = agent.step(shot)  # the same screen again: the same content
    assert same.reused > same.new and same.screenshots == 2
    other = agent.step(am.screen(2), "close the menu")
    assert "the prompt changed there" in other.note and 0 < other.reused < same.reused
    told = agent.format.messages("close the menu", recent(agent.past, 5), am.screen(3))
    text, _ = am.from_scratch(agent.model, processor, told, 10)
    assert agent.step(am.screen(3)).text == text


def test_a_picture_that_changed_in_place_is_another_picture():
    """Identity is by content: a screen that is drawn over is not taken for what it was."""
    model, processor, agent = session()
    pixels = np.array(am.screen(1))
    agent.step(pixels, TASK)
    pixels[:] = 255 - pixels
    told = agent.format.messages(TASK, recent(agent.past, 5), Image.fromarray(pixels))
    text, _ = am.from_scratch(model, processor, told, 10)
    assert agent.step(pixels).text == text
    held = agent.memory.held.spans
    assert held[0].content != held[1].content


def test_malformed_output_is_kept_and_told():
    """The tiny model writes nonsense: it is a step like others, its text stays in the history."""
    _, _, agent = session()
    step = agent.step(am.screen(0), TASK)
    assert step.actions == () and step.problems == ("no 'Action:' in the output",)
    assert agent.past[0].response == step.text
    assert agent.step(am.screen(1)).reused > 0


@pytest.mark.parametrize(
    ("screenshot", "said"),
    [
        (np.zeros((0, 5, 3), np.uint8), "0 pixels"),
        (np.zeros((5, 5), np.uint8), "possible are"),
        (np.zeros((5, 5, 3), np.float32), "possible are"),
        (torch.zeros(5, 5, 4, dtype=torch.uint8), "possible are"),
        (Image.new("RGB", (0, 7)), "0 x 7"),
        (Image.new("RGB", (1, 300)), "200 times"),
        (None, "possible are"),
        (17, "possible are"),
    ],
)
def test_broken_screens(screenshot, said):
    _, _, agent = session()
    first = agent.step(am.screen(0), TASK)
    with pytest.raises(ValueError, match=said):
        agent.step(screenshot)
    step = agent.step(am.screen(1))  # as if nothing had been
    assert step.reused >= first.new and step.screenshots == 2


def test_broken_files(tmp_path):
    _, _, agent = session()
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    am.screen(1).save(tmp_path / "yes.png")
    whole = (tmp_path / "yes.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("no.png", "half.png"):
        with pytest.raises(ValueError, match=name):
            agent.step(tmp_path / name, TASK)
    with pytest.raises(ValueError, match="cannot be read"):
        agent.step(Image.open(tmp_path / "half.png"), TASK)
    with pytest.raises(FileNotFoundError):
        agent.step(str(tmp_path / "none.png"), TASK)
    assert agent.step(tmp_path / "yes.png", TASK).new


def test_a_step_before_any_instruction():
    _, _, agent = session()
    with pytest.raises(ValueError, match="no instruction yet"):
        agent.step(am.screen(0))
    assert agent.step(am.screen(0), TASK).new


def test_a_step_that_fails_half_way():
    model, processor, agent = session()
    agent.step(am.screen(0), TASK)
    hook = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agent.step(am.screen(1))
    hook.remove()
    assert len(agent.past) == 1
    told = agent.format.messages(TASK, recent(agent.past, 5), am.screen(1))
    text, _ = am.from_scratch(model, processor, told, 10)
    step = agent.step(am.screen(1))
    assert step.text == text and step.note == "encoded from scratch: the step before failed"


def test_wrapping_between_steps():
    model, _, agent = session()
    agent.step(am.screen(0), TASK)
    mmkv.wrap(model)
    step = agent.step(am.screen(1))
    assert step.note == "encoded from scratch: the model was wrapped or unwrapped in between" and step.reused == 0
    assert agent.step(am.screen(2)).reused > 0


def test_an_instruction_with_the_token_of_a_picture():
    _, _, agent = session()
    with pytest.raises(ValueError, match="2 places for 1 pictures"):
        agent.step(am.screen(0), "look at <|image_pad|>")
    assert agent.step(am.screen(0), TASK).new


def test_sampling_and_options():
    _, _, agent = session(do_sample=True, top_k=5)
    torch.manual_seed(0)
    assert agent.step(am.screen(0), TASK).tokens == 10
    for wrong in (
        dict(num_beams=3),
        dict(num_return_sequences=2),
        dict(max_new_tokens=0),
        dict(screenshots=0),
        dict(slack=-1),
    ):
        with pytest.raises(ValueError, match=r"possible are|leave it out"):
            session(**wrong)
    with pytest.raises(ValueError, match="possible are"):
        session(format="nobody's")
    with pytest.raises(TypeError, match="AgentFormat"):
        session(format=3)


def test_a_model_whose_pictures_have_no_grid():
    model = rm.make("llava")
    _, processor = am.make("qwen2_5_vl")
    agent = mmkv.agent(model, processor, format=UITars())
    with pytest.raises(ValueError, match="no grids"):
        agent.step(am.screen(0), TASK)


def test_formats_of_others():
    """A format is an object with messages and parse; the processor's limits are put in."""
    from dataclasses import dataclass

    from mmkv.agents import Parsed, image

    @dataclass(frozen=True)
    class Mine(AgentFormat):
        def messages(self, instruction, steps, screenshot):
            return [{"role": "user", "content": [image(screenshot)]}]

        def parse(self, text, size):
            return Parsed(text, thought=f"{size} {self.resize.max_pixels}")

    model, processor = am.make("qwen2_5_vl")
    agent = mmkv.agent(model, processor, format=Mine(), max_new_tokens=3)
    assert agent.step(am.screen(0), TASK).thought == "(40, 24) 1280"
    with pytest.raises(NotImplementedError):
        AgentFormat().parse("", (1, 1))
    assert PastStep.of(Parsed("x", thought="y")).thought == "y"


@pytest.mark.parametrize(
    "options",
    [
        dict(tokens=[mmkv.tokens.VisionZip(dominant=0.3, contextual=0.1)]),
        dict(tokens=[mmkv.tokens.FastV(layer=1)], cache=[mmkv.cache.KIVI(bits=4, group=32, residual=32)]),
        dict(cache=[mmkv.cache.GUIKV(budget=0.3), mmkv.cache.KIVI(bits=2, group=32, residual=32)]),
        dict(cache=[mmkv.cache.GUIKV(budget=0.3)], prefill_chunk=200),
        dict(max_bytes="400KiB"),
        dict(positions="trained"),
    ],
    ids=lambda options: "-".join(options),
)
def test_all_kinds_of_methods(options):
    """Steps go on over what any method holds, and begin anew where it cannot be cut; bytes are below the dense ones."""
    model, processor = am.make("qwen2_5_vl", **BIG)
    with mmkv.wrapped(model, **options):
        agent = mmkv.agent(model, processor, format=SHORT["qwen2_5_vl"], max_new_tokens=3, screenshots=2)
        first, second, third = (agent.step(shot, TASK) for shot in big(3))
    assert second.reused >= first.new and not second.note
    assert third.note.startswith("encoded")
    dense = (second.reused + second.new) * 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert second.kv_bytes < (1.02 if "positions" in options else 0.75) * dense


def test_the_public_name():
    assert mmkv.agent.__module__ == "mmkv.agents.agent" and "agent" in mmkv.__all__
    assert mmkv.agents.Agent is type(session()[2])
