"""Which keys a query sees, and how much each weighs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_device


class Sight(NamedTuple):
    """What comes between scores and softmax.

    Args:
        softcap: scores become `softcap * tanh(score / softcap)`.
        q_positions: int [B, Tq] of any strides, None where positions play no role.
        at: position of key 0 (keys are consecutive), or int [B, Hkv or 1, T] of every key.
        causal: hide keys at positions > the query's.
        window: hide keys at positions <= the query's - window.
        mask: bool, from `grouped_mask`.
        weight: fp32 [B, Hkv, T], how many keys each stands for.
    """

    softcap: float | None = None
    q_positions: Tensor | None = None
    at: int | Tensor = 0
    causal: bool = False
    window: int | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None

    def apply(self, s: Tensor, rows: slice, cols: slice) -> Tensor:
        """Scores fp32 [B, Hkv, G, rows, cols] of some query rows and keys, in place: weighted, -inf where hidden."""
        if self.weight is not None:
            s.add_(self.weight[:, :, None, None, cols].log())
        if self.mask is not None:
            s.masked_fill_(~mask_tile(self.mask, rows, cols), -torch.inf)
        if self.q_positions is not None:
            query = self.q_positions[:, None, None, rows, None]
            key = self.at[:, :, None, None, cols] if isinstance(self.at, Tensor) else self._consecutive(cols, s)
            if self.causal:
                s.masked_fill_(key > query, -torch.inf)
            if self.window is not None:
                s.masked_fill_(key <= query - self.window, -torch.inf)
        return s

    def _consecutive(self, cols: slice, s: Tensor) -> Tensor:
        return torch.arange(self.at + cols.start, self.at + cols.start + s.shape[-1], device=s.device)


def checked_positions(q: Tensor, q_positions: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Positions as int [B, Tq], None where they play no role; raises where they are missing."""
    if not causal and window is None:
        return None
    if q_positions is None:
        raise ValueError(f"{'causal' if causal else 'window'} needs q_positions, the logical position of each query")
    check_device(q.device, q_positions=q_positions)
    if q_positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"q_positions must be int32 or int64, not {q_positions.dtype}")
    if q_positions.dim() not in (1, 2) or any(
        m not in (1, n) for m, n in zip(q_positions.shape[::-1], (q.shape[2], q.shape[0]))
    ):
        raise ValueError(f"q_positions {tuple(q_positions.shape)} does not broadcast to {(q.shape[0], q.shape[2])}")
    return q_positions.expand(q.shape[0], q.shape[2])


def grouped_mask(mask: Tensor, b: int, hq: int, hkv: int, tq: int, t: int) -> Tensor:
    """A bool mask broadcastable to [B, 1|Hq, Tq, T], viewed as 5-D, broadcastable to [B, Hkv, G, Tq, T]; or one that is so."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), not {mask.dtype}")
    whole = (b, hq, tq, t) if mask.dim() < 5 else (b, hkv, hq // hkv, tq, t)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != len(whole) or any(m not in (1, n) for m, n in zip(shape, whole)):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {whole}")
    if mask.dim() == 5:
        return mask
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (hkv, hq // hkv))


def mask_tile(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    """Rows and columns of a mask from `grouped_mask`, where it has more than one."""
    mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., cols]
