"""Jobs in this process, or in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mmkv.eval.engines import TRIES
from mmkv.eval.work import Job, Work, given_up

Row = dict[str, Any]
DEAD = object()  # heard from a process that is gone


def here(work: Work, jobs: Sequence[Job], on_row: Callable[[Row], None], loaded=None) -> None:
    """All jobs one after the other, in this process."""
    worker = work.start(loaded)
    for job in jobs:
        for row in worker.rows(job):
            on_row(row)


class _Process:
    """A process with a worker, and the job it has."""

    def __init__(self, work: Work):
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends when the process does
        self.job: Job | None = None
        self.done: set[tuple[str, str]] = set()

    def give(self, job: Job) -> None:
        self.job, self.done = job, set()
        self.pipe.send(job)

    def hear(self) -> Any:
        """The next message; `DEAD` where the process is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return DEAD

    def end(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def processes(work: Work, jobs: Sequence[Job], workers: int, on_row: Callable[[Row], None]) -> None:
    """Jobs shared by processes with a model each; a process that dies is replaced and its samples are done again.

    Raises:
        RuntimeError: a worker met an error of ours (its traceback is the message), or they die one after the other.
    """
    waiting: deque[Job] = deque(jobs)
    deaths: dict[str, int] = {}
    crew = [_Process(work) for _ in range(min(workers, len(jobs)))]
    try:
        for member in crew:
            member.give(waiting.popleft())
        idle = 0  # deaths since the last row
        while crew:
            for pipe in wait([member.pipe for member in crew]):
                member = next(m for m in crew if m.pipe is pipe)
                told = member.hear()
                if told is DEAD:
                    crew.remove(member)
                    member.end()
                    idle += 1
                    _check_alive(idle, member)
                    _bury(member, waiting, deaths, on_row)
                    if waiting:
                        crew.append(_Process(work))
                        crew[-1].give(waiting.popleft())
                    continue
                idle = 0
                _told(member, told, on_row)
                if told is None and not waiting:
                    crew.remove(member)
                    member.end()
                elif told is None:
                    member.give(waiting.popleft())
    finally:
        for member in crew:
            member.process.terminate()
            member.end()


def _check_alive(idle: int, member: _Process) -> None:
    """Raise RuntimeError where no worker ever gets to an answer: that is no sample's fault."""
    if idle >= 3 * TRIES:
        code = member.process.exitcode
        raise RuntimeError(f"{idle} workers died one after the other (exit code {code}); too little memory?")


def _told(member: _Process, told: Row | str | None, on_row: Callable[[Row], None]) -> None:
    """A row, None where the job is done, or the traceback of an error."""
    if isinstance(told, str):
        raise RuntimeError(f"a worker met an error:\n{told}")
    if told is None:
        member.job = None
    else:
        member.done.add((told["method"], told["id"]))
        on_row(told)


def _bury(member: _Process, waiting: deque[Job], deaths: dict[str, int], on_row: Callable[[Row], None]) -> None:
    """Put what a dead process left undone in front of what waits; or give it up."""
    if member.job is None:
        return
    left = member.job.without(member.done)
    deaths[left.group] = deaths.get(left.group, 0) + 1
    if deaths[left.group] >= TRIES:
        for row in given_up(left, f"its worker died {TRIES} times, last with exit code {member.process.exitcode}"):
            on_row(row)
    elif left.pending:
        waiting.appendleft(left)


def _serve(pipe: Connection, work: Work) -> None:
    """Body of a process: rows for each job that comes through the pipe, then None; ends when the pipe does."""
    try:
        worker = work.start()
        while True:
            job = pipe.recv()
            for row in worker.rows(job):
                pipe.send(row)
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        pipe.send(traceback.format_exc())
