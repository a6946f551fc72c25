"""What the eval commands share: run with a progress bar, then show the table and what was skipped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mmkv.eval import table
from mmkv.eval.methods import Method
from mmkv.eval.runner import Outcome, Plan, run
from mmkv.eval.task import Task

CACHE = Path.home() / ".cache" / "mmkv"
QUIET = 30  # seconds between lines of progress where there is no terminal

out = Console()
err = Console(stderr=True)


def run_and_show(task: Task, methods: Sequence[Method], model: str, plan: Plan) -> Outcome:
    """Run, with a bar that tells the time left; then the table of methods, what was skipped, and where the result lies."""
    bar = _Bar(task.name)
    with bar:
        outcome = run(task, methods, model, plan, bar.told)
    if outcome.summary is None:
        err.print(f"{len(outcome.rows)} rows in {outcome.folder}; the last rank to be done sums up", highlight=False)
        return outcome
    show(outcome)
    return outcome


def show(outcome: Outcome) -> None:
    """Print what a person wants to know of a finished run."""
    found = outcome.summary or {}
    table.show(table.summary_table(found))
    for line in [*skipped_lines(found), media_line(outcome.rows)]:
        if line:
            out.print(Text(line), soft_wrap=True)
    out.print(f"result: {outcome.folder}", highlight=False, soft_wrap=True)


def skipped_lines(summary: dict[str, Any]) -> list[str]:
    """What was left out and why, most frequent reason first."""
    told = summary["skipped"]
    if not told["samples"]:
        return []
    reasons = sorted(told["reasons"].items(), key=lambda item: -item[1])
    return [f"skipped: {told['samples']} of {summary['samples']} samples", *(f"  {n} x {why}" for why, n in reasons)]


def media_line(rows: Sequence[dict[str, Any]]) -> str | None:
    """How fast media were read: each once for all methods."""
    media: dict[str, tuple[float, int]] = {}
    for row in rows:
        if row.get("frames") and not row.get("skipped"):
            media.setdefault(row["group"], (row["media_seconds"], row["frames"]))
    seconds, frames = sum(s for s, _ in media.values()), sum(f for _, f in media.values())
    if not media:
        return None
    busy = {(row["method"], row["group"]): row.get("prefill_seconds", 0.0) for row in rows if not row.get("skipped")}
    spent = sum(busy.values()) + sum(row.get("decode_seconds", 0.0) for row in rows)
    rate = f", {frames / seconds:,.0f} frames/s" if seconds else ""
    return f"frames: {frames:,} of {len(media)} videos in {seconds:.1f} s{rate}; the model worked {spent:.1f} s in the same run"


class _Bar:
    """Progress with the time left on a terminal; elsewhere a line now and then."""

    def __init__(self, name: str):
        self.name, self.first, self.began, self.spoke = name, 0, 0.0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=err, disable=not err.is_terminal)
        self.task: Any = None

    def __enter__(self) -> _Bar:
        self.bar.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.bar.__exit__(*problem)

    def told(self, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.name, total=total, completed=done)
            self.first, self.began = done, time.monotonic()
            if done:
                err.print(f"{done:,} of {total:,} rows are there; the rest goes on", highlight=False)
            return
        self.bar.update(self.task, completed=done)
        now = time.monotonic()
        if not err.is_terminal and (now - self.spoke > QUIET or done == total):
            self.spoke = now
            left = (now - self.began) / max(done - self.first, 1) * (total - done)
            print(f"{self.name}: {done:,} of {total:,}, {left:,.0f} s left", file=sys.stderr, flush=True)
