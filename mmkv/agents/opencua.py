"""OpenCUA (arXiv 2508.09123): prompts, history of steps as AgentNetBench tells it, and the parser of pyautogui code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmkv.agents import opencua_faithful as faithful
from mmkv.agents.action import Action, Parsed, PastStep, Point
from mmkv.agents.calls import Call, is_number, read_call
from mmkv.agents.formats import AgentFormat, image, register, text
from mmkv.agents.opencua_prompts import CODE, DETAIL, HISTORY, INSTRUCTION, STEP, SYSTEM

POINTED = {
    "pyautogui.click": "click", "pyautogui.leftClick": "click", "pyautogui.doubleClick": "doubleClick",
    "pyautogui.rightClick": "rightClick", "pyautogui.middleClick": "middleClick", "pyautogui.tripleClick": "tripleClick",
    "pyautogui.moveTo": "moveTo", "pyautogui.dragTo": "dragTo", "computer.triple_click": "tripleClick",
}  # fmt: skip
KEYED = {"press": "press", "hotkey": "hotkey", "keyDown": "keyDown", "keyUp": "keyUp"}
_HEADING = r"^(?:#+ *)?{}: *\n?(.*?)(?=^(?:#+ *)?(?:Observation|Thought|Action|Code):|^```|\Z)"
_OFFICIAL = {"triple_click": "tripleClick"}


@register
@dataclass(frozen=True)
class OpenCUA(AgentFormat):
    """OpenCUA: a system prompt, earlier steps as "# Step k" in assistant turns, the current screenshot with the instruction.

    Spec: xlang-ai/OpenCUA at 1d70f20, `evaluation/agentnetbench/agent/opencua.py`.

    Args:
        resize: as in `AgentFormat`; the default is OpenCUA's.
        level: system prompt, "l1" (action), "l2" (thought, action) or "l3" (observation too), "l1_short" ..., "grounding".
        history: what is told of earlier steps: "action", "thought" (with the action) or "observation" (with both).
        max_history: steps that are told at all, the newest; screenshots of older ones still stand where they are kept.
        max_detail: of these, steps that are told as the level asks for answers, with their code.
        faithful: read outputs as AgentNetBench's own code does, see `opencua_faithful`. Without, positional coordinates,
            tripleClick, computer.* and every escape in typed text are read, and points below one pixel are taken as relative.
    """

    name: ClassVar[str] = "opencua"
    level: str = "l2"
    history: str = "thought"
    max_history: int = 10
    max_detail: int = 0
    faithful: bool = False

    def __post_init__(self):
        if self.level not in SYSTEM:
            raise ValueError(f"level={self.level!r}; possible are {', '.join(map(repr, SYSTEM))}")
        if self.history not in HISTORY:
            raise ValueError(f"history={self.history!r}; possible are {', '.join(map(repr, HISTORY))}")
        for name in ("max_history", "max_detail"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r}; possible are whole numbers of steps from 0")

    @classmethod
    def suits(cls, config) -> bool:
        return config.model_type == "opencua"

    def messages(self, instruction: str, steps: Sequence[PastStep], screenshot) -> list[dict]:
        turns: list[dict] = [{"role": "system", "content": SYSTEM[self.level]}]
        for index, step in enumerate(steps):
            if step.screenshot is not None:
                turns.append({"role": "user", "content": [image(step.screenshot)]})
            if index >= len(steps) - self.max_history:
                turns.append({"role": "assistant", "content": self._told(step, index, len(steps))})
        asked = instruction if self.level == "grounding" else INSTRUCTION.replace("{instruction}", instruction)
        return [*turns, {"role": "user", "content": [image(screenshot), text(asked)]}]

    def _told(self, step: PastStep, index: int, count: int) -> str:
        detailed = index >= count - self.max_detail
        form = HISTORY[DETAIL.get(self.level[:2], "action")] + CODE if detailed else HISTORY[self.history]
        parts = dict(observation=step.observation, thought=step.thought, action=step.action, code=step.code)
        return STEP.format(number=index + 1) + form.format(**parts)

    def parse(self, text: str, size: tuple[int, int]) -> Parsed:
        self.resize.size(*size)
        said = {part: _section(text, part) for part in ("Observation", "Thought", "Action")}
        code = "\n".join(faithful.command_lines(text))
        actions: list[Action] = []
        if not code:
            problems = ["no line with a pyautogui or computer command in the output"]
        elif self.faithful:
            actions, problems = self._official(text, size)
        else:
            actions, problems = self._actions(code, size)
        return Parsed(text, tuple(actions), tuple(problems), said["Thought"], said["Action"], said["Observation"], code)

    def _official(self, output: str, size: tuple[int, int]) -> tuple[list[Action], list[str]]:
        actions: list[Action] = []
        problems: list[str] = []
        relative = (faithful.relative_code(output, size, self.resize) or "").split("\n")
        for line, source in zip(relative, faithful.command_lines(output)):
            try:
                found = faithful.extract_actions(line)
            except ValueError:
                found = []
            actions += [_from_official(kind, value, source) for kind, value in found]
            problems += [] if found else [f"not an action: {source[:200]!r}"]
        return actions, problems

    def _actions(self, code: str, size: tuple[int, int]) -> tuple[list[Action], list[str]]:
        actions: list[Action] = []
        problems: list[str] = []
        for line in code.split("\n"):
            call = read_call(line) or read_call(line[: line.rfind(")") + 1])
            if call is None:
                problems.append(f"not a call with constant arguments: {line[:200]!r}")
                continue
            found = self._action(call, line, size)
            if isinstance(found, Action):
                actions.append(found)
            else:
                problems.append(f"{found}: {line[:200]!r}")
        return actions, problems

    def _action(self, call: Call, line: str, size: tuple[int, int]) -> Action | str:
        """The action of a call, or what is wrong with it."""
        if call.name in POINTED:
            return self._pointed(call, line, size)
        module, _, name = call.name.rpartition(".")
        if call.name == "computer.terminate":
            status = str(call.kwargs.get("status", call.args[0] if call.args else ""))
            known = status in ("success", "failure")
            return Action("terminate", {"status": status}, line) if known else f"status {status!r}"
        if call.name == "computer.wait" or (module, name) == ("pyautogui", "sleep"):
            seconds = call.args[0] if call.args else call.kwargs.get("seconds")
            return Action("wait", {} if seconds is None else {"seconds": seconds}, line)
        if module != "pyautogui":
            return f"unknown function {call.name!r}"
        if name in ("write", "typewrite"):
            written = call.kwargs.get("message", call.args[0] if call.args else None)
            return Action("write", {"text": written}, line) if isinstance(written, str) else "no text to write"
        if name in KEYED:
            return _keyed(KEYED[name], call, line)
        if name in ("scroll", "hscroll", "vscroll"):
            return self._scroll(name, call, line, size)
        return f"unknown function {call.name!r}"

    def _pointed(self, call: Call, line: str, size: tuple[int, int]) -> Action | str:
        given = dict(call.kwargs)
        args = list(call.args)
        if args and isinstance(args[0], (tuple, list)):
            args = [*args[0], *args[1:]]
        given |= dict(zip(("x", "y"), args))
        x, y = given.pop("x", None), given.pop("y", None)
        kind = POINTED[call.name]
        if kind == "click":
            button, clicks = str(given.get("button")), str(given.get("clicks"))
            kind = {"2": "doubleClick", "3": "tripleClick"}.get(clicks, kind)
            kind = {"right": "rightClick", "middle": "middleClick"}.get(button, kind)
        if x is None and y is None and kind != "dragTo" and kind != "moveTo":
            return Action(kind, given, line)  # where the pointer is
        point = self._place(x, y, size)
        return f"{call.name} needs x and y" if point is None else Action(kind, {"point": point, **given}, line)

    def _place(self, x, y, size: tuple[int, int]) -> Point | None:
        if not (is_number(x) and is_number(y)):
            return None
        whole = isinstance(x, int) and isinstance(y, int)
        inside = 0 <= x <= 1 and 0 <= y <= 1 and not whole
        return (float(x), float(y)) if inside else self.resize.relative(x, y, size)

    def _scroll(self, name: str, call: Call, line: str, size: tuple[int, int]) -> Action | str:
        amount = call.kwargs.get("clicks", call.args[0] if call.args else None)
        if not is_number(amount):
            return "no amount to scroll"
        ways = ("right", "left") if name == "hscroll" else ("up", "down")
        params: dict = {"direction": ways[amount < 0], "amount": abs(amount)}
        point = self._place(call.kwargs.get("x"), call.kwargs.get("y"), size)
        return Action("scroll", params if point is None else {**params, "point": point}, line)


def _keyed(kind: str, call: Call, line: str) -> Action | str:
    given = call.kwargs.get("keys", call.kwargs.get("key", call.args))
    if len(call.args) == 1 and isinstance(call.args[0], (list, tuple)):
        given = call.args[0]
    elif kind != "hotkey" and call.args:
        given = call.args[:1]  # further ones are how often and how fast
    keys = tuple(str(key) for key in (given if isinstance(given, (list, tuple)) else [given]))
    more = {name: call.kwargs[name] for name in ("presses", "interval") if name in call.kwargs}
    return Action(kind, {"keys": keys, **more}, line) if keys else f"{call.name} needs a key"


def _from_official(kind: str, value, line: str) -> Action:
    """An `Action` of what the official parser found."""
    if kind == "terminate":
        params = {"status": value}
    elif kind == "write":
        params = {"text": value}
    elif kind in ("press", "hotkey"):
        params = {"keys": tuple(value)}
    elif kind == "scroll":
        params = {"direction": "down" if value < 0 else "up", "amount": abs(value)}
    else:
        params = {"point": value}
    return Action(_OFFICIAL.get(kind, kind), params, line)


def _section(output: str, heading: str) -> str:
    """What stands below "## Thought:" and the like, "" without it."""
    found = re.search(_HEADING.format(heading), output, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""
