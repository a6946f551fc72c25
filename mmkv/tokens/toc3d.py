"""ToC3D: settings, and the dynamic router that gives a block its salient tokens and one bridge token per window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mmkv.parts.registry import register
from mmkv.tokens.toc3d_windows import lay_out, regions

PAD_SCORE = -1e6  # of a pad slot: below every log-probability


@register("tokens", "ToC3D, ECCV 2024, arXiv 2409.00633")
@dataclass(frozen=True)
class ToC3D:
    """Runs the blocks of a multi-view 3D detector's ViT on the tokens that the last frame's objects point at.

    Paper: Make Your ViT-based Multi-view 3D Detectors Faster via Token Compression (ECCV 2024, arXiv 2409.00633).
    A backbone asks it (`mmkv.models.toc3d`); it is no method for language models. From the first scoring block on, each
    block runs attention and MLP on the best-scored tokens of each window and on one bridge token, the weighted mean of the
    others; these get the bridge token's change. No token is ever lost: the neck still sees the whole grid.

    Args:
        ratios: share of tokens that a block keeps, one per scoring block, absolute (not compounded), each in (0, 1].
        scoring: blocks before which the tokens are scored anew, ascending; they must not be global blocks.
        queries: objects of the last frame that score the tokens, the most confident ones; ties the scorer's weights.
        bridge: weights of the bridge token: "paper", by the probability to be kept; or "official", by its |logarithm|, so
            that the least salient tokens weigh most.
        select: "real", a share of each window's real tokens, never a pad; or "padded", a share of the slots of the
            zero-padded windows, in which pads are attended and weigh in the bridge token.
        noise: "training", Gumbel noise in the mask only while training; or "always", at inference as well.
        history: what the scorer is told of an object's motion: "aligned", relative to this frame's ego and time; or
            "official", velocity and ego pose as stored and minus the old timestamp.
        loss_weight: weight of `selection_loss` beside the detector's losses.

    Where we differ: the official code is `bridge="official", select="padded", noise="always", history="official"`. Its
    int(256 * 0.7) slots of 8 padded windows at 20 x 50 tokens put 1440 tokens into an MLP that reads 1000 without it; ours
    704. Its ratio 1.0 leaves tokens in the wrong places, its batches take the first sample's history flag for all, its
    first frames train no scorer, and its box targets miss the last row and column: all mended. The paper's text was not
    at hand, so "paper" is the reading by which what matters more weighs more. Blocks that keep all tokens do not pad.
    """

    for_vlm = False

    ratios: tuple[float, ...] = (0.7, 0.5, 0.5)
    scoring: tuple[int, ...] = (6, 12, 18)
    queries: int = 64
    bridge: str = "paper"
    select: str = "real"
    noise: str = "training"
    history: str = "aligned"
    loss_weight: float = 5.0

    def __post_init__(self):
        _check_numbers(self)
        for name, possible in (
            ("bridge", ("paper", "official")),
            ("select", ("real", "padded")),
            ("noise", ("training", "always")),
            ("history", ("aligned", "official")),
        ):
            if getattr(self, name) not in possible:
                raise ValueError(f"{name} {getattr(self, name)!r}; possible are {', '.join(map(repr, possible))}")

    @classmethod
    def fast(cls, **options) -> ToC3D:
        """ToC3D-Fast: ratios 0.7, 0.5, 0.5."""
        return cls(ratios=(0.7, 0.5, 0.5), **options)

    @classmethod
    def faster(cls, **options) -> ToC3D:
        """ToC3D-Faster: ratios 0.5, 0.4, 0.3."""
        return cls(ratios=(0.5, 0.4, 0.3), **options)

    def keeping_everything(self) -> ToC3D:
        """The setting whose router runs every token, as the dense backbone does."""
        return replace(self, ratios=(1.0,) * len(self.scoring), select="real")

    def ratio(self, block: int) -> float | None:
        """Share that a block keeps, None before the first scoring block."""
        stages = [ratio for ratio, start in zip(self.ratios, self.scoring) if start <= block]
        return stages[-1] if stages else None

    def check(self, depth: int, global_blocks: tuple[int, ...]) -> None:
        """Raise ValueError where a backbone has too few blocks, or is global where it should score."""
        if self.scoring[-1] >= depth:
            raise ValueError(
                f"scoring block {self.scoring[-1]} of a backbone of {depth} blocks; the last is {depth - 1}"
            )
        both = sorted(set(self.scoring) & set(global_blocks))
        if both:
            raise ValueError(f"scoring block {both[0]} is a global block (they are {global_blocks}); score at another")


def _check_numbers(method: ToC3D) -> None:
    numbers = [r for r in method.ratios if isinstance(r, int | float) and not isinstance(r, bool) and 0 < r <= 1]
    if not method.ratios or len(numbers) != len(method.ratios):
        raise ValueError(f"ratios {method.ratios}; each must be a number above 0, at most 1 (1 keeps all)")
    if len(method.scoring) != len(method.ratios):
        raise ValueError(f"{len(method.ratios)} ratios for {len(method.scoring)} scoring blocks; give one for each")
    if any(isinstance(b, bool) or not isinstance(b, int) or b < 0 for b in method.scoring) or any(
        b <= a for a, b in zip(method.scoring, method.scoring[1:])
    ):
        raise ValueError(f"scoring {method.scoring}; possible are block indices from 0 on, ascending")
    if isinstance(method.queries, bool) or not isinstance(method.queries, int) or method.queries < 1:
        raise ValueError(f"queries {method.queries!r}; must be a whole number from 1 on")
    weight = method.loss_weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
        raise ValueError(f"loss_weight {weight!r}; must be a number from 0 on")


def kept(tokens: int, ratio: float) -> int:
    """How many of a window's tokens are salient: the ratio rounded down, at least one."""
    return max(1, int(tokens * ratio + 1e-9))  # 0.29 * 100 is 28.999...


def split(scores: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(salient int64 `[W, keep]`, redundant int64 `[W, n - keep]`): places of the best scores `[W, n]` and of the others,
    best first; of equal ones the first in the window is better.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :keep], order[:, keep:]


def take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows of `[W, n, C]` at `[W, k]`: `[W, k, C]`."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def fill(salient, redundant, salient_at: torch.Tensor, redundant_at: torch.Tensor) -> torch.Tensor:
    """The inverse of `take` by both sets of places: `[W, n, C]`."""
    places = torch.cat([salient_at, redundant_at], 1)
    rows = torch.cat([salient, redundant], 1)
    return torch.empty_like(rows).scatter(1, places[..., None].expand_as(rows), rows)


def bridge_token(x: torch.Tensor, scores: torch.Tensor, weights: str = "paper") -> torch.Tensor:
    """`[W, 1, C]`: weighted mean of redundant tokens `[W, m, C]` by their log-probabilities `[W, m]`, see `ToC3D.bridge`."""
    scores = scores.float().clamp(max=-1e-12)  # certain ones, log p = 0, still weigh alike among themselves
    share = scores.softmax(-1) if weights == "paper" else scores / scores.sum(-1, keepdim=True)
    return (share[:, None] @ x.float()).to(x.dtype)


def mlp_tokens(height: int, width: int, window: int, ratio: float | None, select: str = "real") -> tuple[int, int]:
    """(all, real): tokens of one image that enter a block's MLP, bridge tokens and pads included, and the grid's own of them."""
    slots = real = 0
    for region in regions(height, width, window):
        tokens = region.height * region.width
        windows = (region.rows.stop - region.rows.start) * (region.cols.stop - region.cols.start) // tokens
        size = window * window if select == "padded" and ratio is not None else tokens
        keep = size if ratio is None else kept(size, ratio)
        slots += windows * (keep + (keep < size))
        real += windows * min(keep, tokens)
    return slots, real


Block = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dense(block: Block, x: torch.Tensor, window: int) -> torch.Tensor:
    """A block on all tokens of `[B, H, W, C]`, window by window; see `route`."""
    parts = [
        (region, block(region.cut(x), region.all_places(x, window)))
        for region in regions(x.shape[1], x.shape[2], window)
    ]
    return lay_out(parts, x.shape[0])


def route(
    block: Block, x: torch.Tensor, scores: torch.Tensor, window: int, ratio: float, method: ToC3D
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block on the salient tokens and the bridge token of each window.

    Args:
        block: `block(tokens [W, n, C], places int64 [W, n]) -> [W, n, C]` with its residuals; places in a window x window grid.
        x: `[B, H, W, C]`.
        scores: `[B, H, W]`, log-probabilities to be kept.
        window: side in tokens; the grid need not be a multiple.
        ratio: share of each window that is salient.
        method: for `bridge` and `select`.

    Returns:
        The grid `[B, H, W, C]`, and bool `[B, H, W]`, its salient tokens.
    """
    height, width = x.shape[1:3]
    if method.select == "padded":
        low, right = -height % window, -width % window
        x, scores = F.pad(x, (0, 0, 0, right, 0, low)), F.pad(scores, (0, right, 0, low), value=PAD_SCORE)
    parts = [
        (region, *_route(block, region.cut(x), region.all_places(x, window), region.cut(scores), ratio, method))
        for region in regions(x.shape[1], x.shape[2], window)
    ]
    out = lay_out([(region, tokens) for region, tokens, _ in parts], x.shape[0])
    salient = lay_out([(region, chosen) for region, _, chosen in parts], x.shape[0])
    return out[:, :height, :width], salient[:, :height, :width]


def _route(block: Block, tokens, places, scores, ratio: float, method: ToC3D):
    """`route` in equal windows: tokens `[W, n, C]` after the block, and bool `[W, n]`."""
    salient_at, redundant_at = split(scores, kept(tokens.shape[1], ratio))
    if not redundant_at.shape[1]:
        return block(tokens, places), torch.ones_like(scores, dtype=torch.bool)
    keep = salient_at.shape[1]
    salient, redundant = take(tokens, salient_at), take(tokens, redundant_at)
    bridge = bridge_token(redundant, scores.gather(1, redundant_at), method.bridge)
    # The bridge has no place of its own; the official code rotates it as the window's token number `keep`.
    at = torch.cat([places.gather(1, salient_at), places[:, keep : keep + 1]], 1)
    out = block(torch.cat([salient, bridge], 1), at)
    redundant = redundant + (out[:, keep:] - bridge)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, salient_at, True)
    return fill(out[:, :keep], redundant, salient_at, redundant_at), chosen
