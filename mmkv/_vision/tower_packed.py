"""`PackedHooks`: token methods look into a tower that packs images of all sizes into one row."""

from __future__ import annotations

from functools import partial

import torch

from mmkv.models.qwen_tower import PackedTower
from mmkv.tokens.method import TokenMethod, TowerView


class PackedHooks:
    """Asks token methods inside such a tower. They may note, they cannot merge.

    Args:
        tower: where to listen.
        methods: asked in this order in each block.
        done: called after each forward of the tower with its output and what was noted: by name a list of fp32 `[n]` for each
            image or video.
    """

    def __init__(self, tower: PackedTower, methods: tuple[TokenMethod, ...], done):
        self.tower, self.methods, self.done = tower, methods, done
        self._hooks: list = []
        self._qkv = self._given = None
        self._notes: dict[str, torch.Tensor] = {}

    def attach(self) -> None:
        depth = len(self.tower.blocks)
        for block in sorted({b for method in self.methods for b in method.tower_blocks(depth)}):
            mine = tuple(m for m in self.methods if block in m.tower_blocks(depth))
            attention = self.tower.blocks[block].attn
            self._hooks.append(attention.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(attention.qkv.register_forward_hook(self._projected))
            self._hooks.append(self.tower.blocks[block].register_forward_hook(partial(self._look, block, mine)))
        self._hooks.append(self.tower.module.register_forward_pre_hook(self._begin))
        self._hooks.append(self.tower.module.register_forward_hook(self._after, with_kwargs=True))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, module, args):
        self._notes = {}  # of a run that failed

    def _before(self, module, args, kwargs):
        self._given = kwargs

    def _projected(self, module, args, output):
        self._qkv = output.detach()

    @torch.no_grad()
    def _look(self, block: int, methods, module, args, hidden: torch.Tensor) -> None:
        queries, keys, scale = self.tower.queries_keys(block, self._qkv, self._given["position_embeddings"])
        n = hidden.shape[0]
        view = TowerView(
            block=block,
            depth=len(self.tower.blocks),
            hidden=hidden[None],
            queries=queries,
            keys=keys,
            scale=scale,
            size=torch.ones(1, n, device=hidden.device),
            source=torch.arange(n, device=hidden.device)[None],
            prefix=0,
            has_cls=False,
            spans=self._given["cu_seqlens"].long(),
            notes=self._notes,
        )
        for method in methods:
            if method.in_tower(view) is not None:
                raise ValueError(
                    f"{type(method).__name__} merges tokens inside the vision tower; Qwen's holds on to every patch: merge "
                    "behind it (EVS, VisionZip, MustDrop)"
                )
        self._qkv = self._given = None

    def _after(self, module, args, kwargs, output):
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        notes, self._notes = self._notes, {}
        self.done(output, {name: self.tower.to_tokens(values[0], grid) for name, values in notes.items()})
