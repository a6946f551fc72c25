"""`VitSession`: what `wrap` leaves on a timm vision transformer, and its report."""

from __future__ import annotations

from dataclasses import dataclass

from mmkv._vision.tower import TowerHooks
from mmkv.models.timm_vit import TimmViT
from mmkv.tokens.method import TokenMethod, overrides


@dataclass(frozen=True)
class VitReport:
    """Tokens of the last forward.

    Args:
        tokens_in: tokens of an image that entered the first block, prefix tokens included.
        tokens_per_block: tokens that each block's MLP saw, the most of any image.
    """

    tokens_in: int = 0
    tokens_per_block: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.tokens_in:
            return "mmkv report: no forward yet"
        counts = ", ".join(f"{n:,}" for n in self.tokens_per_block)
        return f"mmkv report: {self.tokens_in:,} tokens in; MLPs saw {counts}"


class VitSession:
    """One wrapped timm model: the hooks of its token methods.

    Args:
        adapter: of the model.
        methods: in the order in which they are asked.
    """

    def __init__(self, adapter: TimmViT, methods: tuple[TokenMethod, ...]):
        self.adapter, self.methods = adapter, methods
        self.hooks = TowerHooks(adapter.tower(), methods)

    def attach(self) -> None:
        """Plug in. Undone by `detach`."""
        self.hooks.attach()
        self.adapter.model._mmkv = self

    def detach(self) -> None:
        """Leave the model as it was."""
        self.hooks.detach()
        self.adapter.model.__dict__.pop("_mmkv", None)

    def report(self) -> VitReport:
        """Tokens of the last forward."""
        state = self.hooks.state
        return VitReport() if state is None else VitReport(state.n0, tuple(state.tokens_per_block))


def check_vit(methods: tuple[TokenMethod, ...], adapter: TimmViT, others: dict) -> None:
    """Raise ValueError for what a model without a decoder cannot do.

    Args:
        others: options of `wrap` that were given, by name.
    """
    name = type(adapter.model).__name__
    if others:
        raise ValueError(f"{', '.join(others)} on {name}, which has no decoder and no cache; possible is tokens=[...]")
    if not methods:
        raise ValueError(
            f"nothing to do on {name}; give token methods: mmkv.wrap(model, tokens=[mmkv.tokens.ToMe(r=8)])"
        )
    for method in methods:
        if overrides(method, "before_decoder") or overrides(method, "in_decoder"):
            raise ValueError(
                f"{type(method).__name__} acts behind the vision tower, and {name} is no more than one; use ToMe"
            )
