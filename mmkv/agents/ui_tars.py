"""UI-TARS (arXiv 2501.12326) and UI-TARS-1.5: prompts, order of turns, and the parser of "Thought: ... Action: ..."."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmkv.agents.action import Action, Parsed, PastStep, Point
from mmkv.agents.calls import Call, is_number, read_call
from mmkv.agents.formats import AgentFormat, image, register, text
from mmkv.agents.ui_tars_prompts import PROMPTS

TYPES = {
    "click": "click", "left_single": "click", "left_double": "doubleClick", "right_single": "rightClick", "hover": "moveTo",
    "long_press": "longPress", "drag": "drag", "select": "drag", "scroll": "scroll", "type": "write", "hotkey": "hotkey",
    "press": "press", "keydown": "keyDown", "release": "keyUp", "keyup": "keyUp", "wait": "wait", "open_app": "openApp",
    "press_home": "home", "press_back": "back", "finished": "terminate", "call_user": "terminate",
}  # fmt: skip
_PLACES = {"point": "point", "start_box": "point", "start_point": "point", "end_box": "end", "end_point": "end"}
_RENAMED = {"content": "text", "key": "keys", "press": "keys", "hotkey": "keys", "app_name": "app"}
_MARKS = re.compile(r"<\|box_(?:start|end)\|>|<\|im_end\|>|\[EOS\]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BOX = re.compile(rf"[(\[]?\s*{_NUMBER.pattern}(?:[\s,]+{_NUMBER.pattern})*\s*[)\]]?")
_TAGS = re.compile(r"</?(?:point|bbox|box)>")
_BETWEEN = re.compile(rf"(?<=\))\s*\n\s*(?=(?:{'|'.join(TYPES)})\()")
_TYPED = re.compile(r"""type\(\s*content\s*=\s*(['"])(.*)\1\s*\)""", re.DOTALL)


@register
@dataclass(frozen=True)
class UITars(AgentFormat):
    """UI-TARS: the prompt as a turn of its own, then screenshots and answers in turns, the current screenshot last.

    Spec: bytedance/UI-TARS at 582f3a7 (prompts, action_parser.py, data/test_messages_single_image.json).

    Args:
        resize: as in `AgentFormat`.
        prompt: "computer", "mobile", or "grounding" (ScreenSpot: an action without a thought).
        language: of the thought.
        factor: None where the model writes pixels of the resized screenshot (Qwen2.5-VL: UI-TARS-1.5); 1000 where it writes
            thousandths of the sides (Qwen2-VL: UI-TARS 1.0, and "doubao").

    Where we differ from the official parser: it raises where we report, and it keeps actions of unknown names, which we report.
    Unescaped quotes, real newlines and double quotes in typed text are read, and so are box tokens, bare tuples and points with
    decimals. "Action:" at the start of a line is preferred over one within a line, and needs no blank behind it. Actions may
    stand a line apart (there, the official parser takes a call for part of the typed text). A box of four numbers is its centre.
    """

    name: ClassVar[str] = "ui_tars"
    prompt: str = "computer"
    language: str = "English"
    factor: int | None = None

    def __post_init__(self):
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt={self.prompt!r}; possible are {', '.join(map(repr, PROMPTS))}")
        if self.factor is not None and (type(self.factor) is not int or self.factor < 1):
            raise ValueError(
                f"factor={self.factor!r}; possible are None (pixels) and whole numbers from 1, such as 1000"
            )

    @classmethod
    def suits(cls, config) -> bool:
        name = str(getattr(config, "_name_or_path", "")).lower().replace("_", "-")
        return config.model_type in ("qwen2_vl", "qwen2_5_vl") and "ui-tars" in name

    def messages(self, instruction: str, steps: Sequence[PastStep], screenshot) -> list[dict]:
        # a language with braces or an instruction with them is nobody's placeholder
        prompt = PROMPTS[self.prompt].replace("{language}", self.language).replace("{instruction}", instruction)
        turns = [{"role": "user", "content": [text(prompt)]}]
        for step in steps:
            if step.screenshot is not None:
                turns.append({"role": "user", "content": [image(step.screenshot)]})
            turns.append({"role": "assistant", "content": [text(step.response)]})
        return [*turns, {"role": "user", "content": [image(screenshot)]}]

    def parse(self, text: str, size: tuple[int, int]) -> Parsed:
        self.resize.size(*size)  # a size that no processor takes is the caller's mistake, not the model's
        thought, code = _parts(text)
        if code is None:
            return Parsed(text, problems=("no 'Action:' in the output",), thought=thought)
        actions, problems = [], []
        for source in _split(code):
            action, problem = self._action(source, size)
            actions += [] if action is None else [action]
            problems += [] if problem is None else [problem]
        return Parsed(text, tuple(actions), tuple(problems), thought, code=code)

    def _action(self, source: str, size: tuple[int, int]) -> tuple[Action | None, str | None]:
        call = _read(source)
        if call is None:
            return None, f"not an action: {source[:200]!r}"
        kind = TYPES.get(call.name)
        if kind is None:
            return None, f"unknown action {call.name!r}: {source[:200]!r}"
        params, wrong = self._params(kind, call, size)
        return (None, f"{wrong}: {source[:200]!r}") if wrong else (Action(kind, params, source), None)

    def _params(self, kind: str, call: Call, size: tuple[int, int]) -> tuple[dict, str | None]:
        """Parameters in the vocabulary of `Action`, or what is wrong with them."""
        params: dict = {}
        for name, value in call.kwargs.items():
            if value == "":
                continue
            if name in _PLACES:
                place = self._place(value, size)
                if place is None:
                    return {}, f"{name} is no point on the screen"
                params[_PLACES[name]] = place
            else:
                params[_RENAMED.get(name, name)] = (
                    value.strip() if isinstance(value, str) and kind != "write" else value
                )
        if "keys" in params:
            params["keys"] = tuple(str(params["keys"]).split())
        if kind == "drag":
            if "point" not in params or "end" not in params:
                return {}, "a drag needs a start and an end"
            params["start"] = params.pop("point")
        elif kind in ("click", "doubleClick", "rightClick", "moveTo", "longPress") and "point" not in params:
            return {}, f"{call.name} needs a point"
        elif kind in ("hotkey", "press", "keyDown", "keyUp") and not params.get("keys"):
            return {}, f"{call.name} needs a key"
        elif kind == "write":
            params = {"text": str(params.get("text", ""))}
        elif kind == "openApp" and "app" not in params:
            return {}, "open_app needs an app_name"
        elif kind == "scroll" and params.get("direction") not in ("up", "down", "left", "right"):
            return {}, "a scroll needs a direction: up, down, left or right"
        elif kind == "terminate":
            content = {"content": params["text"]} if params.get("text") else {}
            params = {"status": "success" if call.name == "finished" else "failure", **content}
        return params, None

    def _place(self, value, size: tuple[int, int]) -> Point | None:
        """The relative point of "(x,y)", "<point>x y</point>", a tuple, or the centre of a box of four numbers."""
        written = value if isinstance(value, str) else str(value)
        written = _TAGS.sub(" ", written).strip()
        if not _BOX.fullmatch(written):
            return None
        numbers = [float(n) for n in _NUMBER.findall(written)]
        if len(numbers) not in (2, 4) or not all(map(is_number, numbers)):
            return None
        x, y = (sum(numbers[axis::2]) / (len(numbers) // 2) for axis in (0, 1))
        point = (x / self.factor, y / self.factor) if self.factor else self.resize.relative(x, y, size)
        return point if all(0 <= axis <= 1 for axis in point) else None


def _parts(output: str) -> tuple[str, str | None]:
    """The thought, and what stands behind the last "Action:"; None without one."""
    output = _MARKS.sub("", output).strip()
    starts = [m.end() for m in re.finditer(r"^Action:", output, re.MULTILINE)]
    starts = starts or [m.end() for m in re.finditer(r"Action:", output)]
    code = output[starts[-1] :].strip() if starts else None
    thought = re.search(r"(?:Thought|Action_Summary): ?(.+?)(?=\s*Action:|$)", output, re.DOTALL)
    return (thought[1].strip() if thought else ""), code


def _split(code: str) -> list[str]:
    """The actions, which stand a blank line apart, or a line."""
    return [part.strip() for part in _BETWEEN.split(code)]


def _read(source: str) -> Call | None:
    """The call; typed text as it was meant, with its escapes undone, whatever quotes and newlines stand in it."""
    typed = _TYPED.fullmatch(source) or _TYPED.fullmatch(source + ")")
    if typed is None:
        return read_call(source.replace("\n", "\\n")) or read_call(source.replace("\n", "\\n") + ")")
    quote, content = typed.groups()
    literal = re.sub(rf"(?<!\\)((?:\\\\)*){quote}", rf"\1\\{quote}", content.replace("\n", "\\n"))
    call = read_call(f"type(content={quote}{literal}{quote})")
    return call or Call("type", (), {"content": content})
