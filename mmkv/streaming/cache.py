"""`StreamCache`: hands every layer's unrotated queries, keys and values to whoever reads or writes a stream."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mmkv import compat
from mmkv.cache.view import View


class Pass(Protocol):
    """One way through the decoder: writing, retrieving or answering."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention output fp32 `[1, Hq, T, Dv]` of new tokens, all unrotated: q `[1, Hq, T, D]`, k, v `[1, Hkv, T, D]`."""
        ...


class StreamLayer(CacheLayerMixin):
    """One layer of a pass. Counts the tokens that came, as `generate` asks; what is kept of them is the pass's affair."""

    is_sliding = False

    def __init__(self, way: Pass, index: int):
        super().__init__()
        self.way, self.index, self.seen = way, index, 0
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing is held here."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.seen += key_states.shape[2]
        view = StreamView(self, key_states, value_states)
        return view, view

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.seen + compat.query_length(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class StreamView(View):
    """What such a layer hands to the attention function."""

    def __init__(self, layer: StreamLayer, keys: torch.Tensor, values: torch.Tensor):
        self.way, self.index, self.keys, self.values = layer.way, layer.index, keys, values

    def attend(self, stock, stock_name, module, query, mask, **kwargs):
        if (
            kwargs.get("softcap") is not None
            or kwargs.get("s_aux") is not None
            or kwargs.get("sliding_window") is not None
        ):
            raise ValueError("streams work with plain attention; this model caps scores, adds sinks or slides a window")
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = self.way.attend(self.index, query.detach(), self.keys, self.values, scale)
        return out.transpose(1, 2).to(query.dtype), None


class StreamCache(Cache):
    """A cache for one way through the decoder.

    Args:
        way: the pass.
        layers: decoder layers.
    """

    def __init__(self, way: Pass, layers: int):
        super().__init__(layers=[StreamLayer(way, index) for index in range(layers)])
        self.way = way
