"""Numbers of a whole run: means over steps, per action type, per trajectory, of milestones and of groups of action types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkv.eval.agentnetbench.data import POINTING

GROUPS = {
    "coordinate": (*POINTING, "scroll"),
    "content": ("write", "press", "hotkey"),
    "function": ("terminate",),
}
"""Our reading of the published columns; the grouping code is not public, so compare the average alone with other tables."""


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of scored steps.

    Args:
        rows: each with `score` (0 to 1), `by_type` {type: score}, `alternative` (-1 for none) and `facts` {trajectory, milestone,
            first_type}.

    Returns:
        average_score (mean over all steps), average_trajectory_score (mean of the trajectories' means), milestone_score,
        action_type_scores (mean over the steps whose true actions, those used, hold the type), group_scores (mean over the
        steps of the group of their types' mean), alternative_matches and their percentage, total_steps, total_trajectories,
        milestone_steps. Means of nothing are None.
    """
    by_type: dict[str, list[float]] = {}
    by_group: dict[str, list[float]] = {}
    by_trajectory: dict[str, list[float]] = {}
    for row in rows:
        by_trajectory.setdefault(row["facts"]["trajectory"], []).append(row["score"])
        for name, score in row["by_type"].items():
            by_type.setdefault(name, []).append(score)
        for group, names in GROUPS.items():
            inside = [score for name, score in row["by_type"].items() if name in names]
            if inside:
                by_group.setdefault(group, []).append(sum(inside) / len(inside))
    milestones = [row["score"] for row in rows if row["facts"]["milestone"]]
    matches = sum(row["alternative"] >= 0 for row in rows)
    return {
        "average_score": mean([row["score"] for row in rows]),
        "average_trajectory_score": mean([sum(scores) / len(scores) for scores in by_trajectory.values()]),
        "milestone_score": mean(milestones),
        "action_type_scores": {name: mean(scores) for name, scores in by_type.items()},
        "group_scores": {group: mean(by_group.get(group, [])) for group in GROUPS},
        "alternative_matches": matches,
        "alternative_match_percentage": 100 * matches / len(rows) if rows else None,
        "total_steps": len(rows),
        "total_trajectories": len(by_trajectory),
        "milestone_steps": len(milestones),
    }


def mean(scores: Sequence[float]) -> float | None:
    """Plain mean; None of nothing."""
    return sum(scores) / len(scores) if scores else None
