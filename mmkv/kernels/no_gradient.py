"""For results that have no gradient: they say so when one is asked for, where it would else be lost in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import wants_grad


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("attention over a compressed cache has no gradient; call mmkv.unwrap(model) to train")


def without_gradient(q: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
    """The results, made under `torch.no_grad()`; a backward pass through them to `q` raises RuntimeError."""
    return _NoGradient.apply(q, *results) if wants_grad(q) else results
