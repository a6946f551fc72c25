"""Attention mass per key of a few query rows: what most saliency scores are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_device, check_float, group_size
from .attend_dense import TILE_KEYS, TILE_SCORES, grouped_mask, mask_tile, scores


class Mass(NamedTuple):
    """Attention mass of P probe rows.

    Args:
        sum: fp32 [B, Hq, T], probability of each key, summed over the rows.
        max: fp32 [B, Hq, T], largest probability of each key.
        count: int32 [B or 1, Hq or 1, T], rows that may see the key (first sizes as the mask's; no mask: 1).
    """

    sum: Tensor
    max: Tensor
    count: Tensor


def probe(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float | None = None) -> Mass:
    """Softmax probabilities of the given query rows, reduced over rows; at most a tile of them exists at a time.

    Args:
        q: [B, Hq, P, D], the probe rows.
        k: [B, Hkv, T, D].
        scale: factor on q.k.
        mask: bool, broadcastable to [B, 1 or Hq, P, T]; True = attend. A row that sees nothing adds nothing.
        softcap: scores become `softcap * tanh(score / softcap)`.
    """
    check_float(q=q, k=k)
    check_device(q.device, k=k)
    b, hq, p, d = q.shape
    _, hkv, t, _ = k.shape
    if k.shape != (b, hkv, t, d):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    g = group_size(hq, hkv)
    total = q.new_zeros(b, hkv, g, t, dtype=torch.float32)
    top = torch.zeros_like(total)
    count = q.new_full((1, 1, t), p, dtype=torch.int32)
    if mask is not None:
        mask = grouped_mask(mask, b, hq, hkv, p, t)
        seen = mask.sum(-2, dtype=torch.int32) * (p if mask.shape[-2] == 1 else 1)
        count = seen.flatten(1, 2).expand(-1, -1, t).contiguous()
    step = max(1, TILE_SCORES[q.device.type] // max(1, b * hq * t))
    for i in range(0, p if t else 0, step):
        rows = slice(i, min(i + step, p))
        qi = q[:, :, rows].float().mul(scale).unflatten(1, (hkv, g))
        s = q.new_empty(*qi.shape[:-1], t, dtype=torch.float32)
        for j in range(0, t, TILE_KEYS):  # so that keys of 16 bit are not copied to fp32 as a whole
            s[..., j : j + TILE_KEYS] = scores(qi, k[:, :, j : j + TILE_KEYS], softcap)
        if mask is not None:
            s.masked_fill_(~mask_tile(mask, rows, slice(None)), -torch.inf)
        high = s.amax(-1, keepdim=True)
        s = s.sub_(high.masked_fill_(high == -torch.inf, 0.0)).exp_()
        s = s.div_(s.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
        total += s.sum(-2)
        top = torch.maximum(top, s.amax(-2))
    return Mass(total.flatten(1, 2), top.flatten(1, 2), count)
