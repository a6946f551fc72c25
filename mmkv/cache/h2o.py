"""H2O: heavy hitters, the tokens with the most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_numbers
from mmkv.parts.budget import check_some, tokens_of
from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register


@register("cache", "H2O, NeurIPS 2023, arXiv 2306.14048")
@dataclass(frozen=True)
class H2O(Eviction):
    """Keeps the tokens with the largest attention summed over all queries so far, and the newest; goes on while decoding.

    Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv 2306.14048).

    Args:
        budget, sinks, residual: as in `Eviction`, one amount for all modalities. The paper: 0.2, heavy and recent together.
            Set by the prompt; decoding does not raise it.
        recent: share of the budget that goes to the newest tokens (the paper: half).

    Costs more than the others: the attention of every query is computed a second time, tile by tile, at prefill and at each
    step, for its sums.

    Where we differ: the sums are averaged over the query heads of a KV head; decoded tokens compete with the heavy hitters 32
    at a time, when they leave the residual window; a token once dropped never returns (the released simulation masks, and
    lets it).
    """

    budget: float | int | str = 0.2
    recent: float = 0.5

    accumulates: ClassVar[bool] = True
    recalls: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(recent=self.recent)
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent {self.recent}: possible are 0 to below 1 (share of the budget for the newest)")
        if self.budget.total is None:
            raise ValueError("H2O decides anew among all tokens as it goes; give it one budget, not one by modality")

    @property
    def interval(self) -> int | None:
        return None if self.budget.everything else 32

    def decide(self, fill: Fill, plan: Plan) -> None:
        if self.budget.everything:
            return
        newest = fill.length - fill.old
        total = tokens_of(self.budget.total, fill.whole, fill.bytes_per_token)
        if fill.scales:
            check_some(total, self.budget.total, fill.whole)
        if fill.decoding:  # as many as before
            stored = 0 if fill.present is None else int(fill.present[:, : fill.recalled].sum(1).max())
            total = newest + stored if stored else max(total, newest)
        fixed = max(int(total * self.recent) - newest, 0)  # of the old tokens, those that are recent
        score = fill.scores[:, : fill.old].clone()
        if fixed:
            score[:, max(fill.old - fixed, fill.recalled) :] = torch.inf
        plan.drop(top_per_head(plan.available(score, fill), total - newest), fill)
