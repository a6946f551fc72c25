"""`Stretch`: a run of decode steps during which no tensor of a cache moves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mmkv.cache.layer import KVLayer
from mmkv.cache.method import CacheMethod
from mmkv.cache.segment import PackedSegment
from mmkv.cache.stage import Stage
from mmkv.cache.static.layer import StaticLayer, held_columns, newest_segment, steps_alone
from mmkv.layout import TokenLayout

if TYPE_CHECKING:
    from mmkv.cache.cache import Cache

ROOM = 1024  # steps of a stretch; then its buffers are made anew, larger
LEAST = 8  # a stretch that ends sooner is not worth beginning


def refusal(method: CacheMethod | None) -> str | None:
    """Why a method's decode steps cannot be the same sequence of kernels each time; None where they can."""
    if method is None:
        return None
    if method.accumulates:
        return "adds up attention at every step"
    if method.interval is not None:
        return f"decides again every {method.interval} decoded tokens"
    if method.next_scale:
        return "is for models that paint scale by scale"
    if method.segment_class is not PackedSegment:
        return "fits what it stores to every block on its own"
    return None


class Stretch:
    """Lends all layers of a cache static buffers. The cache's state learns of the tokens when it ends.

    Args:
        cache: one that mmkv fills; its newest forward has ended.
        room: steps that there has to be room for.
        layout: gives the layout of new tokens, from the inputs of their steps joined along tokens, their number, and the
            layout of those before. It must not own the model: a copy of the cache copies it.

    Raises:
        ValueError: fewer than `room` steps are possible; ask `possible` first.
    """

    def __init__(
        self, cache: Cache, room: int, layout: Callable[[dict[str, torch.Tensor], int, TokenLayout], TokenLayout]
    ):
        layers: list[KVLayer] = cache.layers
        self.state, self.layout = layers[0].state.root, layout
        if room > possible(layers, room):
            raise ValueError(f"{room} steps: {possible(layers, room)} are possible without packing on the host")
        self.room, self.steps = room, 0
        self.seen = self.state.seen
        self.inputs: list[dict[str, torch.Tensor]] = []  # what the layout of each new token is made of
        self.failed = True  # a step stopped half-way, or this itself, where memory did not suffice
        self.packed = False  # whether the newest step packed
        self.layers: list[StaticLayer] = []
        self.state.stretch = self
        # layers and their buffers know each other: without this they would wait for the garbage collector
        self._ending = weakref.finalize(cache, self.abandon)
        self._ending.atexit = False
        for layer in layers:
            self.layers.append(StaticLayer(layer, room))
            self.state.count(layer.index, layer.nbytes)
        self._flushes = {first for layer in self.layers for first in layer.first_flushes()}
        self.failed = False

    def begin(self, inputs: dict[str, torch.Tensor]) -> bool:
        """A step begins; returns whether it packs.

        Args:
            inputs: the new token's `position_ids` int `[A, B, 1]`, and `input_ids` int `[B, 1]` where they are known.
        """
        self.inputs.append(inputs)
        self.steps += 1
        self.packed = any(self.steps >= first and (self.steps - first) % group == 0 for first, group in self._flushes)
        for layer in self.layers:
            layer.flushing = self.packed
        return self.packed

    def close(self) -> None:
        """Make the cache what it would be without the stretch.

        Raises:
            RuntimeError: one of its steps stopped half-way.
        """
        if self.failed:
            raise RuntimeError("a forward failed half-way; start a new cache")
        try:
            self._close()
        except BaseException:
            self.failed, self.state.stretch = True, self
            raise
        self._ending.detach()  # it would hold on to this, and so to its recordings, as long as the cache lives

    def _close(self) -> None:
        state, steps = self.state, self.steps
        state.stretch = None
        if steps:
            joined = {name: torch.cat([one[name] for one in self.inputs], -1) for name in self.inputs[0]}
            state.extend(self.layout(joined, steps, state.layout), None)
            state.steps = steps
            state.fresh, state.prompted = [False] * state.layout.batch, [False] * state.layout.batch
            self._pass_on(steps)
        for layer in self.layers:
            layer.close(steps)
        self.layers = []

    def _pass_on(self, steps: int) -> None:
        """Tell the states of layers that see a part of the tokens what came: all of it."""
        parent = self.state
        for static in self.layers:
            mine = static.layer.state
            if mine is not parent:
                assert isinstance(mine, Stage)
                mine.follow(parent, steps, torch.arange(steps).expand(mine.layout.batch, -1))
            parent = mine

    def abandon(self) -> None:
        """Forget what the layers hold: the cache is gone, or is to be empty."""
        self._ending.detach()
        self.state.stretch = None
        for layer in self.layers:
            layer.layer.static = None
        self.layers = []


def possible(layers: list[KVLayer], room: int = ROOM) -> int:
    """Steps, up to `room`, after which something happens that static buffers cannot do."""
    alike = {}  # most layers hold the same tokens in the same way
    for layer in layers:
        rows = range(layer.batch_size)
        alike.setdefault(
            (id(layer.state), layer.start, *layer.packed_to, *(newest_segment(layer, r) is None for r in rows)), layer
        )
    limits = [
        steps_alone(layer, row, columns) for layer in alike.values() for row, columns in enumerate(held_columns(layer))
    ]
    return min([room, *(limit for limit in limits if limit is not None)])
