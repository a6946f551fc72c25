"""Result folders: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mmkv.eval.results import CONFIG, ResultError, Results, differences, read

CONFIGURATION = dict(task="t", settings=dict(frames=4), methods=dict(dense="nothing"), command="a", started="1")


def row(number, method="dense", **more):
    return dict(method=method, id=f"s{number}", group="g", score=1.0) | more


def test_rows_are_there_again(tmp_path):
    with Results(tmp_path / "r", CONFIGURATION) as results:
        results.append(row(1, response="ü\n"))
        results.append(row(2))
    with Results(tmp_path / "r", CONFIGURATION | dict(command="b", started="2")) as results:
        assert list(results.rows) == [("dense", "s1"), ("dense", "s2")]
        assert results.rows["dense", "s1"]["response"] == "ü\n"
        results.append(row(3))
    assert len(read(tmp_path / "r")) == 3


def test_row_twice_is_refused(tmp_path):
    with Results(tmp_path, CONFIGURATION) as results:
        results.append(row(1))
        with pytest.raises(ResultError, match="dense, s1 is there already"):
            results.append(row(1, score=0.0))
        results.append(row(1, method="kivi-2"))


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_torn_last_line_is_cut_off(tmp_path, kept):
    with Results(tmp_path, CONFIGURATION) as results:
        results.append(row(1))
        results.append(row(2))
    path = tmp_path / "predictions.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    assert list(read(tmp_path)) == [("dense", "s1")]
    with Results(tmp_path, CONFIGURATION) as results:
        results.append(row(2))
    assert path.read_bytes() == first + second


def test_damaged_line_before_the_last_is_named(tmp_path):
    with Results(tmp_path, CONFIGURATION) as results:
        results.append(row(1))
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'{"method": "den\n' + path.read_bytes())
    with pytest.raises(ResultError, match="line 1 is damaged"):
        Results(tmp_path, CONFIGURATION)


def test_other_configuration_is_refused(tmp_path):
    Results(tmp_path, CONFIGURATION).close()
    with pytest.raises(ResultError, match=r"settings.frames: 4 there, 8 now.*choose another --out"):
        Results(tmp_path, CONFIGURATION | dict(settings=dict(frames=8)))
    assert json.loads((tmp_path / CONFIG).read_text())["settings"] == dict(frames=4)
    assert differences(dict(a=1, b=dict(c=2)), dict(b=dict(c=3), d=4)) == [
        "a: 1 there, None now",
        "b.c: 2 there, 3 now",
        "d: None there, 4 now",
    ]


def test_predictions_without_a_configuration_are_not_taken_over(tmp_path):
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(ResultError, match=r"predictions without config\.json"):
        Results(tmp_path, CONFIGURATION)


def test_resumes_are_told(tmp_path):
    Results(tmp_path, CONFIGURATION | dict(commit="abc")).close()
    Results(tmp_path, CONFIGURATION | dict(commit="abc+", started="2")).close()
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["commit"] == "abc"
    assert config["resumed"] == [dict(command="a", started="2", commit="abc+")]
    Results(tmp_path, CONFIGURATION | dict(commit="abc+", started="3")).close()
    assert len(json.loads((tmp_path / CONFIG).read_text())["resumed"]) == 2


def test_two_writers_of_one_file_are_refused(tmp_path):
    with Results(tmp_path, CONFIGURATION), pytest.raises(ResultError, match="being written by another run"):
        Results(tmp_path, CONFIGURATION)
    Results(tmp_path, CONFIGURATION).close()


def test_skipped_rows_can_be_tried_again(tmp_path):
    with Results(tmp_path, CONFIGURATION) as results:
        results.append(row(1))
        results.append(dict(method="dense", id="s2", skipped="missing video"))
        assert results.drop_skipped() == 1
        assert list(read(tmp_path)) == [("dense", "s1")]
        results.append(row(2))
    assert list(read(tmp_path)) == [("dense", "s1"), ("dense", "s2")]


def test_ranks_write_apart_and_the_last_one_merges(tmp_path):
    order = [("dense", f"s{n}") for n in range(4)]
    with Results(tmp_path, CONFIGURATION, 0, 2) as first, Results(tmp_path, CONFIGURATION, 1, 2) as second:
        first.append(row(0))
        second.append(row(1))
        first.append(row(2))
        assert first.merge(order) is None
        second.append(row(3))
        assert list(second.merge(order)) == order
    assert [p.name for p in tmp_path.glob("predictions*")] == ["predictions.jsonl"]
    assert list(read(tmp_path)) == order


def test_rows_of_a_merge_that_was_cut_short_count_once(tmp_path):
    with Results(tmp_path, CONFIGURATION, 0, 2) as results:
        results.append(row(0))
    shard = tmp_path / "predictions.rank0of2.jsonl"
    (tmp_path / "predictions.jsonl").write_bytes(shard.read_bytes())
    assert len(read(tmp_path)) == 1
    shard.write_text(json.dumps(row(0, score=0.0)) + "\n")
    with pytest.raises(ResultError, match="has another row already"):
        read(tmp_path)


WRITER = """
import sys
from mmkv.eval.results import Results
with Results(sys.argv[1], {"task": "t"}) as results:
    for number in range(len(results.rows), 100000):
        results.append({"method": "dense", "id": str(number), "text": "x" * 500})
        print(number, flush=True)
"""


def test_killed_writer_loses_nothing_it_said(tmp_path):
    """SIGKILL at whatever moment, three times over; every row that was told is there, once."""
    told = -1
    for stop in (20, 55, 90):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for line in writer.stdout:
                assert int(line) == told + 1  # goes on exactly where the disk ends, or where the last kill was seen
                told = int(line)
                if told >= stop:
                    writer.kill()
                    break
            rest = writer.stdout.read().split()
        told = max([told, *map(int, rest)])
        there = list(read(tmp_path))
        assert there[: told + 1] == [("dense", str(n)) for n in range(told + 1)]
        told = len(there) - 1  # a row may be on the disk and not yet told
    assert len((tmp_path / "predictions.jsonl").read_bytes().split(b"\n")) >= told
    assert os.path.getsize(tmp_path / "predictions.jsonl") > 500 * told
