"""`Action` and `Parsed`: what an agent's output asks for, in one vocabulary for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The names are AgentNetBench's where it has one (they are pyautogui's), see `Action`.
POINTED = ("click", "doubleClick", "rightClick", "middleClick", "tripleClick", "moveTo", "dragTo", "longPress")
TYPES = (*POINTED, "drag", "scroll", "write", "press", "hotkey", "keyDown", "keyUp", "wait", "openApp", "home", "back",
         "terminate")  # fmt: skip

Point = tuple[float, float]


@dataclass(frozen=True)
class Action:
    """One thing that an agent asks to be done; mmkv never does it.

    Points are relative: x and y in 0 .. 1 of the screenshot's width and height. A model may point outside; the value is kept.

    Args:
        type: one of `mmkv.agents.TYPES`.
        params: by type. click, doubleClick, rightClick, middleClick, tripleClick, moveTo, dragTo, longPress: `point` (x, y),
            left out where the model gave none. drag: `start`, `end`. scroll: `direction` "up", "down", "left", "right" and
            `amount` in clicks, above 0 (left out where the model gave none), `point` perhaps. write: `text`. press, hotkey,
            keyDown, keyUp: `keys`, a tuple of names. wait: `seconds` perhaps. openApp: `app`. terminate: `status` "success"
            or "failure", `content` perhaps. Further keywords of the model's own call (button, duration ...) by their names.
        source: the text that it was read from, as the model wrote it.
    """

    type: str
    params: Mapping = field(default_factory=dict)
    source: str = ""

    @property
    def point(self) -> Point | None:
        """Where it acts: of a drag its end; None for what has no place."""
        return self.params.get("point", self.params.get("end"))


@dataclass(frozen=True)
class Parsed:
    """A model's output, read. What could not be read is kept in `text` and said in `problems`.

    Args:
        text: the output, unchanged.
        actions: what it asks for, in order.
        problems: what could not be read, one line each; empty where all was.
        thought: the part in which it reasons, "" without one.
        action: the part that says the action in words ("## Action:" of OpenCUA), "" without one.
        observation: the part that describes the screen, "" without one.
        code: the lines that the actions were read from.
    """

    text: str
    actions: tuple[Action, ...] = ()
    problems: tuple[str, ...] = ()
    thought: str = ""
    action: str = ""
    observation: str = ""
    code: str = ""


@dataclass(frozen=True)
class PastStep:
    """A step that a prompt tells of.

    Args:
        screenshot: the picture it began with; None where it is told as text alone.
        response: the model's whole output, as it wrote it.
        thought, action, observation, code: parts of it as in `Parsed`, or an annotator's words (AgentNetBench's
            `inner_monologue`: thought, low_level_instruction, observation, and the step's `action`).
    """

    screenshot: Any = None
    response: str = ""
    thought: str = ""
    action: str = ""
    observation: str = ""
    code: str = ""

    @classmethod
    def of(cls, parsed: Parsed, screenshot=None) -> PastStep:
        """A step from what a model answered."""
        return cls(screenshot, parsed.text, parsed.thought, parsed.action, parsed.observation, parsed.code)
