"""Tokens of an image or video by frame, and what methods that act behind the projector share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmkv.tokens.method import Choice, Vision

TILE = 1 << 24  # fp32 numbers of a copy of the features that exist at a time


def clips(vision: Vision) -> list[torch.Tensor]:
    """Runs of neighbouring frames with equally many tokens, each int64 `[F, m]`: index of each token, in raster order.

    A video is one clip. An image is one clip of one frame, or one for each size of its tiles. Newlines are in none.
    """
    cells = (~vision.structural).nonzero()[:, 0]
    _, counts = vision.layout.frame[0, cells].unique(return_counts=True)
    if not counts.numel():
        return []
    cells = cells[vision.layout.frame[0, cells].argsort(stable=True)]
    sizes, frames = counts.unique_consecutive(return_counts=True)
    runs = cells.split((sizes * frames).tolist())
    return [run.view(-1, size).to(vision.features.device) for run, size in zip(runs, sizes.tolist())]


def tiles(clip: torch.Tensor, channels: int, together: int = 1) -> tuple[torch.Tensor, ...]:
    """A clip `[F, m]` in parts whose features fit a bounded fp32 copy; `together` frames are never parted."""
    size = clip.shape[1] * channels * together
    return clip.split(together * max(1, TILE // max(size, 1)))


def cosine(features: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp32, shape of `left`: cosine similarity of the features `[n, C]` at `left` and at `right`, int64 of one shape."""
    out = torch.empty(left.shape, dtype=torch.float32, device=features.device)
    step = max(1, TILE // max(features.shape[1], 1))
    parts = zip(out.view(-1).split(step), left.flatten().split(step), right.flatten().split(step))
    for part, a, b in parts:
        part.copy_(F.cosine_similarity(features[a].float(), features[b].float(), dim=-1))
    return out


def kept_so_far(vision: Vision) -> torch.Tensor:
    """bool `[n]` on the features' device: the structural tokens, which always stay."""
    return vision.structural.to(vision.features.device)


def pruned(keep: torch.Tensor) -> Choice | None:
    """The choice that drops all but `keep` (bool `[n]`) and changes no feature; None where all stay."""
    if bool(keep.all()):
        return None
    return Choice(keep, into=places(keep).masked_fill(~keep, -1))


def places(keep: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: each token's own index."""
    return torch.arange(keep.shape[0], device=keep.device)


def check_amount(name: str, amount: float | int, least: int = 1) -> None:
    """Raise ValueError for what is neither a ratio (float) nor a number of tokens (int) of a frame."""
    possible = (
        f"possible are a ratio {'[0' if least == 0 else '(0'}, 1] (a float) or tokens of a frame from {least} (an int)"
    )
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    fits = number and (amount >= least if isinstance(amount, int) else (0 < amount <= 1 or amount == least == 0))
    if not fits:
        raise ValueError(f"{name}={amount!r}; {possible}")


def tokens_of(amount: float | int, size: int) -> int:
    """How many of a frame's `size` tokens an amount means: at least 1 for any ratio above 0, at most all."""
    if isinstance(amount, float):
        amount = max(round(amount * size), int(amount > 0))
    return min(amount, size)


def check_dropped(name: str, ratio: float) -> None:
    """Raise ValueError for what is no share of dropped tokens."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"{name}={ratio!r}; possible are shares of dropped tokens in [0, 1), 0 keeps all")


def check_name(name: str, value: str, possible: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not among the possible ones."""
    if value not in possible:
        raise ValueError(f"{name}={value!r}; possible are {', '.join(map(repr, possible))}")
