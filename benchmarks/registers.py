"""Registers, spilled bytes, shared memory and warps of the kernels, as compiled for GPUs that need not be there.

python benchmarks/registers.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
import triton
from common import environment, save
from machine_code import Compiled, compile_for, usage
from rich.console import Console
from rich.table import Table

from mmkv.kernels import (
    Spec,
    _splits,
    attend_dense_triton,
    gaussian,
    group_mean_triton,
    group_members,
    lloyd,
    mean_only,
    merge_triton,
    minmax,
    most_similar_triton,
    pack_triton,
    prefill_sparse_triton,
    probe_triton,
    rotate_triton,
    ternary,
)
from mmkv.kernels._sight import Sight

KERNELS = (
    "_most_similar",
    "_mean",
    "_total",
    "_rotate",
    "attend",
    "merge_parts",
    "_softmax_sums",
    "_mass",
    "_attend",
    "_pack",
)
CAPABILITIES = (80, 89, 90)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASSES = ((16, gaussian(2)), (16, minmax(4)), (48, lloyd(1)), (32, mean_only()), (16, ternary(0.5, scale="one")))


class Case(NamedTuple):
    """A kernel and a call that launches it.

    Args:
        group: which of the tables it belongs to.
        module: where the kernel is.
        kernel: its name there.
        case: in words.
        call: what launches it, once, and perhaps others.
    """

    group: str
    module: ModuleType
    kernel: str
    case: str
    call: Callable[[], object]


def matching(dtype: torch.dtype, batch: int) -> Callable:
    """Even and odd tokens of video frames."""
    x = torch.zeros(batch, 1458, 64, dtype=dtype)
    return lambda: most_similar_triton.most_similar_triton(x[:, ::2], x[:, 1::2])


def means(total: bool) -> Callable:
    """Averages of merged tokens, or sums of a number of each."""
    x = torch.zeros(2, 729, 1152, dtype=BF16)

    def call():
        members = group_members(torch.arange(729).remainder(365).expand(2, -1), 365)
        if total:
            return group_mean_triton.group_total_triton(x[..., 0].float(), members)
        return group_mean_triton.group_mean_triton(x, torch.ones(2, 729), members)

    return call


def rotation(interleaved: bool) -> Callable:
    x, table = torch.zeros(1, 28, 2700, 128, dtype=BF16), torch.zeros(2700, 64)
    rules = dict(interleaved=interleaved, inverse=False, inplace=True)
    return lambda: rotate_triton.rotate_triton(x, table, table, **rules)


def dense(dtype: torch.dtype, channels: int, tokens: int, sight: Sight) -> Callable:
    """28/4 heads over keys that are not packed."""
    q, k = torch.zeros(1, 28, tokens, channels, dtype=dtype), torch.zeros(1, 4, 304, channels, dtype=dtype)
    return lambda: attend_dense_triton.attend_dense_triton(q, k, k, sight, scale=0.1, merged=False)


def merging(tokens: int, splits: int) -> Callable:
    """Two parts of 28 heads of 128 and sink logits."""
    parts = [(torch.zeros(n, 1, 28, tokens, 128), torch.zeros(n, 1, 28, tokens)) for n in (splits, 1)]
    return lambda: merge_triton.merge_triton(parts, torch.zeros(28), BF16)


def probing(dtype: torch.dtype, channels: int, hidden: bool) -> Callable:
    """64 rows of 28/4 heads; `hidden`: with all that hides a key."""
    q, k = torch.zeros(1, 28, 64, channels, dtype=dtype), torch.zeros(1, 4, 300, channels, dtype=dtype)
    rules: dict = {}
    if hidden:
        mask, at = torch.zeros(1, 28, 64, 300, dtype=torch.bool), torch.zeros(1, 64, dtype=torch.int64)
        rules = dict(mask=mask, positions=at, causal=True, window=7)
    rules = dict(mask=None, positions=None, causal=False, window=None) | rules
    return lambda: probe_triton.probe_triton(q, k, scale=0.1, softcap=None, k_start=3, splits=2, **rules)


def sparse(dtype: torch.dtype, channels: int) -> Callable:
    """200 of 300 tokens of 28/4 heads."""
    q, k = torch.zeros(28, 300, channels, dtype=dtype), torch.zeros(4, 300, channels, dtype=dtype)
    return lambda: prefill_sparse_triton.prefill_sparse_triton(
        q, k, k, torch.arange(200), scale=0.1, softcap=None, sinks=None
    )


def packing(spec: Spec) -> Callable:
    x = torch.zeros(1, spec.group, spec.channels, dtype=BF16)
    return lambda: pack_triton.pack_blocks_triton(x, torch.ones(1).int(), spec)


def cases() -> list[Case]:
    """All, in the order of docs/kernels.md."""
    at = torch.zeros(1, 50, dtype=torch.int64)
    every = torch.ones(1, 1, 1, 50, 304, dtype=torch.bool)
    causal = Sight(q_positions=at, causal=True)
    full = Sight(q_positions=at[:, :1], window=9, mask=every[:, :, :, :1], softcap=5.0, weight=torch.ones(1, 4, 304))
    by_channel = Spec("channel", 128, ((128, minmax(2)),))
    mixed = Spec("channel", 128, CLASSES, scale_bits=8)
    tokens = [
        (most_similar_triton, "_most_similar", "bf16, tiles of 64 x 64 x 64", matching(BF16, 64)),
        (most_similar_triton, "_most_similar", "bf16, 16 x 64 x 64 (a batch of one)", matching(BF16, 1)),
        (most_similar_triton, "_most_similar", "fp32, 64 x 64 x 32", matching(FP32, 64)),
        (group_mean_triton, "_mean", "bf16, 4 members x 512 channels", means(total=False)),
        (group_mean_triton, "_total", "fp32, 16 groups x 16 members", means(total=True)),
        (rotate_triton, "_rotate", "bf16, 32 tokens x 64 pairs, halves", rotation(interleaved=False)),
        (rotate_triton, "_rotate", "bf16, 32 tokens x 64 pairs, interleaved", rotation(interleaved=True)),
    ]
    attention = [
        (attend_dense_triton, "attend", "28/4 heads of 128, bf16, one token", dense(BF16, 128, 1, Sight())),
        (attend_dense_triton, "attend", "the same, window, softcap, weights, padding", dense(BF16, 128, 1, full)),
        (attend_dense_triton, "attend", "50 tokens, causal", dense(BF16, 128, 50, causal)),
        (attend_dense_triton, "attend", "50 tokens, a mask by query", dense(BF16, 128, 50, Sight(mask=every))),
        (attend_dense_triton, "attend", "heads of 256, 50 tokens, causal", dense(BF16, 256, 50, causal)),
        (attend_dense_triton, "attend", "fp32, one token", dense(FP32, 128, 1, Sight())),
        (attend_dense_triton, "attend", "fp32, 50 tokens, causal", dense(FP32, 128, 50, causal)),
        (merge_triton, "merge_parts", "28 rows of 128, 66 splits and one", merging(1, 66)),
        (merge_triton, "merge_parts", "75,600 rows, two parts", merging(2700, 1)),
    ]
    masses = [
        (probe_triton, "_softmax_sums", "28/4 heads of 128, bf16, no mask", probing(BF16, 128, False)),
        (probe_triton, "_mass", "the same", probing(BF16, 128, False)),
        (probe_triton, "_mass", "fp16, heads of 80, causal, window, mask", probing(FP16, 80, True)),
        (probe_triton, "_mass", "fp32, heads of 256, causal, window, mask", probing(FP32, 256, True)),
        (prefill_sparse_triton, "_attend", "heads of 128, bf16", sparse(BF16, 128)),
        (prefill_sparse_triton, "_attend", "heads of 256, fp16", sparse(FP16, 256)),
        (pack_triton, "_pack", "min-max, 2 bits, by channel", packing(by_channel)),
        (pack_triton, "_pack", "five classes, scales of 8 bits", packing(mixed)),
    ]
    groups = dict(tokens=tokens, attention=attention, masses=masses)
    return [Case(group, *case) for group, found in groups.items() for case in found]


class Passed:
    """Stands in for a kernel that nobody asked for: launches nothing."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def compiled(case: Case):
    """The kernel of a case, caught at its launch on a GPU of 132 multiprocessors."""
    kernel = Compiled(getattr(case.module, case.kernel))
    names = {name: Passed() for name in KERNELS if hasattr(case.module, name)} | {case.kernel: kernel}
    with mock.patch.multiple(case.module, **names):
        case.call()
    (one,) = kernel.variants
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(CAPABILITIES))
    parser.add_argument(
        "--groups", nargs="+", default=list(dict.fromkeys(case.group for case in cases())), help="of docs/kernels.md"
    )
    parser.add_argument("--out", default="benchmarks/results/registers.json")
    options = parser.parse_args()
    for module in (_splits, most_similar_triton, probe_triton, rotate_triton):
        module.multiprocessors = lambda device: 132
    chosen = [case for case in cases() if case.group in options.groups]
    taken: list[list[dict]] = [[] for _ in chosen]
    for capability in options.capabilities:
        compile_for(capability)
        for case, found in zip(chosen, taken):
            found.append(dict(capability=capability, **vars(usage(compiled(case)))))
    table = Table(title=f"kernels, {', '.join(f'sm_{capability}' for capability in options.capabilities)}")
    for name in ("kernel", "case", "registers", "spilled", "shared", "warps"):
        table.add_column(name, justify="left" if name in ("kernel", "case") else "right")
    rows = []
    for case, found in zip(chosen, taken):
        module = case.module.__name__.rsplit(".", 1)[-1].removesuffix("_triton")
        rows.append(dict(group=case.group, module=module, kernel=case.kernel, case=case.case, compiled=found))
        columns = [", ".join(str(one[name]) for one in found) for name in ("registers", "stack")]
        columns += [str(max(one[name] for one in found)) for name in ("shared", "warps")]
        table.add_row(case.kernel, case.case, *columns)
    Console().print(table)
    save(options.out, dict(environment=environment(), triton=triton.__version__, rows=rows))


if __name__ == "__main__":
    main()
