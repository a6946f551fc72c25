"""SparseVLM: the words that speak of the image choose its tokens, and a part of the rest is recycled in clusters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.parts.choose import top_per_head
from mmkv.parts.clusters import dpc_knn
from mmkv.parts.matching import Grouping
from mmkv.parts.registry import register
from mmkv.parts.tower_attention import TILE
from mmkv.tokens.between_layers import (
    POSITION_IDS,
    ROWS,
    check_bools,
    check_kept,
    check_layers,
    check_number,
    in_proportion,
    keep_mask,
    listed,
    text_rows,
    visual_columns,
)
from mmkv.tokens.frames import check_name
from mmkv.tokens.method import Choice, DecoderView, TokenMethod, TowerFacts

LAYERS = (2, 6, 15)
LISTS = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
TOTAL = "sparsevlm"  # note: vision tokens that the prompt had at the first stage


@register("tokens", "SparseVLM, ICML 2025, arXiv 2410.04417")
@dataclass(frozen=True)
class SparseVLM(TokenMethod):
    """Keeps, stage by stage inside the decoder, the vision tokens that the words about the image attend to.

    Raters are the text tokens whose embeddings answer the image's: softmax over the text of V T^T, mean over the image, above
    the mean. Behind a few layers the raters' mean attention ranks the vision tokens. The best of what is dropped are
    clustered, and each cluster goes on as one token, the mean of its hidden states.

    Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv 2410.04417).

    Args:
        keep: vision tokens that stay at each stage: numbers (ints; the default is version 1.5's for a mean of 192 of 576 over
            the layers) or ratios (floats) of those there were at the first stage.
        layers: the stages, decoder layers behind which tokens go, counted from 0; None for the paper's (2, 6, 15), in a decoder
            with fewer than 17 layers l * layers // 32 (where two coincide, the later stage counts).
        budget: "fixed" (`keep`; versions 1.5 and 2.0) or "rank" (version 1: int(rank * `scale` + `bias`) stay, where the
            rank is that of the raters' attention `[raters, V]`).
        scale, bias: of that rule; its code takes 13.5 and 0, for POPE 9 and 6, for TextVQA 0.8 and 0.
        recycle: whether dropped tokens are clustered; False in version 2.0.
        recycled: share of the dropped tokens that are, the best by attention: int(share * dropped) + 1.
        per_cluster: tokens for one cluster: m of them make int(m / per_cluster) + 1.
        raters: "salient" (as above) or "all" text tokens.
        heads: query heads whose attention counts, those with the most from raters to vision tokens; None for all, 14 in
            version 2.0.
        rows: which text may rate: "after_first" (behind the first image or video) or "after_last" (behind all of them, so
            that each rater sees every vision token).
        position_ids: "original" (as version 2.0) or "renumbered" (as 1.0 and 1.5).

    Where we differ: a cluster takes the place and the position id of its centre; the official code appends it behind the
    image's tokens and renumbers. Equal densities are told apart by order, not by random noise. A stage whose number reaches
    what is there drops nothing; the official code drops at least one. Where no text token is above the mean, all
    are raters. Version 2.0 also divides the attention by its rotary bias, which needs the model's rotary embedding; we leave
    that out. All images and videos of a prompt are ranked together, newline tokens with them.
    """

    keep: tuple[int | float, ...] = (300, 200, 110)
    layers: tuple[int, ...] | None = None
    budget: str = "fixed"
    scale: float = 13.5
    bias: float = 0.0
    recycle: bool = True
    recycled: float = 0.3
    per_cluster: int = 10
    raters: str = "salient"
    heads: int | None = None
    rows: str = "after_first"
    position_ids: str = "original"

    whole_prompt: ClassVar[bool] = True

    def __post_init__(self):
        if self.layers is not None:
            check_layers(self.layers)
        if not isinstance(self.keep, tuple) or len(self.keep) != len(self._layers):
            raise ValueError(f"keep={self.keep!r}; needed is a tuple of one number or ratio for each of {self._layers}")
        for amount in self.keep:
            check_kept("keep", amount)
        alike = len({type(amount) for amount in self.keep}) == 1
        if alike and list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(
                f"keep={self.keep!r} rises; a later stage cannot keep more than the one before, give falling numbers"
            )
        check_name("budget", self.budget, ("fixed", "rank"))
        check_number("scale", self.scale)
        check_number("bias", self.bias)
        if self.scale < 0 or self.bias < 0 or self.scale == self.bias == 0:
            raise ValueError(f"scale={self.scale}, bias={self.bias}; possible are numbers from 0, one of them above")
        check_bools(recycle=self.recycle)
        check_number("recycled", self.recycled)
        if not 0 < self.recycled <= 1:
            raise ValueError(f"recycled={self.recycled}; possible are shares of the dropped tokens above 0, up to 1")
        for name in ("per_cluster", "heads"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name, value) != ("heads", None):
                raise ValueError(f"{name}={value!r}; possible are whole numbers from 1")
        check_name("raters", self.raters, ("salient", "all"))
        check_name("rows", self.rows, ROWS)
        check_name("position_ids", self.position_ids, POSITION_IDS)

    @classmethod
    def for_tokens(cls, tokens: int, version: str = "1.5", **options) -> SparseVLM:
        """The official setting for a mean of 192, 128, 96 or 64 of LLaVA-1.5's 576 tokens over the layers.

        Args:
            tokens: that mean.
            version: "1.5", or "2.0" (other numbers, 14 heads, no recycling).
            options: others of this class.
        """
        check_name("version", version, tuple(LISTS))
        check_name("tokens", tokens, tuple(LISTS[version]))
        own = {"recycle": False, "heads": 14} if version == "2.0" else {}
        return cls(**{"keep": LISTS[version][tokens], **own, **options})

    @property
    def _layers(self) -> tuple[int, ...]:
        return LAYERS if self.layers is None else self.layers

    def keeping_everything(self) -> SparseVLM:
        """The setting that drops nothing."""
        return replace(self, keep=(1.0,) * len(self.keep), budget="fixed")

    def check(self, adapter_facts: TowerFacts) -> None:
        self._stages(adapter_facts.layers)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return tuple(self._stages(layers))

    def _stages(self, layers: int) -> dict[int, int]:
        """Layer -> stage."""
        if self.layers is None and layers > 1:
            return {layer: stage for stage, layer in enumerate(in_proportion(LAYERS, layers))}
        return {layer: stage for stage, layer in enumerate(listed("SparseVLM", self._layers, layers))}

    def in_decoder(self, view: DecoderView) -> Choice | None:
        columns = visual_columns(view)
        stage = self._stages(view.layers)[view.layer]
        keeps_all = self.budget == "fixed" and isinstance(self.keep[stage], float) and self.keep[stage] == 1
        if keeps_all or not columns.numel():
            return None
        raters = self._raters(view, columns)
        total = int(view.notes[TOTAL][0]) if TOTAL in view.notes else len(columns)
        count = self._count(view, raters, columns, stage, total)
        if count >= len(columns):
            return None
        score = self._relevance(view, raters, columns)
        chosen = top_per_head(score[None], count)[0]
        notes = {TOTAL: torch.full((len(view),), float(total), device=columns.device)}
        keep = keep_mask(view, chosen)
        if not self.recycle:
            return Choice(keep, notes=notes)
        return self._with_clusters(view, keep, columns[~chosen], score[~chosen], notes)

    def _raters(self, view: DecoderView, columns: torch.Tensor) -> torch.Tensor:
        """int64 `[P]` on the CPU: the rows whose attention counts."""
        text = text_rows(view, self.rows, "SparseVLM")
        if self.raters == "all":
            return text
        vision, words = view.embeds[columns].float(), view.embeds[text.to(columns.device)].float()
        answer = sum((part @ words.T).softmax(-1).sum(0) for part in vision.split(max(1, TILE // len(text))))
        above = (answer > answer.mean()).to(text.device)
        return text[above] if bool(above.any()) else text

    def _count(self, view, raters: torch.Tensor, columns: torch.Tensor, stage: int, total: int) -> int:
        """Vision tokens that stay."""
        if self.budget == "rank":
            rank = int(torch.linalg.matrix_rank(view.head_mean(raters)[:, columns].float()))
            return len(columns) if rank == len(columns) else max(int(rank * self.scale + self.bias), 1)
        amount = self.keep[stage]
        return max(round(amount * total), 1) if isinstance(amount, float) else amount

    def _relevance(self, view: DecoderView, raters: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """fp32 `[V]`: the raters' attention, mean over the heads that count."""
        mass = view.mass(raters).sum[:, columns] / len(raters)
        if self.heads is not None and self.heads < len(mass):
            mass = mass[mass.sum(1).argsort(descending=True, stable=True)[: self.heads]]
        return mass.mean(0)

    def _with_clusters(self, view, keep: torch.Tensor, dropped: torch.Tensor, score: torch.Tensor, notes) -> Choice:
        """The best of the dropped tokens, int64 `[m]` of score `[m]`, go on as means at the places of cluster centres."""
        count = min(int(len(dropped) * self.recycled) + 1, len(dropped))
        best = dropped[top_per_head(score[None], count)[0]]
        clusters = min(count // self.per_cluster + 1, count)
        centres, member = dpc_knn(view.hidden[best], clusters, neighbours=clusters)
        means = Grouping(member[None], clusters).merge(view.hidden[best][None])[0]
        into = torch.arange(len(view), device=keep.device).masked_fill(~keep, -1)
        into[best] = best[centres[member]]
        features = view.hidden.clone()
        features[best[centres]] = means
        keep[best[centres]] = True
        return Choice(keep, into, features, notes)
