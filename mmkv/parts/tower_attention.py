"""Attention inside a vision tower, by row or by column, without the weights that the fused attention never forms."""

from __future__ import annotations

import torch

TILE = 1 << 24  # numbers of the weights that exist at a time


def cls_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float, size: torch.Tensor) -> torch.Tensor:
    """fp32 `[B, N]`: attention of the first token's query, mean over heads, proportional to the size of tokens (ToMe, eq. 1).

    Args:
        queries, keys: `[B, H, N, D]`.
        scale: factor on q.k.
        size: fp32 `[B, N]`, patches that each token stands for.
    """
    scores = torch.einsum("bhd,bhnd->bhn", queries[:, :, 0].float(), keys.float()) * scale
    return (scores + size.log()[:, None]).softmax(-1).mean(1)


def received_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, size: torch.Tensor, spans: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 `[B, N]`: attention that each token receives, mean over heads and over the queries of its sequence.

    Args:
        queries, keys, scale, size: as for `cls_attention`.
        spans: int64 `[k + 1]`, bounds of sequences that do not see one another; None for one sequence a batch element.
    """
    batch, heads, length, _ = keys.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=keys.device)
    bounds = [0, length] if spans is None else spans.tolist()
    for first, last in zip(bounds, bounds[1:]):
        part = keys[:, :, first:last].float().transpose(-1, -2)
        bias = size[:, None, None, first:last].log()
        total = torch.zeros(batch, last - first, device=keys.device)
        step = max(1, TILE // max(batch * heads * (last - first), 1))
        for row in range(first, last, step):
            some = queries[:, :, row : min(row + step, last)].float()
            total += (some @ part * scale + bias).softmax(-1).sum((1, 2))
        out[:, first:last] = total / (heads * max(last - first, 1))
    return out
