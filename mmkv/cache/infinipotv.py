"""InfiniPot-V: a cache of a fixed size for a video of any length, kept by temporal redundancy and value norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill, Plan
from mmkv.cache.method import check_bools, check_numbers
from mmkv.parts.budget import tokens_of
from mmkv.parts.choose import top_per_head
from mmkv.parts.frame_grid import FrameGrid
from mmkv.parts.registry import register

# of each quarter of the layers: frames, rows and columns over which value norms are averaged
KERNELS = ((7, 7, 7), (1, 5, 5), (1, 1, 3), (1, 1, 1))


@register("cache", "InfiniPot-V, NeurIPS 2025, arXiv 2506.15745")
@dataclass(frozen=True)
class InfiniPotV(Eviction):
    """Keeps, in a fixed number of tokens however long the video, what no recent frame repeats and what has large values.

    Paper: InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding (arXiv 2506.15745). No
    question is looked at. Whenever media or a long text came (each chunk of `wrap(prefill_chunk=...)`), and more than
    `cap` tokens are held, the cache is compressed to `budget`, what it holds already competing with what is new. Two scores
    share the budget. TaR: minus the mean cosine similarity of a token's key and the keys of the newest frames at the same
    row and column; the newest frames themselves come first. VaN: the norm of the value vector.

    Args:
        budget: what stays, the paper's |C|: tokens per KV head (1024) for a memory that does not grow; a ratio is of all
            real tokens so far, and grows with them; bytes of the whole cache; or tokens by modality (`{"video": 1024}`: text,
            not named, stays whole, as the prompt does in the released code).
        sinks, residual: as in `Eviction`.
        cap: tokens per KV head that may be held before they are compressed, the paper's |M|, at least the budget; None
            compresses whenever anything came. While a chunk is read, it comes on top.
        alpha: share of the budget that TaR gives away, the rest is VaN's; 0 to 1 (the code: 0.5).
        recent: share of what is held whose frames count as the newest, 0 to 1 (the code: 0.25); one frame at least.
        pooling: average VaN over neighbouring tokens: of the first quarter of the layers over 7 frames, rows and columns, of
            the second over 5 rows and columns, of the third over 3 columns, of the last not at all. The released code can
            and does not unless told.

    Where we differ: after its first compression the released code takes equal places in the list of survivors for equal
    places in the picture; here a token keeps the row and column that it came from, and counts as new (similarity 0) where no
    recent frame holds a token there. Averages are over the tokens that are held, not over zeros beyond the edge. At least
    32 newest tokens stay and count. Positions stay as they are, as in the released code (the paper can re-assign them).
    """

    cap: int | None = None
    alpha: float = 0.5
    recent: float = 0.25
    pooling: bool = False

    recalls: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(alpha=self.alpha, recent=self.recent)
        check_bools(pooling=self.pooling)
        for name, share in (("alpha", self.alpha), ("recent", self.recent)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share}: possible are shares from 0 to 1")
        least = self.budget.smallest_count() or 1
        if self.cap is not None and (type(self.cap) is not int or self.cap < least):
            raise ValueError(
                f"cap {self.cap!r}: possible are whole numbers of tokens from the budget ({least}), and None"
            )
        if self.budget.total is None:
            amounts = (self.budget.text, self.budget.image, self.budget.video)
            if any(isinstance(amount, float) and amount != 1.0 for amount in amounts):
                raise ValueError(
                    "InfiniPotV decides anew among all it holds; by modality give tokens or bytes, not ratios"
                )

    def decide(self, fill: Fill, plan: Plan) -> None:
        held = int(plan.keep.sum(1).max()) + fill.length - fill.old
        if self.budget.everything or (self.cap is not None and held <= self.cap):
            return
        grid = FrameGrid.of(fill.layout, fill.columns >= 0, fill.keys.device)
        new, large = self.redundancy(fill, grid), self.score(fill, grid)
        stay = torch.zeros_like(plan.keep)
        for mine, count in self.allowances(fill, plan):
            others = ~mine.to(stay.device)
            first = top_per_head(plan.available(new, fill).masked_fill(others, -torch.inf), round(self.alpha * count))
            rest = plan.available(large, fill).masked_fill(others, -torch.inf)
            stay |= top_per_head(rest.masked_fill(first, torch.inf), count)
        plan.drop(stay, fill)

    def allowances(self, fill: Fill, plan: Plan) -> list[tuple[torch.Tensor, int]]:
        """As in `Eviction`, of all that is held and not of a chunk's share."""
        if self.budget.total is None:
            return super().allowances(replace(fill, prompt=None), plan)
        total = tokens_of(self.budget.total, fill.whole, fill.bytes_per_token, fill.bytes_beyond)
        return [(torch.ones_like(plan.keep), total - (fill.length - fill.old))]

    def redundancy(self, fill: Fill, grid: FrameGrid) -> torch.Tensor:
        """TaR: fp32 `[Hkv, old]`, 2 to 3 for tokens of the newest frames, the newer the more; -inf for those on no grid."""
        newest = max(int(self.recent * grid.frames_worth()), 1)
        keys = torch.nn.functional.normalize(fill.keys.float(), dim=-1)
        likeness = (keys * grid.mean_of_place(keys, grid.on & (grid.age < newest))).sum(-1)
        score = torch.where(grid.age < newest, 3 - grid.age / newest, -likeness)
        return score.masked_fill(~grid.on, -torch.inf)[:, : fill.old]

    def score(self, fill: Fill, grid: FrameGrid | None = None) -> torch.Tensor:
        """VaN: fp32 `[Hkv, old]`."""
        norms = torch.linalg.vector_norm(fill.values, dim=-1, dtype=torch.float32)
        kernel = KERNELS[min(fill.place * len(KERNELS) // fill.places, len(KERNELS) - 1)]
        if self.pooling and max(kernel) > 1:
            grid = FrameGrid.of(fill.layout, fill.columns >= 0, fill.keys.device) if grid is None else grid
            norms = grid.averaged(norms, kernel)
        return norms[:, : fill.old]
