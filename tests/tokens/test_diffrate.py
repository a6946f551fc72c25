"""DiffRate with fixed rates: choice by hand, released rates, files, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from mmkv.tokens import DiffRate
from mmkv.tokens.diffrate_rates import RELEASED
from mmkv.tokens.method import TowerFacts, TowerView


def view(n: int, block: int = 0, prefix: int = 1, has_cls: bool = True, seed: int = 0) -> TowerView:
    generator = torch.Generator().manual_seed(seed)
    return TowerView(
        block=block,
        depth=2,
        hidden=torch.randn(2, n, 8, generator=generator),
        queries=torch.randn(2, 3, n, 4, generator=generator),
        keys=torch.randn(2, 3, n, 4, generator=generator),
        scale=0.5,
        size=torch.randint(1, 4, (2, n), generator=generator).float(),
        source=torch.arange(n).expand(2, -1),
        prefix=prefix,
        has_cls=has_cls,
    )


def by_hand(v: TowerView, row: int, pruned: int, merged: int) -> tuple[list[set[int]], list[float]]:
    """Groups in the order of the tokens that stay, and their sizes; by loops over tokens."""
    n = v.hidden.shape[1]
    score = torch.zeros(n)
    for head in range(v.keys.shape[1]):
        logits = [float(v.queries[row, head, 0] @ v.keys[row, head, j]) * v.scale for j in range(n)]
        mass = [torch.tensor(logits[j]).exp() * v.size[row, j] for j in range(n)]
        score += torch.stack(mass) / sum(mass)
    order = sorted(range(v.prefix, n), key=lambda j: -float(score[j]))
    important, rest = order[: merged - v.prefix], order[merged - v.prefix : pruned - v.prefix]
    groups = {j: {j} for j in [*range(v.prefix), *sorted(important)]}
    size = {j: float(v.size[row, j]) for j in groups}
    for j in rest:
        cosine = {i: float(torch.cosine_similarity(v.hidden[row, j], v.hidden[row, i], 0)) for i in important}
        best = max(cosine, key=cosine.get)
        groups[best].add(j)
        size[best] += float(v.size[row, j]) * max(cosine[best], 0.0)
    return list(groups.values()), list(size.values())


@pytest.mark.parametrize(("pruned", "merged"), [(12, 12), (12, 7), (15, 9), (15, 3), (3, 3), (9, 15)])
@pytest.mark.parametrize("prefix", [1, 2])
def test_choice_by_hand(pruned, merged, prefix):
    v = view(15, prefix=prefix, seed=pruned * merged)
    grouping = DiffRate((pruned, 15), (merged, 15)).in_tower(v)
    hidden, size = grouping.apply(v.hidden, v.size)
    for row in range(2):
        groups, sizes = by_hand(v, row, pruned, min(merged, pruned))
        for place, group in enumerate(groups):
            assert set((grouping.index[row] == place).nonzero()[:, 0].tolist()) == group
            torch.testing.assert_close(hidden[row, place], v.hidden[row, sorted(group)].mean(0))
        torch.testing.assert_close(size[row], torch.tensor(sizes))
        assert torch.equal(hidden[row, 0], v.hidden[row, 0])  # CLS to the bit
    assert grouping.count == min(pruned, merged)


def test_sizes_are_discounted():
    v = view(197)
    v.size = torch.ones(2, 197)
    size = DiffRate((197, 197), (150, 197)).in_tower(v).merge_sizes(v.size)
    assert size.shape == (2, 150)
    assert bool((size.sum(1) < 197).all()) and bool((size >= 1).all())


def test_unlike_tokens_take_no_size_away():
    v = view(4)
    v.hidden = torch.tensor([[[0.0, 1], [1, 0], [-1, 0], [-1, 0]]]).expand(2, -1, -1)
    v.queries, v.keys = torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 4, 1)
    v.size = torch.tensor([[1.0, 9, 2, 2]]).expand(2, -1)
    grouping = DiffRate((4, 4), (2, 4)).in_tower(v)
    assert grouping.merge_sizes(v.size).tolist() == [[1.0, 9.0]] * 2


def test_received_attention_scores_towers_without_cls():
    v = view(9, prefix=0, has_cls=False)
    grouping = DiffRate((5, 9), (5, 9), scores="received").in_tower(v)
    weights = ((v.queries @ v.keys.transpose(-1, -2)) * v.scale + v.size.log()[:, None, None]).softmax(-1)
    best = weights.mean((1, 2)).argsort(1, descending=True)[:, :5].sort(1).values
    assert [(grouping.index[row] >= 0).nonzero()[:, 0].tolist() for row in range(2)] == best.tolist()


def test_running_minimum():
    rates = DiffRate((20, 12, 15, 9), (18, 14, 13, 10))
    assert rates.kept(19) == ((19, 18), (12, 12), (12, 12), (9, 9))
    assert rates.in_tower(view(18)) is None  # nothing left to do at 18 tokens
    assert rates.tower_blocks(4) == (0, 1, 2, 3)


def test_released():
    rates = DiffRate.released("deit-s", 2.9)
    assert rates.tokens == 197 and rates.prune[:3] == (197, 196, 190) and rates.merge[-1] == 3
    for (name, gflops), (prune, merge) in RELEASED.items():
        assert len(prune) == len(merge) == {"s": 12, "b": 12, "l": 24, "h": 32}[name[-1]]
        DiffRate.released(name, gflops).check(TowerFacts(depth=len(prune), has_cls=True, prefix=1, merges=True))
    with pytest.raises(ValueError, match=r"possible are \('deit-s', 2.3\)"):
        DiffRate.released("deit-s", 3.0)


def test_files(tmp_path):
    rates = DiffRate((197, 100), (150, 80), tokens=197)
    rates.save(tmp_path / "rates.json", model="deit_tiny", gflops=0.7)
    assert DiffRate.load(tmp_path / "rates.json") == rates
    held = json.loads((tmp_path / "rates.json").read_text())
    assert (held["depth"], held["tokens"], held["model"], held["gflops"]) == (2, 197, "deit_tiny", 0.7)
    for text in ("", "[]", "{}", json.dumps({**held, "depth": 3}), json.dumps({**held, "method": "ToMe"})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="holds no DiffRate rates"):
            DiffRate.load(tmp_path / "other.json")


def test_another_models_rates():
    rates = DiffRate((197, 100), (150, 80), tokens=197)
    with pytest.raises(ValueError, match="for 2 blocks, the tower has 12"):
        rates.check(TowerFacts(depth=12, has_cls=True, prefix=1, merges=True))
    with pytest.raises(ValueError, match="for 197 tokens, this tower has 50"):
        rates.in_tower(view(50))


def test_check():
    rates = DiffRate((9, 8), (9, 2))
    with pytest.raises(ValueError, match="absolute positions"):
        rates.check(TowerFacts(depth=2))
    with pytest.raises(ValueError, match="choose scores='received'"):
        rates.check(TowerFacts(depth=2, prefix=0, merges=True))
    with pytest.raises(ValueError, match="keep at least 6"):
        rates.check(TowerFacts(depth=2, has_cls=True, prefix=5, merges=True))
    DiffRate().check(TowerFacts(depth=2, has_cls=True, prefix=1, merges=True))


def test_keeping_everything():
    assert DiffRate((9,), (8,)).keeping_everything() == DiffRate()
    assert DiffRate().tower_blocks(12) == ()


@pytest.mark.parametrize(
    "options",
    [
        {"prune": 5},
        {"prune": (0,), "merge": (1,)},
        {"prune": (True,), "merge": (1,)},
        {"prune": (0.5,), "merge": (1,)},
        {"prune": (5, 4), "merge": (4,)},
        {"tokens": 1},
        {"tokens": "many"},
        {"scores": "mean"},
    ],
    ids=str,
)
def test_refused_options(options):
    with pytest.raises(ValueError) as caught:
        DiffRate(**options)
    assert "\n" not in str(caught.value)
