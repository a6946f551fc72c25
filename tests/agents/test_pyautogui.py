"""Actions as pyautogui source, which is text: it is read back here, never run."""

from __future__ import annotations

import ast

import pytest

from mmkv.agents import TYPES, Action, OpenCUA, Resize, UITars, to_pyautogui

SIZE = (1000, 500)
EXAMPLES = [
    (Action("click", {"point": (0.5, 0.25)}), ["pyautogui.click(500, 125)"]),
    (Action("click", {"point": (0.5, 0.25), "button": "left"}), ["pyautogui.click(500, 125, button='left')"]),
    (Action("click"), ["pyautogui.click()"]),
    (Action("doubleClick", {"point": (1.0, 1.0)}), ["pyautogui.doubleClick(999, 499)"]),
    (Action("rightClick", {"point": (0.0, 0.0)}), ["pyautogui.rightClick(0, 0)"]),
    (Action("middleClick", {"point": (0.5, 0.5)}), ["pyautogui.middleClick(500, 250)"]),
    (Action("tripleClick", {"point": (0.5, 0.5)}), ["pyautogui.tripleClick(500, 250)"]),
    (Action("moveTo", {"point": (0.5, 0.5)}), ["pyautogui.moveTo(500, 250)"]),
    (Action("dragTo", {"point": (0.5, 0.5)}), ["pyautogui.dragTo(500, 250, duration=1.0)"]),
    (
        Action("drag", {"start": (0.1, 0.2), "end": (0.5, 0.5)}),
        ["pyautogui.moveTo(100, 100)", "pyautogui.dragTo(500, 250, duration=1.0)"],
    ),
    (Action("scroll", {"direction": "down"}), ["pyautogui.scroll(-5)"]),
    (Action("scroll", {"direction": "up", "amount": 3, "point": (0.5, 0.5)}), ["pyautogui.scroll(3, x=500, y=250)"]),
    (Action("scroll", {"direction": "right", "amount": 2}), ["pyautogui.hscroll(2)"]),
    (Action("write", {"text": "it's\n"}), ['pyautogui.write("it\'s", interval=0.1)', "pyautogui.press('enter')"]),
    (Action("write", {"text": "a\nb"}), ["pyautogui.write('a\\nb', interval=0.1)"]),
    (Action("write", {"text": "\n"}), ["pyautogui.press('enter')"]),
    (Action("press", {"keys": ("enter",)}), ["pyautogui.press('enter')"]),
    (Action("press", {"keys": ("a", "b"), "presses": 2}), ["pyautogui.press(['a', 'b'], presses=2)"]),
    (Action("hotkey", {"keys": ("ctrl", "arrowleft")}), ["pyautogui.hotkey('ctrl', 'left')"]),
    (Action("keyDown", {"keys": ("shift",)}), ["pyautogui.keyDown('shift')"]),
    (Action("keyUp", {"keys": ("shift",)}), ["pyautogui.keyUp('shift')"]),
    (Action("wait"), ["pyautogui.sleep(5)"]),
    (Action("wait", {"seconds": 2}), ["pyautogui.sleep(2)"]),
    (Action("terminate", {"status": "success", "content": "done"}), ["# terminate: success"]),
    (Action("openApp", {"app": "Clock"}), ["# openApp: Clock"]),
    (Action("home"), ["# home: "]),
    (Action("back"), ["# back: "]),
    (Action("longPress", {"point": (0.5, 0.5)}), ["# longPress: point=(0.5, 0.5)"]),
]


@pytest.mark.parametrize(("action", "lines"), EXAMPLES, ids=lambda x: x.type if isinstance(x, Action) else "")
def test_examples(action, lines):
    code = to_pyautogui([action], SIZE)
    assert code.split("\n") == lines
    ast.parse(code)


def test_every_type_has_an_example():
    assert {action.type for action, _ in EXAMPLES} == set(TYPES)


@pytest.mark.parametrize("text", ["'); import os #", '"""\n', "\\", "x\ny", "\r\n", "\u2028", "{0}"])
def test_nothing_that_is_written_can_run(text):
    actions = [
        Action("write", {"text": text}), Action("openApp", {"app": text}), Action("hotkey", {"keys": (text,)}),
        Action("click", {"point": (0.1, 0.1), "button": text}), Action("terminate", {"status": text}),
        Action("home", {text: text}), Action("wait", {"seconds": text}),
    ]  # fmt: skip
    called = [node.func for node in ast.walk(ast.parse(to_pyautogui(actions, SIZE))) if isinstance(node, ast.Call)]
    assert all(isinstance(f, ast.Attribute) and f.value.id == "pyautogui" for f in called)
    assert not any(isinstance(node, ast.Import) for node in ast.walk(ast.parse(to_pyautogui(actions, SIZE))))


def test_from_outputs():
    limits = Resize(78400, 12845056)
    parsed = UITars(resize=limits).parse(
        "Action: click(point='<point>966 546</point>')\n\nfinished(content='ok')", (1920, 1080)
    )
    assert to_pyautogui(parsed.actions, (1920, 1080)) == "pyautogui.click(960, 540)\n# terminate: success"
    parsed = OpenCUA().parse("pyautogui.hotkey('ctrl', 'c')", (1920, 1080))
    assert to_pyautogui(parsed.actions, (1920, 1080)) == "pyautogui.hotkey('ctrl', 'c')"
