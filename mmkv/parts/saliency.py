"""From attention mass to one number per key and KV head."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool1d, max_pool1d


def per_kv_head(mass: torch.Tensor, kv_heads: int, how: str = "mean") -> torch.Tensor:
    """Mass of query heads `[Hq, n]` gathered over the group of each KV head, `[Hkv, n]`; `how` is "mean", "sum" or "max"."""
    grouped = mass.unflatten(0, (kv_heads, -1))
    return grouped.amax(1) if how == "max" else getattr(grouped, how)(1)


def pooled(score: torch.Tensor, kernel: int, how: str = "avg") -> torch.Tensor:
    """Scores `[H, n]` smoothed along the tokens with an odd kernel, zero-padded; `how` is "avg", "max" or "none"."""
    if how == "none" or kernel == 1 or not score.shape[-1]:
        return score
    pool = avg_pool1d if how == "avg" else max_pool1d
    return pool(score[None], kernel, stride=1, padding=kernel // 2)[0]


def normalized(mass: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mass `[H, n]` over the number of rows `[n]` that see each key (ZipCache eq. 8); 0 where none does."""
    return mass / count.clamp(min=1)


def check_pooling(kernel: int, pooling: str) -> None:
    """Raise ValueError for an impossible pooling of scores."""
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel {kernel!r}: possible are odd whole numbers from 1")
    if pooling not in ("avg", "max", "none"):
        raise ValueError(f"pooling {pooling!r}: possible are 'avg', 'max', 'none'")
