"""Attention over dense keys of which every KV head of every batch element holds another number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import group_size
from .attend_dense import attend_dense


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Sequence[int],
    *,
    scale: float,
    softcap: float | None = None,
    positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with logsumexp over keys stored one row after the other, without padding.

    Args:
        q: [B, Hq, Tq, D].
        k: [N, D], v: [N, Dv]: the tokens of row 0, then those of row 1, ...; row r is batch element r // Hkv, KV head
            r % Hkv.
        offsets: R + 1 ascending numbers on the host, R = B * Hkv: row r holds `offsets[r] ... offsets[r + 1] - 1`.
        scale, softcap: as in `attend_dense`.
        positions: int [N], needed with `window`.
        q_positions: int [B, Tq], needed with `window`.
        window: hide keys at positions <= the query's - window.

    Returns:
        out fp32 [B, Hq, Tq, Dv], lse fp32 [B, Hq, Tq] (natural log); a row that sees no key gives (0, -inf).
    """
    b, hq, tq, d = q.shape
    rows = len(offsets) - 1
    if k.shape[0] != v.shape[0] or offsets[0] != 0 or offsets[-1] != k.shape[0]:
        raise ValueError(f"offsets end at {offsets[-1]}, there are {k.shape[0]} keys and {v.shape[0]} values")
    if b and rows % b:
        raise ValueError(f"{rows} rows do not divide over a batch of {b}")
    if window is not None and (positions is None or q_positions is None):
        raise ValueError("window needs positions and q_positions")
    heads = rows // b if b else 1
    group_size(hq, heads)
    lengths = {y - x for x, y in zip(offsets, offsets[1:])}
    if len(lengths) == 1:  # one length: a view is all it takes
        (n,) = lengths
        mask = None
        if window is not None:
            mask = _visible(positions.view(b, heads, 1, n), q_positions[:, None, :, None], window)
            mask = mask.repeat_interleave(hq // heads, 1)
        shape = (b, heads, n)
        return attend_dense(q, k.view(*shape, d), v.view(*shape, v.shape[-1]), scale=scale, mask=mask, softcap=softcap)
    by_row = q.reshape(rows, hq // heads, tq, d)
    out = q.new_zeros(rows, hq // heads, tq, v.shape[-1], dtype=torch.float32)
    lse = q.new_full((rows, hq // heads, tq), -torch.inf, dtype=torch.float32)
    for row in range(rows):
        at = slice(offsets[row], offsets[row + 1])
        if at.stop == at.start:
            continue
        mask = None
        if window is not None:
            mask = _visible(positions[at][None, None, None], q_positions[row // heads][None, None, :, None], window)
        part = attend_dense(
            by_row[row : row + 1], k[at][None, None], v[at][None, None], scale=scale, mask=mask, softcap=softcap
        )
        out[row], lse[row] = part[0][0], part[1][0]
    return out.view(b, hq, tq, v.shape[-1]), lse.view(b, hq, tq)


def _visible(positions: Tensor, q_positions: Tensor, window: int) -> Tensor:
    return positions > q_positions - window
