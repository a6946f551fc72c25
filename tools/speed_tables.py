"""Tables of how fast and how large: whole models, single kernels, and their machine code, for tools/readme.py."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def versions(result: dict) -> str:
    e = result["environment"]
    return f"torch {e['torch']}, transformers {e['transformers']}, {e['device']}, commit {e['commit']}."


def speed() -> str:
    """The first setting of a model in benchmarks/results/generate-{cuda,cpu}.json."""
    rows = next((rows for _, rows in _generated() if rows), [])
    if not rows:
        return "`python benchmarks/generate.py` measures it."
    first, tables = (rows[0]["model"], rows[0]["length"], rows[0]["batch"]), _generating(rows[0]["device"])
    return "\n".join(tables[first] + ["", *_conditions(rows[0]["device"])])


def speed_of_all() -> str:
    """All settings of benchmarks/results/generate-{cuda,cpu}.json."""
    lines = []
    for device, rows in _generated():
        for one in _generating(device).values() if rows else ():
            lines += [*one, ""]
        lines += [*_conditions(device), ""] if rows else []
    return "\n".join(lines).rstrip() or "`python benchmarks/generate.py` measures it."


def _generated() -> list[tuple[str, list[dict]]]:
    """(device, rows); none where it was not measured there."""
    found = []
    for device in ("cuda", "cpu"):
        path = ROOT / f"benchmarks/results/generate-{device}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        found.append((device, [row | dict(device=device) for row in rows]))
    return found


def _generating(device: str) -> dict[tuple, list[str]]:
    """Of each (model, length, batch) the lines of a table."""
    tables: dict[tuple, list[str]] = {}
    for row in dict(_generated())[device]:
        key = (row["model"], row["length"], row["batch"])
        if key not in tables:
            stock = "the stock model does not run"
            if row["prefill_ratio"] is not None:  # then it is the first row
                stock = f"prefill of the stock model {row['prefill_seconds']:.2f} s, then"
                stock += f" {row['decode_tokens_per_second']:.1f} tokens/s"
            tables[key] = [
                f"**{key[0]}**, {key[1]:,} tokens, batch {key[2]}: {stock}",
                "",
                "| cache | prefill time of stock's | tokens/s of stock's | KV, MiB | peak, prefill | peak, decoding |",
                "|---|---|---|---|---|---|",
            ]
        sizes = (f"{row[part] / 2**20:,.1f}" for part in ("kv_bytes", "prefill_peak_bytes", "decode_peak_bytes"))
        ratios = ("-" if r is None else f"{r:.2f}x" for r in (row["prefill_ratio"], row["decode_ratio"]))
        tables[key].append(f"| {' | '.join((row['variant'], *ratios, *sizes))} |")
    return tables


def _conditions(device: str) -> list[str]:
    result = json.loads((ROOT / f"benchmarks/results/generate-{device}.json").read_text())
    return [
        f"Random weights, {result['dtype']}, the fastest of {result['rounds']} rounds. Peaks (MiB) are the allocator's",
        "figures above the weights. The small model has 4 layers of 1,024 channels, 8 query and 2 KV heads of 128.",
        f"{versions(result)} {_load(result)}",
    ]


def _load(result: dict) -> str:
    """How busy the machine was."""
    load = result["load_average"]
    return f"Load of the machine: {load['before'][0]:.1f} to {load['after'][0]:.1f}, {load['cores']} cores."


def kernels() -> str:
    """The tables of benchmarks/results/kernels-{cuda,cpu}.json."""
    lines = []
    for device in ("cuda", "cpu"):
        path = ROOT / f"benchmarks/results/kernels-{device}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        columns = ["kernel", "shape", "us", "floor, us", "of floor"] + ["torch, us", "faster"] * (device == "cuda")
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in result["rows"]:
            cells = [
                f"`{row['kernel']}`",
                row["shape"],
                f"{row['us']:,.0f}",
                f"{row['floor_us']:,.0f} ({row['bound']})",
            ]
            cells.append(f"{row['share_of_floor']:.0%}")
            if device == "cuda":
                cells += [f"{row['reference_us']:,.0f}", f"{row['faster']:.1f}x"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            f"Copying ran at {result['copy_gb_per_s']:.0f} GB/s, products of bf16 matrices at",
            f"{result['product_tflop_per_s']:.2f} TFLOP/s. {versions(result)} {_load(result)}",
            "",
        ]
    return "\n".join(lines).rstrip() or "`python benchmarks/kernels.py` measures it."


def launches() -> str:
    """The table of benchmarks/results/launches.json."""
    result = json.loads((ROOT / "benchmarks/results/launches.json").read_text())
    lines = [
        "| preset | parts of the cache | Triton's launches | torch's | together | torch's operators |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        others = {name.removeprefix("aten::"): n for name, n in row["by_name"].items() if name.startswith("aten::")}
        told = ", ".join(f"{n} `{name}`" for name, n in sorted(others.items())) or "-"
        cells = (row["preset"], row["segments"] + 1, row["triton"], row["torch"], row["total"], told)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", versions(result)])


def registers(group: str) -> str:
    """A table of benchmarks/results/registers.json."""
    result = json.loads((ROOT / "benchmarks/results/registers.json").read_text())
    rows = [row for row in result["rows"] if row["group"] == group]
    targets = ", ".join(f"sm_{one['capability']}" for one in rows[0]["compiled"])
    lines = [
        f"| kernel | case | registers {targets} | spilled, bytes a thread | shared memory, at most | warps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row["compiled"]
        kernel = f"{row['module']}.{row['kernel']}" if row["kernel"] == "_attend" else row["kernel"]
        taken, spilled = (", ".join(str(one[name]) for one in found) for name in ("registers", "stack"))
        shared = max(one["shared"] for one in found)
        size = f"{-(-shared // 1024)} KiB" if shared >= 1024 else f"{shared} B"
        lines.append(f"| `{kernel}` | {row['case']} | {taken} | {spilled} | {size} | {found[0]['warps']} |")
    e = result["environment"]
    return "\n".join([*lines, "", f"Triton {result['triton']}, torch {e['torch']}, commit {e['commit']}."])
