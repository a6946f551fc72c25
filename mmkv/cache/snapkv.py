"""SnapKV: the prompt's last queries vote for the keys that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill
from mmkv.parts.probe_rows import check_window, recent
from mmkv.parts.registry import register
from mmkv.parts.saliency import check_pooling, per_kv_head, pooled


@register("cache", "SnapKV, NeurIPS 2024, arXiv 2404.14469")
@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keeps the tokens that the last queries of the prompt attend to, and their neighbours.

    Paper: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469).

    Args:
        budget, sinks, residual: as in `Eviction`.
        window: queries that vote, the newest of the prompt.
        kernel: tokens over which votes are pooled, odd; 1 for none.
        pooling: "avg" (the code's default), "max" or "none".

    Where we differ: votes are averaged over the query heads of a KV head and one choice is made for it, so the memory is
    freed under grouped-query attention (the paper's code stores every query head). At least 32 newest tokens stay.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        check_pooling(self.kernel, self.pooling)

    def score(self, fill: Fill) -> torch.Tensor:
        mass = fill.mass(recent(fill.length, self.window, fill.fresh)).sum
        return pooled(per_kv_head(mass, fill.heads)[:, : fill.old], self.kernel, self.pooling)
