"""ScaleKV: budgets by layer and scale for visual autoregressive models, kept tokens chosen by a grid of the latest map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_numbers
from mmkv.cache.next_scale import NextScale, check_whole
from mmkv.parts.calibration import LayerRoles, check_groups
from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register
from mmkv.parts.saliency import check_pooling, per_kv_head, pooled

SCORINGS = ("paper", "official")


@register("cache", "ScaleKV, NeurIPS 2025, arXiv 2505.19602")
@dataclass(frozen=True)
class ScaleKV(NextScale):
    """Gives layers that draft large caches and layers that refine small ones, scale by scale, filled by what a grid looks at.

    Paper: Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression (arXiv 2505.19602), for
    models that make an image scale by scale. After a scale the tokens at the centres of a grid over it always stay; of all
    others those stay that their queries attend to most, up to the layer's budget.

    Args:
        budgets: for each scale the tokens that each layer keeps after it, as `scale_budgets` makes them; () for a scale after
            which nothing is dropped. Nothing is dropped after scales beyond the end, such as the last. Without it and
            `roles` the method refuses to run.
        base: while no more tokens than this came, nothing is dropped (the paper: 650, also the average of its 10 % budget); with
            `roles`, the average.
        grid: cells of the grid in each direction; a map with fewer rows or columns has as many, and budgets worked out from
            `roles` that are smaller than the grid get a coarser one.
        kernel: tokens over which scores are pooled, odd; 1 for none.
        scoring: "paper" (softmax attention of the grid's queries, average pooling) or "official" (their raw products q.k, max
            pooling, the grid's own keys left out).
        roles: which layers draft (`LayerRoles`, measured by `ScaleStatistics`, kept in JSON), in place of `budgets`: they are
            then worked out by `scale_budgets` for the scales of the image that the model makes.
        share: with `roles`, what a layer keeps on average, as a share of the tokens before the last scale; 1 keeps everything.

    Where we differ: queries are the model's own in both scorings (the released code makes them without bias, norm, learned
    scale and rotation, though the keys have them). The grid lies over maps of any shape, not only squares. The pooled
    average is over the grid's keys, too (they are -inf in the released code, which would spread). One choice is made for the
    query heads of a KV head.
    """

    budgets: tuple[tuple[int, ...], ...] = ()
    base: int = 650
    grid: int = 4
    kernel: int = 5
    scoring: str = "paper"
    roles: LayerRoles | None = None
    share: float = 0.1

    calibration: ClassVar[tuple[str, type]] = ("roles", LayerRoles)

    def __post_init__(self):
        super().__post_init__()
        check_whole(0, base=self.base)
        check_numbers(share=self.share)
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share {self.share}: possible are 0 (excluded) to 1 (of the tokens before the last scale)"
            )
        if self.roles is not None and not isinstance(self.roles, LayerRoles):
            raise ValueError(f"roles {self.roles!r}: needed is a LayerRoles, as LayerRoles.load(file) gives")
        check_whole(1, grid=self.grid)
        check_pooling(self.kernel, "avg")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring {self.scoring!r}: possible are {', '.join(map(repr, SCORINGS))}")
        try:
            object.__setattr__(self, "budgets", tuple(tuple(row) for row in self.budgets))
        except TypeError:
            raise ValueError(f"budgets {self.budgets!r}: needed are tokens of each layer for each scale") from None
        for scale, row in enumerate(self.budgets):
            check_whole(self.grid**2, **{f"budgets[{scale}][{layer}]": count for layer, count in enumerate(row)})

    def check_model(self, layers: int, kv_heads: int) -> None:
        if self.roles is not None:
            check_groups("drafters", self.roles.drafters, len(self.roles.drafters), layers, "scale", "layer")
        elif not self.budgets:
            raise ValueError(
                "ScaleKV needs budgets of each layer for each scale: budgets=scale_budgets(...), or roles=LayerRoles.load(file)"
            )
        for scale, row in enumerate(self.budgets):
            if row and len(row) != layers:
                raise ValueError(f"budgets of {len(row)} layers for scale {scale}: this model has {layers}")

    def after_scale(self, scale: int, fill: Fill, plan: Plan) -> None:
        self.check_model(fill.layers, fill.heads)
        if not self.budgets and self.roles is not None:
            return self.planned(fill).after_scale(scale, fill, plan)
        row = self.budgets[scale] if scale < len(self.budgets) else ()
        if not row or fill.seen <= self.base:
            return
        if int(plan.keep.sum(1).max()) <= row[fill.layer]:
            return
        window = grid_centres(fill, self.grid)
        score = self.score(fill, plan, window).index_fill(1, window.to(fill.keys.device), torch.inf)
        plan.drop(top_per_head(plan.available(score, fill), row[fill.layer]), fill)

    def planned(self, fill: Fill) -> ScaleKV:
        """With budgets for the scales of the image that is made."""
        if not fill.scales:
            raise ValueError(
                "ScaleKV with roles needs to know the scales, which this model does not say: give budgets=..."
            )
        average = round(self.share * fill.whole)
        budgets = _planned(fill.scales, self.roles.drafters, fill.layers, average)
        grid = min(self.grid, isqrt(min((min(row) for row in budgets if row), default=self.grid**2)))
        return replace(self, budgets=budgets or ((),), base=average, grid=grid)

    def score(self, fill: Fill, plan: Plan, window: torch.Tensor) -> torch.Tensor:
        """fp32 `[Hkv, n]`, how much the queries at `window` int64 `[P]` look at each key and its neighbours."""
        if self.scoring == "paper":
            return pooled(per_kv_head(fill.mass(window).sum, fill.heads), self.kernel, "avg")
        query = fill.queries(window).float().sum(1).unflatten(0, (fill.heads, -1)).mean(1)
        product = (fill.keys.float() @ query[..., None])[..., 0] * fill.scale
        product = product.index_fill(1, window.to(product.device), -torch.inf).masked_fill(~plan.keep, -torch.inf)
        return pooled(product, self.kernel, "max")


@cache
def _planned(sizes: tuple[int, ...], drafters: tuple, layers: int, average: int) -> tuple[tuple[int, ...], ...]:
    return scale_budgets(sizes, drafters, layers, average)


def grid_centres(fill: Fill, grid: int) -> torch.Tensor:
    """int64: indices of the fresh tokens at the centres of the cells of a `grid` x `grid` over their map."""
    at = []
    for place in (fill.layout.row[0, fill.fresh :].long(), fill.layout.col[0, fill.fresh :].long()):
        size = int(place.max()) + 1
        if int(place.min()) < 0:
            raise ValueError("the layout of a scale lacks rows or columns, over which ScaleKV lays its grid")
        cells = min(grid, size)
        cell = size // cells
        at.append(torch.isin(place, torch.arange(cells) * cell + (cell - 1) // 2))
    return (at[0] & at[1]).nonzero()[:, 0] + fill.fresh


def scale_budgets(
    sizes: Sequence[int],
    drafters: Sequence[Sequence[int]],
    layers: int,
    average: int = 650,
    start: int | None = None,
    decay: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """What `ScaleKV.budgets` takes, by the paper's eq. 4: in each scale all layers together keep `average` tokens per layer.

    After the k-th scale that is cut, refining layers keep `start - decay * k` tokens and drafting layers share the rest. Where
    that is more than a drafting layer can hold, they keep about all, and the refining layers share what is left: as many as
    make the total come out in whole tokens. With the paper's numbers this gives the published tables.

    Args:
        sizes: tokens of each scale.
        drafters: for each scale the layers that draft while it is made (`LayerRoles.drafters`).
        layers: of the model.
        average: tokens per layer; nothing is cut before so many came.
        start, decay: of the refining layers, tokens; the paper's 600 and 70 at 650, in proportion, where None.

    Raises:
        ValueError: roles for another number of scales, or refining layers that would keep more than drafting ones or nothing.
    """
    start = round(average * 600 / 650) if start is None else start
    decay = round(average * 70 / 650) if decay is None else decay
    if len(drafters) != len(sizes):
        raise ValueError(f"drafters of {len(drafters)} scales, sizes of {len(sizes)}: each scale needs both")
    held, out, cuts = [0] * layers, [], 0
    for scale, size in enumerate(sizes[:-1]):
        held = [count + size for count in held]
        mine = set(drafters[scale + 1])
        if sum(sizes[: scale + 1]) <= average:
            out.append(())
            continue
        most = min((held[layer] for layer in mine), default=0)
        draft, refine = _shared(average * layers, len(mine), layers - len(mine), start - decay * cuts, most)
        if refine < 1 or draft < refine:
            raise ValueError(
                f"after scale {scale} refining layers would keep {refine} tokens and drafting ones {draft}: change start "
                f"({start}), decay ({decay}) or the roles"
            )
        held = [min(held[layer], draft if layer in mine else refine) for layer in range(layers)]
        out.append(tuple(held))
        cuts += 1
    return tuple(out)


def _shared(total: int, drafters: int, refiners: int, refine: int, most: int) -> tuple[int, int]:
    """Tokens of a drafting and of a refining layer that together make `total`, a drafting one `most` at most."""
    if not drafters or not refiners:
        return (total // (drafters + refiners),) * 2
    draft = (total - refiners * refine) // drafters
    if draft <= most:
        return draft, refine
    whole = (d for d in range(most, most - refiners, -1) if (total - drafters * d) % refiners == 0)
    draft = next(whole, most)
    return draft, (total - drafters * draft) // refiners
