"""`Looking`: token methods at work in a model's vision tower."""

from __future__ import annotations

from collections.abc import Callable

from mmkv._vision.tower import TowerHooks
from mmkv._vision.tower_packed import PackedHooks
from mmkv.models import Adapter
from mmkv.models.qwen_tower import PackedTower
from mmkv.tokens.method import TokenMethod, TowerFacts


class Looking:
    """Hooks of the methods that are asked in the tower; none where no method is.

    Args:
        adapter: of the model.
        methods: in the order in which they are asked.
        done: called after each forward of the tower with its output, and with what was noted, by name.
    """

    def __init__(self, adapter: Adapter, methods: tuple[TokenMethod, ...], done: Callable):
        self.tower = adapter.vision_tower()
        self.done, self._last = done, None
        self.hooks: TowerHooks | PackedHooks | None = None
        if self.tower is None or not any(method.tower_blocks(len(self.tower)) for method in methods):
            return
        if isinstance(self.tower, PackedTower):
            self.hooks = PackedHooks(self.tower, methods, done)
        else:
            self.hooks = TowerHooks(self.tower, methods)

    def attach(self) -> None:
        if self.hooks is None:
            return
        self.hooks.attach()
        if isinstance(self.hooks, TowerHooks):
            self._last = self.tower.module.register_forward_hook(self._after)

    def _after(self, module, args, output) -> None:
        self.done(output, dict(self.hooks.state.notes))

    def detach(self) -> None:
        if self.hooks is not None:
            self.hooks.detach()
        if self._last is not None:
            self._last.remove()
            self._last = None


def facts_of(adapter: Adapter, tower) -> TowerFacts:
    """What methods are told about a model before they are put to work on it."""
    layers, axes = len(adapter.text_model.layers), adapter.axes
    if tower is None:
        return TowerFacts(layers=layers, axes=axes)
    merges = not isinstance(tower, PackedTower)
    return TowerFacts(len(tower), tower.has_cls, tower.prefix, merges, layers, axes)
