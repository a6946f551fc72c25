"""Token merging's weighted scatter: vectors of each group become their mean, numbers of each group their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_device, check_float, wants_grad


class Members(NamedTuple):
    """Tokens by group, so that each group's lie together and are summed in one order, always the same.

    Args:
        order: int64 [B, N], tokens sorted by group, those of a group ascending, pruned ones in front.
        bounds: int64 [B, count + 1]; group g of row b is `order[b, bounds[b, g] : bounds[b, g + 1]]`.
    """

    order: Tensor
    bounds: Tensor


def group_members(index: Tensor, count: int) -> Members:
    """The members of `count` groups, of the group int64 [B, N] of each token (-1 = pruned)."""
    found = index.sort(dim=1, stable=True)
    groups = torch.arange(count + 1, device=index.device).expand(len(index), -1)
    return Members(found.indices, torch.searchsorted(found.values, groups.contiguous()))


def group_mean(
    x: Tensor, index: Tensor, count: int, weight: Tensor | None = None, members: Members | None = None
) -> Tensor:
    """Mean of each group's vectors (ToMe, arXiv 2210.09461; DiffRate, arXiv 2305.17997), summed in fp32 at least.

    The only member of a group stays as it is, to the bit. A group without members, or whose weights sum to nothing, is 0.
    Gradients reach x and weight; where they are wanted a GPU runs torch operations as well.

    Args:
        x: [B, N, C], any strides.
        index: int64 [B, N], group 0 ... count-1 of each token, -1 where it is pruned.
        count: N', groups.
        weight: [B, N], not negative; None for the plain mean.
        members: `group_members(index, count)` where somebody has it; else a GPU sorts for itself.

    Returns:
        [B, N', C] in x's dtype.

    Raises:
        ValueError: shapes do not fit, count is negative, or (looked at on a CPU alone) an index is beyond it.
        TypeError: x or weight is not floating point, or index not int64.
    """
    check_float(x=x, **({} if weight is None else {"weight": weight}))
    _check(x, index, count, weight)
    if x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}; it has to be [B, N, C]")
    if x.is_cuda and not wants_grad(x, weight):
        from .group_mean_triton import group_mean_triton

        with torch.cuda.device(x.device):
            return group_mean_triton(x, weight, members or group_members(index, count))
    return group_mean_reference(x, index, count, weight)


def group_total(values: Tensor, index: Tensor, count: int, members: Members | None = None) -> Tensor:
    """Sum of each group's numbers, `[B, N']` of floating-point `[B, N]` in its dtype; arguments as for `group_mean`."""
    check_float(values=values)
    _check(values, index, count, values)
    if values.is_cuda and not wants_grad(values):
        from .group_mean_triton import group_total_triton

        with torch.cuda.device(values.device):
            return group_total_triton(values, members or group_members(index, count))
    return group_total_reference(values, index, count)


def group_mean_reference(x: Tensor, index: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """`group_mean` by torch: x times the share of each token, added up at its group's place."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.ones(index.shape, dtype=wide, device=x.device) if weight is None else weight.to(wide)
    whole = _add_up(weight, index, count).gather(1, _slots(index, count))
    share = torch.where(whole > 0, weight / whole.where(whole > 0, 1), 0)
    rows = torch.arange(len(index), device=x.device)[:, None] * (count + 1)
    summed = x.new_zeros(x.shape[0] * (count + 1), x.shape[2], dtype=wide)
    summed = summed.index_add(0, (_slots(index, count) + rows).flatten(), (x * share[..., None]).flatten(0, 1))
    return summed.view(x.shape[0], count + 1, x.shape[2])[:, :count].to(x.dtype)


def group_total_reference(values: Tensor, index: Tensor, count: int) -> Tensor:
    """`group_total` by torch."""
    return _add_up(values, index, count)[:, :count]


def _add_up(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[B, count + 1]: the last takes what is pruned."""
    return values.new_zeros(len(values), count + 1).scatter_add(1, _slots(index, count), values)


def _slots(index: Tensor, count: int) -> Tensor:
    return index.where(index >= 0, count)


def _check(x: Tensor, index: Tensor, count: int, weight: Tensor | None) -> None:
    check_device(x.device, index=index, **({} if weight is None else {"weight": weight}))
    if index.dtype != torch.int64:
        raise TypeError(f"index is {index.dtype}; it has to be int64")
    if index.dim() != 2 or x.shape[:2] != index.shape:
        raise ValueError(f"index is {tuple(index.shape)} for tokens {tuple(x.shape[:2])}; both have to be [B, N]")
    if weight is not None and weight.shape != index.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}; it has to be {tuple(index.shape)}")
    if count < 0:
        raise ValueError(f"count={count}; the number of groups is at least 0")
    if not index.is_cuda and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(
            f"index has {int(index.min())} ... {int(index.max())}; possible are 0 to {count - 1}, and -1 for what is pruned"
        )
