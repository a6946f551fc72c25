"""Uniform: evenly spread tokens of each frame's grid, the baseline that methods have to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmkv.parts.registry import register
from mmkv.tokens.frames import check_amount, clips, kept_so_far, pruned, tokens_of
from mmkv.tokens.method import Choice, TokenMethod, Vision


@register("tokens", "baseline: ordered dither, Bayer 1973")
@dataclass(frozen=True)
class Uniform(TokenMethod):
    """Keeps tokens evenly spread over each frame, whatever they show.

    Paper: none; a training-free baseline. The kept places are the lowest of Bayer's ordered dither matrix (An optimum method
    for two-level rendition of continuous-tone pictures, 1973), so a quarter of an even grid is every second row and column,
    a half is a checkerboard, and any exact number is spread as evenly as that.

    Args:
        keep: tokens of each frame that stay: a ratio of its tokens (a float) or a number (an int).

    Where we differ: papers call several things uniform; most take every n-th token in raster order, which on a grid whose
    width n divides keeps vertical stripes only. A frame of fewer tokens than `keep` stays whole. Newlines always stay
    and do not count.
    """

    keep: float | int = 0.25

    def __post_init__(self):
        check_amount("keep", self.keep)

    def before_decoder(self, vision: Vision) -> Choice | None:
        keep = kept_so_far(vision)
        row, col = vision.layout.row[0].long(), vision.layout.col[0].long()
        rank = dither(row.clamp(min=0), col.clamp(min=0)).to(keep.device)
        for clip in clips(vision):
            order = rank[clip].argsort(dim=-1, stable=True)[:, : tokens_of(self.keep, clip.shape[1])]
            keep[clip.gather(1, order)] = True
        return pruned(keep)

    def keeping_everything(self) -> Uniform:
        return replace(self, keep=1.0)


def dither(row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """int64, Bayer's matrix at these places: 0 2 / 3 1 in the small, the same again for each doubling of the grid."""
    bits = max(int(row.max()), int(col.max()), 1).bit_length() if row.numel() else 0
    out = torch.zeros_like(row)
    for bit in range(bits):  # the lowest bit of a place decides first
        out = out * 4 + ((row ^ col) >> bit & 1) * 2 + (row >> bit & 1)
    return out
