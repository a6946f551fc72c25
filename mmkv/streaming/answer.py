"""`Answer`: what a question to a stream brought, and `Reply`: its text as it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Retrieved:
    """A frame that was brought back.

    Args:
        frame: its number in the stream.
        time: its seconds.
        score: mean over the layers that chose it, of the similarity they chose by.
        layers: how many layers chose it.
    """

    frame: int
    time: float
    score: float
    layers: int


@dataclass(frozen=True)
class Answer:
    """The answer to a question about a stream.

    Args:
        text: the answer.
        frames: those that any layer brought back, in order of time.
        seconds: by stage: "retrieve" (the pass in which layers choose and load), "first_token" (from the question to the first
            token, retrieving included) and "answer" (to the last token).
        bytes: what the stream holds, by tier.
        tokens: of the answer.
    """

    text: str
    frames: tuple[Retrieved, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tokens: int = 0


class Reply:
    """Iterate over it for pieces of text as they are generated; `answer()` waits for the rest.

    Args:
        generate: `generate(put)` runs the model, hands pieces of text to `put`, and returns the `Answer`.
    """

    def __init__(self, generate: Callable[[Callable[[str], None]], Answer]):
        self._generate = generate
        self._pieces: list[str] = []
        self._news = threading.Condition()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._done = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            answer = self._generate(self._put)
        except BaseException as error:  # handed to whoever reads
            answer, self._error = None, error
        with self._news:
            self._answer = answer
            self._done = True
            self._news.notify_all()

    def _put(self, piece: str) -> None:
        with self._news:
            self._pieces.append(piece)
            self._news.notify_all()

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._news:
                while len(self._pieces) == at and not self._done:
                    self._news.wait()
                pieces, done = self._pieces[at:], self._done
            yield from pieces
            at += len(pieces)
            if done and at == len(self._pieces):
                break
        if self._error is not None:
            raise self._error

    def answer(self) -> Answer:
        """The whole answer; raises what the model raised."""
        for _ in self:
            pass
        return self._answer


def clock() -> float:
    """Seconds, for differences."""
    return time.perf_counter()
