"""Statistics against numbers worked out by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from mmkv.eval import statistics


def test_mcnemar_by_hand():
    # the first alone is right 1 time, the second alone 6 times: 2 * (C(7,0) + C(7,1)) / 2^7 = 16 / 128
    first = [True] * 3 + [True] + [False] * 6 + [False] * 2
    second = [True] * 3 + [False] + [True] * 6 + [False] * 2
    assert statistics.mcnemar(first, second) == (1, 6, 0.125)
    assert statistics.mcnemar(second, first) == (6, 1, 0.125)
    assert statistics.mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    assert statistics.mcnemar([True, False], [False, True])[2] == 1.0  # 2 * (1 + 2) / 4, cut to 1


def test_clustered_error_by_hand():
    # mean 1/2, deviations +-1/2; groups a: +1, b: -1, so sqrt(1 + 1) / 4. Without groups it would be sqrt(4 / 4) / 4 = 1/4
    scores, groups = [1, 1, 0, 0], ["a", "a", "b", "b"]
    assert statistics.clustered_error(scores, groups) == pytest.approx(sqrt(2) / 4)
    assert statistics.clustered_error(scores, list("abcd")) == pytest.approx(1 / 4)


def test_bootstrap_of_two_groups_by_hand():
    # groups of scores (1, 1, 1) and (0): the first twice gives 1, the second twice 0, one of each 3/4: 1/4, 1/4, 1/2 of the draws
    means = statistics.bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"], draws=40_000)
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.75, 1.0]
    # 0.0125 is five standard errors of a share of 1/2 among 40,000
    assert counts / 40_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.0125)


def test_interval_is_that_of_a_normal_mean():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, 400).tolist()
    low, high = statistics.interval(statistics.bootstrap(scores, [str(i) for i in range(400)]))
    error = np.std(scores) / 20
    assert low == pytest.approx(np.mean(scores) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(np.mean(scores) + 1.96 * error, abs=0.15 * error)


def test_questions_of_one_video_widen_the_interval():
    scores = [1.0] * 30 + [0.0] * 30
    apart = statistics.interval(statistics.bootstrap(scores, [str(i) for i in range(60)]))
    together = statistics.interval(statistics.bootstrap(scores, [str(i // 10) for i in range(60)]))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_seed_gives_the_same_numbers():
    first = statistics.bootstrap([1, 0, 1], ["a", "b", "c"])
    assert np.array_equal(first, statistics.bootstrap([1, 0, 1], ["a", "b", "c"]))
    assert not np.array_equal(first, statistics.bootstrap([1, 0, 1], ["a", "b", "c"], seed=1))


def test_agreement_and_refusals():
    assert statistics.agreement(["A", "B", "C", ""], ["A", "C", "C", ""]) == 0.75
    with pytest.raises(ValueError, match="pairs are needed"):
        statistics.agreement(["A"], [])
    with pytest.raises(ValueError, match="as many of each"):
        statistics.bootstrap([1.0], ["a", "b"])
    with pytest.raises(ValueError, match="pairs are needed"):
        statistics.mcnemar([True], [])
