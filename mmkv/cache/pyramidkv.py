"""PyramidKV: SnapKV with more tokens in early layers than in late ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.fill import Fill
from mmkv.cache.method import check_numbers
from mmkv.cache.snapkv import SnapKV
from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register


@register("cache", "PyramidKV, arXiv 2406.02069")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice with a budget that falls linearly from the first layer to the last.

    Paper: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (arXiv 2406.02069). Of b tokens
    that a layer may keep on average beside the newest, the last layer keeps b / beta and the first 2 b - b / beta, or all it
    has where that is fewer, and the last then 2 b less that: the mean over the layers stays b.

    Args:
        budget: the mean over the layers, else as in `Eviction`.
        sinks, residual: as in `Eviction`.
        window, kernel, pooling: as in `SnapKV`.
        beta: how steeply budgets fall, from 1 (all layers alike); the last layer keeps 1 / `beta` of the mean.

    Where we differ: as SnapKV; rounding is symmetric around the middle layer, so that the mean is met exactly (the released
    code rounds each step down). The line runs over the layers without a sliding window.
    """

    beta: float = 20

    def __post_init__(self):
        super().__post_init__()
        check_numbers(beta=self.beta)
        if not self.beta >= 1:
            raise ValueError(f"beta {self.beta}: possible are numbers from 1 (all layers alike)")

    def choose(self, score: torch.Tensor, count: int, fill: Fill) -> torch.Tensor:
        held = int((score > -torch.inf).sum(-1).max())
        return top_per_head(score, self.of_layer(max(count, 0), held, fill.place, fill.places))

    def of_layer(self, mean: int, held: int, layer: int, layers: int) -> int:
        """Tokens that a layer keeps where the mean over the layers is `mean`, and each has `held` to choose from."""
        if layers == 1:
            return mean
        above = max(min(mean - mean / self.beta, held - mean), 0)  # of the first layer, over the mean
        return mean + int(above * (layers - 1 - 2 * layer) / (layers - 1))
