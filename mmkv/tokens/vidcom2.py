"""VidCom2: a frame's budget by how unlike the video it is, its tokens by how unlike video and frame they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mmkv.layout import VIDEO
from mmkv.parts.registry import register
from mmkv.tokens.frames import clips, kept_so_far, pruned, tiles
from mmkv.tokens.method import Choice, TokenMethod, Vision

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the Gaussian kernels that are added up


@register("tokens", "VidCom2, EMNLP 2025, arXiv 2505.14454")
@dataclass(frozen=True)
class VidCom2(TokenMethod):
    """Gives unusual frames of a video more tokens, and keeps the most unusual tokens of each frame.

    Paper: Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (arXiv 2505.14454).
    A token's likeness to a center is the sum over five widths a of exp(-|x - c|^2 / 2a), x of unit length, c the mean of all
    of the video's tokens or of the frame's. A frame gets `keep` (1 + s - mean s) of its tokens, s the softmax over frames of
    its tokens' negated mean likeness to the video's center; the tokens least like both centers stay.

    Args:
        keep: share of all tokens that stay, in (0, 1]; at least one token of each frame stays.
        temperature: of that softmax; the larger, the more equal the budgets.
        channels: share of the channels that are compared, those that vary least over the video; 0.5 in the official code.

    Where we differ: budgets are rounded by largest remainder and what a full frame cannot take goes to the others, so that
    exactly `keep` of the tokens stay (the official code rounds and caps each frame by itself). Computed in fp32; of equal
    tokens the earlier stays. Images are left alone; newlines always stay and do not count. Where frames have different
    numbers of tokens, each run of equal ones counts as a video of its own.
    """

    keep: float = 0.25
    temperature: float = 0.01
    channels: float = 0.5

    def __post_init__(self):
        for name, most in (("keep", 1), ("temperature", float("inf")), ("channels", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name}={value!r}; possible are numbers above 0{', at most 1' if most == 1 else ''}")

    def before_decoder(self, vision: Vision) -> Choice | None:
        if self.keep == 1 or not bool((vision.layout.modality == VIDEO).all()):
            return None
        keep = kept_so_far(vision)
        for clip in clips(vision):
            to_video, to_frame = self._likeness(vision.features, clip)
            budget = self._budgets(-to_video.double().mean(1).cpu(), clip.shape[1]).to(clip.device)
            rank = (to_video + to_frame).argsort(dim=-1, stable=True).argsort(dim=-1)
            keep[clip] = rank < budget[:, None]
        return pruned(keep)

    def keeping_everything(self) -> VidCom2:
        return replace(self, keep=1.0)

    def _likeness(self, features: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `[F, m]` twice: each token's likeness to the video's center and to its frame's."""
        chosen = steady_channels(features, clip.flatten(), self.channels)
        parts = tiles(clip, features.shape[1])
        video = sum(unit(features, part, chosen).sum((0, 1)) for part in parts) / clip.numel()
        both = [
            (likeness(x, video), likeness(x, x.mean(1, keepdim=True)))
            for x in (unit(features, part, chosen) for part in parts)
        ]
        return torch.cat([a for a, _ in both]), torch.cat([b for _, b in both])

    def _budgets(self, unlike: torch.Tensor, size: int) -> torch.Tensor:
        """int64 `[F]`: tokens of each frame that stay, from fp64 `[F]` how unlike the video it is."""
        share = (unlike / self.temperature).softmax(0)
        total = min(max(round(self.keep * size * len(unlike)), len(unlike)), size * len(unlike))
        return apportion(self.keep * size * (1 + share - share.mean()), total, size)


def steady_channels(features: torch.Tensor, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """int64, sorted: the `share` of the channels that vary least over the tokens; at least one."""
    width = max(1, (1 << 24) // max(tokens.numel(), 1))
    spread = torch.cat([part[tokens].float().var(0, correction=0) for part in features.split(width, dim=1)])
    return spread.argsort(stable=True)[: max(1, int(share * len(spread) + 1e-6))].sort().values


def unit(features: torch.Tensor, part: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """fp32 `[F, m, c]`: these tokens' chosen channels, of unit length."""
    return F.normalize(features[part].index_select(-1, channels).float(), dim=-1)


def likeness(x: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """fp32 `[F, m]`: sum of Gaussian kernels of the distance to a center."""
    distance = (x - center).square().sum(-1)
    return sum((distance / (-2 * width)).exp() for width in WIDTHS)


def apportion(wanted: torch.Tensor, total: int, most: int) -> torch.Tensor:
    """int64 `[F]`, between 1 and `most` each, that add up to `total`: `wanted` (fp64) shifted alike where bounds bite, then
    rounded by largest remainder, ties to the earlier frame."""
    low, high = -float(wanted.max()), float(most) - float(wanted.min())
    filled = wanted.clamp(1, most)
    if abs(float(filled.sum()) - total) > 0.5:
        for _ in range(60):
            middle = (low + high) / 2
            filled = (wanted + middle).clamp(1, most)
            low, high = (middle, high) if float(filled.sum()) < total else (low, middle)
    out = (filled + 1e-6).floor().long()
    out[(filled - out).argsort(descending=True, stable=True)[: total - int(out.sum())]] += 1
    return out
