"""Flat windows of a grid: which there are, how flat, which merge, and what comes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmkv.parts import neighbourhoods as nb


def naive_flatness(x):
    """Mean cosine over ordered pairs of [n, C]."""
    n = len(x)
    return (
        sum(float(F.cosine_similarity(x[i], x[j], dim=0)) for i in range(n) for j in range(n) if i != j) / n / (n - 1)
    )


def naive_windows(grid, side):
    """Raster places of the windows that fit."""
    rows, cols = grid
    return [
        [(top + i) * cols + left + j for i in range(side[0]) for j in range(side[1])]
        for top in range(0, rows - side[0] + 1, side[0])
        for left in range(0, cols - side[1] + 1, side[1])
    ]


@pytest.mark.parametrize("grid", [(24, 24), (6, 9), (7, 5), (14, 14), (2, 9), (1, 1)])
@pytest.mark.parametrize("side", [(3, 3), (2, 2), (1, 3), (2, 3)])
def test_windows_that_fit(grid, side):
    assert nb.grid_windows(grid, side).tolist() == naive_windows(grid, side)


def test_windows_of_several_frames_and_incomplete_ones():
    # two frames of 2x4 and 2x2 and a newline; of the first frame token (0, 3) is gone
    frame = torch.tensor([0] * 7 + [0] + [1] * 4)
    row = torch.tensor([0, 0, 0, 1, 1, 1, 1] + [-1] + [0, 0, 1, 1])
    col = torch.tensor([0, 1, 2, 0, 1, 2, 3] + [-1] + [0, 1, 0, 1])
    assert nb.windows(frame, row, col, (2, 2)).tolist() == [[0, 1, 3, 4], [8, 9, 10, 11]]
    none = torch.full((3,), -1)
    assert nb.windows(none, none, none, (3, 3)).shape == (0, 9)


def test_flatness_by_hand():
    # cosines: (a, b) 0, (a, c) .7071, (b, c) .7071; ordered pairs: 4 * .7071 / 6
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])[None]
    assert nb.flatness(x, torch.tensor([[0, 1, 2]])).item() == pytest.approx(0.47140452, abs=1e-6)
    # a zero vector agrees with nobody: one pair of two remains
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])[None]
    assert nb.flatness(x, torch.tensor([[0, 1, 2]])).item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("tile", [1 << 24, 50])
def test_flatness_against_all_pairs(tile, monkeypatch):
    monkeypatch.setattr(nb, "TILE", tile)
    x = torch.randn(2, 36, 5) + 1
    members = nb.grid_windows((6, 6), (3, 3))
    expected = [[naive_flatness(x[b][window]) for window in members] for b in range(2)]
    torch.testing.assert_close(nb.flatness(x, members), torch.tensor(expected))
    assert nb.flatness(x, members[:0]).shape == (2, 0)


def test_the_batch_merges_as_many_as_its_busiest_image():
    score = torch.tensor([[0.9, 0.85, 0.1, 0.95], [0.2, 0.7, 0.9, 0.85]])
    assert nb.flattest(score, 0.8).tolist() == [[True, False, False, True], [False, False, True, True]]
    assert nb.flattest(score, 0.88).tolist() == [[False, False, False, True], [False, False, True, False]]
    assert not nb.flattest(score, 0.91).any()
    assert nb.flattest(torch.zeros(2, 0), 0.5).shape == (2, 0)
    assert nb.flattest(torch.full((1, 3), 0.9), 0.9).all()


def test_a_grouping_by_hand():
    # CLS and a grid of 2x4; the second window of 2x2 merges: patches 2, 3, 6, 7 at the place of 2
    members = nb.grid_windows((2, 4), (2, 2))
    group = nb.grouped_windows(torch.tensor([[False, True]]), members, 8, prefix=1)
    assert group.count == 6
    assert group.index.tolist() == [[0, 1, 2, 3, 3, 4, 5, 3, 3]]
    x = torch.tensor([[9.0, 0, 1, 2, 3, 4, 5, 6, 8]])[..., None]
    merged, size = group.apply(x, torch.ones(1, 9))
    assert merged[0, :, 0].tolist() == [9, 0, 1, 4.75, 4, 5]
    assert size.tolist() == [[1, 1, 1, 1, 1, 1]]


def test_against_the_papers_description():
    """Length 577 - 8 r; CLS untouched; merged tokens are means of the r best windows; the others keep their order."""
    x = torch.randn(1, 577, 32)
    flat = [0, 9, 17, 40, 63]  # of 8x8 windows
    for rank, window in enumerate(flat):
        top, left = window // 8 * 3, window % 8 * 3
        base = torch.randn(32)
        for i in range(3):
            for j in range(3):
                x[0, 1 + (top + i) * 24 + left + j] = base + 0.02 * rank * torch.randn(32)
    members = nb.grid_windows((24, 24), (3, 3))
    chosen = nb.flattest(nb.flatness(x[:, 1:], members), 0.8)
    assert chosen[0].nonzero()[:, 0].tolist() == flat
    out, _ = nb.grouped_windows(chosen, members, 576, prefix=1).apply(x, torch.ones(1, 577))
    assert out.shape[1] == 577 - 8 * 5
    assert torch.equal(out[0, 0], x[0, 0])
    expected, taken = [], set()
    for patch in range(576):
        window = patch // 24 // 3 * 8 + patch % 24 // 3
        if window not in flat:
            expected.append(x[0, 1 + patch])
        elif window not in taken:
            taken.add(window)
            places = [1 + (window // 8 * 3 + i) * 24 + window % 8 * 3 + j for i in range(3) for j in range(3)]
            expected.append(x[0, places].mean(0))
    torch.testing.assert_close(out[0, 1:], torch.stack(expected))
