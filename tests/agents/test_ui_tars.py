"""UI-TARS: its prompts to the letter, the order of turns, and every form of action that its grammar has."""

from __future__ import annotations

import hashlib
import random

import pytest

from mmkv.agents import TYPES, Action, OpenCUA, PastStep, Resize, UITars, format_for, get_format, recent, to_pyautogui
from mmkv.agents.ui_tars_prompts import COMPUTER, GROUNDING, MOBILE

SIZE = (1920, 1080)  # resized to 1932 x 1092
FORMAT = UITars(resize=Resize(78400, 12845056))
# sha256 of the texts of bytedance/UI-TARS at 582f3a7 (codes/ui_tars/prompt.py), computed from that file
HASHES = {
    "computer": "0fd4d14c3890f672", "mobile": "4c6da47a4608edb0", "grounding": "e0fda4eb0b91efda",
}  # fmt: skip


def read(output: str, size=SIZE, **options) -> tuple[Action, ...]:
    parsed = UITars(resize=FORMAT.resize, **options).parse(output, size)
    assert parsed.problems == () and parsed.text == output
    return parsed.actions


def test_prompts_are_the_official_ones():
    texts = {"computer": COMPUTER, "mobile": MOBILE, "grounding": GROUNDING}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()} == HASHES


def test_order_of_turns():
    """The prompt is a turn of its own; then screenshots and answers; the current screenshot is last."""
    steps = recent([PastStep(f"screen {k}", response=f"Thought: {k}") for k in range(3)], screenshots=3)
    turns = FORMAT.messages("open {the} menu", steps, "now")
    assert [t["role"] for t in turns] == ["user", "assistant", "user", "assistant", "user", "assistant", "user"]
    prompt = turns[0]["content"][0]["text"]
    assert prompt == COMPUTER.replace("{language}", "English").replace("{instruction}", "open {the} menu")
    shown = [part["image"] for t in turns for part in t["content"] if part["type"] == "image"]
    assert shown == ["screen 1", "screen 2", "now"]
    assert [t["content"][0]["text"] for t in turns if t["role"] == "assistant"] == [
        "Thought: 0",
        "Thought: 1",
        "Thought: 2",
    ]
    assert len(FORMAT.messages("x", [], "now")) == 2


# every action of the three prompts, as the prompts write it, with the numbers 197 and 525
GRAMMAR = {
    "click(point='<point>197 525</point>')": ("click", {"point": (197 / 1932, 525 / 1092)}),
    "left_double(point='<point>197 525</point>')": ("doubleClick", {"point": (197 / 1932, 525 / 1092)}),
    "right_single(point='<point>197 525</point>')": ("rightClick", {"point": (197 / 1932, 525 / 1092)}),
    "drag(start_point='<point>10 20</point>', end_point='<point>30 40</point>')": (
        "drag", {"start": (10 / 1932, 20 / 1092), "end": (30 / 1932, 40 / 1092)},
    ),
    "hotkey(key='ctrl c')": ("hotkey", {"keys": ("ctrl", "c")}),
    r"type(content='xxx')": ("write", {"text": "xxx"}),
    r"type(content='it\'s \"ok\"\n')": ("write", {"text": 'it\'s "ok"\n'}),
    "scroll(point='<point>10 20</point>', direction='down')": (
        "scroll", {"point": (10 / 1932, 20 / 1092), "direction": "down"},
    ),
    "scroll(direction='left')": ("scroll", {"direction": "left"}),
    "wait()": ("wait", {}),
    "finished(content='xxx')": ("terminate", {"status": "success", "content": "xxx"}),
    "finished()": ("terminate", {"status": "success"}),
    "long_press(point='<point>197 525</point>')": ("longPress", {"point": (197 / 1932, 525 / 1092)}),
    "open_app(app_name='Clock')": ("openApp", {"app": "Clock"}),
    "press_home()": ("home", {}),
    "press_back()": ("back", {}),
    "call_user()": ("terminate", {"status": "failure"}),
    "click(start_box='(197,525)')": ("click", {"point": (197 / 1932, 525 / 1092)}),
    "click(start_box='<|box_start|>(197,525)<|box_end|>')": ("click", {"point": (197 / 1932, 525 / 1092)}),
    "click(start_box='[190,520,204,530]')": ("click", {"point": (197 / 1932, 525 / 1092)}),
    "drag(start_box='(10,20)', end_box='(30,40)')": ("drag", {"start": (10 / 1932, 20 / 1092), "end": (30 / 1932, 40 / 1092)}),
}  # fmt: skip


@pytest.mark.parametrize("source", GRAMMAR)
def test_grammar(source):
    kind, params = GRAMMAR[source]
    (action,) = read(f"Thought: x\nAction: {source}")
    assert action.type == kind and dict(action.params) == params
    assert action.source == source.replace("<|box_start|>", "").replace("<|box_end|>", "")


def test_numbers_of_the_sheet():
    (click,) = read("Thought: x\nAction: click(start_box='(197,525)')")
    assert click.point == pytest.approx((0.101967, 0.480769), abs=1e-6)
    (drag,) = read("Action: drag(start_box='(10,20)', end_box='(30,40)')")
    assert drag.params["start"] == pytest.approx((0.0051760, 0.0183150), abs=1e-7)
    assert drag.params["end"] == drag.point == pytest.approx((0.0155280, 0.0366300), abs=1e-7)


def test_two_actions():
    first, second = read("Thought: a\nAction: click(start_box='(197,525)')\n\ntype(content='it\\'s ok\\n')")
    assert first.type == "click" and second == Action("write", {"text": "it's ok\n"}, "type(content='it\\'s ok\\n')")


def test_the_last_action_counts_and_the_thought_is_kept():
    parsed = FORMAT.parse("Thought: I could\nAction: wait()\nThought: or rather\nAction: press_home()", SIZE)
    assert [a.type for a in parsed.actions] == ["home"]
    assert parsed.thought == "I could"
    assert FORMAT.parse("Action_Summary: go on Action: wait()", SIZE).thought == "go on"
    assert FORMAT.parse("Reflection: wrong Action_Summary: go on\nAction: wait()", SIZE).thought == "go on"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (r"it's ok", "it's ok"),
        (r"it\'s ok", "it's ok"),
        ('say "hi"', 'say "hi"'),
        ("two\nlines", "two\nlines"),
        (r"a\\b", r"a\b"),
        ("f(x)", "f(x)"),
        ("Action: go", "Action: go"),
        ("日本 50%", "日本 50%"),
        ("", ""),
        (r"C:\path", r"C:\path"),
        (r"\u12", r"\u12"),
    ],
)
def test_typed_text(content, text):
    (action,) = read(f"Thought: t\nAction: type(content='{content}')")
    assert action.params == {"text": text}


def test_thousandths():
    (click,) = read("Action: click(point='<point>250 750</point>')", factor=1000)
    assert click.point == (0.25, 0.75)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("click(point='<point>1 2</point>')", "no 'Action:'"),
        ("", "no 'Action:'"),
        ("Action:", "not an action: ''"),
        ("Action: click()", "needs a point"),
        ("Action: click(point='here')", "no point"),
        ("Action: fly(point='(1,2)')", "unknown"),
        ("Action: drag(start_box='(1,2)')", "a start and an end"),
        ("Action: hotkey(key='')", "needs a key"),
        ("Action: scroll(point='(1,2)', direction='sideways')", "direction"),
        ("Action: open_app()", "app_name"),
        ("Action: click(point='(1,2)'", ""),
        ("Action: __import__('os').system('x')", "not an action"),
        ("Action: click(point='(1,2)') and then", "not an action"),
        ("Action: click(point=f(x))", "not an action"),
        ("Action: " + "(" * 500, "not an action"),
        ("Action: click(start_box='(1)')", "no point"),
        ("Action: click(point='(100000,2)')", "point is no point on the screen"),
    ],
)
def test_malformed_is_kept_and_reported(output, said):
    parsed = FORMAT.parse(output, SIZE)
    assert parsed.text == output
    if not said:  # a bracket that is missing at the end is taken as written
        assert len(parsed.actions) == 1
        return
    assert parsed.actions == () and len(parsed.problems) == 1 and said in parsed.problems[0]
    assert "\n" not in parsed.problems[0]


def test_one_bad_action_leaves_the_others():
    parsed = FORMAT.parse("Action: wait()\n\nclick(point='no')\n\npress_back()", SIZE)
    assert [a.type for a in parsed.actions] == ["wait", "back"] and len(parsed.problems) == 1


@pytest.mark.parametrize("options", [dict(prompt="tablet"), dict(factor=0), dict(factor=True), dict(factor=1.5)])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="possible are"):
        UITars(**options)


def test_found_from_the_model():
    from types import SimpleNamespace as Of

    def model(**config):
        return Of(config=Of(**config))

    named = dict(model_type="qwen2_5_vl", _name_or_path="ByteDance-Seed/UI-TARS-1.5-7B")
    assert isinstance(format_for(model(**named)), UITars)
    assert isinstance(format_for(model(agent_format="ui_tars", model_type="qwen2_5_vl")), UITars)
    with pytest.raises(ValueError, match=r"no agent format is known.*ui_tars"):
        format_for(model(model_type="qwen2_5_vl", _name_or_path="Qwen/Qwen2.5-VL-7B-Instruct"))
    with pytest.raises(ValueError, match="possible are"):
        format_for(model(agent_format="nobody's"))
    with pytest.raises(ValueError, match="has no option colour"):
        get_format("ui_tars", colour=1)


def broken(outputs, count, seed=0):
    """Outputs with pieces cut out, doubled and mixed."""
    draw = random.Random(seed)
    for _ in range(count):
        text = draw.choice(outputs)
        for _ in range(draw.randint(1, 4)):
            a, b = sorted(draw.choices(range(len(text) + 1), k=2))
            text = draw.choice([text[:a] + text[b:], text[:b] + text[a:], text[:a] + draw.choice(outputs) + text[b:]])
        yield text + draw.choice(["", "\0", "\ud800", "9" * 400, "[" * 300, "\\", "'", '"""'])


def test_nothing_that_a_model_writes_raises():
    """3000 damaged outputs, through all formats and on to code."""
    outputs = [f"Thought: a\nAction: {source}" for source in GRAMMAR] + [
        "pyautogui.click(x=1, y=2)", "computer.triple_click(x=3, y=4)", "pyautogui.click(button=[1], clicks=[2])",
        "pyautogui.scroll(1e999)", "pyautogui.press(keys=3)", "pyautogui.write(message='x')", "pyautogui.hotkey(**{'a': 1})",
        "pyautogui.dragTo(x=1.2.3, y=4)", f"pyautogui.moveTo({'7' * 400}, 1)", f"Action: click(start_box='({'7' * 400},1)')",
    ]  # fmt: skip
    forms = [FORMAT, UITars(factor=1000), OpenCUA(), OpenCUA(faithful=True)]
    for text in [*outputs, *broken(outputs, 3000)]:
        for form in forms:
            parsed = form.parse(text, SIZE)
            assert parsed.text == text and (parsed.actions or parsed.problems)
            assert all("\n" not in problem for problem in parsed.problems)
            assert all(action.type in TYPES for action in parsed.actions)
            to_pyautogui(parsed.actions, SIZE)
