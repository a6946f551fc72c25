"""Ada-KV: heads compete for a layer's budget, against loops, and memory is freed head by head."""

from __future__ import annotations

import pytest
import torch
from cache_reference import Bare, held_by_head

from mmkv.cache import AdaKV, SnapKV
from mmkv.cache.dense import DenseSegment


def kept(bare, head, row=0):
    return held_by_head(bare.layer, row, head)[0].tolist()


def segment(bare) -> DenseSegment:
    (only,) = [s for s in bare.layer.segments if isinstance(s, DenseSegment)]
    return only


def votes(keys, queries, head, window, n):
    """fp64 `[n - 32]`: attention of the last `window` queries, averaged over the head's two query heads."""
    out = torch.zeros(n, dtype=torch.float64)
    for q_head in (2 * head, 2 * head + 1):
        for t in range(n - window, n):
            out[: t + 1] += (keys[0, head, : t + 1].double() @ queries[0, q_head, t].double() / 4).softmax(0) / 2
    return out[: n - 32]


@pytest.mark.parametrize(
    ("safeguard", "want"),
    [
        # 2 heads x 4 tokens; of the 8 best, one is head 0's token 10, seven are head 1's tokens 40 to 46
        (0.0, ([10], [40, 41, 42, 43, 44, 45, 46])),
        (0.25, ([10], [40, 41, 42, 43, 44, 45, 46])),
        # two are sure for each head: head 0's second best are equal, and the first of them counts
        (0.5, ([0, 10], [40, 41, 42, 43, 44, 45])),
        (1.0, ([0, 1, 2, 10], [40, 41, 42, 43])),
    ],
)
def test_by_hand(safeguard, want):
    keys, queries = torch.zeros(1, 2, 100, 16), torch.zeros(1, 4, 100, 16)
    queries[..., 0] = 4.0
    keys[0, 0, 10, 0] = 9.0
    keys[0, 1, 40:47, 0] = 9.0 - torch.arange(7)
    bare = Bare(AdaKV(budget=36, kernel=1, safeguard=safeguard)).feed(100, keys=keys, queries=queries)
    for head in range(2):
        assert kept(bare, head) == [*want[head], *range(68, 100)]


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.6])
def test_against_a_naive_loop(safeguard):
    generator = torch.Generator().manual_seed(1)
    n, window, budget = 150, 8, 60
    keys = torch.randn(1, 2, n, 16, generator=generator)
    keys[:, 1] *= 3  # a head that looks at few tokens
    queries = torch.randn(1, 4, n, 16, generator=generator)
    method = AdaKV(budget=budget, window=window, kernel=1, safeguard=safeguard)
    bare = Bare(method).feed(n, keys=keys, queries=queries)
    mass = [votes(keys, queries, head, window, n) for head in range(2)]
    sure = [{*mass[head].topk(int(safeguard * (budget - 32))).indices.tolist()} for head in range(2)]
    ranked = sorted(((-float(m), h, i) for h in range(2) for i, m in enumerate(mass[h]) if i not in sure[h]))
    for _, head, i in ranked[: 2 * (budget - 32) - len(sure[0]) - len(sure[1])]:
        sure[head].add(i)
    for head in range(2):
        assert kept(bare, head) == [*sorted(sure[head]), *range(n - 32, n)]
    assert len(sure[0]) != len(sure[1])


def test_more_attention_is_held_than_with_equal_budgets():
    """Which is the paper's reason for it; and the same number of tokens."""
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(1, 2, 200, 16, generator=generator), torch.randn(1, 4, 200, 16, generator=generator)
    keys[:, 0] *= 3
    held = {}
    for method in (AdaKV(budget=0.3, kernel=1, safeguard=0.0), SnapKV(budget=0.3, kernel=1)):
        bare = Bare(method).feed(200, keys=keys, queries=queries)
        mass = [
            votes(keys, queries, head, 32, 200)[[i for i in kept(bare, head) if i < 168]].sum() for head in range(2)
        ]
        held[type(method)] = float(sum(mass))
        assert sum(len(kept(bare, head)) for head in range(2)) == 2 * 60
    assert held[AdaKV] > held[SnapKV]


def test_memory_is_freed_head_by_head():
    """Heads of different lengths, which sum to heads x count, and no byte beside their tokens."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 4, 500, 32, generator=generator) * torch.tensor([0.3, 1.0, 2.0, 3.0])[:, None, None]
    bare = Bare(AdaKV(budget=0.4), batch=2, heads=4, dim=32, dtype=torch.bfloat16)
    valid = torch.ones(2, 500, dtype=torch.bool)
    valid[0, :100] = False
    bare.feed(500, valid, keys=keys)
    dense = segment(bare)
    for row, real in enumerate((400, 500)):
        lengths = dense.lengths[4 * row : 4 * row + 4]
        assert len(set(lengths)) == 4
        assert sum(lengths) == 4 * (int(0.4 * real + 1e-6) - 32)
        assert min(lengths) >= int(0.2 * (0.4 * real - 32) - 1e-6)
    tokens = sum(dense.lengths)
    assert sum(t.untyped_storage().nbytes() for t in dense.tensors()) == tokens * (2 * 32 * 2 + 4)


@pytest.mark.parametrize("safeguard", [-0.1, 1.1, True, "0.2", None, float("nan")])
def test_impossible_settings(safeguard):
    with pytest.raises(ValueError, match="safeguard") as caught:
        AdaKV(safeguard=safeguard)
    assert "\n" not in str(caught.value)
