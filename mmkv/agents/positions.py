"""Position ids of a prompt with pictures, for every version of transformers alike."""

from __future__ import annotations

import torch

from mmkv.agents.prompt import Prompt


def mrope_positions(prompt: Prompt, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Time, height and width ids int64 `[3, 1, T]` of Qwen's models.

    Text counts on in all three; a picture stands at one time, its rows and columns count from there, and text behind it goes on
    above its largest id.

    Args:
        prompt: ids and spans.
        grids: rows and columns of tokens of each picture.
    """
    out = torch.empty(3, len(prompt.ids), dtype=torch.int64)
    free = at = 0
    for span, (rows, cols) in zip(prompt.spans, grids):
        out[:, at : span.start] = torch.arange(free, free + span.start - at)
        free += span.start - at
        cells = torch.arange(rows * cols)
        out[0, span.start : span.end] = free
        out[1, span.start : span.end] = free + cells // cols
        out[2, span.start : span.end] = free + cells % cols
        free, at = free + max(rows, cols), span.end
    out[:, at:] = torch.arange(free, free + len(prompt.ids) - at)
    return out[:, None]
