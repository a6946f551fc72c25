"""What lmms-eval finds of us: the entry point `lmms_eval.models`, so that `python -m lmms_eval --model mmkv` works.

Nothing of lmms-eval is imported before lmms-eval itself asks.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of the model `mmkv`, a chat model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmkv", chat_class_path="mmkv.eval.lmms_model.MMKVChat")
