"""What a run hands to its workers: what to load, and jobs. Light to import, since every process does so first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmkv.eval.task import Sample, Task

if TYPE_CHECKING:
    from mmkv.eval.methods import Method
    from mmkv.eval.worker import Worker


@dataclass(frozen=True)
class Job:
    """Samples of one group, and what is still to be done with them.

    Args:
        group: their group.
        samples: in order.
        pending: for each method's name the ids that it has not answered yet.
    """

    group: str
    samples: tuple[Sample, ...]
    pending: Mapping[str, tuple[str, ...]]

    def without(self, done: set[tuple[str, str]]) -> Job:
        """The job less some (method, id)."""
        left = {m: tuple(i for i in ids if (m, i) not in done) for m, ids in self.pending.items()}
        return Job(self.group, self.samples, {m: ids for m, ids in left.items() if ids})

    def wanted(self, sample: Sample) -> list[str]:
        """Names of the methods that have yet to answer a sample."""
        return [name for name, ids in self.pending.items() if sample.id in ids]

    @property
    def size(self) -> int:
        """Rows that it will give."""
        return sum(map(len, self.pending.values()))


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know; pickled to processes.

    Args:
        task: the benchmark.
        methods: those that run.
        model: hub name, folder, or "tiny".
        device, dtype: None for what `mmkv ask` takes.
        threads: CPU threads of torch; None leaves them.
    """

    task: Task
    methods: tuple[Method, ...]
    model: str
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def start(self, loaded: tuple[Any, Any] | None = None) -> Worker:
        """Load the model, unless (model, processor) are there already."""
        from mmkv.eval.worker import Worker

        return Worker(self, loaded)


def given_up(job: Job, reason: str) -> list[dict[str, Any]]:
    """Rows for what a job has pending, all skipped."""
    return [head_of(name, s) | dict(skipped=reason) for s in job.samples for name in job.wanted(s)]


def head_of(method: str, sample: Sample) -> dict[str, Any]:
    """The part of a row that is known before anything runs."""
    return dict(method=method, id=sample.id, group=sample.group, facts=dict(sample.facts), target=sample.target)
