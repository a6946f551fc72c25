"""Checkpoints that transformers' Auto classes misread or do not know: which of our own loaders takes them."""

from __future__ import annotations

from collections.abc import Callable


def own_loader(name: str) -> Callable | None:
    """`load(name, dtype=..., device=...)` of the port that a checkpoint belongs to, by its config.json; None for transformers'.

    Args:
        name: a folder or a hub name.

    Raises:
        OSError: no such checkpoint, or without a config.json.
    """
    from transformers import PreTrainedConfig

    from mmkv.models import longva, opencua

    config, _ = PreTrainedConfig.get_config_dict(name)
    if longva.is_longva(config):
        return longva.load
    return opencua.load if config.get("model_type") == "opencua" else None
