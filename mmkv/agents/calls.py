"""Calls such as `click(x=3, y=4)` in a model's output, read as text: nothing is ever evaluated."""

from __future__ import annotations

import ast
import math
import warnings
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True)
class Call:
    """A call with constant arguments.

    Args:
        name: dotted name, "pyautogui.click".
        args: positional arguments: numbers, strings, lists and tuples of them.
        kwargs: keyword arguments.
    """

    name: str
    args: tuple
    kwargs: dict


def read_call(source: str) -> Call | None:
    """One call; None where the text is anything else, or an argument is not a constant."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know, which stay as they are
            node = ast.parse(source.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            return None
        args = tuple(ast.literal_eval(a) for a in node.args)
        kwargs = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        name = ast.unparse(node.func)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    plain = all(part.isidentifier() for part in name.split("."))
    return Call(name, args, kwargs) if plain and None not in kwargs else None


def is_number(value) -> TypeGuard[float]:
    """Whether a constant is a finite number that fits a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
