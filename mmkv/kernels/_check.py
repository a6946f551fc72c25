"""Argument checks that every kernel shares."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float64 is read on CPU only; results are fp32


def check_float(**tensors: Tensor) -> None:
    """Raises unless each is a tensor of floating-point numbers of a supported width."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}; it has to be a tensor")
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


def check_rank(rank: int, **tensors: Tensor) -> None:
    """Raises unless each tensor has so many dimensions."""
    for name, t in tensors.items():
        if t.dim() != rank:
            raise ValueError(f"{name} has {t.dim()} dimensions, {tuple(t.shape)}; it has to have {rank}")


def check_integer(**tensors: Tensor) -> None:
    """Raises unless each tensor holds whole numbers."""
    for name, t in tensors.items():
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {str(t.dtype).removeprefix('torch.')}; allowed are int32, int64")


def check_numbers(scale: float, softcap: float | None = None, window: int | None = None) -> None:
    """Raises unless they are what scores can be made with; none may be a tensor, which a GPU would have to be asked for."""
    for name, value in (("scale", scale), ("softcap", softcap), ("window", window)):
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{name} is a {type(value).__name__}; it has to be a number")
    if scale is None or not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it has to be finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it has to be above 0, or None for no cap")
    if window is not None:
        check_whole(window=window)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it has to be at least 1 token, or None for full attention")


def check_whole(**numbers: int) -> None:
    """Raises unless each is a whole number on the host."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}; it has to be a whole number")


def check_choice(**options: bool | None) -> None:
    """Raises unless each is True, False or None."""
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; possible are True, False and None")


def group_size(q_heads: int, kv_heads: int) -> int:
    """Query heads per KV head."""
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads do not divide over {kv_heads} KV heads")
    return q_heads // kv_heads


def wants_grad(*tensors: Tensor | None) -> bool:
    """Autograd would record a torch operation on these; Triton kernels leave no trace there."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
