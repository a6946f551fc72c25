"""Attention mass per key of a few query rows: what most saliency scores are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_device, check_float, check_integer, check_numbers, check_rank, check_whole, group_size

TILE_SCORES = 1 << 22  # scores that exist at a time
TILE_KEYS = 4096  # keys that are converted to fp32 at a time, per KV head


class Mass(NamedTuple):
    """Attention mass of P probe rows.

    Args:
        sum: fp32 [B, Hq, T], probability of each key, summed over the rows.
        max: fp32 [B, Hq, T], largest probability of each key.
        count: int32 [B or 1, Hq or 1, T], rows that may see the key (sizes as the mask's, or the positions'; neither: 1).
    """

    sum: Tensor
    max: Tensor
    count: Tensor


def probe(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    k_start: int = 0,
) -> Mass:
    """Softmax probabilities of the given query rows, reduced over rows; at most a tile of them exists at a time.

    A row sees the keys that mask, causal and window all leave it. A row that sees nothing adds nothing.

    Args:
        q: [B, Hq, P, D], the probe rows.
        k: [B, Hkv, T, D].
        scale: factor on q.k.
        mask: bool, broadcastable to [B, 1 or Hq, P, T]; True = attend.
        softcap: scores become `softcap * tanh(score / softcap)`.
        positions: int [P] or [B, P], logical positions of the rows in any order; needed for causal and window.
        causal: hide keys at positions > the row's.
        window: hide keys at positions <= the row's - window.
        k_start: logical position of the first key; the others follow it one by one.
    """
    check_numbers(scale, softcap, window)
    check_whole(k_start=k_start)
    mask, positions = _check(q, k, mask, positions, causal, window)
    options = {"scale": scale, "mask": mask, "softcap": softcap, "positions": positions, "causal": causal}
    options |= {"window": window, "k_start": k_start}
    if q.is_cuda:
        from .probe_triton import probe_triton

        with torch.cuda.device(q.device):  # Triton launches on the current device, a split model has several
            return probe_triton(q, k, **options)
    return probe_reference(q, k, **options)


def _check(q, k, mask, positions, causal, window) -> tuple[Tensor | None, Tensor | None]:
    """Raises on what does not fit; returns the mask with 4 dimensions, and positions int64 [1 or B, P] where they matter."""
    check_float(q=q, k=k)
    check_rank(4, q=q, k=k)
    check_device(q.device, k=k)
    (b, hq, p, d), (_, hkv, t, _) = q.shape, k.shape
    if k.shape != (b, hkv, t, d):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    group_size(hq, hkv)
    if mask is not None:
        check_device(q.device, mask=mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = attend), not {mask.dtype}")
        shape = (1,) * (4 - mask.dim()) + mask.shape
        if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape, (b, hq, p, t))):
            raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(b, hq, p, t)}")
        mask = mask[(None,) * (4 - mask.dim())]
    if not causal and window is None:
        return mask, None
    if positions is None:
        raise ValueError(f"{'causal' if causal else 'window'} needs positions, the logical position of each row")
    check_device(q.device, positions=positions)
    check_integer(positions=positions)
    if tuple(positions.shape) not in ((p,), (1, p), (b, p)):
        raise ValueError(f"positions are {tuple(positions.shape)}; wanted are {(p,)} or {(b, p)}")
    return mask, (positions[None] if positions.dim() == 1 else positions).long()


def probe_reference(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    positions: Tensor | None,
    causal: bool,
    window: int | None,
    k_start: int,
) -> Mass:
    """`probe` in torch; arguments as there, mask with 4 dimensions, positions int64 [1 or B, P] or None."""
    b, hq, p, _ = q.shape
    hkv, t = k.shape[1:3]
    g = hq // hkv
    total = q.new_zeros(b, hq, t, dtype=torch.float32)
    top = torch.zeros_like(total)
    count = q.new_zeros(count_shape(b, hq, t, mask, positions), dtype=torch.int32)
    keys = torch.arange(k_start, k_start + t, device=q.device)
    step = max(1, TILE_SCORES // max(1, b * hq * t))
    for i in range(0, p, step):
        rows = slice(i, min(i + step, p))
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        if positions is not None:
            sight = in_sight(positions[:, None, rows, None], keys, causal, window)
            seen = sight if seen is None else seen & sight
        n = rows.stop - i
        count += n if seen is None else seen.sum(-2, dtype=torch.int32) * (n // seen.shape[-2])
        if t == 0:
            continue
        qi = q[:, :, rows].float().mul(scale).unflatten(1, (hkv, g)).flatten(2, 3)
        s = q.new_empty(b, hkv, qi.shape[2], t, dtype=torch.float32)
        for j in range(0, t, TILE_KEYS):  # so that keys of 16 bit are not copied to fp32 as a whole
            s[..., j : j + TILE_KEYS] = qi @ k[:, :, j : j + TILE_KEYS].float().mT
        s = s.view(b, hq, n, t)
        if softcap is not None:
            s.div_(softcap).tanh_().mul_(softcap)
        if seen is not None:
            s.masked_fill_(~seen, -torch.inf)
        high = s.amax(-1, keepdim=True)
        s = s.sub_(high.masked_fill_(high == -torch.inf, 0.0)).exp_()
        s = s.div_(s.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
        total += s.sum(-2)
        top = torch.maximum(top, s.amax(-2))
    return Mass(total, top, count)


def count_shape(b: int, hq: int, t: int, mask: Tensor | None, positions: Tensor | None) -> tuple[int, int, int]:
    """Sizes of `Mass.count`: of batch and heads only where what is seen differs in them."""
    batch = max(1 if mask is None else mask.shape[0], 1 if positions is None else positions.shape[0])
    return (batch if b else 0, 1 if mask is None else mask.shape[1], t)


def in_sight(at: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """bool: which keys (positions [T]) rows at positions [..., 1] see."""
    seen = torch.ones((), dtype=torch.bool, device=at.device)
    if causal:
        seen = keys <= at
    return seen if window is None else seen & (keys > at - window)
