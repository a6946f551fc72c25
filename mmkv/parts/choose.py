"""Who stays: the best tokens of each KV head, the best of all heads of a layer together."""

from __future__ import annotations

import torch


def top_per_head(score: torch.Tensor, count: int) -> torch.Tensor:
    """bool `[H, n]`: the `count` best of each head; -inf never counts as best, ties go to the earlier token."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    count = min(max(count, 0), score.shape[-1])
    order = score.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return chosen.scatter_(-1, order, True) & (score > -torch.inf)


def top_share_per_head(score: torch.Tensor, share: float) -> torch.Tensor:
    """bool `[H, n]`: of each head's scores above -inf the best `share`, rounded; ties go to the earlier token."""
    held = score > -torch.inf
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return held & (rank < (share * held.sum(-1, keepdim=True)).round())


def top_over_heads(score: torch.Tensor, count: int, floor: int) -> torch.Tensor:
    """bool `[H, n]`: `floor` best of each head, and the best of all that is left until H * `count` are chosen."""
    heads, n = score.shape
    sure = top_per_head(score, min(floor, count))
    left = max(heads * min(count, n) - int(sure.sum()), 0)
    rest = score.masked_fill(sure, -torch.inf).flatten()
    return sure | top_per_head(rest[None], left)[0].view(heads, n)


def smallest_prefix(score: torch.Tensor, share: float) -> int:
    """How many of the largest numbers of `[n]` make up `share` of their sum; at least 1 where there is any."""
    if not score.numel():
        return 0
    ranked = score.double().sort(descending=True).values.cumsum(0)
    reached = ranked >= share * ranked[-1] * (1 - 1e-12)
    return int(reached.to(torch.int8).argmax()) + 1
