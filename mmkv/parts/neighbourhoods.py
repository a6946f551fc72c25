"""Flat neighbourhoods: windows of a patch grid whose tokens look alike, and what becomes of them when each turns into one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmkv.parts.matching import Grouping
from mmkv.parts.tower_attention import TILE


def windows(frame: torch.Tensor, row: torch.Tensor, col: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    """int64 `[W, n]`: the members of every complete window, ascending, so that the first is the one at its top left.

    Windows start at row and column 0 and do not overlap. Those that reach over the border of a grid, or have lost a member,
    are not listed: their tokens are on their own.

    Args:
        frame, row, col: int `[N]`, place of each token; a negative row marks a token on no grid.
        side: rows and columns of a window; n is their product.
    """
    n = side[0] * side[1]
    here = (row >= 0).nonzero()[:, 0]
    frame, down, right = frame[here].long(), row[here].long() // side[0], col[here].long() // side[1]
    if not here.numel():
        return here.new_zeros(0, n)
    window = (frame * (down.max() + 1) + down) * (right.max() + 1) + right
    order = window.argsort(stable=True)
    count = window[order].unique_consecutive(return_counts=True)[1]
    first = (count.cumsum(0) - count)[count == n]
    return here[order[first[:, None] + torch.arange(n, device=here.device)]]


def grid_windows(grid: tuple[int, int], side: tuple[int, int], device=None) -> torch.Tensor:
    """int64 `[W, n]`: the same for one grid of `(rows, columns)` whose tokens lie in raster order."""
    place = torch.arange(grid[0] * grid[1], device=device)
    return windows(torch.zeros_like(place), place // grid[1], place % grid[1], side)


@torch.no_grad()
def flatness(x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """fp32 `[B, W]`: how alike the tokens of each window are, the mean cosine over its ordered pairs i != j.

    Args:
        x: `[B, N, C]`. A zero vector has cosine 0 with all others.
        members: int64 `[W, n]`, n at least 2.
    """
    count, n = members.shape
    step = max(1, TILE // max(x.shape[0] * n * x.shape[2], 1))
    out = [x.new_zeros(x.shape[0], 0, dtype=torch.float32)]
    for some in members.split(step) if count else ():
        unit = F.normalize(x[:, some].float(), dim=-1)
        # all pairs at once: |sum of unit vectors|^2 counts each i = j, too
        out.append((unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))) / (n * (n - 1)))
    return torch.cat(out, 1)


def flattest(score: torch.Tensor, tau: float) -> torch.Tensor:
    """bool `[B, W]`: the r best windows of each batch element; r is the smallest number that reach `tau` in any of them.

    So every element gets rid of the same number of tokens. Ties go to the earlier window.
    """
    reach = (score >= tau).sum(1)
    r = int(reach.min()) if reach.numel() else 0
    best = score.argsort(dim=1, descending=True, stable=True)[:, :r]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


def merged_into(chosen: torch.Tensor, members: torch.Tensor, length: int) -> torch.Tensor:
    """int64 `[B, length]`: the token that each becomes part of: the first of its window where that is chosen, else itself.

    Args:
        chosen: bool `[B, W]`.
        members: int64 `[W, n]` of `length` tokens.
    """
    target = torch.arange(length, device=members.device).repeat(len(chosen), 1)
    if not members.numel():
        return target
    first = torch.where(chosen[..., None], members[:, :1], members)
    return target.scatter_(1, members.expand(len(chosen), -1, -1).flatten(1), first.flatten(1))


def grouped_windows(chosen: torch.Tensor, members: torch.Tensor, length: int, prefix: int = 0) -> Grouping:
    """Each chosen window becomes one token, the plain mean of its tokens, where its first one was.

    All chosen windows count as one token of size 1, so that attention proportional to size stays ordinary attention.

    Args:
        chosen: bool `[B, W]`, the same number in each batch element.
        members: int64 `[W, n]`, places among the patches.
        length: patches.
        prefix: tokens in front of them that stay as they are.
    """
    place = merged_into(chosen, members, length)
    front = torch.arange(prefix, device=place.device).expand(len(place), -1)
    share = torch.ones(place.shape, dtype=torch.float32, device=place.device)
    if members.numel():
        window_share = torch.where(chosen, 1 / members.shape[1], 1.0)[..., None].expand(-1, -1, members.shape[1])
        share.scatter_(1, members.expand(len(chosen), -1, -1).flatten(1), window_share.flatten(1).to(share.dtype))
    gone = int(chosen[0].sum()) * (members.shape[1] - 1) if len(chosen) else 0
    return Grouping.into(
        torch.cat([front, place + prefix], 1),
        prefix + length - gone,
        size_weighted=False,
        size_share=torch.cat([torch.ones_like(front, dtype=share.dtype), share], 1),
    )
