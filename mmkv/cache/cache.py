"""The cache object: made by the user as `mmkv.Cache(model)`, or an empty `DynamicCache` adopted in place."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache

from mmkv import compat
from mmkv.cache.deciding import fill_of, plan_of
from mmkv.cache.layer import KVLayer
from mmkv.cache.method import CacheMethod
from mmkv.cache.state import CacheState


class Cache(DynamicCache):
    """A KV cache for a wrapped model, to be kept over turns: `model.generate(**inputs, past_key_values=cache)`.

    Args:
        model: a model that `mmkv.wrap` has wrapped; the cache stores tokens as that model's methods say.
    """

    def __init__(self, model):
        session = getattr(model, "_mmkv", None)
        if session is None:
            raise ValueError(f"{type(model).__name__} is not wrapped; call mmkv.wrap(model, ...) first")
        super().__init__(config=session.text_config)
        adopt(self, session.text_config, session.method, session.max_bytes)


def state_of(cache) -> CacheState | None:
    """The state of all tokens of a cache that mmkv fills, None for any other object."""
    layers = getattr(cache, "layers", None)
    return layers[0].state.root if layers and isinstance(layers[0], KVLayer) else None


def adopt(cache, text_config, method: CacheMethod | None, max_bytes: int | None = None) -> CacheState:
    """Fill an empty `DynamicCache` with our layers; the handle that the user or `generate` holds stays true.

    Raises:
        TypeError: any other cache object, or one that already holds tokens.
    """
    state = state_of(cache)
    if state is not None:
        if state.method != method or len(cache.layers) != text_config.num_hidden_layers:
            raise ValueError(
                f"this cache stores tokens by {state.method or 'keeping everything'}, the model is wrapped with "
                f"{method or 'nothing'}; start a new cache after wrapping anew"
            )
        state.max_bytes = max_bytes
        return state
    name = type(cache).__name__
    known = type(cache) is DynamicCache or isinstance(cache, Cache)  # a subclass may do anything around our layers
    if not known or getattr(cache, "offloading", False):
        offloaded = "an offloading " if getattr(cache, "offloading", False) else ""
        raise TypeError(f"a wrapped model takes an empty DynamicCache or mmkv.Cache(model), not {offloaded}{name}")
    if cache.get_seq_length() > 0:
        raise TypeError(
            f"a wrapped model takes an empty DynamicCache, this {name} holds {cache.get_seq_length()} tokens"
        )
    windows = compat.layer_windows(text_config)
    window = min((w for w in windows if w is not None), default=None)
    sliding = tuple(i for i, w in enumerate(windows) if w is not None)
    state = CacheState(method, window=window, layers=len(windows), sliding=sliding, max_bytes=max_bytes)
    # a cache made for rollback: told so (5.3 and later), or made without a config so that no layer slides (5.2)
    full = cache.layer_class_to_replicate is not None and any(windows)
    state.record_past = full or any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.layers = [KVLayer(state, index, window) for index, window in enumerate(windows)]
    cache.layer_class_to_replicate = None
    return state


@torch.no_grad()
def settle_jointly(layers: list[KVLayer]) -> None:
    """Store what a forward brought where the method decides for all layers together. Called when the forward ends."""
    if not layers or layers[0].state.method is None or not layers[0].state.method.joint:
        return
    method, waiting = layers[0].state.method, [layer for layer in layers if layer.waits]
    found: list[list] = [[] for _ in waiting]
    for row in range(layers[0].batch_size if waiting else 0):
        fills = [fill_of(layer, row, layer.asked) for layer in waiting]
        plans = [None] * len(waiting)
        if all(fill is not None for fill in fills) and layers[0].state.prompted[row]:
            plans = [plan_of(layer, row, fill) for layer, fill in zip(waiting, fills)]
            method.decide_jointly(fills, plans)
        for mine, fill, plan in zip(found, fills, plans):
            mine.append(None if plan is None else (fill, plan))
    for layer, mine in zip(waiting, found):
        layer.apply(mine)
    for layer in waiting:
        layer.finish()
