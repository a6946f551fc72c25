"""Which frames a question brings back."""

from __future__ import annotations

from collections.abc import Collection

import torch

SIMILARITIES = ("cosine", "dot")
FIXED = ("uniform", "recent")


def representatives(keys: torch.Tensor, tokens: int) -> torch.Tensor:
    """fp32 `[F, Hkv * D]`: the mean of each frame's unrotated keys `[Hkv, F * tokens, D]`.

    KV heads are not repeated for their query heads, whose queries are summed instead: the same scores, Hq / Hkv times smaller.
    """
    return keys.float().unflatten(1, (-1, tokens)).mean(2).transpose(0, 1).flatten(1)


def scores(queries: torch.Tensor, index: torch.Tensor, kv_heads: int, similarity: str) -> torch.Tensor:
    """fp32 `[F]`: how well each frame answers the mean of a question's unrotated queries (ReKV, arXiv 2503.00540).

    Args:
        queries: `[Hq, T, D]`.
        index: fp32 `[F, Hkv * D]`.
        kv_heads: Hkv.
        similarity: "cosine" (the paper) or "dot" (its code), both up to a factor that all frames share.
    """
    mean = queries.float().mean(1)
    grouped = mean.unflatten(0, (kv_heads, -1)).sum(1).flatten()
    found = index @ grouped
    if similarity == "cosine":
        repeats = queries.shape[0] // kv_heads
        found = found / (index.norm(dim=1) * repeats**0.5 * mean.norm()).clamp(min=1e-12)
    return found


def best(found: torch.Tensor, count: int, group: int = 1, without: Collection[int] = ()) -> list[int]:
    """The `count` best frames in order of time, or the best groups of consecutive frames.

    Args:
        found: fp32 `[F]`.
        count: frames at most; all there are where there are fewer.
        group: consecutive frames that are ranked by their mean and come back together; a last, shorter group counts by its own.
        without: frames that cannot be read.
    """
    frames = len(found)
    if without:
        found = found.clone()
        found[list(without)] = -torch.inf
    if frames <= count:
        return [f for f in range(frames) if f not in without]
    pieces = torch.arange(frames, device=found.device) // group
    total = found.new_zeros(int(pieces[-1]) + 1).index_add_(0, pieces, found)
    size = torch.bincount(pieces, minlength=len(total))
    ranked = (total / size).topk(min(max(count // group, 1), len(total))).indices
    chosen = torch.isin(pieces, ranked).nonzero()[:, 0].tolist()
    return [f for f in chosen if f not in without]


def fixed(which: str, frames: int, count: int, without: Collection[int] = ()) -> list[int]:
    """Frames that no question chooses: "uniform" over the stream, or the most "recent"; for comparison."""
    there = [f for f in range(frames) if f not in without]
    count = min(count, len(there))
    if which == "recent":
        return there[len(there) - count :]
    return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]
