"""Groupings that apply themselves, and the two matchings, against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from mmkv.parts.matching import Grouping, bipartite_soft_matching, nearest_important, unmerge

INDEX = torch.tensor([[0, 1, 0, -1, 1], [0, -1, 1, 1, 0]])
X = torch.tensor([[[1.0], [2], [3], [4], [5]], [[6.0], [7], [8], [9], [10]]])


def cosine(a: list[float], b: list[float]) -> float:
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / norm


def tome_by_hand(rows: list[list[float]], r: int, prefix: int) -> list[list[int]]:
    """The groups of one image in ToMe's order, as lists of old tokens; the token that stays comes first."""
    n = len(rows)
    even = [i for i in range(n) if i % 2 == 0 and i >= prefix]
    odd = [i for i in range(n) if i % 2 == 1 and i >= prefix]
    r = min(r, (n - prefix) // 2)
    edges = []
    for a in even:
        best = max(odd, key=lambda b: cosine(rows[a], rows[b]))
        edges.append((cosine(rows[a], rows[best]), a, best))
    merged = {a: b for _, a, b in sorted(edges, reverse=True)[:r]}
    groups = [[i] for i in range(prefix)] + [[a] for a in even if a not in merged]
    return groups + [[b] + [a for a in even if merged.get(a) == b] for b in odd]


def groups_of(grouping: Grouping, row: int) -> list[set[int]]:
    return [set((grouping.index[row] == place).nonzero()[:, 0].tolist()) for place in range(grouping.count)]


def test_merge_by_hand():
    g = Grouping(INDEX, 2)
    assert g.merge(X)[..., 0].tolist() == [[2.0, 3.5], [8.0, 8.5]]
    weight = torch.tensor([[1.0, 1, 3, 9, 1], [1.0, 9, 1, 3, 3]])
    assert g.merge(X, weight)[..., 0].tolist() == [[2.5, 3.5], [9.0, 8.75]]
    assert g.total(weight).tolist() == [[4.0, 2.0], [4.0, 4.0]]
    assert g.unmerge(torch.tensor([[[1.0], [2]], [[3.0], [4]]]))[..., 0].tolist() == [[1, 2, 1, 0, 2], [3, 0, 4, 4, 3]]


def test_single_members_stay_to_the_bit():
    x = torch.randn(3, 20, 7)
    g = Grouping(torch.stack([torch.randperm(20) for _ in range(3)]), 20)
    size = torch.rand(3, 20) * 9
    assert torch.equal(g.unmerge(g.merge(x, size)), x)
    assert torch.equal(g.merge(x.bfloat16(), size), g.merge(x.bfloat16()))


def test_compose_follows_every_token():
    first, second = Grouping(INDEX, 2), Grouping(torch.tensor([[0, 0], [-1, 0]]), 1)
    start = torch.arange(5).expand(2, -1)
    assert second.compose(first.compose(start)).tolist() == [[0, 0, 0, -1, 0], [-1, -1, 0, 0, -1]]
    assert unmerge(X[:, :1], second.compose(first.compose(start)))[..., 0].tolist() == [
        [1, 1, 1, 0, 1],
        [0, 0, 6, 6, 0],
    ]


def test_sizes_by_share():
    g = Grouping(INDEX, 2, size_weighted=False, size_share=torch.tensor([[1.0, 1, 0.5, 1, 0.25], [1.0, 1, 1, 0, 1]]))
    merged, size = g.apply(X, torch.full((2, 5), 2.0))
    assert merged[..., 0].tolist() == [[2.0, 3.5], [8.0, 8.5]]
    assert size.tolist() == [[3.0, 2.5], [4.0, 2.0]]


def test_into_and_ragged_rows():
    g = Grouping.into(torch.tensor([[0, 0, 2, -1], [0, 1, 2, 2]]))
    assert (g.index.tolist(), g.count, g.ragged) == ([[0, 0, 1, -1], [0, 1, 2, 2]], 3, True)
    assert g.merge(X[:, :4])[..., 0].tolist() == [[1.5, 3.0, 0.0], [6.0, 7.0, 8.5]]
    assert g.merge_sizes(torch.ones(2, 4)).tolist() == [[2, 1, 0], [1, 1, 2]]
    kept = Grouping.keeping(torch.tensor([[True, False, True], [False, True, True]]))
    assert (kept.index.tolist(), kept.count, kept.ragged) == ([[0, -1, 1], [-1, 0, 1]], 2, False)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("n", [12, 13, 21])
@pytest.mark.parametrize("r", [0, 1, 4, 100])
def test_bipartite_soft_matching_by_hand(n, prefix, r):
    generator = torch.Generator().manual_seed(n * prefix + r)
    metric = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    g = bipartite_soft_matching(metric, r, prefix)
    for row in range(2):
        by_hand = tome_by_hand(metric[row].tolist(), r, prefix) if r else None
        if by_hand:
            assert groups_of(g, row) == [set(group) for group in by_hand]
    assert g.count == n - min(r, (n - prefix) // 2)
    assert g.index[:, :prefix].tolist() == [list(range(prefix))] * 2
    # conservation: every token is in one group, sizes sum to n, the sum of x by size stays
    x = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    merged, size = g.apply(x, torch.ones(2, n))
    assert torch.equal(size.sum(1), torch.full((2,), float(n)))
    torch.testing.assert_close((merged * size[..., None]).sum(1), x.sum(1))


def test_several_even_tokens_end_in_one_odd_token():
    metric = torch.tensor([[[1.0, 0], [1, 0.1], [1, 0.05], [-1, 0], [1, 0.2], [-1, -1]]])
    g = bipartite_soft_matching(metric, 3)
    assert groups_of(g, 0) == [{0, 1, 2, 4}, {3}, {5}]


def test_r_and_towers_too_small():
    assert bipartite_soft_matching(torch.randn(1, 2, 4), 1, prefix=1).count == 2
    assert bipartite_soft_matching(torch.randn(1, 3, 4), 1, prefix=1).index.tolist() == [[0, 1, 1]]
    assert bipartite_soft_matching(torch.randn(1, 4, 4), 9, prefix=4).count == 4
    with pytest.raises(ValueError, match="r=-1"):
        bipartite_soft_matching(torch.randn(1, 4, 4), -1)


def test_nearest_important_by_hand():
    metric = torch.randn(2, 9, 4, dtype=torch.float64)
    important, rest = torch.tensor([[1, 4, 8], [2, 3, 5]]), torch.tensor([[2, 3], [8, 1]])
    nearest, score = nearest_important(metric, important, rest)
    for row in range(2):
        for i, token in enumerate(rest[row].tolist()):
            by_hand = {k: cosine(metric[row, token].tolist(), metric[row, k].tolist()) for k in important[row].tolist()}
            assert int(nearest[row, i]) == max(by_hand, key=by_hand.get)
            assert float(score[row, i]) == pytest.approx(max(by_hand.values()))
    with pytest.raises(ValueError, match="no important token"):
        nearest_important(metric, important[:, :0], rest)


def test_gradients_flow_through_the_mean():
    x = X.clone().requires_grad_()
    Grouping(INDEX, 2).merge(x)[:, 0].sum().backward()
    assert x.grad[..., 0].tolist() == [[0.5, 0, 0.5, 0, 0], [0.5, 0, 0, 0, 0.5]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grouping(INDEX.float(), 2),
        lambda: Grouping(INDEX[0], 2),
        lambda: Grouping(INDEX, 0),
        lambda: Grouping(INDEX, 2, size_share=torch.ones(2, 3)),
        lambda: Grouping.keeping(torch.zeros(1, 4, dtype=torch.bool)),
    ],
)
def test_refusals(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
