"""MustDrop: flat neighbourhoods merge in the vision tower, weak tokens go between decoder layers, the cache follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.parts.matching import Grouping
from mmkv.parts.neighbourhoods import flatness, flattest, grid_windows, grouped_windows, merged_into, windows
from mmkv.parts.per_frame import best_share
from mmkv.parts.registry import register
from mmkv.tokens.between_layers import (
    POSITION_IDS,
    ROWS,
    attention_of,
    check_bools,
    check_layers,
    check_number,
    in_proportion,
    keep_mask,
    listed,
    text_rows,
    visual_columns,
)
from mmkv.tokens.copies import copied_from, note_copies
from mmkv.tokens.frames import check_name
from mmkv.tokens.method import Choice, DecoderView, TokenMethod, TowerFacts, TowerView, Vision
from mmkv.tokens.saliency import check_scores, check_tower, note_score, noted

LAYERS = (2, 6, 10, 14)
THRESHOLDS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}
MERGED, SCORE, KEY = "mustdrop.merged", "mustdrop.score", "key"


@register("tokens", "MustDrop, arXiv 2411.10803")
@dataclass(frozen=True)
class MustDrop(TokenMethod):
    """Merges flat neighbourhoods in the tower, drops tokens weak by two tests between decoder layers, and trims the cache.

    Stage 1 merges windows of patches that look alike behind the tower's first attention, and marks the tokens with the most
    attention in its last block as the key set. Stage 2 drops, behind a few decoder layers, the vision tokens that are
    weak both in all of the text's attention and for every single text token, unless they are key. Stage 3 takes out of the
    earlier layers' cache what the last stage dropped.

    Paper: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (arXiv 2411.10803).

    Args:
        tau: mean cosine from which on a window merges; 0.8 as in the code, above 1 merges nothing.
        window: side of the square windows, or (rows, columns); 3 as in the code, its figure shows 2.
        key_rate: share of a frame's or tile's tokens that are key, ceil(rate * tokens), after merging; 0.08 as in the code
            (about 5 % in the figure), 0 for none.
        scores: attention that makes a token key: "cls" (the paper), "received" (mean over all queries) or "auto" (the first
            where the tower has a CLS token, else the second).
        gamma: share of the text's attention to all vision tokens below which one is weak for the text as a whole.
        alpha: attention below which it is weak for a text token. Both are absolute, made for some 440 vision tokens: use
            lower ones for more. 0 drops nothing.
        layers: decoder layers behind which tokens go, counted from 0; None for the paper's (2, 6, 10, 14), in a decoder with
            fewer than 16 layers l * layers // 32.
        rows: text that looks: "after_first" (all behind the first image or video) or "after_last" (behind all of them, so
            that each row sees every vision token).
        trims_cache: whether layers before a drop let go of what the last drop did not keep (stage 3).
        position_ids: "original" or "renumbered" (as the code does in each layer).

    Where we differ: the merge happens between attention and MLP of the tower's first block, the code's behind its MLP. Merged
    tokens stay in raster order, where their window's first patch was; the code puts them first. Stage 3 trims the layers from
    the first to the last, the code leaves those up to its first drop whole and knows 32 layers only; with original position ids
    a new token continues behind the prompt, the code's may come before cached keys. Grids that the window does not divide
    leave their border unmerged. Where tokens cannot be merged in the tower (packed images, windows) or the decoder's tokens
    are no longer the tower's (2x2 mergers, pooled video), windows of the projected features merge (pooled video's in both
    places), each frame its own number of them; inside a tower every image of the batch merges as many as the one with the
    fewest flat windows, as in the code. The key set is taken per frame or group of tiles. Newline tokens stay until the
    decoder, where they are judged like others.
    """

    tau: float = 0.8
    window: int | tuple[int, int] = 3
    key_rate: float = 0.08
    scores: str = "auto"
    gamma: float = 0.001
    alpha: float = 0.001
    layers: tuple[int, ...] | None = None
    rows: str = "after_first"
    trims_cache: bool = True
    position_ids: str = "original"

    whole_prompt: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("tau", "key_rate", "gamma", "alpha"):
            check_number(name, getattr(self, name))
        side = self._side
        if not all(type(n) is int and n > 0 for n in side) or len(side) != 2 or side[0] * side[1] < 2:
            raise ValueError(
                f"window={self.window!r}; possible are sides from 2, or (rows, columns) of at least two patches"
            )
        if not 0 <= self.key_rate <= 1:
            raise ValueError(f"key_rate={self.key_rate}; possible are shares of the tokens from 0 (none) to 1")
        check_scores(self.scores)
        if self.gamma < 0 or self.alpha < 0:
            raise ValueError(
                f"gamma={self.gamma}, alpha={self.alpha}; possible are thresholds from 0, which drops nothing"
            )
        if self.gamma > 1 and self.alpha > 1 and not self.key_rate:
            raise ValueError(f"gamma={self.gamma}, alpha={self.alpha} drop every token; lower one, or set a key_rate")
        if self.layers is not None:
            check_layers(self.layers)
        check_name("rows", self.rows, ROWS)
        check_bools(trims_cache=self.trims_cache)
        check_name("position_ids", self.position_ids, POSITION_IDS)

    @classmethod
    def for_tokens(cls, tokens: int, **options) -> MustDrop:
        """The official thresholds for a mean of 192, 128 or 64 of LLaVA-1.5's 576 tokens over the layers.

        Args:
            tokens: that mean.
            options: others of this class.
        """
        check_name("tokens", tokens, tuple(THRESHOLDS))
        gamma, alpha = THRESHOLDS[tokens]
        return cls(**{"gamma": gamma, "alpha": alpha, **options})

    @property
    def _side(self) -> tuple[int, int]:
        return self.window if isinstance(self.window, tuple) else (self.window, self.window)

    @property
    def _merges(self) -> bool:
        return self.tau <= 1

    def keeping_everything(self) -> MustDrop:
        """The setting that merges and drops nothing."""
        return replace(self, tau=1.01, gamma=1.0, alpha=0.0)

    def check(self, adapter_facts: TowerFacts) -> None:
        if self.key_rate:
            check_tower("MustDrop", self.scores, adapter_facts)
        if adapter_facts.layers:
            self.decoder_layers(adapter_facts.layers)

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        asked = ({0} if self._merges else set()) | ({depth - 1} if self.key_rate else set())
        return tuple(sorted(asked)) if depth else ()

    def in_tower(self, view: TowerView) -> Grouping | None:
        if self.key_rate and view.block == view.depth - 1:
            note_score(view, self.scores, SCORE)
        # a row that packs several images has no common grid: those merge behind the projector
        if view.block or not self._merges or view.grid is None or view.spans is not None:
            return None
        return self._merge_in_tower(view)

    def _merge_in_tower(self, view: TowerView) -> Grouping | None:
        patches = view.hidden[:, view.prefix :]
        if patches.shape[1] != view.grid[0] * view.grid[1]:
            raise ValueError(
                f"MustDrop merges windows of all {view.grid[0]}x{view.grid[1]} patches, but {patches.shape[1]} are left; list "
                "it before methods that merge in the tower's first block"
            )
        members = grid_windows(view.grid, self._side, view.hidden.device)
        chosen = flattest(flatness(patches, members), self.tau)
        note_copies(view, MERGED, merged_into(chosen, members, patches.shape[1]))
        return grouped_windows(chosen, members, patches.shape[1], view.prefix) if bool(chosen.any()) else None

    def before_decoder(self, vision: Vision) -> Choice | None:
        features = vision.features
        own = torch.arange(len(vision), device=features.device)
        target = self._merged(vision) if self._merges else own
        group = Grouping.into(target[None], size_weighted=False)
        keep, notes = target == own, {}
        if self.key_rate:
            score = noted(vision, SCORE).to(features.device)
            score = group.unmerge(group.merge(score[None, :, None]))[0, :, 0]
            structural = vision.structural.to(features.device)
            frame = vision.layout.frame[0].to(features.device)
            notes[KEY] = best_share(score, frame, keep & ~structural, self.key_rate).float()
        if bool(keep.all()):
            return Choice(keep, notes=notes) if notes else None
        merged = features.index_copy(0, keep.nonzero()[:, 0], group.merge(features[None])[0])
        return Choice(keep, target, merged, notes)

    def _merged(self, vision: Vision) -> torch.Tensor:
        """int64 `[n]`: the token that each becomes part of."""
        device = vision.features.device
        frame, row, col = (getattr(vision.layout, name)[0].to(device) for name in ("frame", "row", "col"))
        target = copied_from(vision, MERGED)
        fresh = row.where(target < 0, -1)  # tokens that no tower has merged
        members = windows(frame, fresh, col, self._side)
        score = flatness(vision.features[None], members)
        again = merged_into(score >= self.tau, members, len(vision))[0]
        return again.where(target < 0, target)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers is None:
            return tuple(sorted(set(in_proportion(LAYERS, layers))))
        return listed("MustDrop", self.layers, layers)

    def in_decoder(self, view: DecoderView) -> Choice | None:
        columns = visual_columns(view)
        if not self.gamma or not self.alpha or not columns.numel():
            return None
        total, top = attention_of(view, text_rows(view, self.rows, "MustDrop"), columns)
        weak = weak_by_both(total, top, self.gamma, self.alpha)
        if KEY in view.notes:
            weak &= ~(view.notes[KEY].to(columns.device)[columns] > 0)
        return Choice(keep_mask(view, ~weak)) if bool(weak.any()) else None


def weak_by_both(total: torch.Tensor, top: torch.Tensor, gamma: float, alpha: float) -> torch.Tensor:
    """bool `[V]`: the dual-attention filter's verdict on tokens with these sums and maxima of the text's attention."""
    return (total < gamma * total.sum()) & (top < alpha)
