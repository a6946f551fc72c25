"""Infinity's bitwise tokens: bits and codes, and the residual quantizer that writes a feature map scale by scale.

Spec: Infinity (arXiv 2412.04431), sections 3.2 and 3.3; shapes and orders of the repository FoundationVision/Infinity. Sizes are
(height, width) of the VAE's latent; where the transformer patchifies, they are twice those of its own schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
PATCH = 2  # latent positions per token and direction, where the transformer patchifies


@dataclass(frozen=True)
class Quantized:
    """A feature map as bits of each scale, and what the transformer sees of it.

    Args:
        bits: uint8 `[B, h, w, d]` for each scale: what is to be predicted.
        summed: `[B, d, H, W]`, sum of all scales' codes, what the decoder gets.
        inputs: `[B, d, h, w]` for each scale but the first: the sum of all before, at its size.
    """

    bits: list[Tensor]
    summed: Tensor
    inputs: list[Tensor]


def codes(bits: Tensor) -> Tensor:
    """`[B, d, h, w]` fp32 codes of bits `[B, h, w, d]`: 1/sqrt(d) for a 1, -1/sqrt(d) for a 0 (a point on the unit sphere).

    Raises:
        ValueError: another number of dimensions.
    """
    if bits.ndim != 4:
        raise ValueError(f"bits of shape {tuple(bits.shape)}: needed are [batch, height, width, bits per position]")
    return (bits.movedim(-1, 1).float() * 2 - 1) / bits.shape[-1] ** 0.5


def bits_of(features: Tensor) -> Tensor:
    """uint8 `[B, h, w, d]`: 1 where a feature `[B, d, h, w]` is above zero."""
    return (features > 0).movedim(1, -1).to(torch.uint8)


def resized(features: Tensor, size: Size) -> Tensor:
    """`[B, d, *size]`, trilinear over a time of one as in the official code (bilinear differs in the last bit)."""
    if features.shape[-2:] == tuple(size):
        return features
    return F.interpolate(features[:, :, None], size=(1, *size), mode="trilinear", align_corners=False)[:, :, 0]


def accumulate(summed: Tensor | None, scale_codes: Tensor, size: Size) -> Tensor:
    """The running sum `[B, d, *size]` with one more scale.

    Args:
        summed: so far, at `size`; None before the first scale.
        scale_codes: `[B, d, h, w]` of the scale.
        size: of the last scale.
    """
    large = resized(scale_codes, size)
    return large if summed is None else summed + large


def next_input(summed: Tensor, size: Size) -> Tensor:
    """What the transformer gets for a scale, `[B, d, *size]`: the running sum of all before, trilinear also downwards."""
    return resized(summed, size)


def patchified(features: Tensor) -> Tensor:
    """`[B, 4 * d, h / 2, w / 2]` of `[B, d, h, w]`: four neighbours become the channels of one token (of the 8B model)."""
    return F.pixel_unshuffle(features, PATCH)


def unpatchified(bits: Tensor) -> Tensor:
    """`[B, 2 * h, 2 * w, d]` of the transformer's bits `[B, h, w, 4 * d]`."""
    if bits.shape[-1] % PATCH**2:
        raise ValueError(f"{bits.shape[-1]} bits per token are not those of {PATCH**2} positions; patchify is off")
    return F.pixel_shuffle(bits.movedim(-1, 1), PATCH).movedim(1, -1)


def quantize(features: Tensor, sizes: Sequence[Size], flip: Callable[[int, Tensor], Tensor] | None = None) -> Quantized:
    """Bits of a feature map by residual quantization: each scale writes what those before left over.

    The residual is averaged over areas to the scale's size, each position is projected on the unit sphere, and the signs
    (zero counts as negative) are its bits. Gradients pass straight through the signs to `features`.

    Args:
        features: `[B, d, H, W]` of the encoder, fp32.
        sizes: of the scales, the last is (H, W).
        flip: (scale, bits) to the bits that are used in place of them in the sum, see `SelfCorrection`.

    Raises:
        ValueError: the last scale is not of the map's size.
    """
    if tuple(sizes[-1]) != tuple(features.shape[-2:]):
        raise ValueError(
            f"a map of {tuple(features.shape[-2:])} with scales up to {tuple(sizes[-1])}: the last scale is the whole map"
        )
    summed, found, inputs = torch.zeros_like(features), [], []
    for scale, size in enumerate(sizes):
        if scale:
            inputs.append(next_input(summed.detach(), size))
        residual = features - summed.detach()
        if tuple(size) != tuple(sizes[-1]):
            residual = F.interpolate(residual, size=tuple(size), mode="area")
        found.append(bits_of(residual))
        used = codes(found[-1] if flip is None else flip(scale, found[-1])).to(features.dtype)
        if features.requires_grad:
            used = _straight_through(residual, used)
        summed = accumulate(summed, used, sizes[-1])
    return Quantized(found, summed, inputs)


def _straight_through(residual: Tensor, used: Tensor) -> Tensor:
    unit = F.normalize(residual, dim=1)
    return unit + (used - unit).detach()


@dataclass(frozen=True)
class SelfCorrection:
    """Random errors in the bits that training continues from, so that later scales learn to correct them (paper, Alg. 2).

    Pass it to `quantize` as `flip`: labels stay right, but sum and inputs of later scales are made of the flipped bits.

    Args:
        strength: the largest share of the bits that is flipped, 0 to 1; each scale of each call draws its share from 0, 0.01,
            ..., strength. The official training: 0.3.
        scales: how many scales, from the first, have errors.
        generator: of randomness; None for torch's own.
    """

    strength: float = 0.3
    scales: int = 13
    generator: torch.Generator | None = None

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength {self.strength}: possible are 0 to 1 (share of the bits that is flipped)")

    def __call__(self, scale: int, bits: Tensor) -> Tensor:
        if scale >= self.scales:
            return bits
        share = int(torch.randint(round(100 * self.strength) + 1, (), generator=self.generator)) / 100
        return bits ^ (torch.rand(bits.shape, generator=self.generator) < share).to(bits)
