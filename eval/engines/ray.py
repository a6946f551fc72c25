"""Jobs on a Ray cluster: actors with one model each; needs `pip install mmkv[ray]`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mmkv.eval.engines import TRIES
from mmkv.eval.work import Job, Work, given_up


class RayWorker:
    """The actor's class: a worker, and the process it lives in."""

    def __init__(self, work: Work):
        self.worker = work.start()

    def rows(self, job: Job) -> list[dict[str, Any]]:
        """All rows of a job."""
        return list(self.worker.rows(job))

    def pid(self) -> int:
        """Of its process."""
        import os

        return os.getpid()


def on_ray(
    work: Work,
    jobs: Sequence[Job],
    workers: int,
    on_row: Callable[[dict], None],
    address: str | None = None,
    gpus: float | None = None,
    on_actor: Callable[[Any], None] = lambda actor: None,
) -> None:
    """Jobs shared by actors; one that dies is replaced and its job is done again.

    Args:
        work, jobs, workers: as for processes.
        on_row: called here, for each row of a job that is done.
        address: of a running cluster ("auto": the one of this machine); None starts a local one, and stops it.
        gpus: of each actor; None for one where the work is on CUDA, else none.
        on_actor: called with each new actor.

    Raises:
        ModuleNotFoundError: Ray is not installed; the message says how to get it.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--engine ray needs Ray; install it with: pip install 'mmkv[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        slots = None if address else max(workers, 1)
        ray.init(
            address=address, num_cpus=slots, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    try:
        _share(ray, work, jobs, workers, on_row, _gpus(work, gpus), on_actor)
    finally:
        if mine:
            ray.shutdown()


def _gpus(work: Work, gpus: float | None) -> float:
    if gpus is not None:
        return gpus
    import torch

    return float(torch.cuda.is_available() if work.device is None else work.device.startswith("cuda"))


def _share(ray, work: Work, jobs: Sequence[Job], workers: int, on_row, gpus: float, on_actor) -> None:
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(RayWorker)

    def hire(count: int) -> list[Any]:
        actors = [remote.remote(work) for _ in range(count)]
        ray.get([actor.pid.remote() for actor in actors])  # a model that cannot be loaded ends the run here
        for actor in actors:
            on_actor(actor)
        return actors

    waiting: deque[Job] = deque(jobs)
    deaths: dict[str, int] = {}
    running: dict[Any, tuple[Any, Job]] = {}

    def give(actor: Any) -> None:
        job = waiting.popleft()
        running[actor.rows.remote(job)] = (actor, job)

    for actor in hire(min(workers, len(jobs))):
        give(actor)
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, job = running.pop(ready)
        try:
            rows = ray.get(ready)
        except ray.exceptions.RayActorError as error:  # the process is gone; errors of ours are RayTaskError and pass
            deaths[job.group] = deaths.get(job.group, 0) + 1
            if deaths[job.group] >= TRIES:
                rows = given_up(job, f"its worker died {TRIES} times: {str(error).splitlines()[0]}")
            else:
                rows = []
                waiting.appendleft(job)
            actor = hire(1)[0] if waiting else None
        for row in rows:
            on_row(row)
        if waiting:
            give(actor)
