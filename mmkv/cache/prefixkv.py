"""PrefixKV: each layer keeps as many tokens as it needs for one share of its attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mmkv.cache.cache import Cache, state_of
from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_numbers
from mmkv.parts.budget import Budget
from mmkv.parts.probe_rows import check_newest_or_all, newest_or_all
from mmkv.parts.registry import register
from mmkv.parts.saliency import per_kv_head


@register("cache", "PrefixKV, arXiv 2412.03409")
@dataclass(frozen=True)
class PrefixKV(Eviction):
    """Keeps the most attended tokens, in each layer as many as hold the same share of its attention.

    Paper: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation (arXiv
    2412.03409). A token's importance in a layer is the attention of the prompt's queries, averaged over all heads, which
    keep the same tokens. One share p holds for all layers, such that together they keep the budget.

    Args:
        budget: the mean over the layers, else as in `Eviction`; the mean of `ratios` where they are given.
        sinks: first tokens of the sequence that always stay.
        residual: as in `Eviction`.
        ratios: share of the tokens that each layer keeps, 0 (excluded) to 1, one for each layer of the model: what the paper
            averages over prompts beforehand, and `ratios_from` does here. Each layer is then compressed right after its
            attention; None looks for p anew in each prompt, which needs all layers dense until the forward ends.
        probe_rows: queries whose attention counts: "all" (the paper), or a number of the newest. All of them cost a second
            pass over every query-key product, in fp32; 64 of n tokens cost 64 / n of that.

    Where we differ: p is found exactly by sorting (the paper's binary search stops within 5 tokens). The newest `residual`
    tokens stay, not the last alone, and what stays anyway counts into p. Decoded tokens stay (the released code drops one at
    a fixed place for each).
    """

    sinks: int = 4
    ratios: tuple[float, ...] | None = None
    probe_rows: int | str = "all"

    @property
    def joint(self) -> bool:
        return self.ratios is None

    def __post_init__(self):
        if self.ratios is not None:
            object.__setattr__(self, "ratios", checked_ratios(self.ratios))
            mean = float(sum(self.ratios) / len(self.ratios))
            check_agreement(self.budget, mean)
            object.__setattr__(self, "budget", mean)
        super().__post_init__()
        check_newest_or_all(self.probe_rows)

    def check_model(self, layers: int, kv_heads: int) -> None:
        if self.ratios is not None and len(self.ratios) != layers:
            raise ValueError(f"{len(self.ratios)} ratios: this model has {layers} layers, and each needs one")

    def score(self, fill: Fill) -> torch.Tensor:
        mass = self.mass(fill)
        if fill.recalled:  # heads that hold different tokens cannot choose the same
            return per_kv_head(mass, fill.heads)[:, : fill.old]
        return mass.mean(0)[: fill.old].expand(fill.heads, -1)

    def mass(self, fill: Fill) -> torch.Tensor:
        """fp32 `[Hq, n]`, attention of the probe rows on each token."""
        return fill.mass(newest_or_all(fill.length, self.probe_rows, fill.fresh)).sum

    def decide(self, fill: Fill, plan: Plan) -> None:
        self.check_model(fill.layers, fill.heads)
        Eviction.decide(replace(self, budget=float(self.ratios[fill.layer]), ratios=None), fill, plan)

    def decide_jointly(self, fills: list[Fill], plans: list[Plan]) -> None:
        if self.budget.everything:
            return
        mass = [self.mass(fill).mean(0) for fill in fills]
        stay = [torch.zeros(fill.old, dtype=torch.bool, device=m.device) for fill, m in zip(fills, mass)]
        for pools in zip(*(self.allowances(fill, plan) for fill, plan in zip(fills, plans))):
            ranked = [ranks(m, fill, mine) for m, fill, (mine, _) in zip(mass, fills, pools)]
            sure = sum(int((fill.protected & mine).sum()) for fill, (mine, _) in zip(fills, pools))
            counts = prefixes([reached for _, reached in ranked], sum(count for _, count in pools) - sure)
            for chosen, (order, _), count in zip(stay, ranked, counts):
                chosen[order[:count]] = True
        for fill, plan, chosen in zip(fills, plans, stay):
            plan.drop(chosen.expand_as(plan.keep), fill)


def ranks(mass: torch.Tensor, fill: Fill, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that a layer may drop, best first, and what it holds of its attention before each of them is taken.

    Args:
        mass: `[n]`, attention on each token.
        fill: the layer's tokens; the protected and the newest are held anyway.
        mine: bool `[old]`, tokens that compete.

    Returns:
        int64 `[m]`, indices; fp64 `[m]`, shares of the attention, ascending.
    """
    old = mass[: fill.old].double()
    protected = fill.protected.to(mass.device)
    free = (mine.to(mass.device) & ~protected).nonzero()[:, 0]
    order = free[old[free].argsort(descending=True, stable=True)]
    total = mass.double().sum()
    anyway = total - old[~protected].sum()
    taken = old[order].cumsum(0)
    before = torch.nn.functional.pad(taken[:-1], (1, 0)) if len(order) else taken
    return order, (anyway + before) / total.clamp(min=torch.finfo(torch.float64).tiny)


def prefixes(reached: list[torch.Tensor], total: int) -> list[int]:
    """How many of its best tokens each layer keeps, `total` together: all that are taken before one share p is reached.

    Args:
        reached: of each layer fp64 `[m]`, ascending, what it holds before it takes each token.
        total: tokens of all layers; what is impossible means none or all.
    """
    flat = torch.cat([r.to(reached[0].device) for r in reached])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(stable=True)[: max(total, 0)]] = True
    return torch.stack([part.sum() for part in chosen.split([len(r) for r in reached])]).tolist()


def ratios_from(caches: Iterable[Cache]) -> tuple[float, ...]:
    """What `PrefixKV.ratios` takes: the share of its tokens that each layer holds, averaged over prompts.

    Args:
        caches: of a model wrapped with `PrefixKV(budget=...)`, each after one prompt; a generator keeps only one alive. The
            elements of a batch count as prompts of their own.

    Raises:
        TypeError: another kind of cache, or no caches.
        ValueError: no cache, or one without a prompt.
    """
    needed = "needed are caches of a model wrapped with PrefixKV"
    if not isinstance(caches, Iterable):
        raise TypeError(f"ratios from {type(caches).__name__}: {needed}, in a list or another iterable")
    found = []
    for cache in caches:
        state = state_of(cache)
        if state is None:
            raise TypeError(f"ratios from {type(cache).__name__}: {needed}")
        if state.layout is None or not len(state.layout):
            raise ValueError(f"ratios from an empty {type(cache).__name__}: {needed}, each after one prompt")
        valid = state.layout.valid
        for row in range(len(valid)):
            held = [
                sum(segment.tokens[row] for segment in layer.segments)
                + int(valid[row, max(layer.start, layer.packed_to[row]) :].sum())
                for layer in cache.layers
            ]
            found.append(torch.tensor(held, dtype=torch.float64) / int(valid[row].sum()))
    if not found:
        raise ValueError("ratios from no prompt at all: give at least one cache that was filled")
    return tuple(torch.stack(found).mean(0).tolist())


def checked_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
    """Ratios as a tuple; ValueError for shares that are none."""
    needed = "needed is one share for each layer, 0 (excluded) to 1"
    if not isinstance(ratios, Iterable):
        raise ValueError(f"ratios {ratios!r}: {needed}")
    ratios = tuple(ratios)
    check_numbers(**{f"ratios[{i}]": ratio for i, ratio in enumerate(ratios)})
    wrong = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if wrong or not ratios:
        raise ValueError(f"ratios {wrong or ratios}: {needed}")
    return ratios


def check_agreement(budget: Budget | float | int | str | dict, mean: float) -> None:
    """Raise ValueError where a budget that is not the default is not the mean of the ratios either."""
    total = Budget.of(budget).total
    if total != Eviction.budget and not (isinstance(total, float) and abs(total - mean) < 1e-6):
        raise ValueError(
            f"budget {budget!r} with ratios whose mean is {mean:.3g}: ratios set the budget; leave one out"
        )
