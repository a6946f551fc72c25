"""Model adapters, one file per family, and the bundled tiny model (`mmkv.models.tiny`)."""

from __future__ import annotations

from mmkv.models.adapter import Adapter, supported
from mmkv.models.infinity.adapter import Infinity
from mmkv.models.internvl import InternVL
from mmkv.models.llava import Llava
from mmkv.models.llava_onevision import LlavaOnevision
from mmkv.models.longva.adapter import LongVA
from mmkv.models.opencua.adapter import OpenCUAAdapter
from mmkv.models.qwen_vl import QwenVL
from mmkv.models.text import TextDecoder

ADAPTERS: tuple[type[Adapter], ...] = (
    QwenVL,
    LlavaOnevision,
    Llava,
    LongVA,
    InternVL,
    OpenCUAAdapter,
    TextDecoder,
    Infinity,
)

__all__ = ["ADAPTERS", "Adapter", "adapter_for"]


def adapter_for(model) -> Adapter:
    """The adapter of a model, chosen by its `config.model_type` (subclasses and renamed classes are fine).

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: a family without an adapter; the message lists the supported ones.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None or not hasattr(model, "generate"):
        raise TypeError(f"mmkv.wrap takes a transformers model with generate(), not {type(model).__name__}")
    for adapter in ADAPTERS:
        if family in adapter.families:
            return adapter(model)
    raise ValueError(
        f"{type(model).__name__} ({family}){_reason(config)} is not supported; possible are {supported(ADAPTERS)}"
    )


def _reason(config) -> str:
    text = config.get_text_config()
    if config.is_encoder_decoder or getattr(text, "cross_attention_layers", None):
        return ", with cross-attention,"
    if getattr(text, "kv_lora_rank", None):
        return ", with multi-head latent attention (MLA),"
    if getattr(text, "num_kv_shared_layers", 0):
        return ", which shares KV between layers,"
    return ""
