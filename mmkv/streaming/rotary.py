"""`Rotary`: rotates queries and keys that are kept unrotated, at whatever positions they are read."""

from __future__ import annotations

import torch

from mmkv import compat
from mmkv.kernels import rotate
from mmkv.models import Adapter


class Rotary:
    """The decoder's own rotary table, at positions of our choice.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter):
        self.module, self.axes = adapter.text_model.rotary_emb, adapter.axes
        self.sections = compat.mrope_sections(adapter.text_config)

    def tables(self, ids: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin fp32 `[T, D / 2]`, a column for each pair of channels, at positions `[A, T]`."""
        ids = ids.to(like.device)[:, None] if self.axes > 1 else ids.to(like.device)
        cos, sin = self.module(like.float(), ids)  # an fp32 input gives fp32 tables
        cos, sin = compat.merged_axes(cos, self.sections), compat.merged_axes(sin, self.sections)
        return cos[:, : cos.shape[1] // 2], sin[:, : sin.shape[1] // 2]  # both halves are alike

    def rotate(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[..., T, D]` rotated to positions `[A, T]`; the dtype stays."""
        return rotate(x, *self.tables(ids, x))


def unrotated(kwargs: dict) -> dict:
    """The keywords of a decoder layer, with a rotary table that turns nothing."""
    cos, sin = kwargs["position_embeddings"]
    return {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
