"""Accuracy of detections by centre distance, and how well scores rank tokens under objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

DISTANCES = (0.5, 1.0, 2.0, 4.0)  # m, of the nuScenes detection task (arXiv 1903.11027)
LEAST = 0.1  # recall and precision below this do not count, as there


@dataclass(eq=False)
class Sample:
    """A frame's detections and objects: scores `[n]`, labels `[n]`, centres `[n, 2]`; true labels `[m]`, centres `[m, 2]`."""

    scores: np.ndarray
    labels: np.ndarray
    centres: np.ndarray
    true_labels: np.ndarray
    true_centres: np.ndarray


def hits(samples: list[Sample], label: int, distance: float) -> tuple[np.ndarray, int]:
    """Bool per detection of a class, best score first over all samples: whether it took an object; and how many objects.

    Each takes the nearest object of its class that no better one has, if within the distance.
    """
    found = [(s, i, k) for i, s in enumerate(samples) for k, s in _of(s.scores, s.labels, label)]
    free = [s.true_labels == label for s in samples]
    objects, out = sum(int(f.sum()) for f in free), []
    for _, i, k in sorted(found, key=lambda f: -f[0]):
        far = np.linalg.norm(samples[i].true_centres - samples[i].centres[k], axis=-1)
        far = np.where(free[i], far, np.inf)
        hit = len(far) > 0 and far.min() < distance
        if hit:
            free[i][far.argmin()] = False
        out.append(hit)
    return np.array(out, dtype=bool), objects


def _of(scores, labels, label):
    return [(k, scores[k]) for k in np.flatnonzero(labels == label)]


def average_precision(hit: np.ndarray, objects: int) -> float:
    """nuScenes' AP: mean precision over recalls above 0.1, less 0.1, so that 1 is perfect."""
    if not objects or not hit.any():
        return 0.0
    right = hit.cumsum()
    precision, recall = right / np.arange(1, len(hit) + 1), right / objects
    at = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return float(np.clip(at[round(100 * LEAST) + 1 :] - LEAST, 0, None).mean() / (1 - LEAST))


def accuracy(samples: list[Sample], classes: int) -> dict[str, float]:
    """Mean AP over classes and distances, and recall: share of objects found within 2 m (and 1 m) by any detection at all."""
    every = [average_precision(*hits(samples, c, d)) for c in range(classes) for d in DISTANCES]
    out = {"mAP": float(np.mean(every))}
    for distance in (1.0, 2.0):
        both = [hits(samples, c, distance) for c in range(classes)]
        out[f"recall {distance:g} m"] = float(sum(h.sum() for h, _ in both) / sum(n for _, n in both))
    return out


def ranking(scores: torch.Tensor, target: torch.Tensor) -> float:
    """Chance that a token under an object scores higher than one under none (area under the ROC curve), ties half.

    Args:
        scores, target: `[n]`; target is above 0 under objects.
    """
    scores, under = scores.flatten().double(), target.flatten() > 0
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]  # from 1, ties share their mean
    positive, negative = int(under.sum()), int((~under).sum())
    return float((rank[under].sum() - positive * (positive + 1) / 2) / (positive * negative))
