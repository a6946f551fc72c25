"""Compiles the kernels of attention over packed codes, in the manner of `compile_for_gpu.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmkv.kernels import (
    Blocks,
    Spec,
    Table,
    attend_packed_triton,
    gaussian,
    lloyd,
    mean_only,
    minmax,
    symmetric,
    ternary,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine_code import Compiled, compile_for


def formats(d: int, group: int) -> list[tuple[Spec, Spec]]:
    """Pairs of (keys, values) that between them use each branch of the kernels."""
    mixed = ((16, gaussian(2)), (16, minmax(4)), (d - 48, gaussian(1)), (16, mean_only()))
    codes = ((16, symmetric(8)), (16, ternary(0.5, scale="one")), (d - 32, gaussian(4, scale="fit")))
    return [
        (Spec("channel", group, mixed, scale_bits=8), Spec("token", group, ((d, gaussian(1.58, zero="none")),), d)),
        (Spec("channel", group, ((d, minmax(2)),)), Spec("token", group, ((d, minmax(2)),), d // 2)),
        (Spec("token", group, ((d, gaussian(4)),), d, scale_bits=8), Spec("channel", group, codes, scale_bits=8)),
    ]


def planes_runs() -> list[tuple]:
    """(capability, dtype, queries, formats) that take the kernel for evenly spaced codes."""
    classes = ((64, lloyd(2)), (32, lloyd(1)), (16, lloyd(4)), (16, mean_only()))
    token = {code: Spec("token", 128, ((128, code),), 128) for code in (minmax(2), gaussian(1.58, zero="none"))}
    kivi = Spec("channel", 64, ((128, minmax(2)),)), Spec("token", 64, ((128, minmax(2)),), 128)
    mixed = Spec("channel", 128, classes, scale_bits=8), token[gaussian(1.58, zero="none")]
    plain = Spec("channel", 128, ((128, lloyd(2)),)), token[minmax(2)]
    return [
        (90, torch.bfloat16, 1, kivi),
        (90, torch.bfloat16, 9, plain),
        (89, torch.float16, 1, mixed),
        (80, torch.bfloat16, 1, plain),
    ]


def run() -> None:
    """Compiles each kernel; asserts that its shared memory suits every GPU."""
    names = [(attend_packed_triton, name) for name in ("_attend", "attend_planes")]
    kernels = [Compiled(getattr(module, name)) for module, name in names]
    for (module, name), kernel in zip(names, kernels):
        setattr(module, name, kernel)
    compile_for(90)
    runs = ((90, torch.bfloat16, 256, 1, 0), (80, torch.float32, 80, 9, 1), (90, torch.float16, 96, 1, 2))
    for capability, dtype, d, tq, i in runs:
        compile_for(capability)
        zeros = torch.zeros(2, 1 + i, dtype=torch.int32)
        at = None if i == 1 else torch.zeros(1, tq, dtype=torch.int64)
        attend_packed_triton.attend_packed_triton(
            torch.zeros(1, 14, tq, d, dtype=dtype), *(Blocks.empty(spec, 4) for spec in formats(d, 128)[i]),
            Table(zeros, zeros, zeros), scale=0.1, softcap=None if at is None else 5.0, q_positions=at,
            causal=at is not None, window=None if at is None else 7, splits=2, merged=False,
        )  # fmt: skip
    for capability, dtype, tq, (keys, values) in planes_runs():
        compile_for(capability)
        zeros = torch.zeros(2, 2, dtype=torch.int32)
        attend_packed_triton.attend_packed_triton(
            torch.zeros(1, 14, tq, keys.channels, dtype=dtype), Blocks.empty(keys, 4), Blocks.empty(values, 4),
            Table(zeros, zeros, zeros), scale=0.1, softcap=None, q_positions=torch.zeros(1, tq, dtype=torch.int64),
            causal=tq > 1, window=None, splits=2, merged=False,
        )  # fmt: skip
    for (_, name), kernel in zip(names, kernels):
        shared = [one.metadata.shared for one in kernel.variants if one.asm["ptx"]]
        assert len(shared) == len(kernel.variants) > 0, f"{name} was not compiled"
        assert max(shared) <= 99 * 1024, f"{name} needs {max(shared)} bytes of shared memory"
        print(f"{name}: {len(shared)} variants, shared <= {max(shared)} bytes")
