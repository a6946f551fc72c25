"""Engines: every row once, whoever dies."""

from __future__ import annotations

import os
import signal

import pytest
from eval_crew import FakeWork, jobs, keys, wanted

from mmkv.eval.engines import TRIES, local, ranks


def test_processes_share_the_jobs(tmp_path):
    rows = []
    local.processes(FakeWork(str(tmp_path)), jobs(), 2, rows.append)
    assert keys(rows) == wanted(jobs())
    assert len({row["pid"] for row in rows}) == 2
    assert os.getpid() not in {row["pid"] for row in rows}


def test_dead_worker_is_replaced_and_its_samples_are_done_again(tmp_path):
    rows = []
    local.processes(FakeWork(str(tmp_path), dies="1-1"), jobs(), 2, rows.append)
    assert keys(rows) == wanted(jobs())  # none lost and none twice, those before the death included
    assert len({row["pid"] for row in rows}) == 3
    assert not any(row.get("skipped") for row in rows)


def test_sample_that_kills_every_worker_is_given_up_and_named(tmp_path):
    rows = []
    local.processes(FakeWork(str(tmp_path), dies="1-1", always=True), jobs(), 1, rows.append)
    assert keys(rows) == wanted(jobs())
    gone = [row for row in rows if row.get("skipped")]
    # the first sample of the group had been answered; what follows the deadly one goes with it
    assert keys(gone) == [(m, i) for m in ("dense", "kivi-2") for i in ("1-1", "1-2")]
    assert gone[0]["skipped"] == f"its worker died {TRIES} times, last with exit code -9"


def test_fault_of_ours_ends_the_run_with_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a fault of ours"):
        local.processes(FakeWork(str(tmp_path), fails="2-0"), jobs(), 2, [].append)


def test_this_process(tmp_path):
    rows = []
    local.here(FakeWork(str(tmp_path)), jobs(), rows.append)
    assert {row["pid"] for row in rows} == {os.getpid()}
    assert keys(rows) == wanted(jobs())


def test_job_less_what_is_done():
    (job,) = jobs(1, 2)
    left = job.without({("dense", "0-0"), ("dense", "0-1"), ("kivi-2", "0-1")})
    assert dict(left.pending) == {"kivi-2": ("0-0",)}
    assert left.size == 1 and job.size == 4


def test_ranks():
    assert ranks.rank_of({}) == (0, 1)
    assert ranks.rank_of({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    for wrong in ({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="both are needed"):
            ranks.rank_of(wrong)
    with pytest.raises(ValueError, match="possible are 0 to 1"):
        ranks.rank_of({"RANK": "2", "WORLD_SIZE": "2"})
    found = [ranks.mine(range(7), rank, 3) for rank in range(3)]
    assert found == [[0, 3, 6], [1, 4], [2, 5]]
    assert ranks.local_device("cpu", {"LOCAL_RANK": "1"}) == "cpu"


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster of two processors."""
    ray = pytest.importorskip("ray")
    import sys
    from pathlib import Path

    here = str(Path(__file__).parents[1])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )  # fmt: skip
    assert sys.modules["ray"] is ray
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_shares_the_jobs_and_replaces_the_dead(cluster, tmp_path):
    from mmkv.eval.engines.ray import on_ray

    rows: list = []
    on_ray(FakeWork(str(tmp_path), dies="1-1"), jobs(), 2, rows.append)
    assert keys(rows) == wanted(jobs())
    assert len({row["pid"] for row in rows}) >= 2
    assert not any(row.get("skipped") for row in rows)


@pytest.mark.slow
def test_ray_worker_killed_from_outside(cluster, tmp_path):
    from mmkv.eval.engines.ray import on_ray

    rows: list = []
    actors: list = []

    def kill_the_first(row):
        if not rows:
            os.kill(cluster.get(actors[0].pid.remote()), signal.SIGKILL)
        rows.append(row)

    on_ray(FakeWork(str(tmp_path)), jobs(6), 2, kill_the_first, on_actor=actors.append)
    assert keys(rows) == wanted(jobs(6))
    assert len(actors) >= 2


@pytest.mark.slow
def test_ray_gives_up_what_kills_every_worker_and_tells_faults(cluster, tmp_path):
    from mmkv.eval.engines.ray import on_ray

    rows: list = []
    on_ray(FakeWork(str(tmp_path), dies="0-0", always=True), jobs(2), 1, rows.append)
    assert keys(rows) == wanted(jobs(2))
    assert {row["group"] for row in rows if row.get("skipped")} == {"g0"}
    with pytest.raises(LookupError, match="a fault of ours"):
        on_ray(FakeWork(str(tmp_path), fails="1-0"), jobs(2), 1, [].append)
