"""How well one predicted action meets one true action: a number from 0 to 1."""

from __future__ import annotations

import math
from typing import Any

from mmkv.eval.agentnetbench.data import KEYS, POINTING, Target
from mmkv.eval.agentnetbench.rules import Rules

Action = tuple[str, Any]
"""A predicted action: its type and its value ((x, y), text, list of keys, amount or status)."""

NEAR = 0.01 * 2**0.5  # relative distance within which a point is right
DECAY = 120.0
SIMILAR = 0.8  # similarity from which a text is right
NEWLINE_FACTOR = 0.9
CONTROL = dict.fromkeys(("control", "cmd", "command"), "ctrl")
ENTER = ("enter", "return")


def kind(name: str, value: Any, rules: Rules) -> str:
    """An action's type as it is compared."""
    name = name.lower()
    if rules.one_name and name == "triple_click":
        return "tripleclick"
    return "press" if rules.one_key and name == "hotkey" and len(value) == 1 else name


def action_score(action: Action, target: Target, rules: Rules) -> float:
    """Score of one predicted action against one target: 0 where the types differ.

    Args:
        action: (type, value).
        target: the true action.
        rules: what is in force.
    """
    if kind(*action, rules) != kind(target.type, target.value, rules):
        return 0.0
    value = action[1]
    if target.type in POINTING:
        return point_score(value, target)
    if target.type == "write":
        return text_score(value, target.value, rules.newline_seen)
    if target.type in KEYS:
        return float(_keys(value, rules) == _keys(target.value, rules))
    if target.type == "scroll":
        return scroll_score(value, target.value) if rules.scroll_amount else 1.0
    return float(value == target.value)


def point_score(point: tuple[float, float], target: Target) -> float:
    """1 inside any box (edges included) or within 0.0141421 of the point, then exp(-120 d) in the distance beyond it."""
    x, y = point
    if any(left <= x <= left + width and top <= y <= top + height for left, top, width, height in target.boxes):
        return 1.0
    beyond = ((x - target.value[0]) ** 2 + (y - target.value[1]) ** 2) ** 0.5 - NEAR
    return 1.0 if beyond <= 0 else math.exp(-DECAY * beyond)


def text_score(text: str, right: str, newline_seen: bool) -> float:
    """Similarity of two texts, lower-cased and stripped, over 0.8 and at most 1.

    Args:
        text: the predicted text.
        right: the true text.
        newline_seen: multiply the similarity by 0.9 where only one of the two ends with a newline.
    """
    submits, should = text.endswith("\n"), right.endswith("\n")
    text, right = text.lower().strip(), right.lower().strip()
    longest = max(len(text), len(right))
    if longest == 0:
        return 1.0
    similarity = 1.0 - edit_distance(text, right) / longest
    if newline_seen and submits != should:
        similarity *= NEWLINE_FACTOR
    return 1.0 if similarity >= SIMILAR else similarity / SIMILAR


def scroll_score(amount: Any, right: float) -> float:
    """0 for the wrong direction or none, else the smaller amount over the larger."""
    if not isinstance(amount, int | float) or amount * right < 0:
        return 0.0
    if amount == 0 or right == 0:
        return float(amount == right)
    return min(abs(amount), abs(right)) / max(abs(amount), abs(right))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[j - 1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _keys(keys: Any, rules: Rules) -> Any:
    names = [str(key).lower() for key in ([keys] if isinstance(keys, str) else keys)]
    if rules.one_name:
        names = [CONTROL.get(name, name) for name in names]
    if rules.one_key:
        names = ["enter" if name in ENTER else name for name in names]
    return names if rules.key_order else set(names)
