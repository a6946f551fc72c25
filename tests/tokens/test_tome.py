"""ToMe: schedules, what it answers in a block, what it refuses."""

from __future__ import annotations

import pytest
import torch

from mmkv.tokens import ToMe
from mmkv.tokens.method import TowerFacts, TowerView

PLAIN = TowerFacts(depth=12, has_cls=True, prefix=1, merges=True)


def view(n: int, block: int = 0, depth: int = 12, prefix: int = 1, batch: int = 2) -> TowerView:
    return TowerView(
        block=block,
        depth=depth,
        hidden=torch.randn(batch, n, 8),
        queries=torch.randn(batch, 2, n, 4),
        keys=torch.randn(batch, 2, n, 4),
        scale=0.5,
        size=torch.ones(batch, n),
        source=torch.arange(n).expand(batch, -1),
        prefix=prefix,
        has_cls=prefix > 0,
    )


@pytest.mark.parametrize(
    ("r", "inflect", "schedule"),
    [
        (13, -1, (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)),
        (16, -1, (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)),
        (8, -1, (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        (8, 0, (8,) * 12),
        (8, 1, (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)),
        ((3, 0, 2), 0, (3, 0, 2) + (0,) * 9),
    ],
)
def test_schedules(r, inflect, schedule):
    assert ToMe(r, inflect).schedule(12) == schedule
    assert ToMe(r, inflect).tower_blocks(12) == tuple(b for b in range(12) if schedule[b])


def test_first_block():
    assert ToMe(4, first_block=10).schedule(12) == (0,) * 10 + (4, 4)


def test_later_blocks_are_clamped():
    assert ToMe(16).in_tower(view(21, block=11)).count == 11
    assert ToMe(16).in_tower(view(2, block=11)) is None


def test_all_prefix_tokens_are_left_alone():
    for prefix in (1, 2, 5):
        grouping = ToMe(6).in_tower(view(25, prefix=prefix))
        assert grouping.index[:, :prefix].tolist() == [list(range(prefix))] * 2
        assert int((grouping.index < prefix).sum()) == 2 * prefix


def test_r_over_half_of_the_first_blocks_tokens():
    assert ToMe(10).in_tower(view(21)).count == 11
    with pytest.raises(ValueError, match="r=11 in block 0, but of 20 patches at most 10"):
        ToMe(11).in_tower(view(21))
    with pytest.raises(ValueError, match="in block 3"):
        ToMe(11, first_block=3).in_tower(view(21, block=3))


def test_keeping_everything_is_never_asked():
    assert ToMe(5, prop_attn=False).keeping_everything() == ToMe(0, prop_attn=False)
    assert ToMe(0).tower_blocks(12) == ()


def test_check():
    ToMe().check(PLAIN)
    for facts in (TowerFacts(), TowerFacts(depth=12, merges=False)):
        with pytest.raises(ValueError, match="absolute positions"):
            ToMe().check(facts)
    with pytest.raises(ValueError, match="first_block=12"):
        ToMe(first_block=12).check(PLAIN)
    with pytest.raises(ValueError, match="13 numbers"):
        ToMe((1,) * 13).check(PLAIN)


@pytest.mark.parametrize(
    "options",
    [
        {"r": -1},
        {"r": 1.5},
        {"r": True},
        {"r": "8"},
        {"r": (1, -2)},
        {"inflect": 2},
        {"inflect": "up"},
        {"r": (1, 2), "inflect": -1},
        {"prop_attn": 1},
        {"first_block": -1},
        {"first_block": True},
    ],
    ids=str,
)
def test_refused_options(options):
    with pytest.raises(ValueError) as caught:
        ToMe(**options)
    assert "\n" not in str(caught.value)
    assert next(reversed(options)) in str(caught.value)


def test_lists_become_tuples_and_stay_hashable():
    assert hash(ToMe([3, 2])) == hash(ToMe((3, 2)))
