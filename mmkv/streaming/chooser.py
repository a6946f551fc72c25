"""`Choice`: how many frames a question brings back, and by what; `Chooser`: chooses them, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mmkv.streaming.answer import Retrieved
from mmkv.streaming.choosing import FIXED, SIMILARITIES, best, fixed, scores
from mmkv.streaming.store import DamagedFrames, Store


class Retriever(Protocol):
    """Chooses frames beside the model: the same for all layers."""

    def see(self, pictures: np.ndarray, times: Sequence[float]) -> None:
        """Take in the pictures uint8 `[F * p, H, W, 3]` of F frames."""

    def choose(self, question: str, count: int) -> list[int]:
        """The `count` frames that answer a question."""


@dataclass(frozen=True)
class Choice:
    """Which frames a question brings back.

    Args:
        retrieve: frames that each layer brings back, at most.
        by: "cosine", "dot", "uniform", "recent", or a `Retriever`.
        group: consecutive frames that are chosen together.

    Raises:
        ValueError: one of them is out of range.
    """

    retrieve: int = 64
    by: str | Retriever = "cosine"
    group: int = 1

    def __post_init__(self):
        for name in ("retrieve", "group"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; possible are whole numbers from 1")
        retriever = hasattr(self.by, "see") and hasattr(self.by, "choose")
        if self.by not in SIMILARITIES + FIXED if isinstance(self.by, str) else not retriever:
            raise ValueError(f"by={self.by!r}; possible are {', '.join(SIMILARITIES + FIXED)}, or a retriever")
        if self.group > self.retrieve:
            raise ValueError(
                f"group={self.group} with retrieve={self.retrieve}; a group has to fit into what is brought back"
            )


class Chooser:
    """Chooses frames for one question and remembers them.

    Args:
        store: of the stream.
        choice: how many, and by what.
        question: its text.
    """

    def __init__(self, store: Store, choice: Choice, question: str):
        self.store, self.choice, self.question = store, choice, question
        self.without = set(store.damaged)
        self._once: list[int] | None = None
        self._score: dict[int, list[float]] = {}

    def bring(self, layer: int, queries: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The frames that a layer chooses, their keys and values; frames that turn out to be damaged are passed over."""
        store = self.store
        while True:
            frames, values = self._choose(layer, queries)
            try:
                found = store.fetch(layer, frames)
            except DamagedFrames:
                self.without, self._once = set(store.damaged), None
                continue
            for frame, value in zip(frames, values):
                self._score.setdefault(frame, []).append(value)
            if self._once is not None and layer + 1 < store.layers:  # the next layer's frames are known before it runs
                store.prefetch(layer + 1, frames)
            return frames, *found

    def _choose(self, layer: int, queries: torch.Tensor) -> tuple[list[int], list[float]]:
        """Frames, ascending, and how well each answers."""
        by, count = self.choice.by, self.choice.retrieve
        if isinstance(by, str) and by in SIMILARITIES:
            found = scores(queries, self.store.index[layer], self.store.heads, by)
            frames = best(found, count, self.choice.group, self.without)
            return frames, found[frames].tolist()
        if self._once is None:
            self._once = self._of_all_layers(by, count)
        return self._once, [0.0] * len(self._once)

    def _of_all_layers(self, by: str | Retriever, count: int) -> list[int]:
        if isinstance(by, str):
            return fixed(by, self.store.frames, count, self.without)
        chosen = sorted(set(by.choose(self.question, count)))
        if not all(0 <= f < self.store.frames for f in chosen):
            raise ValueError(f"the retriever chose frames {chosen}; there are 0 to {self.store.frames - 1}")
        return [f for f in chosen if f not in self.without]

    def found(self) -> tuple[Retrieved, ...]:
        """All frames that any layer chose, in order of time."""
        times = self.store.times
        return tuple(Retrieved(f, times[f], sum(s) / len(s), len(s)) for f, s in sorted(self._score.items()))
