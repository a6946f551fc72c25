"""KVMerger: runs of tokens with similar keys become one token each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, pad

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_numbers
from mmkv.parts.choose import top_per_head
from mmkv.parts.probe_rows import check_newest_or_all, newest_or_all
from mmkv.parts.registry import register
from mmkv.parts.saliency import per_kv_head


@register("cache", "KVMerger, arXiv 2407.08454")
@dataclass(frozen=True)
class KVMerger(Eviction):
    """Merges neighbouring tokens with similar keys, weighted by a Gaussian around the most attended one of each run.

    Paper: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (arXiv 2407.08454). A run
    is a set of consecutive tokens whose keys each have a cosine above a threshold with the next. Its pivot p is the token
    with the most attention; keys and values become sums over the run with weights in proportion to
    exp(-|k_p - k_i|^2 / (2 sigma^2)), sigma the mean distance of the others to the pivot, and stay at the pivot's position.

    Args:
        budget: as in `Eviction`, met exactly: in each head the threshold is where merging leaves as many tokens. The paper:
            0.5 and 0.35.
        sinks, residual: as in `Eviction`.
        threshold: lowest cosine, -1 to 1: tokens less alike are never merged; where the budget asks for more, the least
            attended tokens and runs are dropped.
        important: share of the tokens that may stay beside the newest which goes to the most attended, never merged.
        probe_rows: queries whose attention counts: "all" (H2O's sums, as in the paper), or a number of the newest. All of
            them cost a second pass over every query-key product, in fp32; 64 of n tokens cost 64 / n of that.

    Where we differ: the paper fixes the threshold, which gives each head of each layer another number of tokens, and no
    budget. Attention is averaged over the query heads of a KV head. There is no released code.
    """

    budget: float | int | str | dict = 0.5
    threshold: float = 0.75
    important: float = 0.25
    probe_rows: int | str = "all"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(threshold=self.threshold, important=self.important)
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}: possible are cosines, -1 to 1")
        if not 0 <= self.important <= 1:
            raise ValueError(f"important {self.important}: possible are 0 to 1 (share of the tokens that may stay)")
        check_newest_or_all(self.probe_rows)

    def score(self, fill: Fill) -> torch.Tensor:
        mass = fill.mass(newest_or_all(fill.length, self.probe_rows, fill.fresh)).sum
        return per_kv_head(mass, fill.heads)[:, : fill.old]

    def decide(self, fill: Fill, plan: Plan) -> None:
        if self.budget.everything:
            return
        score = plan.available(self.score(fill), fill)
        stay = torch.zeros_like(plan.keep)
        for mine, count in self.allowances(fill, plan):
            stay |= self.merge(plan, score.masked_fill(~mine.to(score.device), -torch.inf), max(count, 0))
        plan.drop(stay, fill)

    def merge(self, plan: Plan, score: torch.Tensor, count: int) -> torch.Tensor:
        """Merge among the tokens with a score above -inf, so that `count` of each head are left: bool `[Hkv, old]`."""
        held = score > -torch.inf
        kept = top_per_head(score, int(self.important * count)) | (score == torch.inf)
        free = held & ~kept
        run = runs(plan.keys, free, held.sum(1) - count, self.threshold)
        pivot = pivots(score, run)
        weight = weights(plan.keys, run, pivot)
        plan.keys, plan.values = (merged(x, weight, run, pivot) for x in (plan.keys, plan.values))
        # a run is worth what its tokens are worth together
        worth = torch.zeros_like(score).scatter_add(1, run, score.masked_fill(~free, 0.0)).gather(1, run)
        at = torch.arange(run.shape[1], device=run.device)
        return top_per_head(torch.where(free, worth, score).masked_fill(pivot != at, -torch.inf), count)


def runs(keys: torch.Tensor, free: torch.Tensor, excess: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which run each token belongs to, int64 `[H, n]`, numbered from 0 in each head; most are runs of one.

    Args:
        keys: `[H, n, D]`.
        free: bool `[H, n]`, tokens that may be merged.
        excess: int64 `[H]`, how many should go: so many neighbours are joined, the most similar ones.
        threshold: only those with a cosine above it.
    """
    alike = cosine_similarity(keys[:, 1:].float(), keys[:, :-1].float(), dim=-1)
    alike = alike.masked_fill(~(free[:, 1:] & free[:, :-1]) | (alike <= threshold), -torch.inf)
    rank = alike.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    joined = (rank < excess[:, None]) & (alike > -torch.inf)
    return pad(~joined, (1, 0), value=False).cumsum(1)


def pivots(score: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
    """Index of the best token in each token's run, the earlier of equals: int64 `[H, n]`."""
    best = torch.full_like(score, -torch.inf).scatter_reduce(1, run, score, "amax").gather(1, run)
    at = torch.arange(run.shape[1], device=run.device).expand_as(run)
    at = at.masked_fill(score < best, run.shape[1])
    return torch.full_like(run, run.shape[1]).scatter_reduce(1, run, at, "amin").gather(1, run)


def weights(keys: torch.Tensor, run: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """fp32 `[H, n]`: Gaussian weight of each token in its run, summing to 1 over it."""
    total = lambda x: torch.zeros_like(x).scatter_add(1, run, x).gather(1, run)  # noqa: E731
    center = keys.gather(1, pivot[..., None].expand_as(keys)).float()
    distance = torch.linalg.vector_norm(keys.float() - center, dim=-1)
    others = (total(torch.ones_like(distance)) - 1).clamp(min=1)
    sigma = (total(distance) / others).clamp(min=torch.finfo(torch.float32).tiny)
    weight = (-0.5 * (distance / sigma).square()).exp()
    return weight / total(weight)


def merged(x: torch.Tensor, weight: torch.Tensor, run: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """`x` `[H, n, D]` in which the pivots of runs of several tokens hold the weighted sum over their run."""
    places = run[..., None].expand_as(x)
    sums = (
        torch.zeros(x.shape, device=x.device).scatter_add_(1, places, x.float() * weight[..., None]).gather(1, places)
    )
    mine = (pivot == torch.arange(x.shape[1], device=x.device)) & (weight < 1)
    return torch.where(mine[..., None], sums.to(x.dtype), x)
