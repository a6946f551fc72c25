"""`TowerHooks`: decisions inside a vision tower, applied by forward hooks on its modules.

In a block that a method shortens, the norm in front of the MLP is handed the short hidden states; the MLP's output is put
aside, and the block's own sum, which would add short to long, is replaced by ours behind it. Between the blocks of a
call whose hidden states nobody sees, tokens stay short. Everywhere else each block's output is unmerged: every original
token has its group's vector, a pruned one zeros; the next block takes one member of each group again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from mmkv.models.tower import Tap, Tower
from mmkv.parts.matching import Grouping, unmerge
from mmkv.tokens.method import TokenMethod, TowerFacts, TowerView


@dataclass(eq=False)
class TowerState:
    """What became of the tokens in the last forward.

    Args:
        n0: tokens that entered the first block.
        size: fp32 `[B, N]`, patches that each token stands for; None while nothing was merged or pruned.
        source: int64 `[B, n0]`, the token that each original token is part of, -1 where pruned; None as for `size`.
        tokens_per_block: tokens that each block's MLP saw (the most of any image).
        notes: per-patch facts by name that methods wrote.
        trace: with `trace=True` the source map after every block.
        grid: rows and columns of patches, None where unknown.
        ragged: whether images of the batch kept different numbers of tokens; the others have empty places of size 0.
    """

    n0: int
    size: torch.Tensor | None = None
    source: torch.Tensor | None = None
    tokens_per_block: list[int] = field(default_factory=list)
    notes: dict[str, torch.Tensor] = field(default_factory=dict)
    trace: list[torch.Tensor] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    ragged: bool = False

    def shorten(self, grouping: Grouping, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, N', C]` after a grouping, of `[B, N, C]`; sizes and the source map follow."""
        size, source = self.whole(hidden) if self.size is None else (self.size, self.source)
        hidden, self.size = grouping.apply(hidden, size)
        self.source = grouping.compose(source)
        self.ragged |= grouping.ragged
        return hidden

    def whole(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes and source map of tokens `[B, N, C]` of which none was merged or pruned yet."""
        batch, n, _ = hidden.shape
        ones = torch.ones(batch, n, dtype=torch.float32, device=hidden.device)
        return ones, torch.arange(n, device=hidden.device).expand(batch, -1)

    def one_of_each(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` of unmerged `[B, n0, C]`: a member of each group (they are all equal); empty groups get any token."""
        count = self.size.shape[1]
        slot = self.source.where(self.source >= 0, count)
        here = torch.arange(self.n0, device=hidden.device).expand_as(slot)
        member = slot.new_zeros(len(slot), count + 1).scatter_(1, slot, here)[:, :count]
        return hidden.gather(1, member[..., None].expand(-1, -1, hidden.shape[2]))


class TowerHooks:
    """Asks token methods inside a vision tower and applies what they answer.

    Keys carry the logarithm of their size into the attention (ToMe, eq. 1) if some method asks for it (`prop_attn`).
    Where a classifier averages over patches, the pruned ones count as the average of the others, so that the average is
    that of what is left, by size.

    Args:
        tower: where to listen.
        methods: asked in this order in each block.
        trace: keep the source map after every block in `state.trace` (n0 int64 a block and image).

    Raises:
        ValueError: at the forward: attention that takes no additive mask, gradient checkpointing, a mask of the caller's.
    """

    def __init__(self, tower: Tower, methods: Sequence[TokenMethod], trace: bool = False):
        self.tower = tower
        self.methods = tuple(methods)
        self.trace = trace
        self.state: TowerState | None = None
        self._asked = [[m for m in methods if b in m.tower_blocks(len(tower))] for b in range(len(tower))]
        self._bias = any(getattr(m, "prop_attn", False) for m in methods)
        self._captured: dict[str, torch.Tensor] = {}
        self._short: torch.Tensor | None = None  # hidden states of the block that is being shortened
        self._branch: torch.Tensor | None = None
        self._unseen = False  # nobody sees hidden states between blocks
        self._pixels: tuple[int, int] | None = None
        self._handles: list = []

    def attach(self) -> TowerHooks:
        """Register the hooks; a second call does nothing."""
        if self._handles or not any(self._asked):
            return self
        tower, add = self.tower, self._handles.append
        add(tower.module.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(tower.module.register_forward_hook(self._leave, always_call=True))
        add(tower.patches.register_forward_pre_hook(self._see_pixels))
        for b, tap in enumerate(tower.taps):
            add(tap.block.register_forward_pre_hook(partial(self._block_enter, b), with_kwargs=True))
            add(tap.attention.register_forward_pre_hook(partial(self._attention_enter, tap), with_kwargs=True))
            add(tap.block.register_forward_hook(partial(self._block_leave, b), prepend=True))
            if self._asked[b]:
                add(tap.query.register_forward_hook(partial(self._capture, "query", tap)))
                add(tap.key.register_forward_hook(partial(self._capture, "key", tap)))
                add(tap.norm.register_forward_pre_hook(partial(self._decide, b)))
                add(tap.branch.register_forward_hook(partial(self._put_aside, tap)))
        if tower.pooled is not None:
            add(tower.pooled.register_forward_hook(self._fill_pruned))
        return self

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TowerHooks:
        return self.attach()

    def __exit__(self, *_) -> None:
        self.detach()

    def facts(self) -> TowerFacts:
        """What `TokenMethod.check` is told about a tower without a decoder."""
        return TowerFacts(len(self.tower), self.tower.has_cls, self.tower.prefix, merges=True)

    # The hooks, in the order in which a forward meets them.

    def _enter(self, module, args, kwargs):
        if module.training and torch.is_grad_enabled() and self.tower.checkpointed:
            raise ValueError("gradient checkpointing runs blocks twice; switch it off to merge tokens in training")
        self._unseen = not self.tower.watched(kwargs)

    def _leave(self, module, args, output):
        self._unseen = False

    def _see_pixels(self, module, args):
        self._pixels = tuple(args[0].shape[-2:]) if args else None

    def _block_enter(self, b: int, module, args, kwargs):
        hidden, name = (args[0], None) if args else (kwargs["hidden_states"], "hidden_states")
        if b == 0:
            grid = self._pixels and self.tower.grid(*self._pixels, hidden.shape[1])
            self.state = TowerState(hidden.shape[1], grid=grid)
        self._short = self._branch = None
        self._captured.clear()
        if self.state.source is None or self._unseen:
            return None
        short = self.state.one_of_each(hidden)
        return ((short, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: short})

    def _attention_enter(self, tap: Tap, module, args, kwargs):
        size = self.state.size
        if size is None or not (self._bias or self.state.ragged):
            return None
        if kwargs.get(tap.mask) is not None or len(args) > 1:
            raise ValueError(f"{tap.mask} was given; a mask for the original tokens does not fit merged ones")
        if not self.tower.additive_masks:
            raise ValueError(
                "attention in proportion to sizes needs attn_implementation='sdpa' or 'eager' in the tower"
            )
        bias = size.log() if self._bias else torch.zeros_like(size).masked_fill(size <= 0, -torch.inf)
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, tap.mask: bias[:, None, None].to(hidden.dtype)}

    def _capture(self, name: str, tap: Tap, module, args, output):
        self._captured[name] = output if tap.split else output.unflatten(-1, (self.tower.heads, -1)).transpose(1, 2)

    def _decide(self, b: int, module, args):
        hidden, grouped = args[0], False
        heads = [self._captured.pop(name) for name in ("query", "key")]
        for method in self._asked[b]:
            grouping = method.in_tower(self._view(b, hidden, *heads))
            if grouping is None:
                continue
            weight = self.state.size
            hidden, grouped = self.state.shorten(grouping, hidden), True
            if method is not self._asked[b][-1]:
                heads = [_merge_heads(grouping, x, weight) for x in heads]
        if not grouped:
            return None
        self._short = hidden
        return (hidden,)

    def _view(self, b: int, hidden: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> TowerView:
        state, tower = self.state, self.tower
        size, source = state.whole(hidden) if state.size is None else (state.size, state.source)
        return TowerView(
            block=b,
            depth=len(tower),
            hidden=hidden,
            queries=queries,
            keys=keys,
            scale=tower.scale,
            size=size,
            source=source,
            prefix=tower.prefix,
            has_cls=tower.has_cls,
            grid=state.grid,
            notes=state.notes,
        )

    def _put_aside(self, tap: Tap, module, args, output):
        if self._short is None:
            return None
        self._branch = output if tap.gain is None else tap.gain * output
        return output.new_zeros(())  # the block adds it to its long hidden states, which nobody uses

    def _block_leave(self, b: int, module, args, output):
        state = self.state
        if self._short is not None:
            output = self._short + self._branch
            self._short = self._branch = None
        state.tokens_per_block.append(output.shape[1])
        if state.source is None:
            if self.trace:
                state.trace.append(state.whole(output)[1])
            return None
        if self.trace:
            state.trace.append(state.source)
        last = b == len(self.tower) - 1
        return output if self._unseen and not last else unmerge(output, state.source)

    def _fill_pruned(self, module, args, output):
        source, prefix = self.state.source, self.tower.prefix
        if source is None or output.shape[1] != self.state.n0:
            return None
        left = (source[:, prefix:] >= 0)[..., None].to(output.dtype)
        mean = (output[:, prefix:] * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([output[:, :prefix], torch.where(left > 0, output[:, prefix:], mean)], 1)


def _merge_heads(grouping: Grouping, x: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    """Queries or keys `[B, H, N', D]` of the groups, for the next method of the same block."""
    merged = grouping.merge(x.transpose(1, 2).flatten(2), size if grouping.size_weighted else None)
    return merged.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
