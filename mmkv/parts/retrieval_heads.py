"""Retrieval heads: found by what heads look at in random tokens that repeat (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch

from mmkv.kernels import attend_dense


def repeated_tokens(vocabulary: int, period: int = 2500, times: int = 4, seed: int = 0) -> torch.Tensor:
    """int64 `[period * times]`: random token ids below `vocabulary`, repeated; the defaults are the paper's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (period,), generator=generator).repeat(times)


def echo_and_induction(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    period: int,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each query head looks at earlier occurrences of its own token (echo), and at what followed them (induction).

    Args:
        query: `[Hq, P, D]`, rotated, of the probe rows.
        key: `[Hkv, T, D]`, rotated, of a sequence that repeats every `period` tokens.
        rows: int64 `[P]`, where the probe rows are in the sequence; not in its first period, which has nothing to repeat.
        period: tokens, at least 2.
        scale, softcap: of the attention.

    Returns:
        fp32 `[Hq]` each: attention on all such tokens together, averaged over the rows.
    """
    rows = rows.to(key.device)
    seen = torch.arange(key.shape[1], device=key.device) <= rows[:, None]
    lse = attend_dense(query[None], key[None], key[None, ..., :1], scale=scale, mask=seen[None, None], softcap=softcap)[
        1
    ][0]
    grouped = query.float().unflatten(0, (key.shape[0], -1))
    found = []
    for after in (0, 1):
        mass = torch.zeros_like(lse)
        for back in range(period, int(rows.max()) + 1, period):
            at = rows - back + after
            score = (grouped * key[:, at.clamp(min=0)].float()[:, None]).sum(-1).flatten(0, 1) * scale
            score = score if softcap is None else softcap * (score / softcap).tanh()
            mass += (score - lse).exp() * (rows >= back)
        found.append(mass.mean(-1))
    return found[0], found[1]


def retrieval_heads(
    echo: Mapping[int, torch.Tensor],
    induction: Mapping[int, torch.Tensor],
    kv_heads: int,
    echo_share: float = 0.01,
    induction_share: float = 0.14,
) -> tuple[tuple[int, int], ...]:
    """The (layer, KV head) pairs of which any query head is among the best echo or induction heads of the model.

    Args:
        echo, induction: by layer, fp32 `[Hq]`, as `echo_and_induction` returns them; the same layers.
        kv_heads: Hkv.
        echo_share, induction_share: of all query heads, rounded up to whole heads (the paper: 1 % and 14 %).

    Returns:
        ascending.
    """
    layers, chosen = sorted(echo), set()
    for scores, share in ((echo, echo_share), (induction, induction_share)):
        ranked = torch.stack([scores[layer].cpu() for layer in layers])
        group = ranked.shape[1] // kv_heads
        best = ranked.flatten().argsort(descending=True, stable=True)[: ceil(share * ranked.numel() - 1e-9)]
        chosen |= {(layers[i // ranked.shape[1]], i % ranked.shape[1] // group) for i in best.tolist()}
    return tuple(sorted(chosen))
