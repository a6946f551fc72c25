"""Registers mmkv's attention and mask functions where transformers looks them up. Done by `wrap`, never by an import."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from mmkv.cache.mask import lazy_mask
from mmkv.cache.view import attention

NAME = "mmkv"


def register() -> None:
    """Make `attn_implementation="mmkv"` known to transformers; models that do not name it see no difference."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)
