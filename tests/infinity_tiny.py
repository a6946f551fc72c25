"""A small Infinity whose weights are written by a formula, the same that were put into the released class to get its numbers.

Spec sheet: the state dict's keys sorted, key j and element i are `base + amp * sin(0.37 i + 1.3 j)`, worked out in fp64.
"""

from __future__ import annotations

import math

import torch

from mmkv.models.infinity import attention, conditioning
from mmkv.models.infinity.configuration import InfinityConfig
from mmkv.models.infinity.loading import fill, official_shapes
from mmkv.models.infinity.model import InfinityForImageGeneration

TINY = dict(
    num_hidden_layers=4, hidden_size=64, num_attention_heads=4, block_chunks=2, text_channels=256, text_max_length=16,
    bits_per_token=8, pixels="0.06M",
)  # fmt: skip
SPREAD = {"bits_embed": 8.0, "modulation": 0.3, "proj": 2.5}  # of random weights, over the square root of their inputs
STRONG = ("mat_qkv", "word_embed.weight", "lvl_embed", "pos_start", "ada_gss")


def official_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """By the formula, under the official keys."""
    out = {}
    for j, key in enumerate(sorted(shapes)):
        count = math.prod(shapes[key])
        base = 1.0 if key.endswith("norm.weight") else math.log(30) if "scale_mul" in key else 0.0
        amp = 0.3 if any(part in key for part in STRONG) else 0.05
        values = base + amp * torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + 1.3 * j)
        out[key] = (values * ("zero_k_bias" not in key)).float().view(shapes[key])
    return out


def model(**changes) -> InfinityForImageGeneration:
    """With weights by the formula."""
    made = InfinityForImageGeneration(InfinityConfig(**{**TINY, **changes})).eval()
    fill(made, official_weights(official_shapes(made)))
    return made


def lively(seed: int = 0, **changes) -> InfinityForImageGeneration:
    """With random weights such that heads look at different things, and bits differ from place to place and from seed to seed."""
    made = InfinityForImageGeneration(InfinityConfig(**{**TINY, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        spread = SPREAD.get(name.rsplit(".", 2)[-2], 1.0) / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        if name.endswith(("norm", "norm.weight")):
            parameter.data += 1
        if name.endswith("log_scale"):
            parameter.data += 2.5
    return made


def features(lengths=(5,), seed: int | None = None) -> list[torch.Tensor]:
    """Of prompts: by the sheet's formula (turned round for the second), or random."""
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(length, 256, generator=generator) for length in lengths]
    at = torch.arange(1, max(lengths) + 1, dtype=torch.float64)[:, None] * torch.arange(1, 257, dtype=torch.float64)
    every = torch.sin(0.05 * at).float()
    return [every[:length] if i % 2 == 0 else every[:length].flip(-1) for i, length in enumerate(lengths)]


def as_released(monkeypatch) -> None:
    """Round what attends to the text to bfloat16, as the released code does for its kernels."""

    def rounded(query, keys, values, mask):
        query, keys, values = (x.to(torch.bfloat16) for x in (query, keys, values))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).float()

    monkeypatch.setattr(conditioning, "text_attention", rounded)
    monkeypatch.setattr(attention, "text_attention", rounded)


def watched(painter, text, **options):
    """What `generate` gives, and the output of each scale's forward."""
    outputs = []
    hook = painter.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        return painter.generate(text, **options), outputs
    finally:
        hook.remove()


def same(one, other) -> bool:
    """Whether two generations are equal to the bit."""
    bits = all(torch.equal(a, b) for a, b in zip(one.bits, other.bits, strict=True))
    return bits and torch.equal(one.latent, other.latent)
