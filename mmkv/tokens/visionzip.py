"""VisionZip: the patches that the vision tower looks at, and a few that sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register
from mmkv.tokens.frames import check_amount, check_name, clips, kept_so_far, places, pruned, tiles, tokens_of
from mmkv.tokens.method import Choice, TokenMethod, TowerFacts, TowerView, Vision
from mmkv.tokens.saliency import check_scores, check_tower, note_score, noted

NOTE = "visionzip"


@register("tokens", "VisionZip, CVPR 2025, arXiv 2412.04467")
@dataclass(frozen=True)
class VisionZip(TokenMethod):
    """Keeps the tokens that the vision tower attends to, and merges the others into a few contextual ones by similarity.

    Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467). The paper's splits of
    576 tokens: 54 + 10, 108 + 20, 162 + 30.

    Args:
        dominant: tokens of each frame that stay for the attention they get: a number (an int) or a ratio (a float).
        contextual: tokens of each frame, evenly spaced among the rest, into which each other one is merged, the most similar
            taking it: a number or a ratio; 0 for none, and the rest is dropped.
        scores: whose attention: "cls" (the paper), "received" (mean over all queries, for towers without CLS token) or
            "auto" (the first where there is a CLS token, else the second).
        contextual_merge: "mean" of a contextual token and all that go into it, or "official": the token plus the mean of
            those, which about doubles its norm.

    Where we differ: we act behind the projector on its output, the paper before it; similarity is the cosine of the projected
    features, the paper's that of the tower's keys. The CLS token, which the official code counts among the dominant ones,
    is not read by the decoder, so `dominant` counts patches only. Attention is that of the second to last block, as in the
    paper, where the tower has a CLS token (LLaVA reads that block), of the last block elsewhere. Counts are per frame of a
    video, or per grid of an image in tiles. A frame of no more tokens than dominant + contextual keeps all, untouched.
    Newlines always stay and do not count. Merged vectors keep the norm of features by default ("mean").
    """

    dominant: int | float = 54
    contextual: int | float = 10
    scores: str = "auto"
    contextual_merge: str = "mean"

    def __post_init__(self):
        check_amount("dominant", self.dominant)
        check_amount("contextual", self.contextual, least=0)
        check_scores(self.scores)
        check_name("contextual_merge", self.contextual_merge, ("mean", "official"))
        if (
            isinstance(self.dominant, float)
            and isinstance(self.contextual, float)
            and self.dominant + self.contextual > 1
        ):
            raise ValueError(
                f"dominant={self.dominant} and contextual={self.contextual}; possible are ratios of sum up to 1"
            )

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(max(depth - 2, 0), depth))

    def in_tower(self, view: TowerView) -> None:
        if view.block == max(view.depth - (2 if view.has_cls else 1), 0):
            note_score(view, self.scores, NOTE)

    def before_decoder(self, vision: Vision) -> Choice | None:
        if self._keeps_all:
            return None
        score, features = noted(vision, NOTE).to(vision.features.device), vision.features.clone()
        keep = kept_so_far(vision)
        into = places(keep).masked_fill(~keep, -1)
        for clip in clips(vision):
            dominant, contextual = (tokens_of(amount, clip.shape[1]) for amount in (self.dominant, self.contextual))
            if dominant + contextual >= clip.shape[1]:
                keep[clip] = True
                into[clip] = clip
                continue
            for part in tiles(clip, features.shape[1]):
                best = top_per_head(score[part], dominant)
                keep[part[best]] = True
                into[part[best]] = part[best]
                rest = part[~best].view(len(part), -1)
                if contextual:
                    targets, owner, merged = self._summed_up(vision.features[rest], contextual)
                    at = rest[:, targets]
                    keep[at] = True
                    into[rest] = at.gather(1, owner)
                    features[at] = merged.to(features.dtype)
        return Choice(keep, into, features) if self.contextual and not bool(keep.all()) else pruned(keep)

    def check(self, adapter_facts: TowerFacts) -> None:
        check_tower("VisionZip", self.scores, adapter_facts)

    def keeping_everything(self) -> VisionZip:
        return replace(self, dominant=1.0, contextual=0)

    @property
    def _keeps_all(self) -> bool:
        return isinstance(self.dominant, float) and self.dominant == 1

    def _summed_up(self, rest: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The contextual tokens of `rest` `[F, R, C]`: their places `[count]`, which of them each token goes to, int64
        `[F, R]`, and what they become, fp32 `[F, count, C]`."""
        hidden = rest.float()
        targets = torch.arange(count, device=rest.device) * max(1, rest.shape[1] // count)
        own = hidden[:, targets]
        owner = (hidden @ F.normalize(own, dim=-1).transpose(1, 2)).argmax(-1)
        owner[:, targets] = torch.arange(count, device=rest.device)
        given = F.one_hot(owner, count).to(hidden.dtype)
        given[:, targets] = 0
        total, members = given.transpose(1, 2) @ hidden, given.sum(1)[..., None]
        if self.contextual_merge == "official":
            return targets, owner, own + total / members.clamp(min=1)
        return targets, owner, (own + total) / (1 + members)
