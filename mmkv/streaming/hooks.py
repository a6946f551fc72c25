"""`StreamHooks`: what open streams leave on a model, once for all of them."""

from __future__ import annotations

import threading

from mmkv.cache import NAME, register
from mmkv.models import Adapter
from mmkv.streaming.cache import StreamCache
from mmkv.streaming.rotary import unrotated

_LOCK = threading.Lock()  # streams of several users open and close in threads of their own


class StreamHooks:
    """Decoder layers rotate nothing for a stream's cache, and work as ever for any other.

    Holds no state of any forward, so that several streams and plain `generate` calls may share a model.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter):
        self.adapter, self.streams = adapter, 0
        self.stock = adapter.text_config._attn_implementation
        self._hooks: list = []

    @classmethod
    def of(cls, adapter: Adapter) -> StreamHooks:
        """Those of a model, made where there are none.

        Raises:
            ValueError: `mmkv.wrap` is at work on the model.
        """
        with _LOCK:
            found = getattr(adapter.model, "_mmkv", None)
            if found is None:
                found = cls(adapter)
                found.attach()
            elif not isinstance(found, cls):
                name = type(adapter.model).__name__
                raise ValueError(
                    f"this {name} is wrapped; call mmkv.unwrap(model) first (a stream packs by its own cache=[...])"
                )
            found.streams += 1
            return found

    def release(self) -> None:
        """A stream is closed; the last one takes the hooks along."""
        with _LOCK:
            self.streams -= 1
            if self.streams == 0:
                self.detach()

    def attach(self) -> None:
        """Plug in. Undone by `detach`."""
        register()
        for module in self.adapter.attention_modules():
            module._mmkv_stock = self.stock
        self.adapter.text_config._attn_implementation = NAME
        for layer in self.adapter.text_model.layers:
            self._hooks.append(layer.register_forward_pre_hook(_before_layer, with_kwargs=True))
        self.adapter.model._mmkv = self

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.adapter.text_config._attn_implementation == NAME:
            self.adapter.text_config._attn_implementation = self.stock
        for module in self.adapter.attention_modules():
            module.__dict__.pop("_mmkv_stock", None)
        self.adapter.model.__dict__.pop("_mmkv", None)

    def report(self):
        raise ValueError("this model serves streams; ask them: stream.bytes(), or the answer's numbers")


def _before_layer(module, args, kwargs):
    if not isinstance(kwargs.get("past_key_values"), StreamCache):
        return None
    return args, unrotated(kwargs)
