"""The numbers of a run from its rows: each method by itself, and against the dense baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mmkv.eval import statistics
from mmkv.eval.methods import DENSE
from mmkv.eval.task import Task

Row = dict[str, Any]
MEANS = (
    "prompt_tokens", "vision_tokens", "vision_tokens_held", "tokens_held", "kv_bytes", "kv_bytes_dense", "kv_bytes_peak",
    "prefill_seconds", "decode_seconds", "new_tokens",
)  # fmt: skip


def summarise(task: Task, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """What summary.json holds: `methods`, by name, and what was skipped and why."""
    split: dict[str, list[Row]] = {name: [row for row in rows if row["method"] == name] for name in names}
    dense = split.get(DENSE, [])
    return dict(
        task=task.name,
        scorer=task.scorer,
        samples=len(next(iter(split.values()))),
        groups=len({row["group"] for row in rows}),
        skipped=skipped(rows),
        methods={name: _of_method(task, mine, dense if name != DENSE else []) for name, mine in split.items()},
    )


def skipped(rows: Iterable[Row]) -> dict[str, Any]:
    """{"samples": how many were skipped by any method, "reasons": {reason: samples}}."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if row.get("skipped"):
            reasons.setdefault(row["skipped"], set()).add(row["id"])
    counts = {reason: len(ids) for reason, ids in reasons.items()}
    return dict(samples=len(set().union(*reasons.values())) if reasons else 0, reasons=counts)


def _of_method(task: Task, rows: list[Row], dense: list[Row]) -> dict[str, Any]:
    answered = [row for row in rows if not row.get("skipped")]
    if not answered:
        return dict(n=0, skipped=len(rows))
    return dict(
        n=len(answered),
        skipped=len(rows) - len(answered),
        **_scores([row for row in answered if row["score"] is not None]),
        **task.summary(answered),
        **_costs(answered),
        **({"against_dense": _against(answered, dense)} if dense else {}),
    )


def _scores(rows: list[Row]) -> dict[str, Any]:
    """Mean score, its interval and standard error; all None where nothing is scored."""
    if not rows:
        return dict(scored=0, score=None, interval=None, error=None)
    scores, groups = [row["score"] for row in rows], [row["group"] for row in rows]
    return dict(
        scored=len(rows),
        score=sum(scores) / len(scores),
        interval=statistics.interval(statistics.bootstrap(scores, groups)),
        error=statistics.clustered_error(scores, groups),
    )


def _costs(rows: list[Row]) -> dict[str, Any]:
    """Means over the answers; seconds of a prefill that several answers share are counted once."""
    out: dict[str, Any] = {}
    for name in MEANS:
        mine = [row for row in rows if not (name == "prefill_seconds" and row.get("shared_prefill"))]
        found = [row[name] for row in mine if row.get(name) is not None]
        out[name] = sum(found) / len(found) if found else None
    out["prefills"] = sum(not row.get("shared_prefill", False) for row in rows)
    out["peak_memory"] = max((row["peak_memory"] for row in rows if row.get("peak_memory")), default=None)
    out["short_videos"] = len({row["group"] for row in rows if row.get("short_video")})
    out["decoders"] = dict(Counter(row["decoder"] for row in rows if row.get("decoder")))
    return out


def _against(rows: list[Row], dense: list[Row]) -> dict[str, Any]:
    """Paired with the baseline, over the samples that both answered."""
    before = {row["id"]: row for row in dense if not row.get("skipped") and row["score"] is not None}
    pairs = [(row, before[row["id"]]) for row in rows if row["id"] in before and row["score"] is not None]
    if not pairs:
        return dict(n=0)
    gains = [mine["score"] - other["score"] for mine, other in pairs]
    means = statistics.bootstrap(gains, [mine["group"] for mine, _ in pairs])
    lost, won, p = statistics.mcnemar([d["score"] >= 1 for _, d in pairs], [m["score"] >= 1 for m, _ in pairs])
    return dict(
        n=len(pairs),
        points=100 * sum(gains) / len(gains),
        interval=[100 * bound for bound in statistics.interval(means)],
        lost=lost,
        won=won,
        mcnemar=p,
        agreement=statistics.agreement([said(m) for m, _ in pairs], [said(d) for _, d in pairs]),
    )


def said(row: Row) -> str:
    """What a row's answer is compared by: what was extracted from the response, else the response."""
    return str(row.get("answer", row["response"]))
