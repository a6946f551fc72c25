"""Triton twin of `attend_ragged`: the kernel of `attend_dense`, with each row's first key and number of keys on the device."""

from __future__ import annotations

from torch import Tensor

from ._sight import Sight
from .attend_dense_triton import launch


def attend_ragged_triton(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, counts: Tensor, longest: int, sight: Sight, *, scale: float,
    places: str = "k_start", exact: bool | None = None, splits: int | None = None, merged: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend_ragged` by Triton; sight, places: as in `launch`; splits: runs of keys."""
    rows, heads = (start.contiguous(), counts.contiguous()), len(start) // max(len(q), 1)
    options = {"scale": scale, "exact": exact, "splits": splits, "merged": merged, "places": places}
    return launch(q, k, v, rows, longest, heads, sight, **options)
