"""Whether a click hits, and the accuracies that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkv.agents import Parsed
from mmkv.eval.screenspot.data import KINDS, Box

Rows = Sequence[Mapping[str, Any]]


def clicked(parsed: Parsed) -> tuple[float, float] | None:
    """The first point of an output, relative; None where it has none (a wrong format, which counts as wrong)."""
    return next((action.point for action in parsed.actions if action.point is not None), None)


def hits(point: tuple[float, float], box: Box, size: tuple[int, int]) -> bool:
    """Whether a relative point of a screenshot of `size` (width, height) lies in a box of pixels, edges included."""
    x, y = point[0] * size[0], point[1] * size[1]
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def accuracies(rows: Rows) -> dict[str, Any]:
    """Accuracy of all rows, of text and of icons, and how many had no point: n, accuracy, text, icon, wrong_format.

    Args:
        rows: each with `score` (0 or 1), `wrong_format` and `facts` {kind}.
    """
    of_kind = {kind: _mean([row["score"] for row in rows if row["facts"]["kind"] == kind]) for kind in KINDS}
    wrong = sum(bool(row["wrong_format"]) for row in rows)
    return dict(n=len(rows), accuracy=_mean([row["score"] for row in rows]), **of_kind, wrong_format=wrong)


def split(rows: Rows, fact: str) -> dict[str, dict[str, Any]]:
    """`accuracies` of the rows of each value of a fact."""
    values = dict.fromkeys(row["facts"][fact] for row in rows if row["facts"].get(fact))
    return {value: accuracies([row for row in rows if row["facts"].get(fact) == value]) for value in values}


def macro(rows: Rows) -> float | None:
    """Mean of (mean text accuracy of the platforms, mean icon accuracy of the platforms): GUI-KV's overall number.

    Platforms weigh alike whatever their size. Parts without a sample are left out; None of nothing.
    """
    platforms = split(rows, "platform").values()
    kinds = [_mean([p[kind] for p in platforms if p[kind] is not None]) for kind in KINDS]
    return _mean([kind for kind in kinds if kind is not None])


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
