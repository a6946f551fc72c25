"""Causal attention among some of a prompt's tokens: the others neither attend nor are attended to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ._check import check_device, check_float, group_size
from .attend_dense import attend_dense
from .merge import merge_sinks

TILE_ROWS = 512  # query rows whose mask exists at a time


def prefill_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the chosen tokens of one batch element over those of them that do not come later.

    Without softcap and sink logits it is torch's own attention on the gathered tensors (flash where there is one).

    Args:
        q: [Hq, T, D]; k: [Hkv, T, D]; v: [Hkv, T, Dv].
        index: int64 [n], the chosen tokens, ascending.
        scale: factor on q.k.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: [Hq], a learned logit per query head with value zero.

    Returns:
        [Hq, T, Dv] in q's dtype, 0 for tokens that were not chosen.
    """
    check_float(q=q, k=k, v=v)
    check_device(q.device, k=k, v=v, index=index)
    group_size(q.shape[0], k.shape[0])
    if not k.shape[:2] == v.shape[:2] or q.shape[1] != k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    q, k, v = (t[None, :, index] for t in (q, k, v))
    if softcap is None and sinks is None:
        out[:, index] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]
        return out
    place = torch.arange(len(index), device=q.device)
    for rows in place.split(TILE_ROWS):
        end = int(rows[-1]) + 1  # later keys are seen by none of these rows
        mask = rows[:, None] >= place[:end]
        part, lse = attend_dense(q[:, :, rows], k[:, :, :end], v[:, :, :end], scale=scale, mask=mask, softcap=softcap)
        part = part if sinks is None else merge_sinks(part, lse, sinks)[0]
        out[:, index[rows]] = part[0].to(out.dtype)
    return out
