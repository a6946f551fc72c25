"""Exact merge of attention over parts of the keys by their logsumexp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets.

    Args:
        parts: (out [B, Hq, Tq, Dv], lse [B, Hq, Tq]) of each set; (0, -inf) is neutral.

    Returns:
        out fp32 [B, Hq, Tq, Dv], lse fp32 [B, Hq, Tq]; a row that is -inf in all parts gives (0, -inf).
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    lse = torch.stack([part[1].float() for part in parts])
    top = lse.amax(0)
    weight = (lse - top.masked_fill(top == -torch.inf, 0.0)).exp()  # an all -inf row gives weights 0, not NaN
    total = weight.sum(0)
    weight = weight / total.clamp(min=torch.finfo(torch.float32).tiny)
    out = weight[0].unsqueeze(-1) * parts[0][0].float()
    for w, (o, _) in zip(weight[1:], parts[1:], strict=True):
        out = torch.addcmul(out, w.unsqueeze(-1), o.float())
    return out, top + total.log()


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one learned logit per query head with value zero to the softmax (gpt-oss).

    Args:
        out: [B, Hq, Tq, Dv].
        lse: [B, Hq, Tq].
        sinks: [Hq].

    Returns:
        out fp32, lse fp32 (the sink's mass included), so it must be merged last and once.
    """
    both = torch.logaddexp(lse.float(), sinks.float().view(1, -1, 1))
    share = (lse.float() - both).exp().nan_to_num(0.0)  # -inf - -inf: no key and a sink of -inf
    return out.float() * share.unsqueeze(-1), both
