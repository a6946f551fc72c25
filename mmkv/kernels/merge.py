"""Exact merge of attention over parts of the keys by their logsumexp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import FLOATS, check_device, check_float, check_rank, wants_grad


def merge(
    parts: Sequence[tuple[Tensor, Tensor]], *, sinks: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets; on a GPU all of it in one launch (eight parts at a time).

    Args:
        parts: (out [B, Hq, Tq, Dv], lse [B, Hq, Tq]) of each set, or (out [S, B, Hq, Tq, Dv], lse [S, B, Hq, Tq]) of S sets
            at once, as attention gives with `merged=False`; (0, -inf) is neutral.
        sinks: [Hq], one learned logit per query head with value zero (gpt-oss), which enters once and last.
        dtype: of the output.

    Returns:
        out [B, Hq, Tq, Dv] (on a GPU in the order of [B, Tq, Hq, Dv] in memory), lse fp32 [B, Hq, Tq], the sink's mass
        included; a row that is -inf in all parts gives (0, -inf).

    Raises:
        ValueError: no parts, or parts that do not fit together.
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype}: possible are {', '.join(str(d) for d in FLOATS)}")
    _check(parts, sinks)
    first = parts[0][0]
    if first.is_cuda and not wants_grad(*(t for part in parts for t in part), sinks):
        from .merge_triton import merge_triton

        with torch.cuda.device(first.device):  # Triton launches on the current device, a split model has several
            return merge_triton(parts, sinks, dtype)
    out, lse = merge_reference(parts)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks)
    return out.to(dtype), lse


def _check(parts: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None) -> None:
    first = parts[0][0]
    for i, (out, lse) in enumerate(parts):
        check_float(**{f"parts[{i}]": out, f"parts[{i}].lse": lse})
        check_device(first.device, **{f"parts[{i}]": out, f"parts[{i}].lse": lse})
        if out.dim() not in (4, 5) or out.shape[-4:] != first.shape[-4:] or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {i} is out {tuple(out.shape)}, lse {tuple(lse.shape)}; with part 0 {tuple(first.shape)} possible are "
                "[B, Hq, Tq, Dv] and [S, B, Hq, Tq, Dv] with one lse per row"
            )
    if sinks is not None:
        _check_sinks(first, sinks)


def _check_sinks(out: Tensor, sinks: Tensor) -> None:
    check_float(sinks=sinks)
    check_device(out.device, sinks=sinks)
    if sinks.shape != out.shape[-3:-2]:
        raise ValueError(f"sinks {tuple(sinks.shape)}: possible is one for each of {out.shape[-3]} query heads")


def merge_reference(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`merge` in torch, out fp32."""
    parts = [pair for o, lse in parts for pair in (zip(o, lse) if o.dim() == 5 else [(o, lse)])]
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
    check_rank(4, out=out)
    _check([(out, lse)], sinks)
    both = torch.logaddexp(lse.float(), sinks.float().view(1, -1, 1))
    share = (lse.float() - both).exp().nan_to_num(0.0)  # -inf - -inf: no key and a sink of -inf
    return out.float() * share.unsqueeze(-1), both
