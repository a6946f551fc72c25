"""KVMerger: runs, pivots and weights by hand and against loops; budgets met by merging or, below the threshold, by dropping."""

from __future__ import annotations

import math

import pytest
import torch
from cache_reference import Bare, held_by_head

from mmkv.cache import KVMerger
from mmkv.cache.fill import Plan
from mmkv.layout import VIDEO, TokenLayout

# cosines of neighbours: .99504, .0995, .99504, .99522, -.1961
KEYS = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0], [-1.0, 0.0]]
SCORE = [0.3, 0.1, 0.1, 0.3, 0.2, 0.05]


def by_hand(method, count, score=SCORE):
    """Indices of the tokens that stay of the six, and the plan after merging; values are one-hot."""
    keys, values = torch.tensor(KEYS)[None], torch.eye(6)[None]
    plan = Plan(torch.ones(1, 6, dtype=torch.bool), torch.full((1, 6), -1, dtype=torch.int8), keys, values, [])
    stay = method.merge(plan, torch.tensor(score)[None], count)
    assert torch.equal(keys, torch.tensor(KEYS)[None])  # they belong to the layer
    return stay[0].nonzero()[:, 0].tolist(), plan.keys[0], plan.values[0]


def test_six_tokens_by_hand():
    """Three have to go: the three closest pairs are joined to {0, 1}, {2, 3, 4}, {5} with pivots 0, 3, 5. All others lie .1
    from their pivot, which is sigma, so they weigh exp(-1/2) = .60653 to its 1.
    """
    stay, keys, values = by_hand(KVMerger(important=0), 3)
    assert stay == [0, 3, 5]
    assert keys[0].tolist() == pytest.approx([1.0, 0.1 * 0.37754], abs=1e-5)
    assert values[0].tolist() == pytest.approx([0.62246, 0.37754, 0, 0, 0, 0], abs=1e-5)
    assert keys[3].tolist() == pytest.approx([0.1, 1.0], abs=1e-5)
    assert values[3].tolist() == pytest.approx([0, 0, 0.27407, 0.45186, 0.27407, 0], abs=1e-5)
    assert keys[5].tolist() == [-1.0, 0.0]


def test_only_as_many_are_merged_as_have_to_go():
    """One has to go: the closest pair of all is 3 and 4, of which 3 has more attention."""
    stay, keys, values = by_hand(KVMerger(important=0), 5)
    assert stay == [0, 1, 2, 3, 5]
    assert values[3].tolist() == pytest.approx([0, 0, 0, 0.62246, 0.37754, 0], abs=1e-5)
    assert keys[2].tolist() == KEYS[2]


def test_below_the_threshold_tokens_are_dropped():
    """Four have to go, but the fourth cosine is too small: of the runs, worth .4, .6 and .05, the last is dropped."""
    assert by_hand(KVMerger(important=0), 2)[0] == [0, 3]
    stay, keys, _ = by_hand(KVMerger(important=0, threshold=0.996), 3)
    assert stay == [0, 3, 4]
    assert keys.tolist() == torch.tensor(KEYS).tolist()


def test_without_a_threshold_everything_merges():
    """Five of five pairs: one run of all, with the earlier of the two best tokens as pivot."""
    stay, _, values = by_hand(KVMerger(important=0, threshold=-1.0), 1)
    assert stay == [0]
    away = [math.dist(KEYS[0], key) for key in KEYS]
    sigma = sum(away) / 5
    weight = [math.exp(-(d**2) / (2 * sigma**2)) for d in away]
    assert values[0].tolist() == pytest.approx([w / sum(weight) for w in weight], abs=1e-5)


def test_important_tokens_are_not_merged():
    """A third of three tokens is one, token 0: it stays alone, so 1 does too, and 5 goes for want of similar pairs."""
    stay, keys, values = by_hand(KVMerger(important=0.34), 3)
    assert stay == [0, 1, 3]
    assert keys[0].tolist() == KEYS[0]
    assert values[0].tolist() == [1, 0, 0, 0, 0, 0]


def test_protected_and_missing_tokens_are_left_alone():
    """A sink scores +inf, a token that is not there -inf: neither joins a run."""
    stay, keys, _ = by_hand(KVMerger(important=0), 2, [math.inf, 0.1, 0.1, -math.inf, 0.2, 0.05])
    assert stay == [0, 4]
    assert keys.tolist() == torch.tensor(KEYS).tolist()


def naive(keys, values, mass, count, important, threshold):
    """Of one head, fp64 loops: what stays, as {index: (key, value)}."""
    n = len(mass)
    heavy = set(mass.argsort(descending=True, stable=True)[: int(important * count)].tolist())
    pairs = []
    for i in range(n - 1):
        cosine = float(keys[i] @ keys[i + 1] / keys[i].norm() / keys[i + 1].norm())
        if i not in heavy and i + 1 not in heavy and cosine > threshold:
            pairs.append((cosine, i))
    joined = {i for _, i in sorted(pairs, reverse=True)[: n - count]}
    sets, out = [[0]], {}
    for i in range(1, n):
        if i - 1 in joined:
            sets[-1].append(i)
        else:
            sets.append([i])
    for members in sorted(sets, key=lambda s: -float(mass[s].sum()))[:count]:
        pivot = max(members, key=lambda i: float(mass[i]))
        away = torch.stack([(keys[i] - keys[pivot]).norm() for i in members])
        weight = torch.ones(1, dtype=torch.float64)
        if len(members) > 1:
            weight = (-away.square() / (2 * (away.sum() / (len(members) - 1)) ** 2)).exp()
        weight = (weight / weight.sum())[:, None]
        out[pivot] = ((weight * keys[members]).sum(0), (weight * values[members]).sum(0))
    return out


@pytest.mark.parametrize("important", [0.0, 0.25])
@pytest.mark.parametrize("threshold", [-1.0, 0.6, 0.9])
@pytest.mark.parametrize("probe_rows", ["all", 24])
def test_against_naive_loops(important, threshold, probe_rows):
    n, count = 160, 80
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(1, 2, n, 16, generator=generator).cumsum(2)  # neighbours are alike, some more, some less
    keys = walk + 2 * torch.randn(1, 2, n, 16, generator=generator)
    keys = keys / keys.norm(dim=-1, keepdim=True) * 4
    values, queries = torch.randn(1, 2, n, 16, generator=generator), torch.randn(1, 4, n, 16, generator=generator)
    fed = keys.clone()
    method = KVMerger(budget=count, important=important, threshold=threshold, probe_rows=probe_rows)
    bare = Bare(method).feed(n, keys=keys, values=values, queries=queries)
    assert torch.equal(keys, fed)
    for head in range(2):
        mass = torch.zeros(n, dtype=torch.float64)
        for q_head in (2 * head, 2 * head + 1):
            for t in range(0 if probe_rows == "all" else n - 24, n):
                mass[: t + 1] += (keys[0, head, : t + 1].double() @ queries[0, q_head, t].double() / 4).softmax(0) / 2
        old = slice(0, n - 32)
        want = naive(
            keys[0, head, old].double(), values[0, head, old].double(), mass[old], count - 32, important, threshold
        )
        at, k, v, _ = held_by_head(bare.layer, 0, head)
        assert at.tolist() == [*sorted(want), *range(n - 32, n)]
        for i, place in enumerate(sorted(want)):
            assert torch.allclose(k[i], want[place][0], atol=1e-5)
            assert torch.allclose(v[i], want[place][1], atol=1e-5)


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 1.0])
@pytest.mark.parametrize(("budget", "count"), [(0.5, 100), (0.35, 70), (64, 64), (200, 200)])
def test_budgets_are_met_in_every_head(budget, count, threshold):
    valid = torch.ones(2, 260, dtype=torch.bool)
    valid[0, :60] = False
    bare = Bare(KVMerger(budget=budget, threshold=threshold), batch=2).feed(260, valid)
    for head in range(2):
        at = held_by_head(bare.layer, 0, head)[0]
        assert len(at) == count
        assert at[0] >= 60
        assert at[-32:].tolist() == list(range(228, 260))


def test_duplicates_merge_without_a_change():
    """Runs of four equal tokens: what is left of each is the token."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 2, 40, 16, generator=generator).repeat_interleave(4, 2)
    values = torch.randn(1, 2, 40, 16, generator=generator).repeat_interleave(4, 2)
    bare = Bare(KVMerger(budget=64, important=0.0, threshold=0.999)).feed(160, keys=keys, values=values)
    at, k, v, _ = held_by_head(bare.layer, 0, 0)
    assert sorted((at[:-32] // 4).tolist()) == list(range(32))
    assert torch.allclose(k, keys[0, 0, at].double(), atol=1e-6)
    assert torch.allclose(v, values[0, 0, at].double(), atol=1e-6)


def test_modalities_with_budgets_of_their_own_do_not_mix():
    """All keys are alike, so everything would merge: the video's tokens do among themselves, the text before stays."""
    chunk = TokenLayout.text(1, 240)
    chunk.modality[0, 100:200], chunk.medium[0, 100:200] = VIDEO, 0
    values = torch.zeros(1, 2, 240, 16)
    values[:, :, 100:200] = 1.0
    method = KVMerger(budget={"video": 0.1}, important=0.0)
    bare = Bare(method).feed(240, chunk=chunk, keys=torch.ones(1, 2, 240, 16), values=values)
    at, _, v, _ = held_by_head(bare.layer, 0, 0)
    video = (at >= 100) & (at < 200)
    assert int(video.sum()) == 10
    assert int((~video).sum()) == 140
    assert torch.allclose(v[video], torch.ones_like(v[video]))
    assert not v[~video].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVMerger(threshold=1.1), lambda: KVMerger(threshold=-2), lambda: KVMerger(threshold="a"),
        lambda: KVMerger(important=-0.1), lambda: KVMerger(important=1.5), lambda: KVMerger(important=None),
        lambda: KVMerger(probe_rows=0), lambda: KVMerger(probe_rows="none"), lambda: KVMerger(probe_rows=True),
        lambda: KVMerger(threshold=float("nan")),
    ],
)  # fmt: skip
def test_impossible_settings(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
