"""PruMerge: as many tokens as stand out in the tower's attention, each taking in those like it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mmkv.parts.registry import register
from mmkv.tokens.frames import check_name, clips, kept_so_far, places, tiles
from mmkv.tokens.method import Choice, TokenMethod, TowerFacts, TowerView, Vision
from mmkv.tokens.saliency import check_scores, check_tower, note_score, noted

NOTE = "prumerge"
TILE = 1 << 24  # similarities that exist at a time


@register("tokens", "LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388")
@dataclass(frozen=True)
class PruMerge(TokenMethod):
    """Keeps the tokens whose attention is an outlier, adds similar tokens to each, and sums up the dropped ones in one more.

    Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388). A token stays
    where its attention is above Q3 + `iqr` (Q3 - Q1), quartiles over its frame; about 40 of 576 tokens.

    Args:
        iqr: how far outside the quartiles an outlier is; -inf keeps every token, untouched.
        plus: PruMerge+: also an even grid, every floor(floor(m / outliers) / 3)-th of a frame's m tokens.
        neighbours: tokens most similar to a kept one, kept or not, that are added to it.
        scores: whose attention: "cls" (the paper), "received" (mean over all queries, for towers without CLS token) or
            "auto" (the first where there is a CLS token, else the second).
        weights: of what is added, a its attention: "official": x_i + sum a_j x_j, and sum a_j x_j for the dropped ones; or
            "normalized": the weighted means (a_i x_i + sum a_j x_j) / (a_i + sum a_j), and sum a_j x_j / sum a_j.

    Where we differ: we act behind the projector on its output, the paper before it; similarity is the cosine of the projected
    features, the paper's that of the tower's keys. Attention is the last block's as in the official code, but the mean over
    heads (the code takes all heads' channels as one). Quartiles are each frame's (the code pools a batch), a frame without
    outlier keeps its most attended token, and the grid reaches the last token (the code stops at the 575th whatever the
    image). Kept tokens stay in their order; the sum of the dropped ones takes the place of the most attended of them.
    Newlines always stay and do not count. `into` names, for a dropped token, the most similar kept one that took it in, else the
    place of that sum.
    """

    iqr: float = 1.5
    plus: bool = False
    neighbours: int = 32
    scores: str = "auto"
    weights: str = "official"

    def __post_init__(self):
        number = isinstance(self.iqr, int | float) and not isinstance(self.iqr, bool)
        if not number or not (0 <= self.iqr < math.inf or self.iqr == -math.inf):
            raise ValueError(f"iqr={self.iqr!r}; possible are numbers from 0, or -inf to keep every token")
        if not isinstance(self.plus, bool):
            raise ValueError(f"plus={self.plus!r}; possible are True, False")
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours!r}; possible are numbers of tokens from 0 (an int)")
        check_scores(self.scores)
        check_name("weights", self.weights, ("official", "normalized"))

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,) if depth else ()

    def in_tower(self, view: TowerView) -> None:
        note_score(view, self.scores, NOTE)

    def before_decoder(self, vision: Vision) -> Choice | None:
        if self.iqr == -math.inf:
            return None
        score, features = noted(vision, NOTE).float().to(vision.features.device), vision.features.clone()
        keep = kept_so_far(vision)
        into = places(keep)
        for clip in clips(vision):
            for part in tiles(clip, features.shape[1]):
                weight = score[part]
                best = self._outliers(weight)
                added, owner = self._neighbourhoods(vision.features[part].float(), weight, best)
                rest = weight.masked_fill(best, 0)
                summed = rest[:, None] @ vision.features[part].float()
                if self.weights == "normalized":
                    summed /= rest.sum(1)[:, None, None].clamp(min=torch.finfo(rest.dtype).tiny)
                some = rest.sum(1, keepdim=True) > 0
                extra = weight.masked_fill(best, -torch.inf).argmax(1, keepdim=True)
                place = F.one_hot(extra[:, 0], part.shape[1]).bool() & ~best & some
                owner = torch.where((owner < 0) & some, extra, owner)
                features[part] = torch.where(place[..., None], summed, added).to(features.dtype)
                keep[part] = best | place
                target = part.gather(1, owner.clamp(min=0)).masked_fill(owner < 0, -1)
                into[part] = torch.where(keep[part], part, target)
        return Choice(keep, into, features)

    def check(self, adapter_facts: TowerFacts) -> None:
        check_tower("PruMerge", self.scores, adapter_facts)

    def keeping_everything(self) -> PruMerge:
        return replace(self, iqr=-math.inf)

    def _outliers(self, weight: torch.Tensor) -> torch.Tensor:
        """bool `[F, m]`: the tokens of each frame that stay, from their attention."""
        low, high = weight.quantile(weight.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
        best = weight > high + self.iqr * (high - low)
        first = F.one_hot(weight.argmax(1), weight.shape[1]).bool()
        best |= first & ~best.any(1, keepdim=True)
        if self.plus:
            stride = (weight.shape[1] // best.sum(1, keepdim=True) // 3).clamp(min=1)
            best |= torch.arange(weight.shape[1], device=weight.device) % stride == 0
        return best

    def _neighbourhoods(
        self, hidden: torch.Tensor, weight: torch.Tensor, best: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `[F, m, C]` with each kept token's neighbours added to it, and int64 `[F, m]` the most similar kept token that
        took each one in, -1 where none did."""
        frames, size, _ = hidden.shape
        count = min(self.neighbours, size - 1)
        kept = (
            (~best).byte().argsort(dim=-1, stable=True)[:, : int(best.sum(1).max())]
        )  # the kept ones first; then fillers
        unit, out = F.normalize(hidden, dim=-1), hidden.clone()
        owner, nearest = torch.full_like(best, -1, dtype=torch.int64), torch.full_like(weight, -torch.inf)
        for rows in kept.split(max(1, TILE // (frames * size)), 1):
            wide = rows[..., None].expand(-1, -1, hidden.shape[2])
            alike = (unit.gather(1, wide) @ unit.transpose(1, 2)).scatter(2, rows[..., None], -torch.inf)
            order = alike.argsort(dim=-1, descending=True, stable=True)[..., :count]
            chosen = torch.zeros_like(alike, dtype=torch.bool).scatter(2, order, True) & best.gather(1, rows)[..., None]
            share = weight[:, None] * chosen
            total, own = share @ hidden, hidden.gather(1, wide)
            if self.weights == "normalized":
                mine = weight.gather(1, rows)[..., None]
                whole = mine + share.sum(-1, keepdim=True)
                mixed = torch.where(whole > 0, (mine * own + total) / whole, own)
            else:
                mixed = own + total
            out.scatter_(1, wide, mixed)
            closest = alike.masked_fill(~chosen, -torch.inf).max(1)
            closer = closest.values > nearest
            nearest = torch.where(closer, closest.values, nearest)
            owner = torch.where(closer, rows.gather(1, closest.indices), owner)
        return out, owner
