"""Plain decoder language models."""

from __future__ import annotations

import torch

from mmkv.models.adapter import Adapter


class TextDecoder(Adapter):
    """Decoder-only text models with one self-attention per layer, full or sliding, whose KV heads are stored as they are."""

    families = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss")

    @property
    def text_model(self) -> torch.nn.Module:
        return self.model.model
