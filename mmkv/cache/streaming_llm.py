"""StreamingLLM: attention sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill
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
            answer: what is older goes every 32 tokens. None: decoded tokens stay.
        residual: newest tokens kept dense in the tail, at least 32; `recent` where that is given.

    Where we differ: tokens keep their original positions, as all methods here do; the paper moves them together, which
    matters once a stream is longer than the positions a model was trained for.
    """

    sinks: int = 4
    recent: int | None = None

    def __post_init__(self):
        if self.recent is not None:
            object.__setattr__(self, "residual", self.recent)
        super().__post_init__()

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
