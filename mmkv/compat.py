"""What differs between the versions of transformers that mmkv runs on (5.2 to the newest), in one place."""

from __future__ import annotations

import inspect
import sys

import torch
import transformers
from packaging.version import Version
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TRANSFORMERS = Version(transformers.__version__)


def crop_target(argument: int, seen: int) -> int:
    """Length that a cache of `seen` tokens keeps after `crop(argument)`.

    Negative is a count of tokens to remove, in every version. A positive number is the length to keep (5.2's meaning;
    newer versions refuse it, we still honour it). Zero keeps nothing in 5.2 and removes nothing from 5.3 on.
    """
    if argument < 0:
        return max(seen + argument, 0)
    if argument == 0:
        return 0 if _crop_takes_length() else seen
    return min(argument, seen)


def _crop_takes_length() -> bool:
    from transformers.cache_utils import DynamicLayer

    return "max_length" in inspect.signature(DynamicLayer.crop).parameters


def query_length(argument: int | torch.Tensor) -> int:
    """Number of new tokens from what `get_mask_sizes` receives: a count, or cache positions before 5.3."""
    return argument if isinstance(argument, int) else argument.shape[0]


def layer_windows(config) -> list[int | None]:
    """Sliding window in tokens for each decoder layer of a text config, None for full attention.

    Raises:
        ValueError: a layer type whose cache we do not know (chunked, linear, compressed, shared).
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window is not None else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"layers of type {', '.join(unknown)} are not supported; possible are full_attention, sliding_attention"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def attention_function(name: str, module: torch.nn.Module):
    """The attention function that `name` ("sdpa", "eager", ...) stands for in `module`'s own model file."""
    if name != "eager" and name is not None:
        return ALL_ATTENTION_FUNCTIONS[name]
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} has no eager attention function; set attn_implementation='sdpa'")


def stock_mask(name: str, kwargs: dict, kv_length: int, kv_offset: int):
    """The mask that transformers would make for the implementation `name`, for keys [kv_offset, kv_offset + kv_length)."""
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if make is None:
        return None
    return make(**{**kwargs, "kv_length": kv_length, "kv_offset": kv_offset})


def mask_arguments(kwargs: dict, q_length: int, q_offset: int, attention_mask: torch.Tensor | None) -> dict:
    """The arguments of a mask function for other queries: `q_length` of them behind `q_offset` tokens, and their padding mask."""
    out = {**kwargs, "attention_mask": attention_mask}
    if "cache_position" in kwargs:  # before 5.3
        position = kwargs["cache_position"]
        out["cache_position"] = torch.arange(q_offset, q_offset + q_length, device=position.device)
    else:
        out |= {"q_length": q_length, "q_offset": q_offset}
    return out


def mrope_sections(text_config) -> list[int] | None:
    """Frequencies of the time, height and width axis where a rotary table comes with its axes apart (before 5.3)."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return parameters.get("mrope_section")


def merged_axes(table: torch.Tensor, sections: list[int] | None) -> torch.Tensor:
    """cos or sin `[T, D]` of what a rotary module gave for one sequence, its axes merged where they came apart."""
    if table.dim() == 4:  # [axis, B, T, D]
        parts = table[:, 0].split((sections or []) * 2, dim=-1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)
    return table[0]
