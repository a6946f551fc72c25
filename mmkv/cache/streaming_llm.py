"""StreamingLLM: attention sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.eviction import DEFAULT_BUDGET, Eviction
from mmkv.cache.fill import Fill
from mmkv.cache.method import MIN_RESIDUAL
from mmkv.parts.budget import Budget
from mmkv.parts.registry import register


@register("cache", "StreamingLLM, ICLR 2024, arXiv 2309.17453")
@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """Keeps the first tokens and the newest ones of a prompt; decoded tokens stay unless `recent` bounds them.

    Paper: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).

    Args:
        budget: of a prompt, sinks and newest tokens together, as in `Eviction`.
        sinks: first tokens that always stay (the paper: 4).
        recent: with a number, the cache never holds more than the sinks and about this many newest tokens, however long the
            answer: what is older goes every 32 tokens. At least 32; None: decoded tokens stay.
        residual: newest tokens kept dense in the tail, at least 32. Where `recent` is given, it says so instead.

    Where we differ: tokens keep their original positions, as all methods here do; the paper moves them together, which
    matters once a stream is longer than the positions a model was trained for.
    """

    sinks: int = 4
    recent: int | None = None

    def __post_init__(self):
        if self.recent is not None:
            check_recent(self.recent)
            if self.residual not in (MIN_RESIDUAL, self.recent):
                raise ValueError(
                    f"residual {self.residual!r} with recent {self.recent}: recent is the number of newest tokens kept dense; "
                    "leave residual out"
                )
            if Budget.of(self.budget).total not in (DEFAULT_BUDGET, 1.0):
                raise ValueError(f"budget {self.budget!r} with recent {self.recent}: give one of the two")
        super().__post_init__()

    @property
    def residual_window(self) -> int:
        return self.residual if self.recent is None else self.recent

    @property
    def interval(self) -> int | None:
        return None if self.recent is None else 32

    def score(self, fill: Fill) -> torch.Tensor:
        """The newer the better."""
        return torch.arange(fill.old, dtype=torch.float32, device=fill.keys.device).expand(fill.heads, -1)

    def decide(self, fill, plan) -> None:
        if self.recent is None:
            super().decide(fill, plan)
        else:
            plan.drop(torch.zeros_like(plan.keep), fill)


def check_recent(recent: int) -> None:
    """Raise ValueError for an impossible number of newest tokens."""
    if isinstance(recent, bool) or not isinstance(recent, int) or recent < MIN_RESIDUAL:
        raise ValueError(f"recent {recent!r}: possible are whole numbers of tokens from {MIN_RESIDUAL}, and None")
