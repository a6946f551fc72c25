"""The best tokens of each frame or tile, all frames at once."""

from __future__ import annotations

import torch


def best_share(score: torch.Tensor, frame: torch.Tensor, present: torch.Tensor, share: float) -> torch.Tensor:
    """bool `[n]`: of each frame's present tokens the ceil(share * their number) best; ties go to the earlier token.

    Args:
        score: `[n]`.
        frame: int `[n]`, at least -1, in any order.
        present: bool `[n]`; other tokens are never chosen and do not count.
        share: from 0 to 1.
    """
    if not score.numel():
        return present.clone()
    which = frame.long() + 1
    frames = int(which.max()) + 1
    quota = (share * which[present].bincount(minlength=frames).double()).ceil()
    order = score.masked_fill(~present, -torch.inf).argsort(descending=True, stable=True)
    order = order[which[order].argsort(stable=True)]
    size = which.bincount(minlength=frames)
    rank = torch.empty_like(which)
    rank[order] = torch.arange(len(which), device=which.device) - (size.cumsum(0) - size)[which[order]]
    return present & (rank < quota[which])
