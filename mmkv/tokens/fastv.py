"""FastV: behind an early decoder layer, half of an image's tokens can go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register
from mmkv.tokens.between_layers import POSITION_IDS, check_bools, keep_mask, listed, visual_columns
from mmkv.tokens.frames import check_dropped, check_name
from mmkv.tokens.method import Choice, DecoderView, TokenMethod, TowerFacts


@register("tokens", "FastV, ECCV 2024, arXiv 2403.06764")
@dataclass(frozen=True)
class FastV(TokenMethod):
    """Drops, before one early decoder layer, the vision tokens that the prompt's last token attends to least.

    Paper: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models
    (arXiv 2403.06764).

    Args:
        layer: K, the first decoder layer that reads fewer tokens, counted from 0, at least 1; the attention of layer K - 1,
            mean over heads, decides. 2 as in the paper.
        ratio: R, share of the V vision tokens that go, from 0 up to below 1; round(V * (1 - R)) stay, at least one.
        per_medium: whether each image or video keeps its share, or the best tokens of all of them together stay.
        position_ids: "original" (as the paper) or "renumbered".

    Where we differ: K = 0 is refused (there is no attention before the first layer; the code's mask version then drops at
    random). The choice is made once, in the prefill; the original without a KV cache ranks anew at each step. Of equal
    tokens the earlier stays. Several images share one ranking, as newline tokens of an image do; the code knows one image.
    """

    layer: int = 2
    ratio: float = 0.5
    per_medium: bool = False
    position_ids: str = "original"

    whole_prompt: ClassVar[bool] = True

    def __post_init__(self):
        if type(self.layer) is not int or self.layer < 1:
            raise ValueError(
                f"layer={self.layer!r}; possible are whole numbers from 1, since the layer before it is asked"
            )
        check_dropped("ratio", self.ratio)
        check_bools(per_medium=self.per_medium)
        check_name("position_ids", self.position_ids, POSITION_IDS)

    def keeping_everything(self) -> FastV:
        """The setting that drops nothing."""
        return replace(self, ratio=0.0)

    def check(self, adapter_facts: TowerFacts) -> None:
        self.decoder_layers(adapter_facts.layers)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return listed("FastV", (self.layer - 1,), layers)

    def in_decoder(self, view: DecoderView) -> Choice | None:
        columns = visual_columns(view)
        if not self.ratio or not columns.numel():
            return None
        score = view.mass(torch.tensor([len(view) - 1])).sum.mean(0)[columns]
        if not self.per_medium:
            return Choice(keep_mask(view, self._best(score)))
        medium = view.layout.medium[0, view.visual].to(score.device)
        kept = torch.zeros_like(score, dtype=torch.bool)
        for one in medium.unique():
            kept[medium == one] = self._best(score[medium == one])
        return Choice(keep_mask(view, kept))

    def _best(self, score: torch.Tensor) -> torch.Tensor:
        return top_per_head(score[None], max(1, round(len(score) * (1 - self.ratio))))[0]
