"""RazorAttention: retrieval heads keep everything, the others their newest tokens and one that stands for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import MIN_RESIDUAL, CacheMethod, check_bools, check_numbers
from mmkv.parts.registry import register
from mmkv.parts.retrieval_heads import echo_and_induction, retrieval_heads


@register("cache", "RazorAttention, ICLR 2025, arXiv 2407.15891")
@dataclass(frozen=True)
class RazorAttention(CacheMethod):
    """Keeps all tokens in retrieval heads; in the others sinks, the newest tokens and one mean token for the dropped ones.

    Paper: RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891). The mean key and value
    of N dropped tokens weigh N exp(q.k) in the softmax, which is exact where the dropped keys are alike. No attention
    weights are looked at.

    Args:
        heads: (layer, KV head) of each retrieval head, as `RetrievalHeads` finds them for a model. Empty: all heads are
            local, which loses what is far back.
        buffer: newest tokens that a local head keeps, as a share of all tokens so far; the paper: 0.2.
        least: how many it keeps at least, in tokens; the paper: 4000, so that short prompts are not compressed.
        sinks: first tokens of the sequence that every head keeps.
        compensate: whether dropped tokens leave their mean; without it local heads are StreamingLLM's.
        residual: newest tokens kept dense in the tail, at least 32.

    Where we differ: a KV head is a retrieval head where any of its query heads is. Later prompts, and later chunks of
    one prompt, shorten the buffers again and leave a mean token of their own; decoded tokens stay. No code came with the
    paper.
    """

    heads: tuple[tuple[int, int], ...] = ()
    buffer: float = 0.2
    least: int = 4000
    sinks: int = 4
    compensate: bool = True
    residual: int = MIN_RESIDUAL

    decides: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    recalls: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(buffer=self.buffer)
        if not 0 < self.buffer <= 1:
            raise ValueError(f"buffer {self.buffer}: possible are 0 to 1 (share of the tokens), 0 excluded")
        if not _whole(self.least):
            raise ValueError(f"least {self.least!r}: possible are whole numbers of tokens from 0")
        check_bools(compensate=self.compensate)
        try:
            heads = tuple((layer, head) for layer, head in self.heads)
        except (TypeError, ValueError):
            heads = ((None, None),)
        if not all(_whole(number) for pair in heads for number in pair):
            raise ValueError(f"heads {self.heads!r}: needed are pairs of whole numbers (layer, KV head), both from 0")
        object.__setattr__(self, "heads", heads)

    def check_model(self, layers: int, kv_heads: int) -> None:
        wrong = [pair for pair in self.heads if pair[0] >= layers or pair[1] >= kv_heads]
        if wrong:
            raise ValueError(
                f"heads {wrong[0]}: this model has {layers} layers of {kv_heads} KV heads; find its own with RetrievalHeads"
            )

    def keeping_everything(self) -> RazorAttention:
        """The same with buffers that hold all tokens."""
        return replace(self, buffer=1.0)

    def decide(self, fill: Fill, plan: Plan) -> None:
        newest = fill.length - fill.old
        local = max(int(self.buffer * fill.seen), self.least) - newest
        before = plan.keep
        newer = before.flip(1).cumsum(1).flip(1)  # tokens that a head holds from this one on
        plan.drop((newer <= local) | self._retrieval(fill), fill)
        dropped = before & ~plan.keep
        if self.compensate and bool(dropped.any()):
            plan.summaries.append(mean_token(plan.keys, plan.values, dropped))

    def _retrieval(self, fill: Fill) -> torch.Tensor:
        """bool `[Hkv, 1]`."""
        self.check_model(fill.layers, fill.heads)
        mine = {head for layer, head in self.heads if layer == fill.layer}
        return torch.tensor([[head in mine] for head in range(fill.heads)], device=fill.keys.device)


def mean_token(
    keys: torch.Tensor, values: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean key `[Hkv, D]` and value `[Hkv, Dv]` of the tokens in `dropped` bool `[Hkv, n]`, and their number `[Hkv]`.

    Args:
        keys, values: `[Hkv, n, D]`; sums are fp32.
    """
    count = dropped.sum(1)
    mean = lambda x: (  # noqa: E731
        x.masked_fill(~dropped[..., None], 0).sum(1, dtype=torch.float32) / count.clamp(min=1)[:, None]
    ).to(x.dtype)
    return mean(keys), mean(values), count


@dataclass(frozen=True, eq=False)
class RetrievalHeads(CacheMethod):
    """Stores nothing differently, and finds retrieval heads while a model reads tokens that repeat.

    Wrap a model with it, let it read `mmkv.parts.retrieval_heads.repeated_tokens` in one forward, then ask for `heads()`.

    Args:
        period: tokens after which the sequence repeats.
        rows: newest queries that are looked at; None for one period.
        echo, induction, kv_heads: what was found, by layer.
    """

    period: int = 2500
    rows: int | None = None
    echo: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    induction: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    kv_heads: list[int] = field(default_factory=list, init=False)

    decides: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not _whole(self.period) or self.period < 2:
            raise ValueError(f"period {self.period!r}: possible are whole numbers of tokens from 2")
        if self.rows is not None and (not _whole(self.rows) or self.rows < 1):
            raise ValueError(f"rows {self.rows!r}: possible are whole numbers of queries from 1, and None")

    def decide(self, fill: Fill, plan: Plan) -> None:
        if fill.fresh or fill.length <= self.period:
            raise ValueError(
                f"a first prompt of more than {self.period} tokens is needed in one forward, not {fill.length} tokens with "
                f"{fill.fresh} from before"
            )
        rows = torch.arange(max(fill.length - (self.rows or self.period), self.period), fill.length)
        found = echo_and_induction(
            fill.queries(rows), fill.keys, rows, self.period, scale=fill.scale, softcap=fill.softcap
        )
        self.echo[fill.layer], self.induction[fill.layer] = found
        self.kv_heads[:] = [fill.heads]

    def heads(self, echo_share: float = 0.01, induction_share: float = 0.14) -> tuple[tuple[int, int], ...]:
        """What `RazorAttention.heads` takes; the shares are of all query heads, rounded up (the paper: 1 % and 14 %)."""
        if not self.echo:
            raise ValueError("nothing was read yet; run a wrapped model over repeated tokens first")
        return retrieval_heads(self.echo, self.induction, self.kv_heads[0], echo_share, induction_share)


def _whole(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
