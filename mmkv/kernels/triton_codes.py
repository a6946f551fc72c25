"""What the Triton kernels share: a format as compile-time constants, and decoding in registers.

Names: b_ block values, p_ pointers, o_ offsets, m_ masks, i_ program ids; capitals are sizes and flags.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import Code, Spec

# Fields of one class of channels, as the kernels index them.
WIDTH, FIRST, CODE_AT, NBYTES, LEVELS, AFFINE, LOW, STEP, LUT_AT, SCALE_AT, ZERO_AT = range(11)


def affine(code: Code) -> bool:
    """Levels are evenly spaced, so decoding needs no table."""
    n = len(code.levels)
    step = (code.levels[-1] - code.levels[0]) / max(n - 1, 1)
    return all(abs(code.levels[0] + i * step - v) < 1e-7 * max(1.0, abs(v)) for i, v in enumerate(code.levels))


@cache
def classes(spec: Spec) -> tuple[tuple, ...]:
    """One tuple of constants per class, fields in the order above; offsets are within a block, -1 = none."""
    rows, first, code_at, lut_at, scale_at, zero_at = [], 0, 0, 0, 0, 0
    for width, code in spec.classes:
        token = spec.axis == "token"
        groups = spec.group * (width // spec.channel_group) if token else width
        nb, n = code.nbytes(spec.channel_group if token else spec.group), len(code.levels)
        low, step = float(code.levels[0]), float(code.levels[-1] - code.levels[0]) / max(n - 1, 1)
        scale, zero = (scale_at if code.has_scale else -1), (zero_at if code.has_zero else -1)
        rows.append((width, first, code_at, nb, n, affine(code), low, step, lut_at, scale, zero))
        first, code_at, lut_at = first + width, code_at + groups * nb, lut_at + n
        scale_at, zero_at = scale_at + groups * code.has_scale, zero_at + groups * code.has_zero
    return tuple(rows)


@cache
def level_table(spec: Spec, device: torch.device) -> Tensor:
    """Levels of all classes, one after the other, fp32."""
    levels = [v for _, code in spec.classes for v in code.levels]
    return torch.tensor(levels, dtype=torch.float32, device=device)


@triton.jit
def decode_levels(b_byte, b_digit, p_lut, CLASSES: tl.constexpr, I: tl.constexpr):
    """Bytes and digit numbers (broadcastable) to levels, fp32."""
    L: tl.constexpr = CLASSES[I][4]
    b_code = b_byte.to(tl.int32)
    if L == 3:
        b_power = tl.where(b_digit == 0, 1, tl.where(b_digit == 1, 3, 9))
        b_power = tl.where(b_digit == 3, 27, tl.where(b_digit == 4, 81, b_power))
        b_code = ((b_code * b_power & 255) * 3) >> 8
    elif L == 2:
        b_code = (b_code >> b_digit) & 1
    elif L == 4:
        b_code = (b_code >> (b_digit * 2)) & 3
    elif L == 16:
        b_code = (b_code >> (b_digit * 4)) & 15
    if CLASSES[I][5]:
        b_level = b_code.to(tl.float32) * CLASSES[I][7] + CLASSES[I][6]
    else:
        b_level = tl.load(p_lut + CLASSES[I][8] + b_code)
    return b_level


@triton.jit
def load_scale(p_scale, o_s, m_s, b_top, p_power, SCALE8: tl.constexpr):
    """Scales at offsets o_s of a block as fp32; 8-bit ones are `b_top` times a table of powers of two."""
    b_scale = tl.load(p_scale + o_s, mask=m_s, other=0)
    if SCALE8:
        b_value = tl.load(p_power + b_scale.to(tl.int32)) * b_top
    else:
        b_value = b_scale.to(tl.float32)
    return b_value
