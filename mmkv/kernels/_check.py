"""Argument checks that every kernel shares."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float64 is read on CPU only; results are fp32


def check_float(**tensors: Tensor) -> None:
    """Raises unless each tensor is floating point of a supported width."""
    for name, t in tensors.items():
        allowed = FLOATS[:3] if t.is_cuda else FLOATS
        if t.dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{name} is {str(t.dtype).removeprefix('torch.')}; allowed on {t.device.type} are {names}")


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raises unless all tensors lie on `device`, and it is one that has kernels."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no kernels for device type {device.type}; there are for cpu, cuda")
    for name, t in tensors.items():
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, the other tensors on {device}")


def group_size(q_heads: int, kv_heads: int) -> int:
    """Query heads per KV head."""
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads do not divide over {kv_heads} KV heads")
    return q_heads // kv_heads
