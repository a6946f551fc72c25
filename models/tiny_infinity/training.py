"""What the two trainings of the tiny Infinity share."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterable

import numpy as np
import torch


class Clock:
    """CPU time that a training has used, also before it was resumed.

    Args:
        budget: seconds in all.
    """

    def __init__(self, budget: float):
        self.budget, self.before, self.begin = budget, 0.0, time.process_time()

    @property
    def seconds(self) -> float:
        return self.before + time.process_time() - self.begin

    @property
    def minutes(self) -> float:
        return self.seconds / 60

    @property
    def progress(self) -> float:
        return min(self.seconds / self.budget, 1.0)

    @property
    def done(self) -> bool:
        return self.progress >= 1


def learning_rate(progress: float) -> float:
    """Factor of the learning rate: short warm-up, plateau, linear fall over the last half."""
    return min(1.0, progress / 0.02 + 0.02) * max(min(1.0, (1 - progress) / 0.5), 0.01)


def image_batch(images: Iterable[np.ndarray]) -> torch.Tensor:
    """fp32 `[B, 3, H, W]` in -1..1 of uint8 `[H, W, 3]`."""
    return torch.from_numpy(np.stack(list(images))).movedim(-1, 1).float() / 127.5 - 1


def log(work: pathlib.Path, text: str) -> None:
    """Print a line, and keep it."""
    with (work / "train.log").open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def save(path: pathlib.Path, **state) -> None:
    """Write a state to resume from; a kill in between leaves the old one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)
