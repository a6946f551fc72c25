"""The benchmarks of packed attention: what they compare is right, and the machine code says what is claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import decode_attention  # noqa: E402
from attention_peers import unpacked  # noqa: E402
from timing import CpuTimer  # noqa: E402


def test_all_answers_are_compared_and_the_fastest_dense_one_is_the_baseline():
    rows = decode_attention.measure((4, 2, 64), 1, 300, ["kivi-4", "vidkv"], CpuTimer(2), torch.float32, 1e9)
    names = {row["name"] for row in rows}
    assert {"kivi-4", "vidkv", "sdpa math", "kivi-4, unpacked first"} <= names
    (best,) = {row["baseline"] for row in rows}
    dense = [row for row in rows if row["name"].startswith("sdpa")]
    assert min(dense, key=lambda row: row["us"])["name"] == best
    for row in rows:
        if row["error"] is not None:
            assert row["error"] < 1e-5, row["name"]
    assert next(row for row in rows if row["name"] == best)["times_baseline"] == 1


def test_unpacked_is_what_was_packed():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 100, 32), torch.randn(2, 3, 100, 32)
    k, v = unpacked(decode_attention.segment_of("kivi-4", keys, values), torch.float32)
    assert k.shape == v.shape == (2, 3, 100, 32)
    assert float((k - keys).abs().max()) < 0.3
    assert float((v - values).abs().max()) < 0.3


def written(folder: Path, script: str, *options: str) -> list[dict]:
    """Rows that a benchmark writes, run in a process of its own, where nothing is interpreted."""
    out = folder / f"{script}.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # set by the kernels' tests
    command = [sys.executable, str(FOLDER / f"{script}.py"), *options, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=env)
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_few_instructions_a_number(tmp_path):
    pytest.importorskip("triton")
    rows = written(tmp_path, "instructions", "--presets", "kivi-2")
    taken = {(row["format"], row["kernel"]): row["per_number"] for row in rows}
    assert taken["kivi-2", "planes"] < 4 < 12 < taken["kivi-2", "general"]
    assert not any(row["stack"] for row in rows if row["kernel"] == "planes")


@pytest.mark.slow
def test_few_launches_a_layer(tmp_path):
    pytest.importorskip("triton")
    rows = written(tmp_path, "launches", "--presets", "kivi-2", "vidkv", "waterfill")
    found = {row["preset"]: row for row in rows}
    for name, most in (("kivi-2", 3), ("vidkv", 10), ("waterfill", 8)):
        assert found[name]["total"] <= most, found[name]
        assert found[name]["triton"] == found[name]["segments"] + 2, "one each, one for the tail, one to merge"
        assert found[name]["triton"] + found[name]["torch"] == found[name]["total"]


@pytest.mark.slow
def test_registers_suffice(tmp_path):
    pytest.importorskip("triton")
    rows = written(tmp_path, "registers", "--capabilities", "89", "--groups", "tokens")
    assert {row["kernel"] for row in rows} == {"_most_similar", "_mean", "_total", "_rotate"}
    for row in rows:
        (found,) = row["compiled"]
        assert 0 < found["registers"] <= 255
        assert found["stack"] <= 64, row
        assert found["shared"] <= 99 * 1024, row
