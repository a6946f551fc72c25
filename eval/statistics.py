"""How sure a difference between two methods is, when questions about one video resemble each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


def by_group(scores: Sequence[float], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of scores and number of samples of each group, float64 `[G]`, in the order of first appearance."""
    index: dict[str, int] = {}
    at = np.array([index.setdefault(group, len(index)) for group in groups], dtype=np.int64)
    return np.bincount(at, scores, len(index)), np.bincount(at, minlength=len(index)).astype(np.float64)


def bootstrap(scores: Sequence[float], groups: Sequence[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of `draws` samples in which whole groups are drawn with replacement: float64 `[draws]`.

    Args:
        scores: one number for each sample: a score, or the difference of two methods' scores (a paired bootstrap).
        groups: which samples belong together (a video's questions).
        draws: how many.
        seed: of the drawing.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals; clusters as units of resampling.
    """
    if len(scores) != len(groups) or not len(scores):
        raise ValueError(f"{len(scores)} scores and {len(groups)} groups: as many of each are needed, and at least one")
    sums, counts = by_group(scores, groups)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    return (drawn @ sums) / (drawn @ counts)


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of bootstrap means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered_error(scores: Sequence[float], groups: Sequence[str]) -> float:
    """Standard error of the mean when samples of a group are correlated: sqrt of the sum over groups of (sum of deviations)^2,
    over the number of samples (Miller, Adding Error Bars to Evals, arXiv 2411.00640)."""
    deviations = np.asarray(scores, dtype=np.float64) - np.mean(scores)
    sums, _ = by_group(deviations.tolist(), groups)
    return float(np.sqrt((sums**2).sum()) / len(scores))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Samples that only the first has right, those that only the second has, and McNemar's exact two-sided p-value.

    It takes samples for independent, which questions about one video are not quite; the clustered interval does not.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers: pairs are needed")
    only_first = sum(bool(a) and not b for a, b in zip(first, second))
    only_second = sum(bool(b) and not a for a, b in zip(first, second))
    apart = only_first + only_second
    tail = sum(comb(apart, k) for k in range(min(only_first, only_second) + 1)) / 2**apart
    return only_first, only_second, min(1.0, 2 * tail)


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of samples with the same answer, right or wrong."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers: pairs are needed, and at least one")
    return sum(a == b for a, b in zip(first, second)) / len(first)
