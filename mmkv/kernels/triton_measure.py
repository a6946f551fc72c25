"""What packing does to numbers in registers: the statistics of groups, the choice of codes, and a format as constants.

Names as in `triton_codes.py`. Results are those of `pack.py` bit for bit, sums apart, which are taken in another order.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from .digits import base, unit_steps
from .spec import Spec

TILE_NUMBERS = 4096  # numbers that a program holds
ZERO_KINDS, UNIT_KINDS = ("none", "min", "mean"), ("range", "absmax", "mean_abs", "std")
MIN, MEAN = tl.constexpr(1), tl.constexpr(2)
RANGE, ABSMAX, MEAN_ABS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Fields of one class of channels, as the kernel indexes them; offsets are within a block, -1 = none.
(
    GROUPS, FIRST, CODES, NBYTES, PER_BYTE, BASE, SCALE, ZERO, NOTE, ZERO_KIND, UNIT_KIND, FIT, REFINE, ROUNDS, TILE,
    FROM, TO, BYTES_UP,
) = (tl.constexpr(i) for i in range(18))  # fmt: skip


@triton.jit
def finite(b_x, b_big):
    """NaN to 0, everything else into [-b_big, b_big]."""
    b_x = tl.minimum(tl.maximum(b_x, -b_big[:, None]), b_big[:, None])
    return tl.where(b_x == b_x, b_x, 0.0)


@triton.jit
def code_of(
    b_d, b_unit, CLASSES: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr
):  # fmt: skip
    """Deviations [BG, BI] in units [BG] to codes int32."""
    b_u = tl.div_rn(b_d, tl.maximum(b_unit, 1e-37)[:, None])
    b_u = tl.where((b_unit > 0)[:, None], b_u, 0.0)
    if CLASSES[I][ROUNDS]:  # adding and taking 1.5 * 2^23 rounds to nearest even
        b_u = tl.minimum(tl.maximum(b_u - LEVELS[I][0], -1.0), len(BOUNDS[I]) + 1.0)
        b_code = ((b_u + 12582912.0) - 12582912.0).to(tl.int32)
        b_code = tl.minimum(tl.maximum(b_code, 0), len(BOUNDS[I]))
    else:
        b_code = tl.zeros(b_u.shape, dtype=tl.int32)
        for i in tl.static_range(len(BOUNDS[I])):
            b_code += (b_u > BOUNDS[I][i]).to(tl.int32)
    return b_code


@triton.jit
def level_of(b_code, CLASSES: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr):
    """Codes to levels, fp32."""
    if CLASSES[I][ROUNDS]:
        b_level = b_code.to(tl.float32) + LEVELS[I][0]
    else:
        b_level = tl.zeros(b_code.shape, dtype=tl.float32)
        for i in tl.static_range(len(LEVELS[I])):
            b_level = tl.where(b_code == i, LEVELS[I][i], b_level)
    return b_level


@triton.jit
def fp16(b):
    return tl.minimum(tl.maximum(b, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def measure(b_x, m_x, CLASSES: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr):
    """Of groups [BG, BI]: zero, unit, scale (zero and scale as fp16 has them) and largest finite magnitude, fp32 [BG] each."""
    m_ok = m_x & (b_x == b_x)
    b_abs = tl.abs(b_x)
    b_big = tl.minimum(tl.max(tl.where(m_ok & (b_abs < float("inf")), b_abs, 0.0), 1), 1e15)
    b_x = finite(b_x, b_big)
    b_ok = tl.maximum(tl.sum(m_ok.to(tl.int32), 1), 1).to(tl.float32)

    b_zero = b_big * 0.0
    if CLASSES[I][ZERO_KIND] == MEAN:
        b_zero = fp16(tl.div_rn(tl.sum(tl.where(m_ok, b_x, 0.0), 1), b_ok))
    elif CLASSES[I][ZERO_KIND] == MIN:
        b_zero = tl.min(tl.where(m_ok, b_x, float("inf")), 1)
        b_zero = fp16(tl.where(b_zero == float("inf"), 0.0, b_zero))
    b_unit, b_scale = b_big * 0.0, b_big * 0.0
    if len(LEVELS[I]) > 1:
        b_d = tl.where(m_ok, b_x - b_zero[:, None], 0.0)
        if CLASSES[I][UNIT_KIND] == RANGE:
            b_high = tl.max(tl.where(m_ok, b_d, float("-inf")), 1)
            b_low = b_big * 0.0
            if CLASSES[I][ZERO_KIND] != MIN:
                b_low = tl.min(tl.where(m_ok, b_d, float("inf")), 1)
            b_range = tl.maximum(tl.where(b_high == float("-inf"), 0.0, b_high - b_low), 0.0)
            b_unit = tl.div_rn(b_range, tl.full(b_range.shape, len(LEVELS[I]) - 1, dtype=tl.float32))
        elif CLASSES[I][UNIT_KIND] == ABSMAX:
            b_last = tl.full(b_big.shape, LEVELS[I][len(LEVELS[I]) - 1], dtype=tl.float32)
            b_unit = tl.div_rn(tl.max(tl.abs(b_d), 1), tl.maximum(b_last, 1.0))
        elif CLASSES[I][UNIT_KIND] == MEAN_ABS:
            b_unit = tl.div_rn(tl.sum(tl.abs(b_d), 1), b_ok)
        else:
            b_unit = tl.sqrt_rn(tl.div_rn(tl.sum(b_d * b_d, 1), b_ok))
        if CLASSES[I][REFINE] > 0:
            b_shift = b_big * 0.0
            b_mean = tl.div_rn(tl.sum(b_d, 1), b_ok)
            for _ in range(CLASSES[I][REFINE]):
                b_level = level_of(
                    code_of(b_d - b_shift[:, None], b_unit, CLASSES, BOUNDS, LEVELS, I), CLASSES, LEVELS, I
                )
                b_level = tl.where(m_ok, b_level, 0.0)
                b_middle = tl.div_rn(tl.sum(b_level, 1), b_ok)
                b_spread = tl.div_rn(tl.sum(b_level * b_level, 1), b_ok) - b_middle * b_middle
                b_slope = tl.div_rn(tl.sum(b_level * b_d, 1), b_ok) - b_middle * b_mean
                b_fitted = tl.maximum(tl.div_rn(b_slope, tl.maximum(b_spread, 1e-6)), 0.0)
                b_unit = tl.where(b_spread > 1e-6, b_fitted, b_unit)
                b_shift = tl.where(b_spread > 1e-6, b_mean - b_unit * b_middle, b_shift)
            b_zero = fp16(b_zero + b_shift)
        b_scale = b_unit
        if CLASSES[I][FIT]:
            b_level = level_of(code_of(b_d, b_unit, CLASSES, BOUNDS, LEVELS, I), CLASSES, LEVELS, I)
            b_level = tl.where(m_ok, b_level, 0.0)
            b_power = tl.maximum(tl.sum(b_level * b_level, 1), 1e-30)
            b_scale = tl.maximum(tl.div_rn(tl.sum(b_level * b_d, 1), b_power), 0.0)
        b_scale = fp16(b_scale)
    return b_zero, b_unit, b_scale, b_big


@triton.jit
def scale8(b_scale, b_top):
    """Scales to bytes int32, `blocks.encode_scale8`."""
    b_share = tl.div_rn(b_scale, tl.maximum(b_top, 5.9604644775390625e-08) + b_scale * 0.0)
    b_u = tl.maximum(255.0 + 16.0 * tl.log2(tl.maximum(b_share, 1e-6)), -1.0)
    return tl.minimum(tl.maximum(((b_u + 12582912.0) - 12582912.0).to(tl.int32), 0), 255)


@cache
def pack_classes(spec: Spec) -> tuple[tuple, ...]:
    """One tuple of constants for each class that has channels, in the order of the fields above."""
    token = spec.axis == "token"
    length = spec.channel_group if token else spec.group
    most = max(1, TILE_NUMBERS // triton.next_power_of_2(length))
    rows, first, codes, scale, zero, notes, tiles = [], 0, 0, 0, 0, 0, 0
    for width, code in spec.classes:
        k = spec.group * (width // length) if token else width
        if not k:
            continue
        rounds = code.unit in ("range", "absmax") and unit_steps(code)  # encoding is rounding to nearest even
        nb, tile = code.nbytes(length), min(most, triton.next_power_of_2(k))
        ends = (tiles, tiles + triton.cdiv(k, tile))
        kinds = (ZERO_KINDS.index(code.zero), UNIT_KINDS.index(code.unit), code.scale == "fit", code.refine, rounds)
        rows.append(
            (k, first, codes, nb, code.per_byte, base(code), scale if code.has_scale else -1,
             zero if code.has_zero else -1, notes, *kinds, tile, *ends, triton.next_power_of_2(max(nb, 1)))
        )  # fmt: skip
        first, codes, tiles, notes = first + width, codes + k * nb, ends[1], notes + k * (code.per_byte > 0)
        scale, zero = scale + k * code.has_scale, zero + k * code.has_zero
    return tuple(rows)
