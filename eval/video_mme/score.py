"""Video-MME's numbers: over all questions and over those answered, by duration, domain, sub-category and task type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkv.eval.task import by_facet

FACETS = ("duration", "domain", "sub_category", "task_type")


def percent(correct: int, count: int) -> float:
    """100 * correct / count; 0 where there is nothing, as in the public scorers."""
    return 100 * correct / count if count else 0.0


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy in percent: `accuracy` over all questions (lmms-eval's denominator), `accuracy_answered` over those with an
    extracted letter (the official one), and the share without a letter; and by facet."""
    answered = [row for row in rows if row["answer"]]
    return dict(
        headline=dict(
            accuracy=percent(sum(row["correct"] for row in rows), len(rows)),
            accuracy_answered=percent(sum(row["correct"] for row in answered), len(answered)),
            unanswered=percent(len(rows) - len(answered), len(rows)),
        ),
        by=by_facet(rows, FACETS),
        by_answered=by_facet(answered, FACETS),
    )


def official_json(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The nested list that Video-MME's own `eval_your_results.py` reads: one entry a video, its questions with responses.

    Args:
        rows: of one method, skipped ones included; a video without any answered question is marked `missing`.
    """
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        facts = row["facts"]
        entry = out.setdefault(
            row["group"],
            {key: facts.get(key) for key in ("video_id", "duration", "domain", "sub_category")}
            | {"missing": True, "questions": []},
        )
        if row.get("skipped"):
            continue
        entry["missing"] = False
        asked = {key: facts.get(key) for key in ("task_type", "question", "options")}
        told = dict(question_id=row["id"], **asked, answer=row["target"], response=row["response"])
        entry["questions"].append(told)
    return list(out.values())
