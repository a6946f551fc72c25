"""The wrappers' way to a GPU, walked on a machine without one."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable

import torch

from .conftest import interpreted


def as_if_on_a_gpu(monkeypatch, module: str, *names: str) -> list[str]:
    """From now on CPU tensors count as a GPU's, so that wrappers call Triton's interpreter.

    Args:
        monkeypatch: takes it back.
        module: of `mmkv.kernels`.
        names: functions of the module whose calls are to be seen.

    Returns:
        The names, as they are called.
    """
    interpreted()
    twin = importlib.import_module(f"mmkv.kernels.{module}")
    seen: list[str] = []
    for name in names:
        monkeypatch.setattr(twin, name, _watched(name, getattr(twin, name), seen))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return seen


def _watched(name: str, call: Callable, seen: list[str]) -> Callable:
    def watched(*args, **kw):
        seen.append(name)
        return call(*args, **kw)

    return watched
