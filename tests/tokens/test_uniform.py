"""The evenly spread baseline."""

from __future__ import annotations

import pytest
import torch
from visions import image, video

from mmkv.parts.registry import METHODS
from mmkv.tokens.uniform import Uniform, dither


def kept(method, rows, cols):
    choice = method.before_decoder(image(torch.randn(rows, cols, 3)))
    return choice.keep.view(rows, cols).int().tolist()


def test_dither_is_bayers_matrix():
    row, col = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    want = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert dither(row, col).view(4, 4).tolist() == want


def test_a_quarter_is_every_second_row_and_column():
    assert kept(Uniform(0.25), 4, 6) == [[1, 0, 1, 0, 1, 0], [0] * 6] * 2


def test_a_half_is_a_checkerboard():
    assert kept(Uniform(0.5), 4, 4) == [[1, 0, 1, 0], [0, 1, 0, 1]] * 2


@pytest.mark.parametrize("count", [1, 7, 100, 364, 729, 800])
def test_exact_counts_spread_over_any_grid(count):
    grid = torch.tensor(kept(Uniform(count), 27, 27)) if count < 729 else torch.ones(27, 27)
    if count >= 729:
        assert Uniform(count).before_decoder(image(torch.randn(27, 27, 3))) is None
    assert int(grid.sum()) == min(count, 729)
    if count >= 100:
        quarters = [int(part.sum()) for half in grid.split(14) for part in half.split(14, 1)]
        for size, part in zip((196, 182, 182, 169), quarters):
            assert abs(part - size * count / 729) <= 0.12 * count


def test_each_frame_and_the_newline():
    choice = Uniform(1).before_decoder(video(torch.randn(3, 2, 2, 5), newline=True))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 4, 8, 12]
    assert choice.into.tolist() == [0, -1, -1, -1, 4, -1, -1, -1, 8, -1, -1, -1, 12]
    assert choice.features is None


def test_keeping_everything_and_refusals():
    assert Uniform(0.1).keeping_everything().before_decoder(video(torch.randn(3, 2, 2, 5))) is None
    for bad in (0, 1.01, True, -0.5):
        with pytest.raises(ValueError, match="keep="):
            Uniform(bad)
    assert METHODS["uniform"].kind == "tokens"
