"""`Eviction`: base of the methods that score a prompt's tokens and keep the best within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import MIN_RESIDUAL, CacheMethod
from mmkv.parts.budget import Budget
from mmkv.parts.choose import top_per_head

DEFAULT_BUDGET = 0.25


@dataclass(frozen=True)
class Eviction(CacheMethod):
    """A subclass says how tokens are scored (`score`); where heads or layers get different numbers, `choose` or `count`.

    Args:
        budget: what stays of each prompt and of each later turn that brings media, the newest tokens included: a ratio of
            the real tokens (0.25), tokens per KV head (512), bytes of the whole cache ("64MiB"), or a dict by modality
            (`{"video": 0.2, "image": 0.5}`; text, not named, stays whole). The newest `residual` tokens and sinks stay even
            where that is more: of a prompt shorter than that nothing is dropped.
            On models that make an image scale by scale all that is held is decided upon anew after each scale, ratios are of
            the tokens before the last one, and no newest tokens are set apart.
        sinks: first tokens of the sequence that always stay.
        residual: newest tokens kept, dense, at least 32.
    """

    budget: Budget | float | int | str | dict = DEFAULT_BUDGET
    sinks: int = 0
    residual: int = MIN_RESIDUAL

    decides: ClassVar[bool] = True
    evicts: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "budget", Budget.of(self.budget))
        least, always = self.budget.smallest_count(), self.residual_window + self.dense_sinks
        if self.budget.total is not None and least is not None and least < always:
            raise ValueError(
                f"budget of {least} tokens: {always} always stay (the newest {self.residual_window}, {self.dense_sinks} sinks); "
                f"give {always} or more, or a ratio"
            )

    def score(self, fill: Fill) -> torch.Tensor:
        """fp32 `[Hkv, old]`, the larger the better."""
        raise NotImplementedError

    def count(self, count: int, fill: Fill) -> int:
        """How many tokens stay in this layer where the budget says `count`."""
        return count

    def choose(self, score: torch.Tensor, count: int, fill: Fill) -> torch.Tensor:
        """bool `[Hkv, old]`: which of the tokens with a score above -inf stay, `count` of each head."""
        return top_per_head(score, count)

    def decide(self, fill: Fill, plan: Plan) -> None:
        if self.budget.everything:
            return
        score = plan.available(self.score(fill), fill)
        stay = torch.zeros_like(plan.keep)
        for mine, count in self.allowances(fill, plan):
            stay |= self.choose(score.masked_fill(~mine.to(score.device), -torch.inf), count, fill)
        plan.drop(stay, fill)

    def allowances(self, fill: Fill, plan: Plan) -> list[tuple[torch.Tensor, int]]:
        """Which old tokens compete, bool `[old]` (`[Hkv, old]` where tokens are recalled), and how many of them may stay.

        The newest tokens stay anyway, and count. Of a prompt in chunks, each chunk gets what its old tokens are of all.
        """
        present, newest = plan.present(fill), fill.length - fill.old
        size = (fill.bytes_per_token, fill.bytes_beyond)
        pools = self.budget.pools(fill.modality, present, *size, whole=fill.whole if fill.scales else None)
        if fill.prompt is None:
            kept = [int(mine[..., fill.old :].float().sum(-1).mean()) for mine, _ in pools]
            return [(mine[..., : fill.old], self.count(n, fill) - k) for (mine, n), k in zip(pools, kept)]
        whole = self.budget.pools(fill.prompt, torch.ones(len(fill.prompt)), *size)
        until = fill.prompt_before + (fill.old - fill.recalled)
        out = []
        for (mine, _), (theirs, n) in zip(pools, whole):
            here = mine[..., : fill.old]
            left = float((present[..., : fill.old] * here).sum(-1).mean()) / max(float(here.float().sum(-1).mean()), 1)
            last = int(theirs[len(theirs) - newest :].sum())
            before, after, every = (
                int(theirs[:end].sum()) for end in (fill.prompt_before, until, len(theirs) - newest)
            )
            # rounded from the prompt's beginning, so that what one chunk loses the next one gets
            due = [round(max(self.count(n, fill) - last, 0) * left * part / max(every, 1)) for part in (before, after)]
            out.append((here, due[1] - due[0]))
        return out
