"""`TextPieces`: hands on text while `generate` writes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer

from mmkv.streaming.answer import clock


class TextPieces(BaseStreamer):
    """Decodes tokens as they come; a character that takes several tokens comes when it is whole.

    Args:
        tokenizer: of the model.
        say: called with each piece of text.
    """

    def __init__(self, tokenizer, say: Callable[[str], None]):
        self.tokenizer, self.say = tokenizer, say
        self.first = 0.0  # clock of the first token
        self._ids: list[int] = []
        self._said = 0
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Tokens from `generate`, the prompt first."""
        if self._prompt:
            self._prompt = False
            return
        self.first = self.first or clock()
        self._ids += value.flatten().tolist()
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if len(text) > self._said and not text.endswith("\ufffd"):
            self.say(text[self._said :])
            self._said = len(text)

    def end(self) -> None:
        """Nothing more comes."""
