"""What methods between decoder layers share: which layers, which rows of text look, and from a verdict to a `Choice`."""

from __future__ import annotations

import math

import torch

from mmkv.layout import TEXT
from mmkv.parts.tower_attention import TILE
from mmkv.tokens.method import DecoderView

DEPTH = 32  # layers of LLaMA 7B, which the papers' layers are given for
ROWS = ("after_first", "after_last")
POSITION_IDS = ("original", "renumbered")


def check_layers(layers: tuple[int, ...]) -> None:
    """Raise ValueError for what lists no decoder layers in ascending order."""
    whole = isinstance(layers, tuple) and all(type(layer) is int and layer >= 0 for layer in layers)
    if not whole or not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers={layers!r}; possible are tuples of whole numbers from 0 in ascending order")


def listed(method: str, layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The listed layers, if a decoder of `depth` layers has them and another behind each.

    Raises:
        ValueError: it has not.
    """
    if layers[-1] >= depth - 1:
        possible = f"possible are layers 0 to {depth - 2}" if depth > 1 else "it needs two"
        raise ValueError(f"{method} drops tokens behind layer {layers[-1]} of a decoder of {depth} layers; {possible}")
    return layers


def in_proportion(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The paper's layers, as many; those of a decoder too shallow for them are l * depth // 32, where two may coincide."""
    if depth < 2:
        return ()
    return layers if layers[-1] < depth - 1 else tuple(layer * depth // DEPTH for layer in layers)


def check_bools(**options) -> None:
    """Raise ValueError for an option that is neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}; possible are True and False")


def check_kept(name: str, amount: float | int) -> None:
    """Raise ValueError for what is neither a ratio (float) nor a number (int) of a prompt's vision tokens."""
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or not (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1):
        possible = "possible are ratios (0, 1] (floats) and numbers of vision tokens from 1 (ints)"
        raise ValueError(f"{name} holds {amount!r}; {possible}")


def check_number(name: str, value: float) -> None:
    """Raise ValueError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}; a finite number is needed")


def text_rows(view: DecoderView, rows: str, method: str) -> torch.Tensor:
    """int64 `[P]` on the CPU: text tokens behind the first image or video ("after_first"), or behind all ("after_last").

    Raises:
        ValueError: there are none; the prompt's text stands before its images.
    """
    seen = view.visual.nonzero()[:, 0]
    start = int(seen[0 if rows == "after_first" else -1])
    text = (view.layout.modality[0] == TEXT).nonzero()[:, 0]
    text = text[text > start]
    if not text.numel():
        raise ValueError(
            f"{method} judges images by the text behind them, and this prompt has none; put the question last, or take FastV"
        )
    return text


def attention_of(view: DecoderView, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and max over `rows` of the heads' mean attention, each fp32 `[V]` for the tokens `columns`; a tile at a time."""
    total = torch.zeros(len(columns), dtype=torch.float32, device=columns.device)
    top = torch.zeros_like(total)
    for some in rows.split(max(1, TILE // len(view))):
        attention = view.head_mean(some)[:, columns]
        total, top = total + attention.sum(0), torch.maximum(top, attention.amax(0))
    return total, top


def visual_columns(view: DecoderView) -> torch.Tensor:
    """int64 `[V]` on the device of the hidden states: the tokens of images and videos."""
    return view.visual.nonzero()[:, 0].to(view.hidden.device)


def keep_mask(view: DecoderView, kept: torch.Tensor) -> torch.Tensor:
    """bool `[m]`: all text, and of the vision tokens `[V]` those that bool `kept` names."""
    keep = (~view.visual).to(kept.device)
    keep[visual_columns(view)] = kept
    return keep
