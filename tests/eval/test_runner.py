"""Runs of the bundled model on a generated set: rows, what is skipped, resuming, and numbers above chance."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet
from videos import cut

from mmkv.eval import synthetic_video
from mmkv.eval.frames_cache import FramesCache
from mmkv.eval.methods import methods_of
from mmkv.eval.results import ResultError, read
from mmkv.eval.runner import Plan, run
from mmkv.eval.sampling import Sampling
from mmkv.eval.video_mme.task import VideoMME
from mmkv.models import tiny


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four videos, twelve questions, none harmed."""
    return synthetic_video.write(tmp_path_factory.mktemp("set"), 4)


def task_of(folder, **options):
    cache = options.pop("cache", FramesCache(None))
    return VideoMME(folder, Sampling(frames=32), "likelihood", cache, style="plain", **options)


def copied(data, folder):
    import shutil

    return shutil.copytree(data, folder / "data")


def test_set_is_in_the_exact_format(data):
    rows = parquet.read_table(data / "videomme" / "test-00000-of-00001.parquet").to_pylist()
    assert list(rows[0]) == [
        "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type", "question", "options",
        "answer",
    ]  # fmt: skip
    assert [row["question_id"] for row in rows[:4]] == ["001-1", "001-2", "001-3", "002-1"]
    assert [row["duration"] for row in rows[::3]] == ["short", "medium", "long", "short"]
    for row in rows:
        assert [option[:3] for option in row["options"]] == ["A. ", "B. ", "C. ", "D. "]
        assert (data / "data" / f"{row['videoID']}.mp4").is_file()
        assert " --> " in (data / "subtitle" / f"{row['videoID']}.srt").read_text()
    assert {row["sub_category"] for row in rows} <= {"Technology", "Daily Life"}


def test_set_is_the_same_again(data, tmp_path):
    again = synthetic_video.write(tmp_path, 2)
    name = "videomme/test-00000-of-00001.parquet"
    assert parquet.read_table(again / name).to_pylist() == parquet.read_table(data / name).to_pylist()[:6]


def test_rows_and_summary(data, loaded, tmp_path):
    seen = []
    cache = FramesCache(tmp_path / "frames")
    out = run(
        task_of(data, cache=cache), methods_of("kivi-2,SnapKV(budget=0.5)"), "tiny", Plan(tmp_path / "r"),
        lambda done, total: seen.append((done, total)), loaded,
    )  # fmt: skip
    assert seen == [(n, 36) for n in range(37)]
    assert [row["id"] for row in out.rows[:12]] == [f"{v:03d}-{q}" for v in (1, 2, 3, 4) for q in (1, 2, 3)]
    assert cache.throughput.decoded == 4  # once for all methods and questions
    dense = out.summary["methods"]["dense"]
    assert dense["headline"]["accuracy"] > 60  # chance is 25
    assert dense["n"] == dense["scored"] == 12 and dense["prefills"] == 4
    assert out.summary["methods"]["SnapKV(budget=0.5)"]["prefills"] == 12
    against = out.summary["methods"]["kivi-2"]["against_dense"]
    rows = {(row["method"], row["id"]): row for row in out.rows}
    same = [
        rows["kivi-2", f"{v:03d}-{q}"]["answer"] == rows["dense", f"{v:03d}-{q}"]["answer"]
        for v in (1, 2, 3, 4)
        for q in (1, 2, 3)
    ]
    assert against["n"] == 12 and against["agreement"] == sum(same) / 12
    row = rows["kivi-2", "003-1"]
    assert row["frames"] == 32 and row["video_frames"] == 128 and row["pixels"] == [256, 256]
    assert row["decoder"] in ("decord", "pyav") and not row["short_video"]
    assert row["prefill_seconds"] > 0 and row["decode_seconds"] > 0 and row["kv_bytes"] < row["kv_bytes_dense"]
    official = json.loads((out.folder / "official-SnapKV_budget=0.5.json").read_text())
    assert len(official) == 4 and official[0]["questions"][2]["question_id"] == "001-3"
    assert (out.folder / "official-kivi-2.json").is_file()
    config = json.loads((out.folder / "config.json").read_text())
    assert config["settings"]["frames"] == 32 and config["settings"]["style"] == "plain"
    assert config["scorer"] == "video-mme-1" and config["answer_mode"] == "likelihood"
    assert set(config) >= {"versions", "commit", "device", "prompt_hash", "weights", "dtype", "methods", "positions"}
    assert json.loads((out.folder / "summary.json").read_text()) == json.loads(json.dumps(out.summary))


def test_what_cannot_be_run_is_a_row_with_the_reason(data, loaded, tmp_path):
    folder = copied(data, tmp_path)
    (folder / "data" / "world001.mp4").unlink()
    cut(folder / "data" / "world002.mp4", 0.6)
    path = folder / "videomme" / "test-00000-of-00001.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[6]["options"] = ["A. one"]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    out = run(task_of(folder), methods_of("kivi-2"), "tiny", Plan(tmp_path / "r"), loaded=loaded)
    assert len(out.rows) == 24
    reasons = {row["id"]: row["skipped"] for row in out.rows if row.get("skipped")}
    assert sorted(reasons) == ["001-1", "001-2", "001-3", "002-1", "002-2", "002-3", "003-1"]
    assert reasons["001-1"] == "missing video: world001.mp4"
    assert "world002.mp4" in reasons["002-1"] and "\n" not in reasons["002-1"]
    assert reasons["003-1"].startswith("corrupt row: options are")
    told = out.summary["skipped"]
    assert told["samples"] == 7 and sorted(told["reasons"].values()) == [1, 3, 3]
    assert out.summary["methods"]["kivi-2"]["n"] == 5 and out.summary["methods"]["kivi-2"]["skipped"] == 7

    # put the video back: only what was skipped is run again, and only if one asks for it
    (folder / "data" / "world001.mp4").write_bytes((data / "data" / "world001.mp4").read_bytes())
    calls = []
    run(task_of(folder), methods_of("kivi-2"), "tiny", Plan(tmp_path / "r"), lambda *t: calls.append(t), loaded)
    assert calls == [(24, 24)]
    again = run(task_of(folder), methods_of("kivi-2"), "tiny", Plan(tmp_path / "r", retry_skipped=True), loaded=loaded)
    assert again.summary["skipped"]["samples"] == 4
    assert Counter(map(tuple, ((r["method"], r["id"]) for r in again.rows))).most_common(1)[0][1] == 1


def test_short_video_is_told(data, loaded, tmp_path):
    task = VideoMME(data, Sampling(frames=64), "likelihood", style="plain")
    out = run(task, methods_of("dense"), "tiny", Plan(tmp_path / "r", limit=6), loaded=loaded)
    assert [row["short_video"] for row in out.rows] == [True] * 3 + [False] * 3
    assert [row["frames"] for row in out.rows] == [32] * 3 + [64] * 3
    assert out.summary["methods"]["dense"]["short_videos"] == 1


def test_resume_goes_on_where_it_stopped(data, loaded, tmp_path):
    plan = Plan(tmp_path / "r", limit=6)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        run(task_of(data), methods_of("kivi-2"), "tiny", plan, stop, loaded)
    first = read(tmp_path / "r")
    assert len(first) == 5
    counts = []
    out = run(task_of(data), methods_of("kivi-2"), "tiny", plan, lambda done, total: counts.append(done), loaded)
    assert counts[0] == 5 and counts[-1] == 12 and len(counts) == 8
    assert {key: row for key, row in read(tmp_path / "r").items() if key in first} == first
    assert len(out.rows) == 12
    with pytest.raises(ResultError, match="extractor: 'official' there, 'lmms' now"):
        run(task_of(data, extractor="lmms"), methods_of("kivi-2"), "tiny", plan, loaded=loaded)


def test_ranks_share_the_samples(data, loaded, tmp_path, monkeypatch):
    plan, outcomes = Plan(tmp_path / "r"), []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        outcomes.append(run(task_of(data), methods_of("dense"), "tiny", plan, loaded=loaded))
    assert outcomes[0].summary is None and len(outcomes[0].rows) == 6
    assert outcomes[1].summary["methods"]["dense"]["n"] == 12
    assert [row["id"] for row in outcomes[1].rows] == [s.id for s in task_of(data).samples()]


def test_refusals(data, tmp_path):
    with pytest.raises(ValueError, match="possible are local, ray"):
        Plan(engine="dask")
    with pytest.raises(ValueError, match="workers 0"):
        Plan(workers=0)
    rows = parquet.read_table(data / "videomme" / "test-00000-of-00001.parquet").to_pylist()
    parquet.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="no samples there"):
        run(task_of(tmp_path / "short.parquet", durations=("long",)), methods_of("dense"), "tiny", Plan(tmp_path / "r"))


def test_no_frames_at_all(data, tmp_path):
    """0 is a wrong number, and not the default."""
    arguments = ["--data", str(data), "--frames", "0", "--out", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-m", "mmkv.cli", "eval", "video-mme", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "frames 0" in done.stderr.replace("=", " ") and done.stderr.count("\n") == 1


def command(data, out):
    return [
        sys.executable, "-m", "mmkv.cli", "eval", "video-mme", "--data", str(data), "--method", "kivi-2", "--frames", "32",
        "--out", str(out), "--frames-cache", "0", "--limit", "6", "--dtype", "float32",
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_run_goes_on_without_loss(data, loaded, tmp_path):
    """SIGKILL in the middle of `mmkv eval`; then it ends with each row once, and with an undisturbed run's answers."""
    path = tmp_path / "r" / "predictions.jsonl"
    said = open(tmp_path / "stderr", "w+")  # noqa: SIM115
    with said, subprocess.Popen(command(data, tmp_path / "r"), stderr=said) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.01)
        process.kill()
    there = len(read(tmp_path / "r"))
    assert 4 <= there < 12
    done = subprocess.run(command(data, tmp_path / "r"), capture_output=True, text=True, check=True)
    assert f"{there} of 12 rows are there; the rest goes on" in done.stderr
    assert "frames/s" in done.stdout and "kivi-2" in done.stdout
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len({(row["method"], row["id"]) for row in lines}) == 12
    whole = run(task_of(data), methods_of("kivi-2"), "tiny", Plan(tmp_path / "whole", limit=6), loaded=loaded)
    assert {(row["method"], row["id"]): row["answer"] for row in lines} == {
        (row["method"], row["id"]): row["answer"] for row in whole.rows
    }


@pytest.mark.slow
def test_workers_give_the_rows_of_one(data, loaded, tmp_path):
    one = run(task_of(data), methods_of("dense"), "tiny", Plan(tmp_path / "one"), loaded=loaded)
    two = run(task_of(data), methods_of("dense"), "tiny", Plan(tmp_path / "two", workers=2, dtype="float32", threads=1))
    assert [(row["id"], row["answer"]) for row in two.rows] == [(row["id"], row["answer"]) for row in one.rows]
