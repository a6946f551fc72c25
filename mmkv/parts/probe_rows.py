"""Which query rows are looked at: the indices of probe rows among the tokens of a prompt."""

from __future__ import annotations

import torch


def recent(length: int, count: int = 32, first: int = 0) -> torch.Tensor:
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


def evenly(length: int, count: int, first: int = 0) -> torch.Tensor:
    """At most `count` rows of `first ... length - 1`, evenly spaced, int64 ascending."""
    there = length - first
    count = min(count, there)
    return first + (2 * torch.arange(count) + 1) * there // max(2 * count, 1)


def check_seed(seed: int) -> None:
    """Raise ValueError for what seeds no random rows."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed {seed!r}: a whole number is needed")


def check_window(window: int) -> None:
    """Raise ValueError for an impossible number of probe rows."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window {window!r}: possible are whole numbers of queries from 1")


def newest_or_all(length: int, rows: int | str, first: int = 0) -> torch.Tensor:
    """The newest rows, as many as given, or all for "all"; int64 ascending."""
    return everything(length, first) if rows == "all" else recent(length, rows, first)


def check_newest_or_all(probe_rows: int | str) -> None:
    """Raise ValueError for what `newest_or_all` does not take."""
    if probe_rows == "all":
        return
    if isinstance(probe_rows, bool) or not isinstance(probe_rows, int) or probe_rows < 1:
        raise ValueError(
            f"probe_rows {probe_rows!r}: possible are 'all' and whole numbers of the newest queries from 1"
        )
