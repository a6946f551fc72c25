"""ZipVL: each layer decides how many tokens matter; only those attend in the prefill, and they are stored best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.formats import PackFormat
from mmkv.cache.method import DENSE, MIN_RESIDUAL, CacheMethod, check_bools, check_numbers
from mmkv.cache.zipcache import ZipCache
from mmkv.layout import TEXT
from mmkv.parts.choose import smallest_prefix, top_per_head
from mmkv.parts.probe_rows import check_seed, recent, recent_and_random
from mmkv.parts.registry import register
from mmkv.parts.saliency import normalized


@register("cache", "ZipVL, arXiv 2410.08584")
@dataclass(frozen=True)
class ZipVL(CacheMethod):
    """Finds in each layer how many tokens carry the attention; the others skip it, and are stored at fewer bits or dropped.

    The number p is the fewest tokens whose attention, summed over probe queries and heads, reaches the share `tau` of all of
    it. The p tokens with the largest normalized attention are important, for all heads of the layer: in the prefill they
    attend to one another, causally, and the others get no attention output in that layer.

    Paper: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification (arXiv 2410.08584; version 1
    quantizes, version 2 evicts).

    Args:
        tau: share of the attention that the important tokens carry; 0.975 as in the paper, 0.96 is its aggressive setting, 1.0
            keeps all.
        store: "quantize" (version 1: important tokens at `high` bits, the others at `low`) or "evict" (version 2: the others
            go).
        sparse: whether the prefill's attention is among the important tokens alone; it is exact where False.
        high, low, group: bits, and tokens per block, as in `ZipCache`.
        recent, random: probe queries: the newest of the prompt, and random ones before; 64 and 64.
        seed: of the random ones.
        text: whether text tokens are always important.
        interval: decoded tokens after which those that left the residual window are decided upon; 100.
        residual: newest tokens kept dense, at least 32.
        sinks: first tokens kept dense, always important.

    Where we differ: the last token of the prompt, sinks and, by default, text are always important, in addition to the p (the
    paper does not say; without its last token a prompt has no answer). The attention is averaged over heads. In the prefill
    the newest `residual` tokens are chosen like the others; whatever is chosen, they are stored dense.
    """

    tau: float = 0.975
    store: str = "quantize"
    sparse: bool = True
    high: int = 4
    low: int = 2
    group: int = 64
    recent: int = 64
    random: int = 64
    seed: int = 0
    text: bool = True
    interval: int = 100
    residual: int = MIN_RESIDUAL
    sinks: int = 4

    decides: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(tau=self.tau)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau {self.tau}: possible are shares of the attention above 0, up to 1")
        if self.store not in ("quantize", "evict"):
            raise ValueError(f"store {self.store!r}: possible are 'quantize', 'evict'")
        for name in ("recent", "random", "interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "random"):
                raise ValueError(f"{name} {value!r}: possible are whole numbers from {int(name != 'random')}")
        check_seed(self.seed)
        check_bools(sparse=self.sparse, text=self.text)
        self._storage()

    @property
    def sparse_prefill(self) -> bool:
        return self.sparse and self.tau < 1

    @property
    def evicts(self) -> bool:
        return self.store == "evict"

    def keeping_everything(self) -> ZipVL:
        """The setting that compresses nothing."""
        return replace(self, tau=1.0, high=16)

    def _storage(self) -> ZipCache:
        ratio = 1.0 if self.tau == 1 else 0.5  # whether there are tokens of both kinds
        return ZipCache(ratio, self.high, self.low, self.group, self.residual, self.sinks)

    def formats(self) -> tuple[PackFormat, ...]:
        return () if self.evicts else self._storage().formats()

    def packs_undecided(self, sliding: bool) -> bool:
        return self._storage().packs_undecided(sliding)

    def attends(self, fill: Fill) -> torch.Tensor | None:
        return self.important(fill)

    def important(self, fill: Fill) -> torch.Tensor:
        """bool `[n]`: the tokens that matter in this layer; the same at each call for one fill."""
        if "important" not in fill.notes:
            fill.notes["important"] = self._important(fill)
        return fill.notes["important"]

    def _important(self, fill: Fill) -> torch.Tensor:
        if self.tau == 1:
            return torch.ones(fill.length, dtype=torch.bool, device=fill.keys.device)
        if fill.decoding:  # by the current query, as the paper does
            rows = recent(fill.length, 1, fill.fresh)
        else:
            rows = recent_and_random(fill.length, self.recent, self.random, self.seed, fill.fresh)
        mass = fill.mass(rows)
        attention = mass.sum.mean(0)
        # how many: by the attention as it is; which: by what each row that sees a token gives it
        count = smallest_prefix(attention, self.tau)
        chosen = top_per_head(normalized(attention, mass.count)[None], count)[0]
        chosen[-1] = True
        chosen[: fill.old] |= fill.protected.to(chosen.device)
        if self.text and not fill.decoding:
            chosen |= (fill.modality == TEXT).to(chosen.device)
        return chosen

    def decide(self, fill: Fill, plan: Plan) -> None:
        important = self.important(fill)[: fill.old].expand(fill.heads, -1)
        if self.evicts:
            plan.drop(important, fill)
            return
        forms = self.formats()
        if not forms:
            return
        placed = plan.keep & (plan.form != DENSE)
        high, low = DENSE if self.high == 16 else 0, len(forms) - 1
        plan.form = torch.where(placed, torch.where(important, high, low), plan.form).to(plan.form.dtype)
        plan.split_formats = True
