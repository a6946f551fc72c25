"""The benchmarks of whole models and of single kernels: what they run is right, and their figures follow from what they took."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmkv
from mmkv._presets import PRESETS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import generate  # noqa: E402
import generating  # noqa: E402
import shapes  # noqa: E402
from allocations import allocated  # noqa: E402
from generating import Generating, Setting, Variant  # noqa: E402
from stock_graph import StockGraph  # noqa: E402
from timing import CpuTimer  # noqa: E402

# by its path: the tests have a package of that name
_found = importlib.util.spec_from_file_location("benchmark_of_kernels", ROOT / "benchmarks" / "kernels.py")
kernels = sys.modules["benchmark_of_kernels"] = importlib.util.module_from_spec(_found)
_found.loader.exec_module(kernels)

TINY = dict(shapes.SMALL, hidden_size=128, intermediate_size=128, num_hidden_layers=2)


@pytest.fixture(scope="module")
def model():
    made = shapes.make("Qwen2.5-VL", TINY, "cpu", torch.float32)
    made.generation_config.eos_token_id = None
    return made


def test_allocations_are_counted():
    kept = []
    found = allocated("cpu", lambda: kept.append((torch.zeros(1 << 20) + 1).half()))  # 4 MiB twice, 2 MiB stay
    assert found.peak == pytest.approx(8 << 20, rel=0.01)
    assert found.left == 2 << 20


# Whole models


def test_presets_for_text_each_once():
    names = generating.fitting()
    assert {PRESETS[name].cache for name in names} == {p.cache for p in PRESETS.values() if not p.next_scale}
    assert len({PRESETS[name].cache for name in names}) == len(names)


def test_names_of_variants():
    names = [variant.name for variant in generating.variants(["vidkv"], graphs=True)]
    assert names == ["stock", "vidkv", "stock, graph (static)", "stock, graph (last place)", "vidkv, graphs"]


def test_decoding_apart_is_what_generate_does(model):
    inputs = generate.prompt(model, 200, 2)
    want = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    mine = Generating(model, inputs)
    mine.prefill()
    mine.decode(2)
    mine.decode(4)
    assert torch.equal(mine.ids, want)
    graph = StockGraph(model, inputs, 8, "static")
    graph.prefill()
    said = [graph.token.clone()]
    for _ in range(6):
        graph.decode(1)
        said.append(graph.token.clone())
    assert torch.equal(torch.cat(said, 1), want[:, -7:])


class Waiting(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["static", "last place"])
def test_a_step_of_the_stock_model_can_be_captured(model, kind):
    graph = StockGraph(model, generate.prompt(model, 100, 1), 8, kind)
    graph.prefill()
    want = graph.cache.layers[0].keys.clone()
    graph.decode(1)
    if kind == "static" and not hasattr(graph.cache.layers[0], "cumulative_length"):
        pytest.skip("the StaticCache of this transformers counts its tokens on the host")
    places = [t.data_ptr() for t in (*graph.tensors(), graph.token, graph.positions)]
    with Waiting() as waiting:
        graph.decode(2)
    assert not waiting.seen
    assert places == [t.data_ptr() for t in (*graph.tensors(), graph.token, graph.positions)]
    assert torch.equal(graph.tensors()[0][:, :, : want.shape[2]], want)  # the prompt is not written over


def test_rows_of_whole_models(tmp_path, monkeypatch):
    monkeypatch.setitem(generate.MODELS, "small", TINY)
    out = tmp_path / "generate.json"
    options = ["--lengths", "300", "--batches", "2", "--presets", "kivi-2", "--tokens", "3", "--rounds", "1"]
    generate.main([*options, "--out", str(out)])
    result = json.loads(out.read_text())
    stock, packed = result["rows"]
    assert (stock["variant"], packed["variant"]) == ("stock", "kivi-2")
    assert stock["prefill_ratio"] == stock["decode_ratio"] == 1
    assert stock["length"] == 258  # 3 frames of 64, two tokens around them and 64 of text
    assert (
        stock["kv_bytes"] == 2 * 2 * 2 * 258 * 2 * 16 * 2
    )  # keys and values, layers, batch, tokens, heads, channels, bf16
    assert packed["kv_bytes"] < stock["kv_bytes"]
    for row in (stock, packed):
        assert row["kv_bytes"] < row["decode_peak_bytes"]
        assert row["prefill_seconds"] > 0 < row["decode_tokens_per_second"]
    assert packed["decode_ratio"] == pytest.approx(
        packed["decode_tokens_per_second"] / stock["decode_tokens_per_second"]
    )
    assert set(result["load_average"]) == {"before", "after", "cores"}


def test_the_fastest_rounds_are_compared_and_the_floor_is_of_bytes():
    times = {
        "stock": [dict(prefill=4.0, step=0.3), dict(prefill=16.0, step=0.2), dict(prefill=5.0, step=0.2)],
        "vidkv": [dict(prefill=9.0, step=0.1), dict(prefill=5.0, step=0.4), dict(prefill=6.0, step=0.2)],
    }
    row = generate.row_of(Variant("vidkv"), 8, times, dict(kv_bytes=10), weights=90, copy=4000.0)
    assert row["prefill_ratio"] == 1.25
    assert row["decode_ratio"] == 2
    assert row["decode_tokens_per_second"] == pytest.approx(80)
    assert row["floor_tokens_per_second"] == 8 * 4000 / 100
    assert row["share_of_floor"] == pytest.approx(0.25)
    alone = generate.row_of(Variant("vidkv"), 8, times | dict(stock=[]), dict(kv_bytes=10), weights=90, copy=None)
    assert alone["prefill_ratio"] is alone["decode_ratio"] is None


def test_weights_that_a_token_reads(model):
    whole = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert generate.weights_read(model) == 4 * (whole - model.get_input_embeddings().weight.numel())


def test_what_does_not_run_is_told(model, monkeypatch):
    def wrapped(*_, **__):
        raise NotImplementedError("not yet")

    monkeypatch.setattr(mmkv, "wrapped", wrapped)
    setting = Setting(model, generate.prompt(model, 100, 1), 2, "cpu")
    rows = generate.measure(setting, [Variant(), Variant("vidkv", "graphs")], 1, 1, None, lambda: None)
    assert [row["variant"] for row in rows] == ["stock"]
    assert setting.refused == {"vidkv, graphs": "NotImplementedError: not yet"}


def test_traces(tmp_path, monkeypatch):
    monkeypatch.setitem(generate.MODELS, "small", TINY)
    generate.main(["--lengths", "100", "--presets", "kivi-2", "--profile", str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"small-100x1-{v}-{part}.json" for v in ("stock", "kivi-2") for part in ("prefill", "decode")}
    assert "aten::" in (tmp_path / "small-100x1-stock-decode.json").read_text()


# Kernels


def test_every_kernel_is_measured_and_right():
    wanted = {name for name in kernels.kernels.which_kernels() if name not in ("attend_packed", "group_total")}
    seen = set()
    for case in (c for heads in kernels.HEADS[:1] for c in kernels.decoders(heads, 256, "cpu")):
        seen.add(case.kernel)
        assert kernels.off(case) == 0, case.kernel  # on a CPU both are the reference
    for case in kernels.towers(2, 64, "cpu"):
        seen.add(case.kernel)
        assert kernels.off(case) == 0, case.kernel
    assert seen == wanted


def test_the_floor_is_the_slower_of_bytes_and_products():
    case = kernels.Case("it", "", lambda: torch.zeros(1), lambda: torch.zeros(1), moved=100, flops=50.0)
    row = kernels.measure(case, CpuTimer(1), copy=10.0, product=10.0)
    assert (row["bound"], row["floor_us"]) == ("bytes", 10e6)
    assert kernels.measure(case, CpuTimer(1), copy=100.0, product=10.0)["bound"] == "products"


def test_rows_of_kernels(tmp_path):
    out = tmp_path / "kernels.json"
    kernels.main(["--tokens", "256", "--rounds", "1", "--only", "merge", "rotate", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {row["kernel"] for row in result["rows"]} == {"merge", "rotate"}
    assert all(row["us"] > 0 and row["faster"] is None for row in result["rows"])


def test_one_command_runs_what_wants_a_gpu():
    told = subprocess.run(["tools/gpu.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for step in ("tests", "kernels", "attention", "generate", "tokens", "prefill", "store"):
        assert f"\n  {step} " in told
    wrong = subprocess.run(["tools/gpu.sh", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "nonsense" in wrong.stderr


def test_a_step_of_it_runs():
    """The package is found without being installed."""
    command = ["tools/gpu.sh", "--smoke", "kernels"]
    env = os.environ | dict(PYTHON=sys.executable)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "kernels-cpu.json" in done.stdout
