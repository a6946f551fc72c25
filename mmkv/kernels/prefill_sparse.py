"""Causal attention among some of a prompt's tokens: the others neither attend nor are attended to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ._check import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_numbers,
    check_rank,
    group_size,
    wants_grad,
)
from .attend_dense import attend_dense
from .merge import merge_sinks

TILE_ROWS = 512  # query rows whose mask exists at a time
WORTH_A_COPY = 2048  # chosen tokens from which on torch's flash attention makes up for gathering (docs/kernels.md)


def prefill_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gather: bool | None = None,
) -> Tensor:
    """Attention of the chosen tokens of one batch element over those of them that do not come later.

    There are two ways. One copies the chosen rows together and takes torch's own attention (flash where there is one), or, with
    softcap or sink logits, `attend_dense`. The other, Triton's, reads and writes them in place.

    Args:
        q: [Hq, T, D]; k: [Hkv, T, D]; v: [Hkv, T, Dv].
        index: int [n], the chosen tokens, ascending and below T, which is checked on a CPU alone.
        scale: factor on q.k.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: [Hq], a learned logit per query head with value zero.
        gather: on a GPU, True for the first way, False for the second; None takes the first where torch has flash attention for
            these tensors and enough tokens are chosen, and where gradients are asked for. The CPU always gathers.

    Returns:
        [Hq, T, Dv] in q's dtype, 0 for tokens that were not chosen.
    """
    _check(q, k, v, index, scale, softcap, sinks)
    check_choice(gather=gather)
    if q.is_cuda and not wants_grad(q, k, v, sinks):
        if gather is None:
            gather = len(index) >= WORTH_A_COPY and softcap is None and sinks is None and has_flash(q, k, v)
        if not gather:
            from .prefill_sparse_triton import prefill_sparse_triton

            with torch.cuda.device(q.device):  # Triton launches on the current device, a split model has several
                return prefill_sparse_triton(q, k, v, index, scale=scale, softcap=softcap, sinks=sinks)
    return prefill_sparse_gathered(q, k, v, index, scale=scale, softcap=softcap, sinks=sinks)


def _check(q, k, v, index, scale, softcap, sinks) -> None:
    check_float(q=q, k=k, v=v)
    check_rank(3, q=q, k=k, v=v)
    check_rank(1, index=index)
    check_integer(index=index)
    check_numbers(scale, softcap)
    check_device(q.device, k=k, v=v, index=index)
    group_size(q.shape[0], k.shape[0])
    if k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not index.is_cuda and len(index):  # on a GPU that would wait for it
        low, high = int(index[0]), int(index[-1])
        if low < 0 or high >= q.shape[1] or bool((index[1:] <= index[:-1]).any()):
            raise ValueError(
                f"index runs from {low} to {high} of {q.shape[1]} tokens; it has to be ascending, each token once"
            )
    if sinks is not None:
        check_device(q.device, sinks=sinks)
        if sinks.shape != q.shape[:1]:
            raise ValueError(f"sinks are {tuple(sinks.shape)}; wanted is one for each of {q.shape[0]} query heads")


def has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's attention has a flash kernel for them; what else it has repeats heads or writes all scores down."""
    same = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    return same and q.dtype != torch.float32 and q.shape[-1] <= 256


def prefill_sparse_gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`prefill_sparse` on gathered tensors; arguments as there."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    q, k, v = (t[None, :, index] for t in (q, k, v))
    if softcap is None and sinks is None:
        out[:, index] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]
        return out
    n = len(index)
    place = torch.arange(n, device=q.device)
    for first in range(0, n, TILE_ROWS):
        rows, end = (
            slice(first, first + TILE_ROWS),
            min(first + TILE_ROWS, n),
        )  # later keys are seen by none of these rows
        mask = place[rows, None] >= place[:end]
        part, lse = attend_dense(q[:, :, rows], k[:, :, :end], v[:, :, :end], scale=scale, mask=mask, softcap=softcap)
        part = part if sinks is None else merge_sinks(part, lse, sinks)[0]
        out[:, index[rows]] = part[0].to(out.dtype)
    return out
