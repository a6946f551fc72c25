"""`Pipeline`: several cache methods on one cache, each seeing what the one before it left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.fill import Fill, Plan
from mmkv.cache.formats import PackFormat
from mmkv.cache.method import CacheMethod
from mmkv.cache.segment import PackedSegment


@dataclass(frozen=True)
class Pipeline(CacheMethod):
    """Methods in the order in which they act on a layer's tokens: any that evict or merge, then at most one that stores.

    Args:
        methods: two or more.

    Raises:
        ValueError: an order that makes no sense, with the reason.
    """

    methods: tuple[CacheMethod, ...]

    def __post_init__(self):
        stored = None
        for method in self.methods:
            name = type(method).__name__
            if stored is not None and method.formats():
                raise ValueError(f"{name} after {stored}: tokens are stored once; keep one of the two")
            if stored is not None:
                raise ValueError(
                    f"{name} after {stored}: it chooses among tokens that {stored} has packed already; put {name} first"
                )
            stored = name if method.formats() else None
        joint = [type(m).__name__ for m in self.methods if m.joint]
        if joint and len([m for m in self.methods if m.decides]) > 1:
            raise ValueError(
                f"{joint[0]} decides for all layers together, which leaves no room for another choice; use it alone"
            )
        recalling = [type(m).__name__ for m in self.methods if m.recalls]
        if recalling and len([m for m in self.methods if m.decides]) > 1:
            raise ValueError(
                f"{recalling[0]} decides anew among the tokens it has stored, which leaves no room for another choice; use it "
                "alone, or before a method that packs"
            )
        scales = [type(m).__name__ for m in self.methods if m.next_scale]
        if scales:
            raise ValueError(
                f"{scales[0]} decides anew after each scale among all that it keeps, which leaves no room for another method; "
                "use it alone"
            )
        kinds = {m.reads_hidden for m in self.methods} - {None}
        if len(kinds) > 1:
            raise ValueError(
                f"methods that read hidden states of different kinds ({', '.join(sorted(kinds))}) do not mix"
            )
        super().__post_init__()

    def formats(self) -> tuple[PackFormat, ...]:
        return self.methods[-1].formats()

    @property
    def residual_window(self) -> int:
        return max(method.residual_window for method in self.methods)

    @property
    def least_residual(self) -> int:
        return min(method.least_residual for method in self.methods)

    @property
    def dense_sinks(self) -> int:
        return max(method.dense_sinks for method in self.methods)

    @property
    def interval(self) -> int | None:
        return min((m.interval for m in self.methods if m.interval is not None), default=None)

    @property
    def decides(self) -> bool:
        return any(method.decides for method in self.methods)

    @property
    def evicts(self) -> bool:
        return any(method.evicts for method in self.methods)

    @property
    def accumulates(self) -> bool:
        return any(method.accumulates for method in self.methods)

    @property
    def recalls(self) -> bool:
        return any(method.recalls for method in self.methods)

    @property
    def segment_class(self) -> type[PackedSegment]:
        return self.methods[-1].segment_class

    def packs_undecided(self, sliding: bool) -> bool:
        return self.methods[-1].packs_undecided(sliding)

    @property
    def joint(self) -> bool:
        return any(method.joint for method in self.methods)

    @property
    def reads_hidden(self) -> str | None:
        return next((m.reads_hidden for m in self.methods if m.reads_hidden), None)

    @property
    def reads_embeddings(self) -> bool:
        return any(method.reads_embeddings for method in self.methods)

    def check(self, head_dim: int, value_dim: int) -> None:
        for method in self.methods:
            method.check(head_dim, value_dim)

    def check_model(self, layers: int, kv_heads: int) -> None:
        for method in self.methods:
            method.check_model(layers, kv_heads)

    def adapt(self, form: PackFormat, keys: torch.Tensor, queries: torch.Tensor | None = None) -> PackFormat:
        return self.methods[-1].adapt(form, keys, queries)

    def mark(self, embeds: torch.Tensor, chunk) -> torch.Tensor | None:
        """The first method's mark counts where several mark a token."""
        marks = None
        for method in self.methods:
            mine = method.mark(embeds, chunk)
            if mine is not None:
                marks = mine if marks is None else torch.where(marks != 0, marks, mine)
        return marks

    def counted_rows(self, length: int, first: int = 0) -> torch.Tensor:
        return next(m for m in self.methods if m.accumulates).counted_rows(length, first)

    @property
    def sparse_prefill(self) -> bool:
        return any(method.sparse_prefill for method in self.methods)

    def attends(self, fill: Fill) -> torch.Tensor | None:
        found = [method.attends(fill) for method in self.methods if method.sparse_prefill]
        return next((f for f in found if f is not None), None)

    def decide(self, fill: Fill, plan: Plan) -> None:
        for method in self.methods:
            if method.decides and (not fill.decoding or method.interval is not None):
                method.decide(fill, plan)

    def decide_jointly(self, fills: list[Fill], plans: list[Plan]) -> None:
        for method in self.methods:
            if method.joint:
                method.decide_jointly(fills, plans)


def pipeline(methods: tuple[CacheMethod, ...]) -> CacheMethod | None:
    """One method out of several: None for none, itself for one.

    Raises:
        ValueError: an order that makes no sense.
    """
    if not methods:
        return None
    return methods[0] if len(methods) == 1 else Pipeline(tuple(methods))
