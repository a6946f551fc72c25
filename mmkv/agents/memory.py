"""`Memory`: the KV of an agent's earlier steps in one cache, and how much of it a new prompt can use."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from mmkv.agents.prompt import Prompt
from mmkv.cache import Cache, state_of
from mmkv.parts.storage import storage_bytes


class Memory:
    """A cache and what it holds. A new prompt keeps what it shares with it; the rest is cut off.

    Args:
        model: as `adapter_for` takes it; wrapped or not, and that may change between steps.
    """

    def __init__(self, model):
        self.model = model
        self.forget()

    def forget(self, why: str = "") -> None:
        """Hold nothing. The next `fit` says why, where that is worth saying."""
        self.cache: Any = None
        self.held, self._asked = Prompt([]), 0
        self._session = None
        self._lost = why

    def fit(self, prompt: Prompt) -> tuple[int, str]:
        """Cut the cache down to what a prompt shares with it, less its last token: something has to be fed.

        Returns:
            how many of the prompt's tokens the cache holds now, and what was lost of what it held: "" where that was no more
            than the end of the last prompt and its answer.
        """
        session = getattr(self.model, "_mmkv", None)
        if self.cache is not None and self._session is not session:
            self.forget("the model was wrapped or unwrapped in between")
        if self.cache is None:
            return self._begin(session, self._lost)
        same = prompt.agrees(self.held.first(len(prompt.ids) - 1))
        last = self.held.spans[-1].end if self.held.spans else 0
        why = "" if same >= last else _why(prompt, self.held, same)
        if not same:
            return self._begin(session, why)
        if removed := len(self.held.ids) - same:
            try:
                self.cache.crop(-removed)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                return self._begin(session, self._refused(error, same, why))
        self.held = self.held.first(same)
        return same, f"encoded again from token {same}: {why}" if why else ""

    def _begin(self, session, why: str) -> tuple[int, str]:
        self.forget()
        self._session = session
        self.cache = DynamicCache(config=self.model.config) if session is None else Cache(self.model)
        return 0, f"encoded from scratch: {why}" if why else ""

    def _refused(self, error: Exception, same: int, why: str) -> str:
        """Why a cache cannot be cut to the first `same` tokens, and what would let it."""
        state = state_of(self.cache)
        if why:
            return f"{why}, and some tokens behind it were evicted" if state is not None else f"{why}; {error}"
        if state is None or state.method is None:
            return str(error)
        needed = self._asked - same
        return f"of the last {needed} tokens of the prompt before, which changed, some were evicted; residual={needed} keeps them"

    def keep(self, prompt: Prompt, answer: list[int]) -> None:
        """Enter what a forward has put into the cache: a prompt and its answer, as far as it was fed."""
        fed = self.cache.get_seq_length()
        self.held, self._asked = Prompt([*prompt.ids, *answer][:fed], prompt.spans), len(prompt.ids)

    @property
    def bytes(self) -> int:
        """What the cache really holds."""
        return 0 if self.cache is None else storage_bytes(t for layer in self.cache.layers for t in _tensors(layer))


def _tensors(layer) -> list:
    if hasattr(layer, "tensors"):
        return layer.tensors()
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]


def _why(prompt: Prompt, held: Prompt, same: int) -> str:
    """Why pictures that are held have to go."""
    now = {span.content for span in prompt.spans}
    gone = any(span.end > same and span.content not in now for span in held.spans)
    return "the oldest screenshot left the prompt" if gone else "the prompt changed there"
