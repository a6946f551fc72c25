"""`most_similar` by its reference, and what it refuses."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from mmkv.kernels import most_similar


def test_against_loops():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    score, best = most_similar(a, b)
    for row in range(2):
        for i, x in enumerate(a[row].tolist()):
            cosines = [sum(p * q for p, q in zip(x, y)) / math.hypot(*x) / math.hypot(*y) for y in b[row].tolist()]
            assert float(score[row, i]) == pytest.approx(max(cosines))
            assert int(best[row, i]) == cosines.index(max(cosines))


def test_zero_vectors_are_no_nan():
    score, best = most_similar(torch.zeros(1, 3, 4, dtype=torch.float16), torch.randn(1, 2, 4).half())
    assert score.dtype == torch.float32
    assert score.tolist() == [[0.0, 0.0, 0.0]]
    assert best.tolist() == [[0, 0, 0]]


def test_tiles_change_nothing(monkeypatch):
    a, b = torch.randn(2, 37, 5), torch.randn(2, 23, 5)
    whole = most_similar(a, b)
    monkeypatch.setattr(sys.modules["mmkv.kernels.most_similar"], "TILE", 100)
    torch.testing.assert_close(most_similar(a, b), whole)


def test_nothing_to_compare():
    score, best = most_similar(torch.randn(2, 0, 4), torch.randn(2, 0, 4))
    assert score.shape == best.shape == (2, 0)
    assert most_similar(torch.randn(0, 3, 4), torch.randn(0, 3, 4))[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.ones(1, 2, 3), torch.ones(1, 0, 3), ValueError),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 4), ValueError),
        (torch.ones(1, 2, 3), torch.ones(2, 2, 3), ValueError),
        (torch.ones(2, 3), torch.ones(2, 3), ValueError),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3).half(), TypeError),
        (torch.ones(1, 2, 3).int(), torch.ones(1, 2, 3).int(), TypeError),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3, device="meta"), ValueError),
    ],
)
def test_refusals(a, b, error):
    with pytest.raises(error) as caught:
        most_similar(a, b)
    assert "\n" not in str(caught.value)
