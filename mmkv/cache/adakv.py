"""Ada-KV: SnapKV with heads that compete for one budget per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.fill import Fill
from mmkv.cache.method import check_numbers
from mmkv.cache.snapkv import SnapKV
from mmkv.parts.choose import top_over_heads
from mmkv.parts.registry import register


@register("cache", "Ada-KV, NeurIPS 2025, arXiv 2407.11550")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's votes with budgets by head: a layer keeps its most attended tokens, whichever heads they belong to.

    Paper: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference (arXiv 2407.11550).

    Args:
        budget: the mean over the KV heads of a layer, else as in `Eviction`.
        sinks, residual: as in `Eviction`; every head keeps these.
        window, kernel, pooling: as in `SnapKV` (the released code: 32, 7, "max").
        safeguard: share of the mean budget that every head gets, 0 to 1 (SnapKV); the paper: 0.2.

    Where we differ: as SnapKV. What the safeguard leaves goes to the best tokens that it has not chosen already; the paper
    counts the best of all tokens in each head and moves each count towards the mean by the safeguard, so that a head may
    lose tokens that are among the best. Heads are stored at their own lengths, nothing is padded.
    """

    safeguard: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_numbers(safeguard=self.safeguard)
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard {self.safeguard}: possible are 0 to 1 (share of the mean budget per head)")

    def choose(self, score: torch.Tensor, count: int, fill: Fill) -> torch.Tensor:
        return top_over_heads(score, count, int(self.safeguard * max(count, 0)))
