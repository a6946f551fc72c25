"""timm's vision transformers: towers without a decoder."""

from __future__ import annotations

import sys

import torch

from mmkv.models.tower import Tower, timm_tower


def is_timm_vit(model: torch.nn.Module) -> bool:
    """Whether a model comes from timm (its kind is checked by `timm_tower`). Does not import timm."""
    return "timm" in sys.modules and any(cls.__module__.startswith("timm.models.") for cls in type(model).__mro__)


class TimmViT:
    """A timm vision transformer, as adapters are for vision-language models.

    Args:
        model: a `timm.models.VisionTransformer`.

    Raises:
        ValueError: a model in which tokens cannot be merged, and why.
    """

    families = ("timm",)

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._tower = timm_tower(model)

    def tower(self) -> Tower:
        """Where its blocks can be listened to."""
        return self._tower
