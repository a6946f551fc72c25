"""Methods over the samples of a benchmark: from a task and a model to a result folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmkv.eval.config import config_of, name_of
from mmkv.eval.engines import ENGINES, local, ranks
from mmkv.eval.methods import Method
from mmkv.eval.results import SUMMARY, Results, write_json
from mmkv.eval.summary import summarise
from mmkv.eval.task import Sample, Task
from mmkv.eval.work import Job, Work

OUT = Path("outputs/eval")


@dataclass(frozen=True)
class Plan:
    """How a run is carried out; nothing of it changes a score.

    Args:
        out: result folder; None for one below outputs/eval named after the configuration.
        engine: "local" or "ray".
        workers: processes or actors with a model each; 1 with "local" runs in this process.
        limit: samples, the first ones in whole groups' order; None for all.
        retry_skipped: try again what an earlier run of the folder had to skip.
        device, dtype: as `mmkv ask` takes them.
        threads: CPU threads of each worker; None leaves torch's own choice.
        address: of a Ray cluster; None for a local one.
    """

    out: Path | None = None
    engine: str = "local"
    workers: int = 1
    limit: int | None = None
    retry_skipped: bool = False
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r}: possible are {', '.join(ENGINES)}")
        for name in ("workers", "limit"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} {value!r}: possible are whole numbers from 1")


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Args:
        folder: of the result.
        rows: all rows, in order.
        summary: as in summary.json; None for a rank that was not the last one to be done.
    """

    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None


def run(
    task: Task,
    methods: Sequence[Method],
    model: str,
    plan: Plan | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    loaded: tuple[Any, Any] | None = None,
) -> Outcome:
    """Answer all samples by all methods, or what is missing of them, and sum up.

    Args:
        task: the benchmark.
        methods: those that run, the baseline among them where one is wanted.
        model: hub name, folder, or "tiny".
        plan: how; by default all samples in this process.
        progress: called with rows that are there and rows that there will be, at the start and after each.
        loaded: (model, processor) where they are there already; for one worker in this process.

    Raises:
        ResultError: the folder belongs to another run.
        ValueError: no samples; ids or methods that are not distinct.
    """
    plan = plan or Plan()
    rank, world = ranks.rank_of()
    device = ranks.local_device(plan.device)
    samples = _checked(task, methods)[: plan.limit]
    config = config_of(task, tuple(methods), model, device, plan.dtype) | dict(limit=plan.limit)
    order = [(method.name, sample.id) for method in methods for sample in samples]
    with Results(plan.out or OUT / name_of(config), config, rank, world) as results:
        if plan.retry_skipped and world == 1:
            results.drop_skipped()
        jobs = ranks.mine(_jobs(samples, methods), rank, world)
        pending = [job for job in (job.without(set(results.rows)) for job in jobs) if job.pending]
        total = sum(job.size for job in jobs)
        done = total - sum(job.size for job in pending)
        progress(done, total)

        def on_row(row: dict[str, Any]) -> None:
            nonlocal done
            results.append(row)
            done += 1
            progress(done, total)

        if pending:
            work = Work(task, tuple(methods), model, device, plan.dtype, plan.threads)
            _work_off(work, pending, plan, on_row, loaded)
        rows = results.merge(order)
        if rows is None:
            return Outcome(results.folder, list(results.rows.values()), None)
        found = [rows[key] for key in order]
        summary = summarise(task, found, [method.name for method in methods])
        for method in methods:
            _export(task, method.name, found, results.folder)
        write_json(results.folder / SUMMARY, summary)
        return Outcome(results.folder, found, summary)


def _export(task: Task, method: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write what others read: `official-kivi-2.json` ..."""
    plain = re.sub(r"[^\w.=-]+", "_", method).strip("_")
    for name, value in task.exports([row for row in rows if row["method"] == method]).items():
        write_json(folder / f"{name}-{plain}.json", value)


def _work_off(work: Work, jobs: list[Job], plan: Plan, on_row: Callable[[dict], None], loaded) -> None:
    if plan.engine == "ray":
        from mmkv.eval.engines.ray import on_ray

        on_ray(work, jobs, plan.workers, on_row, plan.address)
    elif plan.workers > 1:
        local.processes(work, jobs, plan.workers, on_row)
    else:
        local.here(work, jobs, on_row, loaded)


def _checked(task: Task, methods: Sequence[Method]) -> list[Sample]:
    samples = task.samples()
    if not samples:
        raise ValueError(f"{task.name}: no samples there")
    for what, names in (("sample", [s.id for s in samples]), ("method", [m.name for m in methods])):
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None or not names:
            raise ValueError(f"{task.name}: {what} {twice!r} is there twice" if names else f"{task.name}: no {what}s")
    return samples


def _jobs(samples: Sequence[Sample], methods: Sequence[Method]) -> list[Job]:
    """One job for each run of samples of one group."""
    out = []
    for group, found in groupby(samples, key=lambda sample: sample.group):
        mine = tuple(found)
        out.append(Job(group, mine, {method.name: tuple(s.id for s in mine) for method in methods}))
    return out
