"""The loop over scales: each is predicted from the running sum of all before it (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkv.models.infinity.conditioning import Text
from mmkv.models.infinity.quantizer import accumulate, codes, next_input, patchified, unpatchified
from mmkv.models.infinity.sampling import Sampling
from mmkv.models.infinity.schedules import Schedule


@dataclass(frozen=True)
class Painted:
    """What was generated.

    Args:
        bits: uint8 `[B, h, w, d]` for each scale, at the positions of the autoencoder's latent.
        latent: fp32 `[B, d, H, W]`, the sum of all scales' codes, which the autoencoder decodes.
        past_key_values: the cache, without the last scale, which nobody reads.
    """

    bits: tuple[Tensor, ...]
    latent: Tensor
    past_key_values: object | None = None


@torch.no_grad()
def paint_scales(
    model,
    text: Text,
    schedule: Schedule,
    sampling: Sampling,
    negative: Text | None = None,
    past_key_values=None,
    on_scale: Callable[[int], None] | None = None,
) -> Painted:
    """All scales of a batch of images.

    Args:
        model: an `InfinityForImageGeneration`.
        text: features of the prompts.
        schedule: of the images.
        sampling: how bits are drawn.
        negative: features of negative prompts, as many; None for the model's own unconditional text.
        past_key_values: an empty cache; made where None.
        on_scale: called with the index of each scale that is done.

    Raises:
        ValueError: a cache that is not empty, settings that are not possible, a prompt that is too long.
    """
    if past_key_values is not None and past_key_values.get_seq_length():
        raise ValueError(
            f"this cache holds {past_key_values.get_seq_length()} tokens; an image starts with a new cache"
        )
    config, batch = model.config, len(text.features)
    strengths, temperatures = (sampling.each(name, len(schedule)) for name in ("guidance", "temperature"))
    layers = sampling.layers(config.num_hidden_layers)
    generators = sampling.generators(batch, model.device)
    both = any(strength != 1 for strength in strengths)
    given = model.model.condition(_with_negative(model, text, negative) if both else text)
    latent_sizes = (schedule.doubled() if config.patchify else schedule).sizes
    summed, inputs, found = None, None, []
    for scale, (rows, columns) in enumerate(schedule.sizes):
        last = scale == len(schedule) - 1
        out = model(
            inputs=inputs, text=given, schedule=schedule, scale=scale, past_key_values=past_key_values, use_cache=True,
            last=last, guidance=(strengths[scale], layers) if both and layers and strengths[scale] != 1 else None,
        )  # fmt: skip
        past_key_values = out.past_key_values
        bits = sampling.bits(out.logits, strengths[scale], temperatures[scale], generators, both)
        bits = bits.unflatten(1, (rows, columns))
        found.append(unpatchified(bits) if config.patchify else bits)
        summed = accumulate(summed, codes(found[-1]), latent_sizes[-1])
        if not last:
            inputs = next_input(summed, latent_sizes[scale + 1])
            inputs = (patchified(inputs) if config.patchify else inputs).flatten(2).mT
            inputs = inputs.repeat(2, 1, 1) if both else inputs
        if on_scale is not None:
            on_scale(scale)
    return Painted(tuple(found), summed, past_key_values)


def _with_negative(model, text: Text, negative: Text | None) -> Text:
    """The prompts, followed by what guidance leads away from."""
    lengths = [len(features) for features in text.split()]
    if negative is None:
        negative = model.model.conditioner.without_prompt(lengths)
    elif len(negative.features) != len(lengths):
        raise ValueError(f"{len(negative.features)} negative prompts for {len(lengths)} prompts: give as many")
    return text.cat(negative)
