"""transformers' own quantized caches: which can be imported, and what they hold."""

from __future__ import annotations

import torch
from transformers.cache_utils import HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available


def importable() -> dict[str, type[QuantizedLayer]]:
    """The layers whose backend is installed, by its name."""
    there = {
        "quanto": (QuantoQuantizedLayer, is_optimum_quanto_available()),
        "hqq": (HQQQuantizedLayer, is_hqq_available()),
    }
    return {name: layer for name, (layer, installed) in there.items() if installed}


def stored_tensors(stored) -> list[torch.Tensor]:
    """The plain tensors inside what a backend made of one."""
    if isinstance(stored, tuple):  # HQQ: codes, and a dictionary
        return [stored[0]] + [t for t in stored[1].values() if isinstance(t, torch.Tensor)]
    return [stored._data._data, stored._scale, stored._shift]  # quanto
