"""Which of several processes this is, as torchrun and `accelerate launch` say, and which jobs are its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def rank_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, ranks) from RANK and WORLD_SIZE; (0, 1) where the process was started by itself.

    Raises:
        ValueError: one of the two is missing or they do not fit.
    """
    rank, ranks = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None and ranks in (None, "1"):
        return 0, 1
    try:
        found = int(rank or ""), int(ranks or "")
    except ValueError as error:
        raise ValueError(f"RANK {rank!r} and WORLD_SIZE {ranks!r}: both are needed, as whole numbers") from error
    if not 0 <= found[0] < found[1]:
        raise ValueError(f"RANK {rank}: possible are 0 to {found[1] - 1} (WORLD_SIZE {ranks})")
    return found


def local_device(device: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The device of this rank: its own CUDA device where none is named and there are several ranks on a machine."""
    local = environment.get("LOCAL_RANK")
    if device is not None or local is None:
        return device
    import torch

    return f"cuda:{int(local)}" if torch.cuda.is_available() else None


def mine(groups: Sequence[T], rank: int, ranks: int) -> list[T]:
    """The groups of one rank: every `ranks`-th, so that all ranks have some from the beginning and the end."""
    return list(groups[rank::ranks])
