"""Two-dimensional rotary embedding: a token's row turns half of its head's pairs, its column the other half.

Spec: rope2d of FoundationVision/Infinity with places normalised to the finest map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkv.models.infinity.schedules import Schedule

BASE = 10000.0


def places(count: int, extent: int) -> Tensor:
    """fp32 `[count]`: where the rows (or columns) of a map lie on the finest one of `extent`, in whole steps (half to even)."""
    return (torch.arange(count) * (extent / count)).round()


def rotary_table(schedule: Schedule, scales: range, head_dim: int, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tokens of some scales: fp32 `[T, head_dim / 2]` each.

    Args:
        schedule: of the image.
        scales: indices of the scales, in order.
        head_dim: channels of a head, a multiple of 4.
        device: of the result.
    """
    half = head_dim // 2
    frequency = 1.0 / BASE ** (torch.arange(0, half, 2).float() / half)
    angles = []
    for rows, columns in (schedule.sizes[scale] for scale in scales):
        row = torch.outer(places(rows, schedule.extent[0]), frequency)[:, None].expand(-1, columns, -1)
        column = torch.outer(places(columns, schedule.extent[1]), frequency)[None].expand(rows, -1, -1)
        angles.append(torch.cat([row, column], -1).flatten(0, 1))
    angle = torch.cat(angles)
    return angle.cos().to(device), angle.sin().to(device)


def rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x` fp32 `[B, H, T, D]` with its pairs of neighbouring channels turned by a `rotary_table` of the T tokens."""
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)
