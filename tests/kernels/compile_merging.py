"""Compiles the kernels of token merging and `rotate`, in the manner of `compile_for_gpu.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmkv.kernels import group_mean_triton, group_members, most_similar_triton, rotate_triton

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine_code import Compiled, compile_for

KERNELS = [
    (most_similar_triton, "_most_similar"),
    (group_mean_triton, "_total"),
    (group_mean_triton, "_mean"),
    (rotate_triton, "_rotate"),
]
RUNS = [  # capability, dtype, tokens, channels, pairs of channels that turn
    (80, torch.float32, 197, 768, 32),
    (89, torch.bfloat16, 729, 1152, 40),
    (90, torch.bfloat16, 2048, 128, 64),
    (90, torch.float16, 7, 80, 128),
]


def run() -> None:
    kernels = [Compiled(getattr(module, name)) for module, name in KERNELS]
    for (module, name), kernel in zip(KERNELS, kernels):
        setattr(module, name, kernel)
    for i, (capability, dtype, n, c, pairs) in enumerate(RUNS):
        compile_for(capability)
        x, table = torch.zeros(2, n, c, dtype=dtype), torch.zeros(n, pairs)
        most_similar_triton.most_similar_triton(x[:, ::2], x[:, 1::2])
        members = group_members(torch.arange(n).remainder(5).expand(2, -1), 5)
        group_mean_triton.group_mean_triton(x, torch.ones(2, n) if i % 2 else None, members)
        group_mean_triton.group_total_triton(x[..., 0], members)
        heads = torch.zeros(2, 4, n, 2 * pairs + (16 if i == 1 else 0), dtype=dtype)
        rotate_triton.rotate_triton(heads, table, table, interleaved=i > 1, inverse=i % 2 == 0, inplace=i == 2)
    for (_, name), kernel in zip(KERNELS, kernels):
        shared = [one.metadata.shared for one in kernel.variants]
        assert len(shared) == len(RUNS) + (name == "_total") * 2, f"{name} was not compiled"
        assert max(shared) <= 99 * 1024, f"{name} needs {max(shared)} bytes of shared memory"
        print(f"{name}: {len(shared)} variants, shared <= {max(shared)} bytes")


if __name__ == "__main__":
    run()
