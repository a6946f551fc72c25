"""HACK: contextual and structural heads of a visual autoregressive model, each compressed by its own rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_bools, check_numbers
from mmkv.cache.next_scale import NextScale, check_whole
from mmkv.parts.calibration import HeadClasses, check_groups, groups_of
from mmkv.parts.choose import top_per_head
from mmkv.parts.probe_rows import evenly
from mmkv.parts.registry import register
from mmkv.parts.saliency import per_kv_head

TILE = 512  # dropped tokens that are compared with the kept ones at a time
FIRST_SCALES = 2  # that structural heads never drop


@register("cache", "HACK, AAAI 2026, arXiv 2504.09261")
@dataclass(frozen=True)
class HACK(NextScale):
    """Keeps few, most attended tokens in contextual heads and many, chosen scale by scale, in structural heads.

    Paper: Head-Aware KV Cache Compression for Efficient Visual Autoregressive Modeling (arXiv 2504.09261), for models that
    make an image scale by scale. Contextual heads, whose queries all look at the same keys, keep those with the most
    attention accumulated over the scales. Structural heads, whose queries look near their own place in every scale, keep
    the first two scales and the latest whole, and of those between the keys that the latest looks at most.

    Args:
        structural: KV heads that are structural: a tuple of indices for each layer, or `HeadClasses` (measured by
            `ScaleStatistics`, kept in JSON). Without it the method refuses to run.
        compression: share of the tokens that is dropped, averaged over all heads of the model, 0 to below 1.
        contextual_share: what a contextual head keeps, as a share of the tokens, at most `1 - compression`; structural heads
            get the rest, so that the average holds. Without both kinds of head it plays no role. The paper does not state it.
        scales: how many scales an image has, or a tuple of the tokens of each. After the last nothing is dropped. With the
            tokens, shares are of all that comes before the last scale: the budget is constant, and nothing is dropped before
            it is exceeded. Without them, shares are of the tokens seen so far, which cuts the early scales as hard as the
            late ones; prefer the tokens. None: as the model says while it makes an image, which is best.
        probes: queries of a scale whose attention counts, evenly spaced.
        merge: merge what contextual heads drop in the last compression into the kept keys that are most alike (cosine), by a
            plain mean of keys and of values; needs `scales`.

    Where we differ: there is no released code that we could read. The rule to reduce the latest scale last where a structural
    head has no room for it, what the shares are of and how tokens are merged are our choices. An average without room for
    the first two scales is refused where the scales are known; where they are not, nothing is dropped while that is so.
    """

    structural: HeadClasses | tuple[tuple[int, ...], ...] | None = None
    compression: float = 0.7
    contextual_share: float = 0.1
    scales: int | tuple[int, ...] | None = None
    probes: int = 32
    merge: bool = False

    accumulates: ClassVar[bool] = True
    calibration: ClassVar[tuple[str, type]] = ("structural", HeadClasses)

    def __post_init__(self):
        super().__post_init__()
        check_numbers(compression=self.compression, contextual_share=self.contextual_share)
        if not 0 <= self.compression < 1:
            raise ValueError(f"compression {self.compression}: possible are 0 to below 1 (share of the tokens dropped)")
        if not 0 < self.contextual_share <= 1:
            raise ValueError(f"contextual_share {self.contextual_share}: possible are 0 (excluded) to 1")
        if self.contextual_share > 1 - self.compression + 1e-9:
            raise ValueError(
                f"contextual_share {self.contextual_share} with compression {self.compression}: contextual heads keep fewer "
                f"than the average, {1 - self.compression:.3g}; give less"
            )
        check_whole(1, probes=self.probes)
        if self.structural is not None and not isinstance(self.structural, HeadClasses):
            object.__setattr__(self, "structural", groups_of("structural", self.structural))
        self._check_scales()

    def _check_scales(self) -> None:
        if isinstance(self.scales, list | tuple):
            object.__setattr__(self, "scales", tuple(self.scales))
            check_whole(1, **{f"scales[{i}]": size for i, size in enumerate(self.scales)})
        if self.scales is not None:
            check_whole(2, scales=len(self.scales) if isinstance(self.scales, tuple) else self.scales)
        check_bools(merge=self.merge)
        if self.merge and self.scales is None:
            raise ValueError("merge acts in the last compression: say how many scales there are (scales=...)")

    def check_model(self, layers: int, kv_heads: int) -> None:
        check_groups("structural", self._structural(), layers, kv_heads, "layer", "KV head")

    @property
    def scale_count(self) -> int | None:
        """How many scales an image has, None where unknown."""
        return len(self.scales) if isinstance(self.scales, tuple) else self.scales

    def counted_rows(self, length: int, first: int = 0) -> torch.Tensor:
        return evenly(length, self.probes, first)

    def after_scale(self, scale: int, fill: Fill, plan: Plan) -> None:
        if self.scales is None and fill.scales:
            return replace(self, scales=fill.scales).after_scale(scale, fill, plan)
        self.check_model(fill.layers, fill.heads)
        groups = self._structural()
        if self.scale_count is not None and scale >= self.scale_count - 1:
            return
        structural = sum(map(len, groups))
        first = int(((fill.layout.medium < FIRST_SCALES) & (fill.columns >= 0)).sum(-1).max())
        few, many = self.lengths(fill.seen, first, fill.layers * fill.heads - structural, structural)
        mine = torch.zeros(fill.heads, 1, dtype=torch.bool)
        mine[list(groups[fill.layer])] = True
        mine, before = mine.to(fill.keys.device), plan.keep
        contextual = top_per_head(plan.available(fill.scores, fill), few)
        stay = contextual
        if bool(mine.any()):
            stay = torch.where(mine, top_per_head(plan.available(self.by_scale(scale, fill), fill), many), contextual)
        plan.drop(stay, fill)
        if self.merge and scale == self.scale_count - 2:
            dropped = before & ~plan.keep & ~mine
            plan.keys, plan.values = merged_into_nearest(plan.keys, plan.values, plan.keep, dropped)

    def lengths(self, seen: int, first: int, contextual: int, structural: int) -> tuple[int, int]:
        """How many tokens a contextual and a structural head keep of `seen`: all, while the average has no room for `first`.

        Args:
            seen: tokens so far.
            first: of them in the first two scales.
            contextual, structural: how many heads of each kind the model has.

        Raises:
            ValueError: the whole image's average has no room for its first two scales.
        """
        whole = sum(self.scales[:-1]) if isinstance(self.scales, tuple) else seen
        mean = (1 - self.compression) * whole + 1e-6  # 30 % of 10 is 3, also in binary
        if isinstance(self.scales, tuple) and structural and mean < sum(self.scales[:FIRST_SCALES]):
            least = sum(self.scales[:FIRST_SCALES])
            raise ValueError(
                f"compression {self.compression:.4g} leaves {int(mean)} of {whole} tokens, and structural heads always keep the "
                f"first {FIRST_SCALES} scales, {least} tokens; possible is up to {1 - least / whole:.4g}"
            )
        if seen <= mean or mean < first:
            return seen, seen
        if not contextual or not structural:
            return int(mean), int(mean)
        total = int(mean * (contextual + structural))
        few = int(self.contextual_share * whole + 1e-6)
        many = min((total - contextual * few) // structural, seen)
        return max(few, min((total - structural * many) // contextual, seen)) if many == seen else few, many

    def by_scale(self, scale: int, fill: Fill) -> torch.Tensor:
        """fp32 `[Hkv, old]`, the larger the better: the first scales, the latest by attention, those between by attention."""
        mass = per_kv_head(fill.mass(evenly(fill.length, self.probes, fill.fresh)).sum, fill.heads)
        rank = mass.argsort(dim=-1, stable=True, descending=True).argsort(dim=-1)  # ties: the earlier token is better
        medium = fill.layout.medium.to(mass.device)
        tier = torch.where(medium < FIRST_SCALES, 2, torch.where(medium == scale, 1, 0))
        return (tier * fill.length - rank).float()

    def _structural(self) -> tuple[tuple[int, ...], ...]:
        if self.structural is None:
            raise ValueError(
                "HACK needs to know the structural heads: structural=HeadClasses.load(file), or measure them with "
                "ScaleStatistics"
            )
        return self.structural.structural if isinstance(self.structural, HeadClasses) else self.structural


def merged_into_nearest(
    keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in which each kept token is the mean of itself and of the dropped tokens nearest to it.

    Args:
        keys: `[H, n, D]`, values `[H, n, Dv]`.
        kept, dropped: bool `[H, n]`.
    """
    direction = torch.nn.functional.normalize(keys.float(), dim=-1)
    target = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    for i in range(0, keys.shape[1], TILE):
        cosine = direction[:, i : i + TILE] @ direction.mT
        target[:, i : i + TILE] = cosine.masked_fill_(~kept[:, None], -torch.inf).argmax(-1)
    weight = dropped[..., None].float()
    count = 1 + torch.zeros_like(weight).scatter_add_(1, target[..., None], weight)
    return tuple(
        (x.float().scatter_add(1, target[..., None].expand_as(x), x * weight) / count).to(x.dtype)
        for x in (keys, values)
    )
