"""Attention of one decoded token over a packed cache, beside the best attention over a dense one.

On a GPU times are medians of graph replays with the L2 cache flushed in between; what launching costs beside is told apart. On a
CPU they are medians of calls in turn. The baseline of each shape is the fastest of torch's backends, compiled flex_attention,
FlashAttention and FlashInfer where they can be imported, in bf16 and fp8. transformers' quantized caches, which unpack everything
at each step, stand beside it where their backends are installed (quanto, hqq). GB/s count the bytes that are really read.
Random numbers: nothing here is about quality.

    python benchmarks/decode_attention.py --device cuda          # H100: 4 shapes, batch 1 to 32, 2k to 128k
    python benchmarks/decode_attention.py                        # CPU: one shape, batch 1, 2k and 8k
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from attention_peers import FP8, dense_peers, quantized_peers, unpacked
from common import environment, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import copy_bandwidth, timer_for

from mmkv._presets import preset
from mmkv.cache.formats import Packer
from mmkv.cache.segment import PackedSegment
from mmkv.kernels import attend_dense

SHAPES = ((28, 4, 128), (32, 8, 128), (16, 2, 128), (32, 32, 128))
PRESETS = ("kivi-4", "kivi-2", "vidkv", "waterfill")
SHARE = 0.6  # of the device's memory that a cache may take beside its copy
EXACT = 1 << 25  # keys and values up to which results are compared with fp32


def segment_of(name: str, keys: torch.Tensor, values: torch.Tensor) -> PackedSegment:
    """Random keys and values `[B, Hkv, T, D]` in the format of a preset."""
    (method,) = preset(name).cache
    form = method.adapt(method.formats()[0], keys[0], None)
    batch, heads, length, dim = keys.shape
    segment = PackedSegment(Packer(form, batch, heads, dim, values.shape[-1], keys.device), 0, batch, keys.device)
    for row in range(batch):
        segment.packer.fit(row, keys[row], values[row])
        segment.append(row, keys[row], values[row], torch.arange(length))
    return segment


def error(segment: PackedSegment, q: torch.Tensor, scale: float) -> float:
    """Relative RMS of the output against fp32 attention over what the codes decode to."""
    keys, values = unpacked(segment, torch.float32)
    want, _ = attend_dense(segment.packer.query(q).float(), keys, values, scale=scale)
    want = segment.packer.output(want)
    have, _ = segment.attend(q, scale=scale)
    return float((have - want).norm() / want.norm())


def measure(
    shape: tuple, batch: int, length: int, names: list[str], timer, dtype: torch.dtype, copy: float
) -> list[dict]:
    """Rows of one shape, batch and length."""
    hq, hkv, dim = shape
    device = timer.device
    torch.manual_seed(0)
    draw = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
    q, keys, values = draw(batch, hq, 1, dim), draw(batch, hkv, length, dim), draw(batch, hkv, length, dim)
    scale, dense_bytes = dim**-0.5, 2 * keys.numel() * keys.element_size()
    calls, sizes, errors, refused = {}, {}, {}, {}
    peers = dense_peers(device)
    for name, make in (peers | quantized_peers()).items():
        try:
            calls[name] = make(q, keys, values, scale)
            calls[name]()
            held = dense_bytes // (2 if name.endswith(FP8) else 1)
            sizes[name] = held if name in peers else calls[name].nbytes + 2 * dense_bytes  # unpacked, and read again
        except Exception as reason:  # a backend that does not take this shape says so in many ways
            calls.pop(name, None)
            refused[name] = str(reason).splitlines()[0][:120] if str(reason) else type(reason).__name__
    for name in names:
        segment = segment_of(name, keys, values)
        calls[name] = lambda s=segment: s.attend(q, scale=scale)
        sizes[name] = sum(t.numel() * t.element_size() for t in segment.tensors())
        if keys.numel() <= EXACT:
            errors[name] = error(segment, q, scale)
        if name == names[0] and dense_bytes <= 1 << 30:
            calls[f"{name}, unpacked first"] = lambda s=segment: torch.nn.functional.scaled_dot_product_attention(
                s.packer.query(q).to(dtype), *unpacked(s, dtype), scale=scale, enable_gqa=True
            )
            sizes[f"{name}, unpacked first"] = sizes[name] + 2 * dense_bytes
    taken = timer.medians(calls)
    dense = {name: taken[name].seconds for name in calls if name in peers}
    best = min(dense, key=lambda name: dense[name])
    return [
        dict(
            query_heads=hq, kv_heads=hkv, head_size=dim, batch=batch, length=length, name=name, us=t.seconds * 1e6,
            launch_us=t.launch * 1e6, captured=t.captured, baseline=best, times_baseline=dense[best] / t.seconds,
            mib=sizes[name] / 2**20, gb_per_s=sizes[name] / t.seconds / 1e9, share_of_copy=sizes[name] / t.seconds / copy,
            error=errors.get(name), refused=refused if name == best else None,
        )
        for name, t in taken.items()
    ]  # fmt: skip


def show(rows: list[dict], copy: float) -> None:
    table = Table(title=f"one decoded token; copying runs at {copy / 1e9:.0f} GB/s", header_style="bold")
    for name in ("heads", "batch", "KV", "attention", "us", "launch us", "x baseline", "GB/s", "of copy", "error"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    last = None
    for row in rows:
        key = (row["query_heads"], row["kv_heads"], row["batch"], row["length"])
        if last not in (None, key):
            table.add_section()
        last = key
        mark = " *" if row["name"] == row["baseline"] else ""
        table.add_row(
            f"{row['query_heads']}/{row['kv_heads']}x{row['head_size']}", str(row["batch"]), f"{row['length']:,}",
            row["name"] + mark, f"{row['us']:,.0f}", f"{row['launch_us']:,.0f}", f"{row['times_baseline']:.2f}",
            f"{row['gb_per_s']:,.1f}", f"{row['share_of_copy']:.1%}", "" if row["error"] is None else f"{row['error']:.1e}",
        )  # fmt: skip
    console = Console()
    console = console if console.is_terminal else Console(width=120)  # wide enough for the table
    console.print(table)
    console.print("* the baseline: the fastest over a dense cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--shapes", type=int, help="how many of the shapes")
    parser.add_argument("--rounds", type=int, help="measurements of each")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no other setting begins")
    parser.add_argument("--out")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    batches = options.batches or ([1, 8, 32] if cuda else [1])
    lengths = options.lengths or ([2048, 8192, 32768, 131072] if cuda else [2048, 8192])
    shapes = SHAPES[: options.shapes or (len(SHAPES) if cuda else 1)]
    timer = timer_for(options.device, options.rounds or (40 if cuda else 15))
    room = torch.cuda.get_device_properties(0).total_memory * SHARE if cuda else 8 << 30
    begun = time.perf_counter()
    copy, rows, skipped = copy_bandwidth(options.device), [], []
    for shape, batch, length in track(list(itertools.product(shapes, batches, lengths)), "attending"):
        if 3 * 4 * batch * shape[1] * length * shape[2] > room:
            skipped.append(dict(shape=shape, batch=batch, length=length, why="memory"))
            continue
        if time.perf_counter() - begun > options.limit:
            skipped.append(dict(shape=shape, batch=batch, length=length, why="no time left"))
            continue
        rows += measure(shape, batch, length, options.presets, timer, torch.bfloat16, copy)
    show(rows, copy)
    out = options.out or f"benchmarks/results/decode-attention-{options.device}.json"
    save(out, dict(environment(), copy_gb_per_s=copy / 1e9, rounds=timer.rounds, skipped=skipped, rows=rows))


if __name__ == "__main__":
    main()
