"""Rotary embedding by tables of cosines and sines, put on or taken off."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import check_device, check_float, wants_grad


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False, inplace: bool = False
) -> Tensor:
    """Pairs of channels turned by the angle of their token: (a, b) to (a cos - b sin, b cos + a sin), RoFormer, arXiv 2104.09864.

    Tables have one column for each pair. Hugging Face's have two, the second half like the first: give the first half,
    `cos[..., : cos.shape[-1] // 2]`. Arithmetic is fp32 (fp64 where x or a table is).

    Args:
        x: [T, D], [H, T, D] or [B, H, T, D], any strides.
        cos, sin: [..., T, P], broadcastable to x's leading sizes; they turn the first 2 P <= D channels, the others stay.
            A factor on both (attention scaling, YaRN) scales what is turned.
        interleaved: pairs are channels (2 p, 2 p + 1) (GPT-J, Infinity); else (p, P + p) (Hugging Face).
        inverse: take off what the same tables put on: the transposed rotation, divided by cos^2 + sin^2 of each pair,
            so that scaled tables and tables rounded to 16 bits are undone as well. No pair of a table may be (0, 0).
        inplace: write into x, whose elements may not share memory.

    Returns:
        x's shape and dtype; x itself where `inplace`.

    Raises:
        ValueError: shapes do not fit.
        TypeError: something is not floating point.
    """
    check_float(x=x, cos=cos, sin=sin)
    check_device(x.device, cos=cos, sin=sin)
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x is {tuple(x.shape)}; it has to be [T, D], [H, T, D] or [B, H, T, D]")
    if cos.shape != sin.shape or not 2 <= cos.dim() <= x.dim():
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} have to be alike, [T, P] or up to {x.dim()}-D"
        )
    if any(c not in (1, n) for c, n in zip(cos.shape[-2::-1], x.shape[-2::-1], strict=False)):
        raise ValueError(f"tables {tuple(cos.shape)} do not broadcast to x {tuple(x.shape)}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"tables of {cos.shape[-1]} columns turn {2 * cos.shape[-1]} channels, x has {x.shape[-1]}; give one a pair"
        )
    if inplace and any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"x of strides {x.stride()} shares memory between elements; turn a copy instead of inplace")
    if x.is_cuda and not wants_grad(x, cos, sin):
        from .rotate_triton import rotate_triton

        with torch.cuda.device(x.device):
            return rotate_triton(x, cos, sin, interleaved=interleaved, inverse=inverse, inplace=inplace)
    return rotate_reference(x, cos, sin, interleaved=interleaved, inverse=inverse, inplace=inplace)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool, inplace: bool) -> Tensor:
    """`rotate` by torch."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin, pairs = cos.to(wide), sin.to(wide), cos.shape[-1]
    if inverse:
        power = cos * cos + sin * sin
        cos, sin = cos / power, -sin / power
    turned = x[..., : 2 * pairs]
    a, b = _halves(turned.to(wide), pairs, interleaved)
    new = (a * cos).sub_(b * sin).to(x.dtype), (b * cos).add_(a * sin).to(x.dtype)
    if inplace:
        for place, numbers in zip(_halves(turned, pairs, interleaved), new, strict=True):
            place.copy_(numbers)
        return x
    rest = x[..., 2 * pairs :]
    joined = torch.stack(new, -1).flatten(-2) if interleaved else torch.cat(new, -1)
    return torch.cat([joined, rest], -1) if rest.shape[-1] else joined


def _halves(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, ...]:
    """The first and the second numbers of all pairs, views of x."""
    return x.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else x.unflatten(-1, (2, pairs)).unbind(-2)
