"""From an agent's text to AgentNetBench's (type, value): OpenCUA's official reading, ours, GUI-KV's conversion."""

from __future__ import annotations

import pytest
from agentnetbench_files import SIZE

from mmkv.agents import Resize, get_format
from mmkv.agents.opencua_faithful import extract_actions, relative_code
from mmkv.eval.agentnetbench.actions import from_parsed, from_parsed_guikv


def official(text, size=(1920, 1080)):
    return extract_actions(relative_code(text, size, Resize()))


def test_official_reading_of_opencua():
    """1920 x 1080 is resized to 1932 x 1092 (the sheet's golden numbers; run on the public agent)."""
    assert official("```python\npyautogui.click(x=966, y=546)\n```") == [("click", (0.5, 0.5))]
    assert official("pyautogui.moveTo(x=483, y=273)\npyautogui.dragTo(x=966, y=546, button='left')") == [
        ("moveTo", (0.25, 0.25)), ("dragTo", (0.5, 0.5)),
    ]  # fmt: skip
    assert official("computer.terminate(status='success')") == [("terminate", "success")]
    assert official("I am done") == []
    assert official("pyautogui.click(966, 546)") == []  # positional coordinates are not read
    assert official("computer.triple_click(x=966, y=546)") == [("triple_click", (966.0, 546.0))]  # and stay pixels here
    assert official("pyautogui.tripleClick(x=966, y=546)") == []
    assert official('pyautogui.write(message="it\'s ok")') == [("write", "it")]
    assert official("pyautogui.write(message='a\\nb')") == [("write", "a\\nb")]  # two characters, as they stand
    assert official("pyautogui.press(['ctrl', 'v'])") == [("hotkey", ["ctrl", "v"])]
    assert official("pyautogui.press(keys=['ctrl', 'v'])") == [("press", ["ctrl", "v"])]
    assert official("pyautogui.hotkey('Command', 'c')") == [("hotkey", ["ctrl", "c"])]
    assert official("pyautogui.scroll(-5)") == [("scroll", -5)] and official("pyautogui.scroll(clicks=3)") == []
    with pytest.raises(ValueError, match="float"):
        official("pyautogui.click(x=1.2.3, y=4)")


def read(text, agent="opencua", size=SIZE):
    return from_parsed(get_format(agent).parse(text, size).actions)


def test_our_reading_of_opencua():
    assert read("pyautogui.click(140, 70)") == [("click", (0.5, 0.5))]
    assert read("computer.triple_click(x=140, y=70)") == [("tripleClick", (0.5, 0.5))]
    assert read('pyautogui.write(message="it\'s ok")') == [("write", "it's ok")]
    assert read("pyautogui.write(message='a\\n')") == [("write", "a\n")]
    assert read("pyautogui.hotkey('cmd', 'c')") == [("hotkey", ["cmd", "c"])]  # named alike on both sides when scored
    assert read("pyautogui.scroll(-7)") == [("scroll", -7)]


def test_our_reading_of_ui_tars():
    def said(action):
        return read(f"Thought: x\nAction: {action}", "ui_tars")

    assert said("click(point='<point>140 70</point>')") == [("click", (0.5, 0.5))]
    assert said("left_double(point='<point>70 35</point>')") == [("doubleClick", (0.25, 0.25))]
    assert said("right_single(point='<point>70 35</point>')") == [("rightClick", (0.25, 0.25))]
    assert said("drag(start_point='<point>0 0</point>', end_point='<point>140 70</point>')") == [
        ("moveTo", (0.0, 0.0)), ("dragTo", (0.5, 0.5)),
    ]  # fmt: skip
    assert said("scroll(point='<point>140 70</point>', direction='down')") == [("moveTo", (0.5, 0.5)), ("scroll", -5)]
    assert said("type(content='ok\\n')") == [("write", "ok\n")] and said("type(content='\\n')") == [
        ("press", ["enter"])
    ]
    assert said("hotkey(key='ctrl c')") == [("hotkey", ["ctrl", "c"])]
    assert said("wait()") == [("wait", None)]
    assert said("finished(content='success')") == [("terminate", "success")]
    assert read("no action", "ui_tars") == []


def test_guikv_conversion_takes_the_first_action():
    def said(action):
        return from_parsed_guikv(get_format("ui_tars").parse(f"Thought: x\nAction: {action}", SIZE).actions)

    assert said("drag(start_point='<point>0 0</point>', end_point='<point>140 70</point>')") == [("dragTo", (0.5, 0.5))]
    assert said("scroll(point='<point>140 70</point>', direction='up')") == [("scroll", 5)]
    assert said("type(content='ok\\n')") == [("write", "ok"), ("press", ["enter"])]
    assert said("hotkey(key='ctrl c')") == [("hotkey", ["ctrl", "c"])]
    assert said("wait()") == [] and from_parsed_guikv(()) == []
    two = said("click(point='<point>140 70</point>')\n\ntype(content='a')")
    assert two == [("click", (0.5, 0.5))]
