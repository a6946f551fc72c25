"""What cache methods for visual autoregressive models share: a forward brings one scale, and may decide on all before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import CacheMethod
from mmkv.layout import TEXT
from mmkv.parts.calibration import (
    Calibration,
    HeadClasses,
    Identity,
    LayerRoles,
    attention_selectivity,
    column_variance,
    drafting_layers,
    probabilities,
    structural_heads,
)
from mmkv.parts.probe_rows import evenly


@dataclass(frozen=True)
class NextScale(CacheMethod):
    """Base of methods for models that make an image scale by scale (VAR, Infinity).

    In the layout a token's `medium` is the index of its scale, from 0. Its scale's queries attend to all that is held and to
    the whole scale. No draft is ever rejected, so no newest tokens are set apart: each scale, when it has been attended to,
    is decided upon together with all that is held of those before it.
    """

    decides: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    recalls: ClassVar[bool] = True
    next_scale: ClassVar[bool] = True
    calibration: ClassVar[tuple[str, type[Calibration]] | None] = None  # an option that is measured, and what it takes

    @property
    def residual_window(self) -> int:
        return 0

    @property
    def least_residual(self) -> int:
        return 0

    def decide(self, fill: Fill, plan: Plan) -> None:
        self.after_scale(scale_index(fill, type(self).__name__), fill, plan)

    def after_scale(self, scale: int, fill: Fill, plan: Plan) -> None:
        """`decide`, given the index of the scale that the forward brought."""
        raise NotImplementedError


def scale_index(fill: Fill, method: str) -> int:
    """Index of the scale that the fresh tokens are.

    Raises:
        ValueError: they are none: this is no next-scale model.
    """
    layout = fill.layout
    media = layout.medium[0, fill.fresh :]
    one = len(media) and int(media[0]) >= 0 and bool((media == media[0]).all())
    if fill.causal or not one or bool((layout.modality[0, fill.fresh :] == TEXT).any()):
        raise ValueError(
            f"{method} acts on models that make an image scale by scale (VAR, Infinity): each forward has to bring one scale, "
            "attended to as a whole; on a language model use SnapKV, H2O or another method for prompts"
        )
    return int(media[0])


def check_whole(least: int, **options) -> None:
    """Raise ValueError for an option that is no whole number from `least`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} {value!r}: possible are whole numbers from {least}")


@dataclass(frozen=True, eq=False)
class ScaleStatistics(NextScale):
    """Keeps everything, and measures what head classes (HACK) and layer roles (ScaleKV) are made of.

    Wrap a model with it, let it make some images (the papers: 50 and 10; one changes little), then ask. Batch elements,
    also both halves of classifier-free guidance, count alike.

    Args:
        probes: queries of each scale that are looked at, evenly spaced. Their attention over all keys is held at once, in
            fp32.
        top: earlier keys of each query whose attention counts for the selectivity (ScaleKV does not state it).
    """

    probes: int = 64
    top: int = 32
    sums: dict[tuple[int, int], list] = field(default_factory=dict, init=False)  # by (layer, scale)

    evicts: ClassVar[bool] = False
    recalls: ClassVar[bool] = False
    keeps_last: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_whole(1, probes=self.probes, top=self.top)

    def after_scale(self, scale: int, fill: Fill, plan: Plan) -> None:
        rows = evenly(fill.length, self.probes, fill.fresh)
        attention = probabilities(fill.queries(rows), fill.keys, fill.scale, fill.softcap)
        variance = column_variance(attention).unflatten(0, (fill.heads, -1)).mean(1).double().cpu()
        index = attention_selectivity(attention, fill.length - fill.fresh, self.top).mean().double().cpu()
        found = self.sums.setdefault((fill.layer, scale), [0, 0.0, 0.0])
        found[:] = [found[0] + 1, found[1] + variance, found[2] + index]

    @property
    def variance(self) -> torch.Tensor:
        """fp64 `[layers, Hkv]`: variance over the queries of each key's weight, averaged over scales and samples."""
        per_scale = [[self._mean(layer, scale, 1) for scale in self._scales()[1:]] for layer in self._layers()]
        return torch.stack([torch.stack(scales).mean(0) for scales in per_scale])

    @property
    def selectivity(self) -> torch.Tensor:
        """fp64 `[layers, scales]`: attention selectivity index, averaged over heads and samples; NaN for the first scale."""
        found = [[self._mean(layer, scale, 2) for scale in self._scales()] for layer in self._layers()]
        index = torch.tensor(found, dtype=torch.float64)
        index[:, 0] = torch.nan  # nothing is before it
        return index

    def head_classes(self, contextual: float, model: Identity) -> HeadClasses:
        """What `HACK.structural` takes: all heads but the share `contextual` of the model's whose queries differ least."""
        self._check(model)
        return HeadClasses(model, structural_heads(self.variance, contextual))

    def layer_roles(self, drafters: int, model: Identity, first: int = 1) -> LayerRoles:
        """What `scale_budgets` takes: the `drafters` (layer, scale) pairs with the least selectivity among scales from `first`.

        Args:
            drafters: pairs in all.
            model: that was measured.
            first: the first scale for which something was dropped before it is made.
        """
        self._check(model)
        index = self.selectivity
        index[:, :first] = torch.nan
        return LayerRoles(model, drafting_layers(index, drafters))

    def _check(self, model: Identity) -> None:
        if len(self._layers()) != model.layers:
            raise ValueError(f"{len(self._layers())} layers were measured, which is not {model}")

    def _mean(self, layer: int, scale: int, which: int):
        found = self.sums[layer, scale]
        return found[which] / found[0]

    def _layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.sums})

    def _scales(self) -> list[int]:
        scales = sorted({scale for _, scale in self.sums})
        if len(scales) < 2:
            raise ValueError(
                f"{len(scales)} scales were measured; let a model that is wrapped with ScaleStatistics make an image first"
            )
        return scales
