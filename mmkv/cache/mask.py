"""`LazyMask`: the arguments of a mask function, until someone knows which keys are held."""

from __future__ import annotations

import torch

from mmkv import compat


class LazyMask:
    """Returned by the mask function registered as "mmkv". Every layer makes what it needs from it.

    Args:
        kwargs: what transformers passed to the mask function.
    """

    def __init__(self, kwargs: dict):
        self.kwargs = kwargs
        self._made: dict = {}

    @property
    def plain(self) -> bool:
        """Causal with an optional window and padding, and nothing laid over it."""
        return bool(self.kwargs.get("allow_is_causal_skip")) and not self.kwargs.get("allow_is_bidirectional_skip")

    def contiguous(self) -> LazyMask:
        """Itself: `generate` calls this on the masks it makes ahead for a compileable (static) cache, which `adopt` refuses."""
        return self

    def within(self, valid: torch.Tensor, new: int) -> LazyMask:
        """The same for layers that see a part of the tokens: bool `[B, n]` of those held so far, the `new` last are queries.

        Raises:
            ValueError: something is laid over the causal mask, which speaks of the places of all tokens.
        """
        if not self.plain:
            raise ValueError("tokens=... works with causal masks alone; this model or call lays another mask over it")
        padded = None if bool(valid.all()) else valid.to(_device(self.kwargs))
        n = valid.shape[1]
        kwargs = compat.mask_arguments(self.kwargs, new, n - new, padded)
        return LazyMask({**kwargs, "kv_length": n, "kv_offset": 0})

    def stock(self, name: str, kv_length: int | None, kv_offset: int | None, device) -> torch.Tensor | None:
        """The mask that the implementation `name` would get, for the keys `[kv_offset, kv_offset + kv_length)`."""
        kv_length = self.kwargs["kv_length"] if kv_length is None else kv_length
        kv_offset = self.kwargs["kv_offset"] if kv_offset is None else kv_offset
        key = (name, kv_length, kv_offset, device)
        if key not in self._made:
            mask = compat.stock_mask(name, self.kwargs, kv_length, kv_offset)
            self._made[key] = mask.to(device) if isinstance(mask, torch.Tensor) else mask
        return self._made[key]


def _device(kwargs: dict) -> torch.device | str:
    """Where the mask is to be."""
    mask, position = kwargs.get("attention_mask"), kwargs.get("cache_position")
    if isinstance(mask, torch.Tensor):
        return mask.device
    return position.device if isinstance(position, torch.Tensor) else kwargs.get("device", "cpu")


def lazy_mask(*args, **kwargs) -> LazyMask:
    """The mask function registered as "mmkv"."""
    if args:
        raise TypeError("mask functions are called by keyword")
    return LazyMask(kwargs)
