"""The tables that `rotate` wants, from positions on one axis or on several (mrope)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor,
    frequencies: Tensor,
    *,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency.

    Args:
        positions: [T], or [A, T] for A axes (time, height, width).
        frequencies: [P], radians per position of each pair of channels.
        sections: pairs that follow each of the A axes, P in all; needed for [A, T].
        interleaved: axes take turns, pair p follows axis p % A as long as that axis has pairs left, those behind the last
            turn the first axis (Qwen3-VL); else an axis's pairs lie together (Qwen2-VL, arXiv 2409.12191).
        scale: factor on both tables (attention scaling).

    Returns:
        cos, sin fp32 [T, P].

    Raises:
        ValueError: shapes and sections do not fit.
    """
    if frequencies.dim() != 1 or positions.dim() not in (1, 2):
        raise ValueError(
            f"positions {tuple(positions.shape)} have to be [T] or [A, T], frequencies {tuple(frequencies.shape)} [P]"
        )
    positions, frequencies = positions.float(), frequencies.float()
    if positions.dim() == 1:
        angle = positions[:, None] * frequencies
    else:
        if sections is None or len(sections) != len(positions) or sum(sections) != len(frequencies):
            raise ValueError(
                f"sections={sections} of {len(positions)} axes and {len(frequencies)} frequencies; give each axis its number of"
                " pairs"
            )
        angle = (_in_turns if interleaved else _side_by_side)(positions[:, :, None], frequencies, sections)
    return angle.cos() * scale, angle.sin() * scale


def _side_by_side(positions: Tensor, frequencies: Tensor, sections: Sequence[int]) -> Tensor:
    return torch.cat([at * part for at, part in zip(positions, frequencies.split(list(sections)), strict=True)], -1)


def _in_turns(positions: Tensor, frequencies: Tensor, sections: Sequence[int]) -> Tensor:
    angle = positions[0] * frequencies
    for axis in range(1, len(sections)):
        turns = slice(axis, len(sections) * sections[axis], len(sections))
        angle[:, turns] = positions[axis] * frequencies[turns]
    return angle
