"""What AgentNetBench's own OpenCUA agent reads from an output, rule by rule, for scores that compare with published ones.

Spec: xlang-ai/OpenCUA at 1d70f20, `evaluation/agentnetbench/agent/opencua.py`, `parse_response` and `extract_actions`. Its
shortcomings are kept: positional coordinates and those of computer.* stay pixels, apostrophes cut typed text, tripleClick of
pyautogui is nothing, `press(['a', 'b'])` is a hotkey.
"""

from __future__ import annotations

import re

from mmkv.agents.coordinates import Resize

_PLACE = re.compile(r"x=([\d.]+),\s*y=([\d.]+)")
_QUOTED = re.compile(r"['\"]([^'\"]+)['\"]")


def command_lines(output: str) -> list[str]:
    """The lines that start with a command; without any, commands from inside lines."""
    lines = [line.strip() for line in output.split("\n")]
    if found := [line for line in lines if line.startswith(("pyautogui.", "computer."))]:
        return found
    for line in lines:
        for module in ("pyautogui.", "computer."):
            if module in line:
                found.append(module + line.split(module)[1].strip())
                break
    return found


def relative_code(output: str, size: tuple[int, int], resize: Resize) -> str | None:
    """The commands of an output, the keyword coordinates of pyautogui's as relative ones; None without a command."""
    wide, high = resize.size(*size)
    lines = [_relative(line, wide, high) for line in command_lines(output)]
    return "\n".join(lines) if lines else None


def _relative(line: str, wide: int, high: int) -> str:
    place = _PLACE.search(line)
    if not line.startswith("pyautogui.") or place is None:
        return line
    try:
        x, y = map(float, place.groups())
    except ValueError:  # "1.2.3"
        return line
    if x <= 1 or y <= 1:
        return line
    return f"{line[: place.start()]}x={x / wide}, y={y / high}{line[place.end() :]}"


def extract_actions(code: str | None) -> list[tuple]:
    """(type, value) of each action of relative code, as the official scorer takes them.

    Raises:
        ValueError: coordinates such as 1.2.3, which the official code stumbles over too (the step then scores 0).
    """
    found = []
    for line in (code or "").strip().split("\n"):
        found += _extract(line.strip())
    return found


def _extract(line: str) -> list[tuple]:
    place = _PLACE.search(line)
    if line.startswith("computer.terminate"):
        status = re.search(r"status=['\"](\w+)['\"]", line)
        return [("terminate", status[1])] if status else []
    if line.startswith("computer.triple_click"):
        return [("triple_click", tuple(map(float, place.groups())))] if place else []
    if not line.startswith("pyautogui."):
        return []
    found: list[tuple] = []
    if place and (kind := _pointed(line)):
        found.append((kind, tuple(map(float, place.groups()))))
    elif place:
        tuple(map(float, place.groups()))  # raises where the official code does
    return found + _written(line) + _keys(line) + _scrolled(line)


def _pointed(line: str) -> str | None:
    if "click" in line and "doubleClick" not in line and "rightClick" not in line:
        return "click"
    return next((kind for kind in ("moveTo", "doubleClick", "rightClick", "dragTo") if kind in line), None)


def _written(line: str) -> list[tuple]:
    if named := re.search(r"message=['\"](.+?)['\"]", line):
        return [("write", named[1])]
    plain = re.search(r"pyautogui\.write\((['\"])(.*?)\1\)", line)
    return [("write", plain[2])] if plain else []


def _keys(line: str) -> list[tuple]:
    if named := re.findall(r"keys=\[(.*?)\]", line):
        pairs = re.findall(r"['\"]([^'\"]*)['\"]|(\w+)", named[0])
        keys = [_key((quoted or bare).strip()) for quoted, bare in pairs if quoted or bare]
        return [("hotkey" if "hotkey" in line else "press", keys)]
    found = []
    if "keys=" not in line and (inside := re.search(r"pyautogui\.hotkey\((.*)\)", line)):
        keys = [_key(key.strip()) for key in _QUOTED.findall(inside[1])]
        found += [("hotkey", keys)] if keys else []
    if "keys=" not in line and (inside := re.search(r"pyautogui\.press\((.*)\)", line)):
        given = inside[1].strip()
        quoted = _QUOTED.findall(given)
        keys = [_key(key.strip()) for key in (quoted if given.startswith("[") else quoted[:1])]
        found += [("hotkey" if len(keys) > 1 else "press", keys)] if keys else []
    return found


def _key(name: str) -> str:
    return "ctrl" if name.lower() in ("cmd", "command") else name


def _scrolled(line: str) -> list[tuple]:
    amount = re.search(r"pyautogui\.scroll\(([-\d]+)\)", line)
    return [("scroll", int(amount[1]))] if amount else []
