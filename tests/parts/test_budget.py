"""Budgets: ratios, tokens, bytes, by modality; and what is no budget."""

from __future__ import annotations

import pytest
import torch

from mmkv.layout import IMAGE, TEXT, VIDEO
from mmkv.parts.budget import Budget, bytes_of
from mmkv.parts.choose import smallest_prefix, top_over_heads, top_per_head
from mmkv.parts.probe_rows import everything, recent, recent_and_random
from mmkv.parts.saliency import normalized, per_kv_head, pooled

MODALITY = torch.tensor([TEXT] * 10 + [VIDEO] * 60 + [IMAGE] * 20 + [TEXT] * 10, dtype=torch.int8)
ONES = torch.ones(100)


@pytest.mark.parametrize(
    ("amount", "count"), [(0.25, 25), (1.0, 100), (40, 40), (400, 100), ("3200B", 32), ("1KiB", 10)]
)
def test_one_amount(amount, count):
    ((mine, found),) = Budget.of(amount).pools(MODALITY, ONES, bytes_per_token=100.0)
    assert mine.all()
    assert found == count


def test_ratios_count_what_is_left():
    """Where an earlier method left 60 of 100 tokens, half of them are 30."""
    ((_, found),) = Budget.of(0.5).pools(MODALITY, ONES * 0.6)
    assert found == 30


def test_by_modality():
    pools = Budget.of({"video": 0.2, "image": 5}).pools(MODALITY, ONES)
    assert [(int(m.sum()), n) for m, n in pools] == [(20, 20), (20, 5), (60, 12)]
    assert [MODALITY[m].unique().tolist() for m, _ in pools] == [[TEXT], [IMAGE], [VIDEO]]


@pytest.mark.parametrize(
    "bad",
    [0, 0.0, -1, 1.5, True, None, "lots", "5", "-3MiB", "0GB", [], {}, {"audio": 0.5}, {"video": 0}, {"video": 2.0}],
    ids=str,
)
def test_what_is_no_budget(bad):
    with pytest.raises(ValueError) as caught:
        Budget.of(bad)
    assert "\n" not in str(caught.value)


def test_total_and_modality_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        Budget(0.5, video=0.2)


def test_everything():
    assert Budget.of(1.0).everything
    assert Budget(video=1.0).everything
    assert not Budget.of(0.99).everything
    assert not Budget.of(10**9).everything


def test_bytes():
    assert bytes_of("64MiB") == 64 * 2**20
    assert bytes_of("1.5 GB") == 1_500_000_000
    assert bytes_of(77) == 77
    assert bytes_of("0.5KB") == 500


@pytest.mark.parametrize("bad", ["0.0001B", "0.9 B", "0KiB", 0, -1, True, 1.5, None, "5", "lots"], ids=str)
def test_what_is_no_number_of_bytes(bad):
    with pytest.raises(ValueError) as caught:
        bytes_of(bad, "max_bytes")
    wants = f"max_bytes {bad!r}: needed is a whole number of bytes above 0, or text such as '64MiB'"
    assert str(caught.value).startswith(wants)
    assert "\n" not in str(caught.value)


def test_rows():
    assert recent(10, 3).tolist() == [7, 8, 9]
    assert recent(10, 30, first=6).tolist() == [6, 7, 8, 9]
    assert everything(5, 2).tolist() == [2, 3, 4]
    rows = recent_and_random(100, 10, 20, seed=1, first=50)
    assert rows[-10:].tolist() == list(range(90, 100))
    assert len(rows) == 30 == len(set(rows.tolist()))
    assert rows.min() >= 50
    assert torch.equal(rows, recent_and_random(100, 10, 20, seed=1, first=50))
    assert not torch.equal(rows, recent_and_random(100, 10, 20, seed=2, first=50))
    state = torch.get_rng_state()
    recent_and_random(100, 10, 20, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "a user's sampling must not change"


def test_saliency():
    mass = torch.tensor([[1.0, 2, 3], [3, 4, 5], [0, 0, 6], [2, 2, 0]])
    assert per_kv_head(mass, 2).tolist() == [[2, 3, 4], [1, 1, 3]]
    assert per_kv_head(mass, 2, "max").tolist() == [[3, 4, 5], [2, 2, 6]]
    assert per_kv_head(mass, 2, "sum").tolist() == [[4, 6, 8], [2, 2, 6]]
    score = torch.tensor([[0.0, 3, 0, 0, 6]])
    assert pooled(score, 3).tolist() == [[1, 1, 1, 2, 2]]
    assert pooled(score, 3, "max").tolist() == [[3, 3, 3, 6, 6]]
    assert pooled(score, 1).tolist() == score.tolist()
    assert normalized(torch.tensor([[4.0, 2, 0]]), torch.tensor([4, 1, 0])).tolist() == [[1, 2, 0]]


def test_who_stays():
    score = torch.tensor([[5.0, 1, 4, 2], [9, 8, 7, 6]])
    assert top_per_head(score, 2).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert top_per_head(score, 0).sum() == 0
    assert top_per_head(score, 9).all()
    assert top_per_head(score.masked_fill(score == 5, -torch.inf), 4)[0].tolist() == [False, True, True, True]
    # three each on average: the second head takes all four, the first keeps its best
    assert top_over_heads(score, 2, 0).tolist() == [[False] * 4, [True] * 4]
    assert top_over_heads(score, 2, 1).tolist() == [[True, False, False, False], [True, True, True, False]]
    assert smallest_prefix(torch.tensor([0.125, 0.5, 0.375]), 0.875) == 2
    assert smallest_prefix(torch.tensor([0.125, 0.5, 0.375]), 0.88) == 3
    assert smallest_prefix(torch.ones(10), 0.5) == 5
    assert smallest_prefix(torch.zeros(0), 0.5) == 0
