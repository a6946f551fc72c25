"""Which implementation a call would run."""

from __future__ import annotations

import importlib.util

import torch

TWINS = {
    "attend_packed": True, "pack_blocks": True, "attend_dense": True, "attend_ragged": True, "merge": True,
    "prefill_sparse": True, "probe": True,
    "group_mean": True, "group_total": True, "most_similar": True, "rotate": True,
}  # fmt: skip


def which_kernels() -> dict[str, str]:
    """Kernel name -> "triton" or "torch" for tensors on this machine's best device.

    CPU tensors always take the torch reference; CUDA tensors take the Triton twin where there is one, and raise where
    Triton is not installed.
    """
    gpu = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return {name: "triton" if twin and gpu else "torch" for name, twin in TWINS.items()}
