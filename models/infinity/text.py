"""Prompts to the features that Infinity was trained with: the encoder of flan-t5-xl, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKPOINT = "google/flan-t5-xl"
MOST = 512  # tokens of a prompt


class T5Prompts:
    """Encodes prompts with a T5 encoder; what `InfinityForImageGeneration.text_encoder` takes.

    Args:
        encoder: a `T5EncoderModel`.
        tokenizer: its tokenizer.
        most: tokens of a prompt at most, its end included.
    """

    def __init__(self, encoder, tokenizer, most: int = MOST):
        self.encoder, self.tokenizer, self.most = encoder.eval(), tokenizer, most

    @classmethod
    def load(cls, name: str = CHECKPOINT, device=None, dtype: torch.dtype | None = None) -> T5Prompts:
        """From a hub name or folder.

        Args:
            name: of the checkpoint.
            device: where it runs; the CPU where None.
            dtype: of its weights; the official scripts run it in float16, on the CPU fp32 is faster. As stored where None.
        """
        from transformers import AutoTokenizer, T5EncoderModel

        encoder = T5EncoderModel.from_pretrained(name, dtype="auto" if dtype is None else dtype)
        return cls(encoder.to(device or "cpu"), AutoTokenizer.from_pretrained(name))

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """fp32 features `[n, C]` of each prompt.

        Raises:
            ValueError: a prompt that is longer than the model takes (the official scripts cut it in silence), or is no text.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {prompt!r}: a text is needed")
        found = [self.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        for prompt, ids in zip(prompts, found):
            if ids.shape[1] > self.most:
                raise ValueError(
                    f"a prompt of {ids.shape[1]} tokens ({prompt[:40]!r} ...): this model takes {self.most} at most; shorten it"
                )
        device = next(self.encoder.parameters()).device
        return [self.encoder(input_ids=ids.to(device)).last_hidden_state[0].float() for ids in found]
