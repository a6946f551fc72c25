"""Where vision tokens stand: hand-written, with another selection in each head."""

from __future__ import annotations

import torch

from mmkv.layout import VIDEO, TokenLayout
from mmkv.parts.frame_grid import FrameGrid


def layout(tokens: list[list[tuple[int, int, int, int] | None]]) -> TokenLayout:
    """Of (medium, frame, row, col) by head; None for text."""
    out = TokenLayout.text(len(tokens), len(tokens[0]))
    for head, row in enumerate(tokens):
        for i, token in enumerate(row):
            if token is not None:
                out.modality[head, i] = VIDEO
                for name, value in zip(("medium", "frame", "row", "col"), token):
                    getattr(out, name)[head, i] = value
    return out


def test_by_hand():
    """Head 0 holds two tokens of frame 0 and one of frame 2; head 1 one of frame 0 of a second video, and a place without."""
    found = layout([[(0, 0, 0, 0), (0, 0, 1, 1), (0, 2, 0, 0), None], [(1, 0, 0, 1), None, (0, 2, 1, 1), (0, 5, 0, 0)]])
    present = torch.tensor([[True] * 4, [True, True, True, False]])
    grid = FrameGrid.of(found, present, "cpu")
    assert grid.on.tolist() == [[True, True, True, False], [True, False, True, False]]
    assert grid.sizes == (3, 2, 2)  # frames: 0 and 2 of the first video, 0 of the second
    assert grid.age[grid.on].tolist() == [2, 2, 1, 0, 1]
    assert grid.frames_worth() == 2.5 / 4
    x = torch.tensor([[1.0, 2, 3, 9], [4, 9, 5, 9]])
    mean = grid.mean_of_place(x[..., None], grid.on)[..., 0]
    assert mean[0].tolist()[:3] == [2, 2, 2]  # at (0, 0): 1 and 3; at (1, 1): 2
    assert mean[1, [0, 2]].tolist() == [4, 5]
    assert grid.mean_of_place(x[..., None], grid.on & (grid.age < 2))[0, 1, 0] == 0  # nothing there
    pooled = grid.averaged(x, (3, 1, 1))  # frames 0 and 2 are neighbours among those that are held
    assert torch.allclose(pooled, torch.tensor([[2.0, 2, 2, 9], [4, 9, 5, 9]]))
    assert torch.allclose(grid.averaged(x, (1, 3, 3)), torch.tensor([[1.5, 1.5, 3, 9], [4, 9, 5, 9]]))


def test_without_any_vision():
    grid = FrameGrid.of(TokenLayout.text(1, 5), torch.ones(5, dtype=torch.bool), "cpu")
    assert not grid.on.any() and grid.frames_worth() == 0
    x = torch.arange(5.0)[None]
    assert torch.equal(grid.averaged(x, (7, 7, 7)), x)
