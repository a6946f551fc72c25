"""Predicted actions from an agent's parsed output, in AgentNetBench's terms: (type, value)."""

from __future__ import annotations

from collections.abc import Callable

from mmkv.agents import Action as Parsed
from mmkv.eval.agentnetbench.data import KEYS
from mmkv.eval.agentnetbench.match import Action

CLICKS = 5  # amount of a scroll whose agent says a direction alone (GUI-KV's and UI-TARS's own number)
POINTED = ("click", "doubleClick", "rightClick", "middleClick", "tripleClick", "moveTo", "dragTo")


def from_parsed(actions: tuple[Parsed, ...]) -> list[Action]:
    """All actions as AgentNetBench writes them: a drag is moveTo and dragTo, a scroll at a point is moveTo and scroll.

    Args:
        actions: of one output, in order, points relative. What AgentNetBench has no word for keeps its own, and matches nothing.
    """
    return [converted for action in actions for converted in _converted(action)]


def from_parsed_guikv(actions: tuple[Parsed, ...]) -> list[Action]:
    """The first action as GUI-KV converts it: a drag is dragTo alone, a scroll has no place, a text that ends with a newline is
    write and press(enter), a long press is a click, back is press(escape), waiting is nothing.

    Its renaming of ctrl to control is left out: ctrl, control, cmd and command are one key on both sides here.
    """
    return _CONVERTED_GUIKV.get(actions[0].type, _converted)(actions[0]) if actions else []


def _converted(action: Parsed) -> list[Action]:
    name, params, point = action.type, action.params, action.point
    if name == "drag":
        return [("moveTo", params["start"]), ("dragTo", params["end"])]
    if name == "scroll":
        return ([("moveTo", point)] if point else []) + [("scroll", _amount(action))]
    if name == "write":
        # a newline alone is the enter key; at the end of a text it is what write and enter are merged into
        return [("write", params["text"])] if params["text"].strip("\n") else [("press", ["enter"])]
    if name in KEYS:
        return [(name, list(params["keys"]))]
    if name == "terminate":
        return [("terminate", params["status"])]
    if name in POINTED:
        return [(name, point)] if point else []
    return [(name, None)]


def _amount(action: Parsed) -> float:
    up = action.params.get("direction") in ("up", "right")
    amount = action.params.get("amount", CLICKS)
    return amount if up else -amount


def _write(action: Parsed) -> list[Action]:
    text = action.params["text"]
    return [("write", text[:-1]), ("press", ["enter"])] if text.endswith("\n") else [("write", text)]


_CONVERTED_GUIKV: dict[str, Callable[[Parsed], list[Action]]] = {
    "drag": lambda action: [("dragTo", action.params["end"])],
    "scroll": lambda action: [("scroll", _amount(action))],
    "write": _write,
    "longPress": lambda action: [("click", action.point)],
    "back": lambda action: [("press", ["escape"])],
    "wait": lambda action: [],
}
