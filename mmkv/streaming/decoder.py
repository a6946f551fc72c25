"""`Decoder`: a model's language model, run for what a pass makes of its unrotated queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmkv.models import Adapter
from mmkv.streaming.cache import Pass, StreamCache
from mmkv.streaming.rotary import Rotary
from mmkv.streaming.text import TextPieces


class Decoder:
    """What a stream asks of its model.

    Args:
        adapter: of the model.
        tokenizer: of the model.
    """

    def __init__(self, adapter: Adapter, tokenizer):
        self.adapter, self.tokenizer = adapter, tokenizer
        self.rotary = Rotary(adapter)
        self.layers = len(adapter.text_model.layers)

    def embeds(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[1, T, C]` of text ids `[T]`."""
        return self.adapter.text_model.get_input_embeddings()(ids.to(self.adapter.model.device))[None]

    def run(self, embeds: torch.Tensor, way: Pass) -> torch.Tensor:
        """Hidden states `[1, T, C]` of embeddings of the same shape."""
        ids = torch.arange(embeds.shape[1], device=embeds.device).expand(self.adapter.axes, 1, -1)
        out = self.adapter.text_model(
            inputs_embeds=embeds,
            position_ids=ids if self.adapter.axes > 1 else ids[0],  # nothing is rotated by them
            past_key_values=StreamCache(way, self.layers),
            use_cache=True,
        )
        return out.last_hidden_state

    def generate(
        self, prompt: torch.Tensor, way: Pass, say: Callable[[str], None], options: dict
    ) -> tuple[str, int, float]:
        """The text that follows a prompt `[T]`, how many tokens it has, and the clock of the first.

        Args:
            say: called with pieces of the text as they come.
            options: of the model's `generate`.
        """
        prompt = prompt.to(self.adapter.model.device)[None]
        streamer = TextPieces(self.tokenizer, say)
        out = self.adapter.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=StreamCache(way, self.layers),
            streamer=streamer, **options,
        )  # fmt: skip
        new = out[0, prompt.shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), streamer.first
