"""Attention over dense keys and values that also returns the logsumexp, so that it can be merged with other parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import (
    check_choice,
    check_device,
    check_float,
    check_numbers,
    check_rank,
    check_whole,
    group_size,
    wants_grad,
)
from ._sight import Sight, checked_positions, grouped_mask

TILE_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}  # scores that exist at a time
TILE_KEYS = 4096  # keys that are converted to fp32 at a time, per KV head


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    k_start: int = 0,
    causal: bool = False,
    window: int | None = None,
    weight: Tensor | None = None,
    exact: bool | None = None,
    merged: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with logsumexp; keys and values are not repeated over query heads.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, T, D]; T may be 0.
        v: [B, Hkv, T, Dv].
        scale: factor on q.k.
        mask: bool, broadcastable to [B, 1 or Hq, Tq, T], or with five dimensions to [B, Hkv, Hq / Hkv, Tq, T]; True = attend.
        softcap: scores become `softcap * tanh(score / softcap)`.
        q_positions: int [B, Tq] or [Tq], logical positions; needed for causal and window.
        k_start: logical position of key 0; keys are consecutive.
        causal: hide keys at positions > the query's.
        window: hide keys at positions <= the query's - window.
        weight: fp32 [B, Hkv, T], how many keys each stands for; 0 hides it.
        exact: on a GPU, products of fp32 numbers; else of 16 bits or TF32. None: as q's dtype has it. The CPU is always exact.
        merged: False leaves the S runs of keys apart that programs of a GPU share, for `merge` to join with other parts.

    Returns:
        out fp32 [B, Hq, Tq, Dv], lse fp32 [B, Hq, Tq] (natural log); a row that sees no key gives (0, -inf). Not merged,
        out [S, B, Hq, Tq, Dv] and lse [S, B, Hq, Tq].
    """
    check_float(q=q, k=k, v=v)
    check_rank(4, q=q, k=k, v=v)
    check_device(q.device, k=k, v=v)
    check_numbers(scale, softcap, window)
    check_choice(exact=exact)
    check_whole(k_start=k_start)
    b, hq, tq, d = q.shape
    _, hkv, t, _ = v.shape
    if k.shape != (b, hkv, t, d):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    group_size(hq, hkv)
    if weight is not None:
        check_device(q.device, weight=weight)
        if weight.shape != (b, hkv, t) or weight.dtype != torch.float32:
            raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be float32 {(b, hkv, t)}")
    if mask is not None:
        check_device(q.device, mask=mask)
        mask = grouped_mask(mask, b, hq, hkv, tq, t)
    q_positions = checked_positions(q, q_positions, causal, window)
    sight = Sight(softcap, q_positions, k_start, causal, window, mask, weight)
    if q.is_cuda and not wants_grad(q, k, v):
        from .attend_dense_triton import attend_dense_triton

        with torch.cuda.device(q.device):  # Triton launches on the current device, a split model has several
            return attend_dense_triton(q, k, v, sight, scale=scale, exact=exact, merged=merged)
    out, lse = attend_dense_reference(q, k, v, sight, scale)
    return (out, lse) if merged else (out[None], lse[None])


def attend_dense_reference(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> tuple[Tensor, Tensor]:
    """`attend_dense` in torch, in tiles of scores."""
    b, hq, tq, _ = q.shape
    _, hkv, t, dv = v.shape
    out = q.new_zeros(b, hkv, hq // hkv, tq, dv, dtype=torch.float32)
    lse = q.new_full((b, hkv, hq // hkv, tq), -torch.inf, dtype=torch.float32)
    keys = min(t, TILE_KEYS)
    step = max(1, TILE_SCORES[q.device.type] // max(1, b * hq * keys))
    if t:
        for i in range(0, tq, step):
            rows = slice(i, min(i + step, tq))
            qi = q[:, :, rows].float().mul(scale).unflatten(1, (hkv, hq // hkv))
            out[:, :, :, rows], lse[:, :, :, rows] = _rows(qi, k, v, sight, rows, keys)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _rows(q: Tensor, k: Tensor, v: Tensor, sight: Sight, rows: slice, keys: int) -> tuple[Tensor, Tensor]:
    """Some query rows, q fp32 [B, Hkv, G, n, D] already scaled, over all keys with a running softmax."""
    top = total = acc = None
    for j in range(0, k.shape[2], keys):
        cols = slice(j, j + keys)
        s = sight.apply(scores(q, k[:, :, cols], sight.softcap), rows, cols)
        new = s.amax(-1, keepdim=True)
        new = new if top is None else torch.maximum(top, new)
        base = new.masked_fill(new == -torch.inf, 0.0)  # a row without keys yet: exp(-inf - 0) = 0, not NaN
        p = s.sub_(base).exp_()
        o = torch.matmul(p.flatten(2, 3), v[:, :, cols].float()).unflatten(2, p.shape[2:4])
        if top is None:
            total, acc = p.sum(-1, keepdim=True), o
        else:
            fade = (top - base).exp()
            total, acc = total * fade + p.sum(-1, keepdim=True), acc * fade + o
        top = new
    return acc / total.clamp(min=torch.finfo(torch.float32).tiny), (top + total.log()).squeeze(-1)


def scores(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    """q fp32 [B, Hkv, G, n, D] (scaled) and k [B, Hkv, T, D] to fp32 [B, Hkv, G, n, T]."""
    s = torch.matmul(q.flatten(2, 3), k.float().transpose(-1, -2)).unflatten(2, q.shape[2:4])
    return s if softcap is None else s.div_(softcap).tanh_().mul_(softcap)
