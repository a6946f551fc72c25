"""Which query rows are looked at: the indices of probe rows among the tokens of a prompt."""

from __future__ import annotations

import torch


def recent(length: int, count: int, first: int = 0) -> torch.Tensor:
    """The newest `count` rows of `first ... length - 1`, int64 ascending."""
    return torch.arange(max(length - count, first), length)


def recent_and_random(length: int, recent_rows: int, random_rows: int, seed: int, first: int = 0) -> torch.Tensor:
    """The newest rows and, of those before them, randomly chosen ones without repetition, int64 ascending.

    Args:
        length: rows there are.
        recent_rows, random_rows: how many of each, at most.
        seed: of a generator of its own, so that a user's sampling is left alone.
        first: rows before it are not available.
    """
    newest = recent(length, recent_rows, first)
    before = int(newest[0]) - first if newest.numel() else 0
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(before, generator=generator)[:random_rows].sort().values + first
    return torch.cat([chosen, newest])


def everything(length: int, first: int = 0) -> torch.Tensor:
    """All rows, int64 ascending."""
    return torch.arange(first, length)
