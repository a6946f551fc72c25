"""Two-dimensional rotary embedding: a token's row turns half of its head's pairs, its column the other half.

Spec: rope2d of FoundationVision/Infinity with places normalised to the finest map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkv.kernels import rotary_tables
from mmkv.models.infinity.schedules import Schedule

BASE = 10000.0


def places(count: int, extent: int) -> Tensor:
    """fp32 `[count]`: where the rows (or columns) of a map lie on the finest one of `extent`, in whole steps (half to even)."""
    return (torch.arange(count) * (extent / count)).round()


def rotary_table(schedule: Schedule, scales: range, head_dim: int, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tokens of some scales: fp32 `[T, head_dim / 2]` each, for pairs of neighbouring channels.

    Args:
        schedule: of the image.
        scales: indices of the scales, in order.
        head_dim: channels of a head, a multiple of 4.
        device: of the result.
    """
    half = head_dim // 2
    frequency = 1.0 / BASE ** (torch.arange(0, half, 2).float() / half)
    sizes = [schedule.sizes[scale] for scale in scales]
    at = [torch.cartesian_prod(*(places(n, e) for n, e in zip(size, schedule.extent, strict=True))) for size in sizes]
    cos, sin = rotary_tables(torch.cat(at).T, frequency.repeat(2), sections=(len(frequency), len(frequency)))
    return cos.to(device), sin.to(device)
