"""`MixedPrecision`: base of the methods that store important tokens at more bits than the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.formats import PackFormat, Side
from mmkv.cache.method import DENSE, MIN_RESIDUAL, CacheMethod, check_numbers
from mmkv.parts.choose import top_share_per_head

HIGH, LOW = (16, 8, 4, 2), (8, 4, 2, 1)


@dataclass(frozen=True)
class MixedPrecision(CacheMethod):
    """A subclass says how tokens are scored (`score`) and how keys and values are stored at some bits (`sides`).

    Args:
        ratio: share of the tokens that leave the residual window that are important, the same for every KV head; 0 to 1.
        high: bits of the important ones: 16 (left as they are, dense), 8, 4 or 2.
        low: bits of the others, fewer: 8, 4, 2 or 1.
        group: tokens per block; important and other tokens fill blocks apart.
        residual: newest tokens kept dense, at least 32.
        sinks: first tokens kept dense, in addition.
    """

    ratio: float = 0.5
    high: int = 4
    low: int = 2
    group: int = 64
    residual: int = MIN_RESIDUAL
    sinks: int = 0

    decides: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(ratio=self.ratio, high=self.high, low=self.low)
        if not 0 <= self.ratio <= 1:
            raise ValueError(
                f"ratio {self.ratio}: possible are 0 to 1 (share of the tokens stored at {self.high} bits)"
            )
        if self.high not in HIGH or self.low not in LOW or self.low >= self.high:
            raise ValueError(
                f"high {self.high!r}, low {self.low!r}: possible are {HIGH} and, fewer than that, {LOW} bits"
            )
        self.formats()

    def score(self, fill: Fill) -> torch.Tensor:
        """fp32 `[Hkv, old]`, the larger the more important."""
        raise NotImplementedError

    def sides(self, bits: int) -> tuple[Side, Side]:
        """How keys and values are stored at 1 to 8 bits."""
        raise NotImplementedError

    def keeping_everything(self) -> MixedPrecision:
        """The setting that compresses nothing."""
        return replace(self, ratio=1.0, high=16)

    def packs_undecided(self, sliding: bool) -> bool:
        return self.high != 16 or self.ratio == 0

    def formats(self) -> tuple[PackFormat, ...]:
        """Those in use: the important tokens' first, then the others'."""
        bits = [self.high] * (self.ratio > 0 and self.high != 16) + [self.low] * (self.ratio < 1)
        name = type(self).__name__.lower()
        return tuple(PackFormat(f"{name}-{b}", *self.sides(b), self.group) for b in bits)

    def decide(self, fill: Fill, plan: Plan) -> None:
        count = len(self.formats())
        if not count:
            return
        placed = plan.keep & (plan.form != DENSE)  # sinks are dense already
        important = top_share_per_head(self.score(fill).masked_fill(~placed, -torch.inf), self.ratio)
        high, low = DENSE if self.high == 16 else 0, count - 1
        plan.form = torch.where(placed, torch.where(important, high, low), plan.form).to(plan.form.dtype)
        plan.split_formats = True
