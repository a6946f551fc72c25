"""Token methods for tests that drop what they are told to, and what stock models say about it: keys hidden by a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.tokens.method import Choice, TokenMethod


@dataclass(frozen=True)
class EveryNth(TokenMethod):
    """Before the decoder keeps every nth token of an image or video, from the first on."""

    nth: int = 2

    def before_decoder(self, vision):
        keep = torch.zeros(len(vision), dtype=torch.bool)
        keep[:: self.nth] = True
        return Choice(keep)

    def keeping_everything(self):
        return EveryNth(1)


@dataclass(frozen=True)
class Behind(TokenMethod):
    """Behind decoder layers keeps every nth of the visual tokens that are left."""

    at: tuple[int, ...] = (0,)
    nth: int = 2
    position_ids: str = "original"
    trims_cache: bool = False

    def decoder_layers(self, layers):
        return self.at

    def in_decoder(self, view):
        keep = ~view.visual
        keep[view.visual.nonzero()[:: self.nth, 0]] = True
        return Choice(keep)

    def keeping_everything(self):
        return Behind(self.at, 1)


def positions(model, inputs: dict) -> torch.Tensor | None:
    """Position ids of the whole prompt as stock `generate` has them, None where the model finds them itself."""
    prepare = getattr(model.model, "get_rope_index", None)
    if prepare is None:
        mask = inputs["attention_mask"]
        return (mask.cumsum(-1) - 1).clamp(min=0)
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "attention_mask",
        "second_per_grid_ts",
    )
    import inspect

    known = inspect.signature(prepare).parameters
    return prepare(**{n: inputs[n] for n in names if n in inputs and n in known})[0]


def hidden_from(model, inputs: dict, kept: dict[int, torch.Tensor], position_ids) -> torch.Tensor:
    """Logits `[B, T, V]` of the stock model in which, from each layer on, the tokens that are not kept are hidden from all.

    Args:
        kept: by layer, bool `[B, T]`.
    """
    mask = inputs["attention_mask"].bool()
    batch, length = mask.shape
    own = torch.eye(length, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def additive(there):
        seen = (causal & (mask & there)[:, None]) | own
        return torch.zeros(batch, 1, length, length).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)

    masks, there = [], torch.ones_like(mask)
    for index in range(len(model.model.language_model.layers)):
        there = there & kept.get(index, there)
        masks.append(additive(there))
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: (args, {**kwargs, "attention_mask": masks[index]}),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        with torch.no_grad():
            return model(**inputs, position_ids=position_ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def kept_masks(trace) -> dict[int, torch.Tensor]:
    """bool `[B, T]` by layer, from what a session traced."""
    out = {}
    for layer, columns in trace.kept.items():
        mask = torch.zeros(columns.shape[0], len(trace.layout), dtype=torch.bool)
        for row, mine in enumerate(columns):
            mask[row, mine[mine >= 0]] = True
        out[layer] = mask
    return out
