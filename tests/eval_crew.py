"""Light workers for tests of the engines: no model; some die or fail on purpose."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from mmkv.eval.task import Sample
from mmkv.eval.work import Job, head_of


@dataclass(frozen=True)
class FakeWork:
    """In place of `Work`: `start` gives a `FakeWorker`.

    Args:
        folder: where a worker leaves a mark before it dies, so that the next one does not.
        dies: id of the sample that kills its process: once, or `always`.
        fails: id of the sample that raises.
    """

    folder: str
    dies: str = ""
    always: bool = False
    fails: str = ""
    device: str | None = "cpu"

    def start(self, loaded=None) -> FakeWorker:
        return FakeWorker(self)


class FakeWorker:
    def __init__(self, work: FakeWork):
        self.work = work

    def rows(self, job: Job):
        for sample in job.samples:
            for name in job.wanted(sample):
                mark = Path(self.work.folder) / sample.id
                if sample.id == self.work.dies and (self.work.always or not mark.exists()):
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if sample.id == self.work.fails:
                    raise LookupError("a fault of ours")
                yield head_of(name, sample) | dict(score=1.0, response="A", pid=os.getpid())


def jobs(groups: int = 4, per_group: int = 3, methods: tuple[str, ...] = ("dense", "kivi-2")) -> list[Job]:
    out = []
    for g in range(groups):
        samples = tuple(Sample(f"{g}-{i}", f"g{g}") for i in range(per_group))
        out.append(Job(f"g{g}", samples, {m: tuple(s.id for s in samples) for m in methods}))
    return out


def keys(rows) -> list[tuple[str, str]]:
    return sorted((row["method"], row["id"]) for row in rows)


def wanted(found: list[Job]) -> list[tuple[str, str]]:
    return sorted((m, i) for job in found for m, ids in job.pending.items() for i in ids)
