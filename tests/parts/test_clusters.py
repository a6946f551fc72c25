"""DPC-kNN against a double loop, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmkv.parts import clusters
from mmkv.parts.clusters import dpc_knn


def naive(x, k, neighbours):
    """Centres and members by the definition, in fp64, without any logarithm."""
    n, channels = x.shape
    d = [[math.dist(x[i].tolist(), x[j].tolist()) / channels**0.5 for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(d[i])[:neighbours]) / neighbours) for i in range(n)]
    far = max(max(row) for row in d)
    denser = [[j for j in range(n) if (density[j], -j) > (density[i], -i)] for i in range(n)]
    separation = [min([d[i][j] for j in denser[i]] or [far]) for i in range(n)]
    score = [separation[i] * density[i] for i in range(n)]
    centres = sorted(range(n), key=lambda i: -score[i])[:k]
    member = [min(range(k), key=lambda c: d[i][centres[c]]) for i in range(n)]
    for c, i in enumerate(centres):
        member[i] = c
    return centres, member


@pytest.mark.parametrize(("n", "k", "neighbours"), [(12, 3, 3), (40, 5, 5), (40, 40, 6), (7, 1, 7)])
def test_against_the_definition(n, k, neighbours, monkeypatch):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n + k), dtype=torch.float64)
    expected = naive(x, k, neighbours)
    for tile in (1 << 24, 3 * n):  # all rows at once, three at a time
        monkeypatch.setattr(clusters, "TILE", tile)
        centres, member = dpc_knn(x, k, neighbours)
        assert (centres.tolist(), member.tolist()) == expected


def test_by_hand():
    # one channel; two neighbours, the token itself and the nearest other
    x = torch.tensor([[0.0], [1.0], [1.1], [8.0], [9.0]])
    # densities e^-.5, e^-.005, e^-.005, e^-.5, e^-.5; of equals the earlier is the denser one
    # separations 1 (from 1), 9 (the largest distance there is), .1 (from 1), 6.9 (from 2), 1 (from 3)
    # products .6, 8.95, .0995, 4.2, .6
    centres, member = dpc_knn(x, 2, 2)
    assert centres.tolist() == [1, 3]
    assert member.tolist() == [0, 0, 0, 1, 1]


def test_equal_tokens_and_huge_ones_work():
    centres, member = dpc_knn(torch.ones(5, 4), 2, 2)
    assert centres.shape == (2,) and member[centres].tolist() == [0, 1]
    # densities are e^-5000 and e^-500000 here, 0 in fp32; the ranking must not be lost
    centres, member = dpc_knn(1e3 * torch.tensor([[0.0], [9.0], [1.0], [1.1], [8.0]]), 2, 2)
    assert centres.tolist() == [2, 3]
    assert member.tolist() == [0, 1, 0, 1, 1]


def test_refuses_more_clusters_than_tokens():
    with pytest.raises(ValueError, match="clusters=4 of 3 tokens; possible are 1 to 3"):
        dpc_knn(torch.zeros(3, 2), 4, 1)
    with pytest.raises(ValueError, match="neighbours=0 of 3"):
        dpc_knn(torch.zeros(3, 2), 1, 0)
