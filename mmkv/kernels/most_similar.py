"""The nearest of many vectors by cosine: the score of bipartite matching, without the matrix of similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_device, check_float, wants_grad

TILE = 1 << 24  # cosines that exist at a time


def most_similar(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each vector of `a` with any of `b`, and which (ToMe, arXiv 2210.09461; DiffRate, arXiv 2305.17997).

    A vector of zeros has cosine 0 with all. Of equal cosines the first wins, and a NaN wins over everything, as in
    `torch.max`. Products of 16-bit numbers are exact, sums are fp32 (fp64 for fp64 input).

    Args:
        a: [B, n, D], any strides.
        b: [B, m, D], a's dtype; m >= 1 unless there is nothing to compare.

    Returns:
        cosine fp32 (fp64) [B, n], index int64 [B, n] into the m vectors.

    Raises:
        ValueError: shapes do not fit, or b is empty.
        TypeError: dtypes differ or are not floating point.
    """
    check_float(a=a, b=b)
    check_device(a.device, b=b)
    if a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype}, b is {b.dtype}; give both the same dtype")
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit together; they have to be [B, n, D], [B, m, D]"
        )
    if not a.shape[0] * a.shape[1]:
        return a.new_zeros(a.shape[:2], dtype=_wide(a)), torch.zeros(a.shape[:2], dtype=torch.int64, device=a.device)
    if not b.shape[1]:
        raise ValueError(f"b is {tuple(b.shape)}: no vector that one of a could be nearest to; give at least one")
    if a.is_cuda and not wants_grad(a, b):
        from .most_similar_triton import most_similar_triton

        with torch.cuda.device(a.device):
            return most_similar_triton(a, b)
    return most_similar_reference(a, b)


def most_similar_reference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`most_similar` of something, by torch: `TILE` cosines at a time."""
    a, b = F.normalize(a.to(_wide(a)), dim=-1), F.normalize(b.to(_wide(b)), dim=-1).transpose(1, 2)
    step = max(1, TILE // (b.shape[0] * b.shape[2]))
    found = [(a[:, row : row + step] @ b).max(-1) for row in range(0, a.shape[1], step)]
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
