"""EVS: of a video, the tokens that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmkv.layout import VIDEO
from mmkv.parts.registry import register
from mmkv.tokens.frames import check_dropped, check_name, clips, cosine, kept_so_far, pruned
from mmkv.tokens.method import Choice, TokenMethod, Vision

ROUNDING = 1e-6  # cosines of equal fp32 vectors differ from 1 by about this


@register("tokens", "Efficient Video Sampling, NVIDIA 2025, arXiv 2510.14624")
@dataclass(frozen=True)
class EVS(TokenMethod):
    """Drops video tokens that hardly differ from the same place one frame earlier.

    Paper: Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (arXiv 2510.14624).

    Args:
        ratio: share of tokens that are dropped, q in the paper, in [0, 1); over the whole video, so that a frame in which
            much happens keeps more. The first frame stays whole whatever the ratio.
        budget: "official" keeps exactly floor((1 - ratio) n) of n tokens, the first frame's included and at least those
            (NVIDIA's code in vLLM); "paper" keeps the first frame and, of all later tokens, those that changed more than the
            `ratio` quantile of the changes, so that a video in which nothing moves keeps its first frame only.

    Where we differ: change is 1 - cosine similarity of the projected features, as in NVIDIA's code in vLLM; the paper takes
    the L1 distance of pixels. Of equal changes the earlier token stays. Position ids are those of the whole video. Images
    are left alone; newlines always stay and do not count. Where frames have different numbers of tokens, each run of equal
    ones counts as a video of its own.
    """

    ratio: float = 0.75
    budget: str = "official"

    def __post_init__(self):
        check_dropped("ratio", self.ratio)
        check_name("budget", self.budget, ("official", "paper"))

    def before_decoder(self, vision: Vision) -> Choice | None:
        if self.ratio == 0 or not bool((vision.layout.modality == VIDEO).all()):
            return None
        keep = kept_so_far(vision)
        for clip in clips(vision):
            keep[clip[0]] = True
            if len(clip) > 1:
                change = 1 - cosine(vision.features, clip[1:], clip[:-1])
                keep[clip[1:]] = self._changed(change.masked_fill(change < ROUNDING, 0))
        return pruned(keep)

    def keeping_everything(self) -> EVS:
        return replace(self, ratio=0.0)

    def _changed(self, change: torch.Tensor) -> torch.Tensor:
        """bool `[F - 1, m]`: the tokens behind the first frame that stay."""
        if self.budget == "paper":
            return change > quantile(change, self.ratio)
        tokens = change.numel() + change.shape[1]
        count = max(int((1 - self.ratio) * tokens + 1e-6) - change.shape[1], 0)
        out = torch.zeros_like(change, dtype=torch.bool)
        out.view(-1)[change.flatten().argsort(descending=True, stable=True)[:count]] = True
        return out


def quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The `share` quantile of all values, between two neighbours linearly, of any number (torch's own stops at 2^24)."""
    ranked = values.flatten().sort().values
    at = share * (len(ranked) - 1)
    low, high = ranked[int(at)], ranked[min(int(at) + 1, len(ranked) - 1)]
    return low + (high - low) * (at - int(at))
