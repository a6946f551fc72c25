"""DyCoke: within every four frames, tokens that repeat an earlier frame go."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmkv.layout import VIDEO
from mmkv.parts.choose import top_per_head
from mmkv.parts.registry import register
from mmkv.tokens.frames import check_dropped, check_name, clips, cosine, places, tiles
from mmkv.tokens.method import Choice, TokenMethod, Vision

GROUP = 4
STEPS = ((3, 2), (2, 0), (1, 0))  # (frame of a group, frame it is compared with), in the order in which merges chain


@register("tokens", "DyCoke, CVPR 2025, arXiv 2411.15024")
@dataclass(frozen=True)
class DyCoke(TokenMethod):
    """Drops or merges video tokens that repeat the same place of an earlier frame, in groups of four frames.

    Paper: DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (arXiv 2411.15024), its first stage,
    temporal token merging (TTM). Of each four frames the first stays whole; the second is compared with it, the fourth with
    the third, then the third with the first; of each compared frame the `ratio` most similar tokens go. With the default 0.7
    about (1 + 3 x 0.3) / 4 = 47.5 % of a video stay.

    Args:
        ratio: share of a compared frame's tokens that go, in [0, 1); 0.7 in the official code.
        redundant: "drop" (the official code) or "mean": the token that stays becomes the mean of all that repeat it.

    Where we differ: the second stage, dynamic KV cache reduction while decoding, is a matter of cache methods and not part of
    this class. The official code, without saying so, drops the last frame of an odd number, leaves the third frame of the last
    group whole, selects the tokens of the second and fourth frame by the similarities of the pair before, and orders what stays
    by similarity; here every group is treated alike (a shorter last one too), by its own similarities, and
    tokens stay in their order. Of equal similarities the earlier token stays. Images are left alone; newlines always stay.
    """

    ratio: float = 0.7
    redundant: str = "drop"

    def __post_init__(self):
        check_dropped("ratio", self.ratio)
        check_name("redundant", self.redundant, ("drop", "mean"))

    def before_decoder(self, vision: Vision) -> Choice | None:
        if self.ratio == 0 or not bool((vision.layout.modality == VIDEO).all()):
            return None
        keep = torch.ones(len(vision), dtype=torch.bool, device=vision.features.device)
        into = places(keep)
        features = vision.features.clone() if self.redundant == "mean" else None
        for clip in clips(vision):
            for part in tiles(clip, vision.features.shape[1], GROUP):
                gone = self._redundant(vision.features, part)
                keep[part] = ~gone
                for frame, earlier in reversed(STEPS):
                    mine = part[frame::GROUP]
                    target = into[part[earlier::GROUP][: len(mine)]]
                    into[mine] = torch.where(gone[frame::GROUP], target, mine)
                if features is not None:
                    features[part] = merged(vision.features[part].float(), gone).to(features.dtype)
        if bool(keep.all()):
            return None
        return Choice(keep, into if features is not None else into.masked_fill(~keep, -1), features)

    def keeping_everything(self) -> DyCoke:
        return replace(self, ratio=0.0)

    def _redundant(self, features: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """bool `[F, m]`: tokens that repeat an earlier frame, of frames `[F, m]` that start with a group."""
        staying = int((1 - self.ratio) * part.shape[1] + 1e-6)
        gone = torch.zeros_like(part, dtype=torch.bool)
        for frame, earlier in STEPS:
            mine = part[frame::GROUP]
            alike = cosine(features, mine, part[earlier::GROUP][: len(mine)])
            gone[frame::GROUP] = ~top_per_head(-alike, staying)
        return gone


def merged(hidden: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """`[F, m, C]`: each token averaged with those that went into it; changes `hidden`, fp32 `[F, m, C]`."""
    weight = torch.ones_like(gone, dtype=hidden.dtype)
    for frame, earlier in STEPS:
        left = gone[frame::GROUP]
        for total in (hidden, weight[..., None]):
            total[earlier::GROUP][: len(left)] += total[frame::GROUP] * left[..., None]
    return hidden.div_(weight[..., None])
