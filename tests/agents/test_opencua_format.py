"""OpenCUA's prompts and history as AgentNetBench tells it, and its parser in both modes."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from mmkv.agents import Action, OpenCUA, PastStep, Resize, format_for, recent
from mmkv.agents.opencua_faithful import extract_actions, relative_code
from mmkv.agents.opencua_prompts import INSTRUCTION, SYSTEM

SIZE = (1920, 1080)  # resized to 1932 x 1092
FORMAT, FAITHFUL = OpenCUA(), OpenCUA(faithful=True)
# sha256 of the texts of xlang-ai/OpenCUA at 1d70f20 (evaluation/agentnetbench/agent/opencua.py), computed from that file
HASHES = {
    "l1": "e6b5db753395aa1d", "l2": "2df3ec939b1f95c9", "l3": "e4fb582ab45eec90", "l1_short": "ceefeaac45036622",
    "l2_short": "107b9915b204c9fb", "l3_short": "e85734adc4eebd34",
}  # fmt: skip


def past(count: int) -> list[PastStep]:
    return [
        PastStep(f"screen {k}", thought=f"thought {k}", action=f"action {k}", observation=f"seen {k}", code=f"code {k}")
        for k in range(1, count + 1)
    ]


def test_prompts_are_the_official_ones():
    found = {name: hashlib.sha256(SYSTEM[name].encode()).hexdigest()[:16] for name in HASHES}
    assert found == HASHES
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:16] == "8a83d89c4f15877b"


def test_first_step():
    system, user = FORMAT.messages("Open the menu", [], "now")
    assert system == {"role": "system", "content": SYSTEM["l2"]}
    assert user["role"] == "user" and user["content"][0] == {"type": "image", "image": "now"}
    assert user["content"][1]["text"] == (
        "\n# Task Instruction:\nOpen the menu\n\nPlease generate the next move according to the screenshot, task instruction and "
        "previous steps (if provided).\n"
    )


def test_fourth_step():
    """Three screenshots: 7 messages."""
    turns = FORMAT.messages("x", recent(past(3), 3), "now")
    assert [t["role"] for t in turns] == ["system", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert turns[1]["content"] == "# Step 1:\n## Thought:\nthought 1\n\n## Action:\naction 1\n"
    shown = [p["image"] for t in turns if t["role"] == "user" for p in t["content"] if p["type"] == "image"]
    assert shown == ["screen 2", "screen 3", "now"]
    assert len(turns[2]["content"]) == 1


def test_tenth_step():
    """13 messages, 7 assistant turns in a row behind the system turn."""
    turns = FORMAT.messages("x", recent(past(9), 3), "now")
    assert len(turns) == 13
    assert [t["role"] for t in turns[:9]] == ["system"] + ["assistant"] * 7 + ["user"]


def test_older_steps_are_left_out():
    turns = FORMAT.messages("x", recent(past(14), 3), "now")
    told = [t["content"] for t in turns if t["role"] == "assistant"]
    assert len(told) == 10 and told[0].startswith("# Step 5:\n")


def test_detail_and_history():
    form = OpenCUA(level="l3", history="action", max_detail=1)
    turns = form.messages("x", recent(past(2), 1), "now")
    assert turns[1]["content"] == "# Step 1:\n## Action:\naction 1\n"
    assert turns[2]["content"] == (
        "# Step 2:\n## Observation:\nseen 2\n\n## Thought:\nthought 2\n\n## Action:\naction 2\n\n## Code:\ncode 2\n"
    )
    form = OpenCUA(history="observation")
    assert "## Observation:\nseen 1\n\n## Thought:" in form.messages("x", past(1), "now")[2]["content"]
    braces = [PastStep(None, thought="{x}", action="{0}")]
    assert "{x}" in FORMAT.messages("say {instruction}", braces, "now")[1]["content"]
    assert "say {instruction}" in FORMAT.messages("say {instruction}", braces, "now")[2]["content"][1]["text"]


def test_grounding():
    system, user = OpenCUA(level="grounding").messages("the save button", [], "now")
    assert system["content"].endswith("series of pyautogui actions to complete the task.")
    assert user["content"][1]["text"] == "the save button"


ANSWER = """# Step 4:
## Thought:
I see the button.
It is blue.

## Action:
Click the blue button.

## Code:
```python
pyautogui.click(x=966, y=546)
```
"""


@pytest.mark.parametrize("form", [FORMAT, FAITHFUL])
def test_an_answer(form):
    parsed = form.parse(ANSWER, SIZE)
    assert parsed.text == ANSWER and parsed.problems == ()
    assert parsed.thought == "I see the button.\nIt is blue."
    assert parsed.action == "Click the blue button." and parsed.code == "pyautogui.click(x=966, y=546)"
    assert parsed.actions == (Action("click", {"point": (0.5, 0.5)}, "pyautogui.click(x=966, y=546)"),)


# every function, as the prompt or pyautogui's users write it
GRAMMAR = {
    "pyautogui.click(x=483, y=273)": ("click", {"point": (0.25, 0.25)}),
    "pyautogui.click(483, 273)": ("click", {"point": (0.25, 0.25)}),
    "pyautogui.click((483, 273))": ("click", {"point": (0.25, 0.25)}),
    "pyautogui.click(x=0.25, y=0.75)": ("click", {"point": (0.25, 0.75)}),
    "pyautogui.click()": ("click", {}),
    "pyautogui.click(x=483, y=273, button='right')": ("rightClick", {"point": (0.25, 0.25), "button": "right"}),
    "pyautogui.click(x=483, y=273, clicks=2)": ("doubleClick", {"point": (0.25, 0.25), "clicks": 2}),
    "pyautogui.doubleClick(x=483, y=273)": ("doubleClick", {"point": (0.25, 0.25)}),
    "pyautogui.rightClick(y=273, x=483)": ("rightClick", {"point": (0.25, 0.25)}),
    "pyautogui.middleClick(x=483, y=273)": ("middleClick", {"point": (0.25, 0.25)}),
    "pyautogui.tripleClick(x=483, y=273)": ("tripleClick", {"point": (0.25, 0.25)}),
    "computer.triple_click(x=483, y=273)": ("tripleClick", {"point": (0.25, 0.25)}),
    "pyautogui.moveTo(483, 273)": ("moveTo", {"point": (0.25, 0.25)}),
    "pyautogui.dragTo(966, 546, button='left')": ("dragTo", {"point": (0.5, 0.5), "button": "left"}),
    r"pyautogui.write(message='it\'s\n')": ("write", {"text": "it's\n"}),
    "pyautogui.write(\"say 'hi'\", interval=0.1)": ("write", {"text": "say 'hi'"}),
    "pyautogui.typewrite('x')": ("write", {"text": "x"}),
    "pyautogui.press('enter')": ("press", {"keys": ("enter",)}),
    "pyautogui.press(['a', 'b'])": ("press", {"keys": ("a", "b")}),
    "pyautogui.press(keys=['a'])": ("press", {"keys": ("a",)}),
    "pyautogui.press('down', presses=3)": ("press", {"keys": ("down",), "presses": 3}),
    "pyautogui.hotkey('ctrl', 'v')": ("hotkey", {"keys": ("ctrl", "v")}),
    "pyautogui.hotkey(['ctrl', 'v'])": ("hotkey", {"keys": ("ctrl", "v")}),
    "pyautogui.hotkey(keys=['ctrl', 'v'])": ("hotkey", {"keys": ("ctrl", "v")}),
    "pyautogui.keyDown('shift')": ("keyDown", {"keys": ("shift",)}),
    "pyautogui.keyUp('shift')": ("keyUp", {"keys": ("shift",)}),
    "pyautogui.scroll(-5)": ("scroll", {"direction": "down", "amount": 5}),
    "pyautogui.scroll(3, x=483, y=273)": ("scroll", {"direction": "up", "amount": 3, "point": (0.25, 0.25)}),
    "pyautogui.hscroll(-2)": ("scroll", {"direction": "left", "amount": 2}),
    "pyautogui.sleep(2)": ("wait", {"seconds": 2}),
    "computer.wait()": ("wait", {}),
    "computer.terminate(status='success')": ("terminate", {"status": "success"}),
    "computer.terminate(status='failure')": ("terminate", {"status": "failure"}),
}


@pytest.mark.parametrize("line", GRAMMAR)
def test_grammar(line):
    parsed = FORMAT.parse(f"```python\n{line}\n```", SIZE)
    assert parsed.problems == ()
    kind, params = GRAMMAR[line]
    assert parsed.actions == (Action(kind, params, line),)


def test_several_lines_in_order():
    parsed = FORMAT.parse("pyautogui.moveTo(x=483, y=273)\npyautogui.dragTo(x=966, y=546, button='left')", SIZE)
    assert [(a.type, a.point) for a in parsed.actions] == [("moveTo", (0.25, 0.25)), ("dragTo", (0.5, 0.5))]
    parsed = FORMAT.parse("I will do pyautogui.click(x=483, y=273) now", SIZE)  # a command inside a line
    assert [a.point for a in parsed.actions] == [(0.25, 0.25)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pyautogui.click(x=a, y=b)", "constant"),
        ("pyautogui.click(x=1)", "needs x and y"),
        ("pyautogui.moveTo()", "needs x and y"),
        ("pyautogui.write(text)", "constant"),
        ("pyautogui.write()", "no text"),
        ("pyautogui.press()", "needs a key"),
        ("pyautogui.scroll()", "no amount"),
        ("pyautogui.screenshot()", "unknown function"),
        ("computer.fly()", "unknown function"),
        ("computer.terminate(status='done')", "status 'done'"),
        ("pyautogui.click(x='3', y=4)", "needs x and y"),
        ("pyautogui.hotkey(*keys)", "constant"),
        ("pyautogui.write(__import__('os').getcwd())", "constant"),
    ],
)
def test_malformed_is_kept_and_reported(line, said):
    parsed = FORMAT.parse(f"{line}\npyautogui.press('enter')", SIZE)
    assert [a.type for a in parsed.actions] == ["press"] and len(parsed.problems) == 1
    assert said in parsed.problems[0] and "\n" not in parsed.problems[0] and line in parsed.text


@pytest.mark.parametrize("form", [FORMAT, FAITHFUL])
@pytest.mark.parametrize("text", ["", "I do not know", "click on it", "```python\nimport time\n```"])
def test_no_command(form, text):
    parsed = form.parse(text, SIZE)
    assert parsed.actions == () and "no line" in parsed.problems[0] and parsed.text == text


def test_faithful_code():
    """The sheet's cases, as the official parser was run on them."""
    resize = Resize()
    assert relative_code(ANSWER, SIZE, resize) == "pyautogui.click(x=0.5, y=0.5)"
    two = "pyautogui.moveTo(x=483, y=273)\npyautogui.dragTo(x=966, y=546, button='left')"
    assert relative_code(two, SIZE, resize) == (
        "pyautogui.moveTo(x=0.25, y=0.25)\npyautogui.dragTo(x=0.5, y=0.5, button='left')"
    )
    assert relative_code("computer.terminate(status='success')", SIZE, resize) == "computer.terminate(status='success')"
    assert relative_code("nothing", SIZE, resize) is None
    assert relative_code("pyautogui.click(966, 546)", SIZE, resize) == "pyautogui.click(966, 546)"
    assert FAITHFUL.parse("pyautogui.click(966, 546)", SIZE).actions == ()


# what the official extract_actions gives, by the rules of the sheet
EXTRACTED = {
    "pyautogui.click(x=0.5, y=0.25)": [("click", (0.5, 0.25))],
    "pyautogui.tripleClick(x=0.5, y=0.25)": [],
    "computer.triple_click(x=966, y=546)": [("triple_click", (966.0, 546.0))],
    "pyautogui.write(message='it\\'s')": [("write", "it\\")],
    "pyautogui.write('a b')": [("write", "a b")],
    "pyautogui.press(['ctrl', 'v'])": [("hotkey", ["ctrl", "v"])],
    "pyautogui.press(keys=['ctrl', 'v'])": [("press", ["ctrl", "v"])],
    "pyautogui.hotkey('cmd', 'C')": [("hotkey", ["ctrl", "C"])],
    "pyautogui.hotkey(keys=['Command', 'v'])": [("hotkey", ["ctrl", "v"])],
    "pyautogui.scroll(-5)": [("scroll", -5)],
    "pyautogui.scroll(-5, x=3, y=4)": [],
    "computer.terminate(status='failure')": [("terminate", "failure")],
}


@pytest.mark.parametrize("line", EXTRACTED)
def test_faithful_actions(line):
    assert extract_actions(line) == EXTRACTED[line]


def test_faithful_never_raises_on_an_output():
    text = "pyautogui.click(x=1.2.3, y=4)\npyautogui.press('enter')"
    with pytest.raises(ValueError):
        extract_actions("pyautogui.click(x=1.2.3, y=4)")
    parsed = FAITHFUL.parse(text, SIZE)
    assert [a.type for a in parsed.actions] == ["press"] and len(parsed.problems) == 1


@pytest.mark.parametrize(
    "options",
    [dict(level="l4"), dict(history="all"), dict(max_history=-1), dict(max_detail=True), dict(max_history=1.5)],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="possible are"):
        OpenCUA(**options)


def test_found_from_the_model():
    assert isinstance(format_for(SimpleNamespace(config=SimpleNamespace(model_type="opencua"))), OpenCUA)


@pytest.mark.parametrize(("count", "shown"), [(0, []), (1, [1]), (2, [1, 2]), (5, [4, 5])])
def test_recent(count, shown):
    assert [k for k, s in enumerate(recent(past(count), 3), 1) if s.screenshot] == shown


def test_slack_moves_the_window_by_leaps():
    kept = [[k for k, s in enumerate(recent(past(n), 3, slack=2), 1) if s.screenshot] for n in range(9)]
    assert kept == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [4, 5], [4, 5, 6], [4, 5, 6, 7], [7, 8]]
    for wrong in (
        dict(screenshots=0),
        dict(screenshots=True),
        dict(screenshots=3, slack=-1),
        dict(screenshots=3, slack=1.5),
    ):
        with pytest.raises(ValueError, match="possible are"):
            recent([], **wrong)
