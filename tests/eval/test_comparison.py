"""`mmkv compare`: cells, frontier, files, and what it says about results that were made differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmkv.cli import app
from mmkv.eval import comparison, table
from mmkv.eval.summary import summarise
from mmkv.eval.task import Task, by_facet


class Plain(Task):
    """Right or wrong."""

    name, scorer = "plain", "plain-1"

    def settings(self):
        return {}

    def samples(self):
        return []

    def media(self, sample): ...

    def prompt(self, sample, media): ...

    def score(self, sample, response): ...

    def summary(self, rows):
        return dict(
            headline=dict(accuracy=100 * sum(r["score"] for r in rows) / len(rows)), by=by_facet(rows, ("kind",))
        )


def row(method, number, score, **more):
    """Two samples in a group; `kv_bytes` and seconds that are easy to average."""
    told = dict(
        method=method, id=str(number), group=f"g{number // 2}", facts=dict(kind="ab"[number % 2]), target="A",
        response="A" if score else "B", score=float(score), prompt_tokens=10, vision_tokens=8, vision_tokens_held=4.0,
        tokens_held=6.0, kv_bytes=1024 * (1 + number), kv_bytes_dense=4096, kv_bytes_peak=4096, prefill_seconds=2.0,
        shared_prefill=number % 2 == 1, decode_seconds=0.5, new_tokens=1, peak_memory=2**20,
    )  # fmt: skip
    return told | more


ROWS = [row("dense", n, s) for n, s in enumerate((1, 1, 0, 1))] + [
    row("kivi-2", n, s) for n, s in enumerate((1, 0, 0, 1))
]


def result(folder: Path, rows=ROWS, **config) -> Path:
    folder.mkdir()
    names = list(dict.fromkeys(r["method"] for r in rows))
    told = dict(
        task="plain", scorer="plain-1", model="some/model", weights="w", dtype="bfloat16", device="cpu", commit="abc",
        prompt_hash="p", answer_mode="generate", settings=dict(frames=8), versions=dict(torch="2"), methods={},
        command="c", started="s",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told | config))
    (folder / "summary.json").write_text(json.dumps(summarise(Plain(), rows, names)))
    return folder


def test_summary_by_hand():
    found = summarise(Plain(), ROWS, ["dense", "kivi-2"])
    assert found["samples"] == 4 and found["groups"] == 2
    mine = found["methods"]["kivi-2"]
    assert mine["headline"] == dict(accuracy=50.0) and mine["score"] == 0.5
    assert mine["by"]["kind"] == {"a": {"n": 2, "score": 0.5}, "b": {"n": 2, "score": 0.5}}
    assert mine["kv_bytes"] == 1024 * 2.5 and mine["prefills"] == 2 and mine["prefill_seconds"] == 2.0
    against = mine["against_dense"]
    assert (against["n"], against["points"], against["lost"], against["won"]) == (4, -25.0, 1, 0)
    assert against["mcnemar"] == 1.0 and against["agreement"] == 0.75
    # differences -1 and 0 over the groups: means 0 (1/4), -1/4 (1/2), -1/2 (1/4) of the draws
    assert against["interval"] == [-50.0, 0.0]
    assert "against_dense" not in found["methods"]["dense"]


def test_what_was_skipped_is_left_out_and_told():
    gone = dict(method="kivi-2", id="3", group="g1", facts={}, target="A", skipped="missing video: x.mp4")
    found = summarise(Plain(), [*ROWS[:7], gone], ["dense", "kivi-2"])
    assert found["skipped"] == dict(samples=1, reasons={"missing video: x.mp4": 1})
    assert found["methods"]["kivi-2"]["n"] == found["methods"]["kivi-2"]["against_dense"]["n"] == 3
    assert found["methods"]["dense"]["n"] == 4
    nothing = summarise(Plain(), [gone], ["kivi-2"])
    assert nothing["methods"]["kivi-2"] == dict(n=0, skipped=1)
    assert table.cells("kivi-2", nothing["methods"]["kivi-2"])[:2] == ["kivi-2", "all skipped"]


def test_unscored_rows_wait():
    rows = [r | dict(score=None) for r in ROWS[:4]]

    class Open(Plain):
        def summary(self, rows):
            return dict(headline=dict(judged=0.0), by={})

    found = summarise(Open(), rows, ["dense"])["methods"]["dense"]
    assert found["scored"] == 0 and found["interval"] is None
    assert table.cells("dense", found)[1:3] == ["unscored", "-"]


def test_frontier():
    points = [(1, 50), (2, 40), (2, 70), (3, 70), (4, 90), (5, 80)]
    assert comparison.frontier(points) == [(1, 50), (2, 70), (4, 90)]


def test_cells():
    found = summarise(Plain(), ROWS, ["dense", "kivi-2"])["methods"]["kivi-2"]
    assert dict(zip(table.HEADS, table.cells("kivi-2", found))) == {
        "method": "kivi-2", "score": "50.0 %", "95 % interval": "50.0 - 50.0", "against dense": "-25.0 [-50.0, +0.0]",
        "p": "1.000", "agrees": "75.0%", "vision tokens": "4 / 8", "KV bytes": "2.5 KiB", "of dense": "62.5%",
        "prefill, s": "2.000", "decode, s": "0.500", "peak": "1.0 MiB", "n": "4",
    }  # fmt: skip


def test_command_writes_markdown_and_html(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install mmkv[eval]")
    one, two = result(tmp_path / "one"), result(tmp_path / "two", settings=dict(frames=16), commit="abd")
    told = CliRunner().invoke(app, ["compare", str(one), str(two), "--out", str(tmp_path / "c.md")])
    assert told.exit_code == 0, told.output
    text = (tmp_path / "c.md").read_text()
    assert text.splitlines()[0].startswith("| benchmark | model | method | score |")
    assert text.count("| plain | model | kivi-2 | 50.0 % |") == 2
    assert "![accuracy over bytes and time](c.png)" in text
    assert "differ: settings.frames: 8 there, 16 now" in text
    assert "commit abc" in text and "commit abd" in text and "torch 2" in text
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    told = CliRunner().invoke(app, ["compare", str(one), "--out", str(tmp_path / "d.html")])
    assert told.exit_code == 0
    page = (tmp_path / "d.html").read_text()
    assert "<td>kivi-2</td>" in page and "src='d.png'" in page


def test_command_refuses_in_one_line(tmp_path):
    def error(*words):
        told = CliRunner().invoke(app, ["compare", *map(str, words)])
        assert told.exit_code == 2 and not told.stdout  # before anything is shown
        return told.stderr

    assert "is no result folder" in error(tmp_path)
    one = result(tmp_path / "one")
    assert "files that end in .md, .html, .png" in error(one, "--out", tmp_path / "x.txt")
    (one / "summary.json").unlink()
    assert "is not finished" in error(one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "/nowhere"], "no such data folder: /nowhere"),
        (["--method", "kiwi-2"], "did you mean 'kivi-2'"),
        (["--frames", "4", "--fps", "2"], "give one of the two"),
        (["--engine", "dask"], "possible are local, ray"),
        (["--answer", "guess"], "possible are generate, likelihood"),
        (["--prompt", "mine"], "possible are official, lmms, vlmeval, plain"),
        (["--workers", "0"], "workers 0"),
    ],
)
def test_eval_refuses_in_one_line(words, message, tmp_path):
    data = [] if "--data" in words else ["--data", str(bare(tmp_path))]
    told = CliRunner().invoke(app, ["eval", "video-mme", *data, *words])
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("\n") == 1


def bare(folder: Path) -> Path:
    """A folder with a parquet file."""
    (folder / "test.parquet").write_bytes(b"")
    return folder
