"""Compiles the Triton kernels of `probe`, `prefill_sparse` and `pack_blocks` for NVIDIA GPUs, on any machine.

`compile_for_gpu.py` runs it with the others; alone: `python tests/kernels/compile_masses.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmkv.kernels import (
    Spec,
    gaussian,
    lloyd,
    mean_only,
    minmax,
    pack_triton,
    prefill_sparse_triton,
    probe_triton,
    symmetric,
    ternary,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine_code import Compiled, compile_for


def probes() -> None:
    """The plain case, one with all that hides a key, and the widest."""
    runs = ((torch.bfloat16, 128, 64, False), (torch.float16, 80, 64, True), (torch.float32, 256, 9, True))
    for dtype, d, p, hidden in (*runs, (torch.bfloat16, 128, 1, False)):
        mask = torch.zeros(1, 7, p, 300, dtype=torch.bool) if hidden and d == 80 else None
        probe_triton.probe_triton(
            torch.zeros(1, 7, p, d, dtype=dtype), torch.zeros(1, 1, 300, d, dtype=dtype), scale=0.1, mask=mask,
            softcap=5.0 if d == 256 else None, positions=torch.zeros(1, p, dtype=torch.int64) if hidden else None,
            causal=hidden, window=7 if hidden else None, k_start=3, splits=2,
        )  # fmt: skip


def sparse_prefills() -> None:
    for dtype, d, dv, plain in ((torch.bfloat16, 128, 128, True), (torch.float16, 256, 256, True), (torch.float32, 80, 64, False),
                                (torch.bfloat16, 64, 64, False)):  # fmt: skip
        q, k, v = (torch.zeros(h, 300, c, dtype=dtype) for h, c in ((7, d), (1, d), (1, dv)))
        prefill_sparse_triton.prefill_sparse_triton(
            q, k, v, torch.arange(200), scale=0.1, softcap=None if plain else 5.0, sinks=None if plain else q[:, 0, 0]
        )


def packs() -> None:
    """Formats that between them use each branch."""
    mixed = ((16, gaussian(2)), (16, minmax(4)), (48, lloyd(1)), (32, mean_only()), (16, ternary(0.5, scale="one")))
    runs = (
        Spec("channel", 128, mixed, scale_bits=8),
        Spec("channel", 160, ((64, lloyd(2)), (64, symmetric(8)))),
        Spec("token", 128, ((128, gaussian(1.58, zero="none")),), 128),
        Spec("token", 128, ((128, gaussian(4, scale="fit")),), 32, scale_bits=8),
    )
    for spec in runs:
        x = torch.zeros(1, spec.group, 128, dtype=torch.bfloat16)
        pack_triton.pack_blocks_triton(x, torch.ones(1).int(), spec)


def run() -> None:
    """Compiles each kernel for sm_80, sm_89 and sm_90; asserts that its shared memory suits all of them."""
    names = [
        (probe_triton, "_softmax_sums"),
        (probe_triton, "_mass"),
        (prefill_sparse_triton, "_attend"),
        (pack_triton, "_pack"),
    ]
    kernels = [Compiled(getattr(module, name)) for module, name in names]
    for (module, name), kernel in zip(names, kernels):
        setattr(module, name, kernel)
    for capability in (90, 89, 80):
        compile_for(capability)
        for kernel in kernels:
            kernel.kernel.device_caches.clear()  # what was compiled for another capability does not count
        probes()
        sparse_prefills()
        packs()
    for (module, name), kernel in zip(names, kernels):
        shared = [one.metadata.shared for one in kernel.variants if one.asm["ptx"]]
        assert len(shared) == len(kernel.variants) > 0, f"{name} was not compiled"
        assert {one.metadata.target.arch for one in kernel.variants} == {80, 89, 90}
        assert max(shared) <= 99 * 1024, f"{name} needs {max(shared)} bytes of shared memory"
        print(f"{module.__name__.rsplit('.', 1)[-1]}.{name}: {len(shared)} variants, shared <= {max(shared)} bytes")


if __name__ == "__main__":
    run()
