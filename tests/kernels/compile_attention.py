"""Compiles the kernels of dense and ragged attention and of the merge, in the manner of `compile_for_gpu.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmkv.kernels import attend_dense_triton, attend_ragged_triton, merge_triton
from mmkv.kernels._sight import Sight

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine_code import Compiled, compile_for, longest_loop

RUNS = [  # dtype, head size, query tokens of 7 heads, which of the sights
    (torch.bfloat16, 128, 1, (0, 2)),
    (torch.float16, 80, 50, (1,)),
    (torch.bfloat16, 128, 50, (0, 1, 2, 3)),
    (torch.bfloat16, 256, 1, (0,)),
    (torch.bfloat16, 256, 50, (1, 3)),
    (torch.bfloat16, 512, 50, (2,)),
    (torch.float32, 128, 1, (0,)),
    (torch.float32, 128, 50, (2, 3)),
    (torch.float32, 256, 50, (1,)),
    (torch.float32, 512, 50, (2,)),
]


def sights(tq: int) -> list[Sight]:
    """What brings in each branch of the kernel."""
    at, mask = torch.zeros(1, tq, dtype=torch.int64), torch.ones(1, 1, 1, tq, 304, dtype=torch.bool)
    return [
        Sight(),
        Sight(q_positions=at, causal=True),
        Sight(q_positions=at, window=9, mask=mask[:, :, :, :1], softcap=5.0, weight=torch.ones(1, 4, 304)),
        Sight(mask=mask),
    ]


def run() -> None:
    """Compile for each architecture; raises where a program needs too much memory or spills registers."""
    for capability in (80, 89, 90):
        compile_for(capability)
        loops = [_attend(dtype, d, tq, sights(tq)[i]) for dtype, d, tq, chosen in RUNS for i in chosen]
        loops += [_attend(dtype, d, tq, ragged=True) for dtype, d, tq, _ in RUNS[:2]]
        shared, spilled = max(loop.shared for loop in loops), max(loop.stack for loop in loops)
        assert shared <= 99 * 1024, f"attend needs {shared} bytes of shared memory"
        assert spilled <= 256, f"attend spills {spilled} bytes"
        print(f"attend, sm_{capability}: {len(loops)} variants, shared <= {shared}, stack <= {spilled} bytes")
        merging = [_merge(*sizes) for sizes in ((28, 128, 66), (28 * 2700, 128, 1), (56, 80, 3))]
        print(
            f"merge_parts, sm_{capability}: {len(merging)} variants, registers <= {max(m.registers for m in merging)}"
        )
        assert max(m.stack for m in merging) == 0, "merge_parts spills"
    _sizes_make_no_variants()


def _sizes_make_no_variants() -> None:
    """A cache that grows must not meet the compiler again in the middle of a generation."""
    kernel = attend_dense_triton.attend
    attend_dense_triton.attend = compiled = Compiled(kernel)
    try:
        for tq, t in ((50, 300), (48, 304), (64, 1)):
            q, k = torch.zeros(2, 28, tq, 128).half(), torch.zeros(2, 4, t, 128).half()
            at, mask = torch.zeros(2, tq, dtype=torch.int64), torch.ones(2, 1, 1, 1, t, dtype=torch.bool)
            sight = Sight(q_positions=at, at=t, causal=True, window=tq, mask=mask)
            attend_dense_triton.attend_dense_triton(q, k, k, sight, scale=0.1, splits=1, merged=False)
    finally:
        attend_dense_triton.attend = kernel
    variants = {one.hash for one in compiled.variants}
    assert len(variants) == 1, f"attend has {len(variants)} variants for three sizes"


def _attend(dtype: torch.dtype, d: int, tq: int, sight: Sight | None = None, ragged: bool = False):
    kernel = attend_dense_triton.attend
    attend_dense_triton.attend = compiled = Compiled(kernel)
    q, k = torch.zeros(1, 28, tq, d, dtype=dtype), torch.zeros(1, 4, 304, d, dtype=dtype)
    try:
        if ragged:
            at = torch.zeros(4, dtype=torch.int64)
            seen = Sight(q_positions=torch.zeros(1, tq, dtype=torch.int64), at=at, window=9)
            attend_ragged_triton.attend_ragged_triton(
                q, k[0, 0], k[0, 0], at, at.int(), 304, seen, scale=0.1, places="row", merged=False
            )
        else:
            attend_dense_triton.attend_dense_triton(q, k, k, sight, scale=0.1, merged=False)
    finally:
        attend_dense_triton.attend = kernel
    (one,) = compiled.variants
    return longest_loop(one)


def _merge(rows: int, dv: int, splits: int):
    kernel = merge_triton.merge_parts
    merge_triton.merge_parts = compiled = Compiled(kernel)
    merge_triton.busy = lambda device: 528  # an H100
    part = torch.zeros(splits, 1, 28, rows // 28, dv), torch.zeros(splits, 1, 28, rows // 28)
    try:
        merge_triton.merge_triton([part, (part[0][0], part[1][0])], torch.zeros(28), torch.bfloat16)
    finally:
        merge_triton.merge_parts = kernel
    (one,) = compiled.variants
    return longest_loop(one)


if __name__ == "__main__":
    run()
