"""Attention over dense keys and values that also returns the logsumexp, so that it can be merged with other parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import check_device, check_float, group_size

TILE_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}  # scores that exist at a time
TILE_KEYS = 4096  # keys that are converted to fp32 at a time, per KV head


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with logsumexp; keys and values are not repeated over query heads.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, T, D]; T may be 0.
        v: [B, Hkv, T, Dv].
        scale: factor on q.k.
        mask: bool, broadcastable to [B, 1 or Hq, Tq, T]; True = attend.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        out fp32 [B, Hq, Tq, Dv], lse fp32 [B, Hq, Tq] (natural log); a row that sees no key gives (0, -inf).
    """
    check_float(q=q, k=k, v=v)
    check_device(q.device, k=k, v=v)
    b, hq, tq, d = q.shape
    _, hkv, t, dv = v.shape
    if k.shape != (b, hkv, t, d):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    g = group_size(hq, hkv)
    if mask is not None:
        mask = grouped_mask(mask, b, hq, hkv, tq, t)
    out = q.new_zeros(b, hkv, g, tq, dv, dtype=torch.float32)
    lse = q.new_full((b, hkv, g, tq), -torch.inf, dtype=torch.float32)
    keys = min(t, TILE_KEYS)
    step = max(1, TILE_SCORES[q.device.type] // max(1, b * hq * keys))
    if t:
        for i in range(0, tq, step):
            rows = slice(i, min(i + step, tq))
            qi = q[:, :, rows].float().mul(scale).unflatten(1, (hkv, g))
            out[:, :, :, rows], lse[:, :, :, rows] = _rows(qi, k, v, mask, rows, keys, softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: slice, keys: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Some query rows, q fp32 [B, Hkv, G, n, D] already scaled, over all keys with a running softmax."""
    top = total = acc = None
    for j in range(0, k.shape[2], keys):
        cols = slice(j, j + keys)
        s = scores(q, k[:, :, cols], softcap)
        if mask is not None:
            s.masked_fill_(~mask_tile(mask, rows, cols), -torch.inf)
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


def grouped_mask(mask: Tensor, b: int, hq: int, hkv: int, tq: int, t: int) -> Tensor:
    """A bool mask broadcastable to [B, 1|Hq, Tq, T], viewed as 5-D, broadcastable to [B, Hkv, G, Tq, T]."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), not {mask.dtype}")
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if any(m not in (1, n) for m, n in zip(mask.shape, (b, hq, tq, t), strict=True)):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(b, hq, tq, t)}")
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (hkv, hq // hkv))


def mask_tile(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    """Rows and columns of a mask from `grouped_mask`, where it has more than one."""
    mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., cols]
