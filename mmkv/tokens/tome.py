"""ToMe: the most similar tokens of a vision tower become one, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from mmkv.parts.matching import Grouping, bipartite_soft_matching
from mmkv.parts.registry import register
from mmkv.tokens.method import TokenMethod, TowerFacts, TowerView


@register("tokens", "ToMe, ICLR 2023, arXiv 2210.09461")
@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Merges the r most similar pairs of tokens in every block of the vision tower.

    Paper: Token Merging: Your ViT But Faster (arXiv 2210.09461).

    Args:
        r: tokens that each block removes; or a sequence with one number for each block (missing ones are 0).
        inflect: -1 ... 1, how an r that is one number is spread over the blocks: 0 the same in each, -1 falling linearly
            from 2r to 0, 1 rising from 0 to 2r. Each block's number is truncated, so the sum may fall short of r * depth.
        prop_attn: attention in proportion to the tokens' sizes (eq. 1). Off for MAE weights that were not trained with it.
        first_block: the first block that merges.

    Where we differ: all prefix tokens are left alone (the official code knows CLS and distillation, no registers); without
    a CLS token the order of tokens stays ascending (it leaves them sorted by similarity); zero keys give similarity 0, not
    NaN. As in the official code, r is clamped to half of the tokens that may merge in the later blocks; an r that the very
    first block cannot fulfil is an error here, since it was asked for in vain. Average pooling behind the tower counts every
    original patch, so merged tokens enter by their size (the official code does so for MAE only).
    """

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    prop_attn: bool = True
    first_block: int = 0

    def __post_init__(self):
        many = isinstance(self.r, list | tuple)
        object.__setattr__(self, "r", tuple(self.r) if many else self.r)
        for r in self.r if many else (self.r,):
            if not isinstance(r, int) or isinstance(r, bool) or r < 0:
                raise ValueError(
                    f"r={self.r!r}; tokens to merge are whole numbers from 0 on, one or one for each block"
                )
        number = isinstance(self.inflect, int | float) and not isinstance(self.inflect, bool)
        if not number or not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect={self.inflect!r}; possible are -1 ... 1")
        if many and self.inflect:
            raise ValueError(
                f"inflect={self.inflect!r} bends one r; a sequence of numbers says it all, leave inflect at 0"
            )
        if not isinstance(self.prop_attn, bool):
            raise ValueError(f"prop_attn={self.prop_attn!r}; possible are True, False")
        if not isinstance(self.first_block, int) or isinstance(self.first_block, bool) or self.first_block < 0:
            raise ValueError(f"first_block={self.first_block!r}; possible are whole numbers from 0 on")

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Tokens that each of `depth` blocks is to remove.

        Raises:
            ValueError: more numbers than blocks.
        """
        if isinstance(self.r, tuple):
            if len(self.r) > depth:
                raise ValueError(f"r has {len(self.r)} numbers, but the tower has {depth} blocks; give at most {depth}")
            rates = self.r + (0,) * (depth - len(self.r))
        else:
            low = int(self.r * (1 - self.inflect))
            step = (2 * self.r - 2 * low) / max(depth - 1, 1)
            rates = tuple(int(low + step * b) for b in range(depth))
        return tuple(r if b >= self.first_block else 0 for b, r in enumerate(rates))

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(b for b, r in enumerate(self.schedule(depth)) if r)

    def in_tower(self, view: TowerView) -> Grouping | None:
        rates = self.schedule(view.depth)
        possible = (view.hidden.shape[1] - view.prefix) // 2
        if rates[view.block] > possible and not any(rates[: view.block]):
            raise ValueError(
                f"r={rates[view.block]} in block {view.block}, but of {view.hidden.shape[1] - view.prefix} patches at most"
                f" {possible} can be merged at once; choose a smaller r"
            )
        r = min(rates[view.block], possible)
        return bipartite_soft_matching(view.keys.mean(1), r, view.prefix) if r > 0 else None

    def check(self, adapter_facts: TowerFacts) -> None:
        if not adapter_facts.merges or not adapter_facts.depth:
            raise ValueError(
                "ToMe merges inside a vision tower with absolute positions (CLIP, SigLIP, timm ViT); this model has none"
            )
        blocks = self.tower_blocks(adapter_facts.depth)
        if not blocks and self.r:
            raise ValueError(
                f"first_block={self.first_block}: no block left to merge in; the tower has {adapter_facts.depth}"
            )

    def keeping_everything(self) -> ToMe:
        return ToMe(r=0, prop_attn=self.prop_attn)
