"""Triton twin of `pack_blocks`: one kernel, one pass over the data.

A program measures groups, chooses their codes and packs them; what it reads a second time lies in its multiprocessor's cache.
With scales of 16 bits programs share a block's groups. With 8 bits a scale is a share of the block's largest, over all its
classes, so a program takes a whole block: it measures all groups, notes what it found, and then encodes them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks, scale8_table
from .digits import base, unit_steps
from .spec import Spec

TILE_NUMBERS = 4096  # numbers of x that a program holds
ZERO_KINDS, UNIT_KINDS = ("none", "min", "mean"), ("range", "absmax", "mean_abs", "std")
MIN, MEAN = tl.constexpr(1), tl.constexpr(2)
RANGE, ABSMAX, MEAN_ABS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Fields of one class of channels, as the kernel indexes them; offsets are within a block, -1 = none.
(
    GROUPS, FIRST, CODES, NBYTES, PER_BYTE, BASE, SCALE, ZERO, NOTE, ZERO_KIND, UNIT_KIND, FIT, REFINE, ROUNDS, TILE,
    FROM, TO, BYTES_UP,
) = (tl.constexpr(i) for i in range(18))  # fmt: skip


@triton.jit
def _load(p_x, s_t, s_c, i_g, o_i, m_g, n_tokens, FIRST: tl.constexpr, LEN: tl.constexpr, NCG: tl.constexpr):
    """Numbers o_i of groups i_g of a block, fp32 [BG, BI], and which are valid. NCG 0: groups run along tokens."""
    if NCG == 0:
        o_t, o_c = o_i[None, :], (FIRST + i_g)[:, None]
    else:
        o_t, o_c = (i_g // NCG)[:, None], (i_g % NCG)[:, None] * LEN + o_i[None, :]
    m_x = m_g[:, None] & (o_i < LEN)[None, :] & (o_t < n_tokens)
    return tl.load(p_x + o_t.to(tl.int64) * s_t + o_c.to(tl.int64) * s_c, mask=m_x, other=0.0).to(tl.float32), m_x


@triton.jit
def _finite(b_x, b_big):
    """NaN to 0, everything else into [-b_big, b_big]."""
    b_x = tl.minimum(tl.maximum(b_x, -b_big[:, None]), b_big[:, None])
    return tl.where(b_x == b_x, b_x, 0.0)


@triton.jit
def _code_of(
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
def _level_of(b_code, CLASSES: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr):
    """Codes to levels, fp32."""
    if CLASSES[I][ROUNDS]:
        b_level = b_code.to(tl.float32) + LEVELS[I][0]
    else:
        b_level = tl.zeros(b_code.shape, dtype=tl.float32)
        for i in tl.static_range(len(LEVELS[I])):
            b_level = tl.where(b_code == i, LEVELS[I][i], b_level)
    return b_level


@triton.jit
def _fp16(b):
    return tl.minimum(tl.maximum(b, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _measure(b_x, m_x, CLASSES: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr):
    """Of groups [BG, BI]: zero, unit, scale (zero and scale as fp16 has them) and largest finite magnitude, fp32 [BG] each."""
    m_ok = m_x & (b_x == b_x)
    b_abs = tl.abs(b_x)
    b_big = tl.minimum(tl.max(tl.where(m_ok & (b_abs < float("inf")), b_abs, 0.0), 1), 1e15)
    b_x = _finite(b_x, b_big)
    b_ok = tl.maximum(tl.sum(m_ok.to(tl.int32), 1), 1).to(tl.float32)

    b_zero = b_big * 0.0
    if CLASSES[I][ZERO_KIND] == MEAN:
        b_zero = _fp16(tl.div_rn(tl.sum(tl.where(m_ok, b_x, 0.0), 1), b_ok))
    elif CLASSES[I][ZERO_KIND] == MIN:
        b_zero = tl.min(tl.where(m_ok, b_x, float("inf")), 1)
        b_zero = _fp16(tl.where(b_zero == float("inf"), 0.0, b_zero))
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
                b_level = _level_of(
                    _code_of(b_d - b_shift[:, None], b_unit, CLASSES, BOUNDS, LEVELS, I), CLASSES, LEVELS, I
                )
                b_level = tl.where(m_ok, b_level, 0.0)
                b_middle = tl.div_rn(tl.sum(b_level, 1), b_ok)
                b_spread = tl.div_rn(tl.sum(b_level * b_level, 1), b_ok) - b_middle * b_middle
                b_slope = tl.div_rn(tl.sum(b_level * b_d, 1), b_ok) - b_middle * b_mean
                b_fitted = tl.maximum(tl.div_rn(b_slope, tl.maximum(b_spread, 1e-6)), 0.0)
                b_unit = tl.where(b_spread > 1e-6, b_fitted, b_unit)
                b_shift = tl.where(b_spread > 1e-6, b_mean - b_unit * b_middle, b_shift)
            b_zero = _fp16(b_zero + b_shift)
        b_scale = b_unit
        if CLASSES[I][FIT]:
            b_level = _level_of(_code_of(b_d, b_unit, CLASSES, BOUNDS, LEVELS, I), CLASSES, LEVELS, I)
            b_level = tl.where(m_ok, b_level, 0.0)
            b_power = tl.maximum(tl.sum(b_level * b_level, 1), 1e-30)
            b_scale = tl.maximum(tl.div_rn(tl.sum(b_level * b_d, 1), b_power), 0.0)
        b_scale = _fp16(b_scale)
    return b_zero, b_unit, b_scale, b_big


@triton.jit
def _encode(
    p_x, s_t, s_c, p_codes, i_g, m_g, b_n, b_zero, b_unit, b_big, LEN: tl.constexpr, NCG: tl.constexpr,
    CLASSES: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Stores the bytes of groups i_g; byte j holds numbers j, j + NB, ..., as `digits.py` says."""
    NB: tl.constexpr = CLASSES[I][NBYTES]
    DIGITS: tl.constexpr = CLASSES[I][PER_BYTE]
    o_b = tl.arange(0, CLASSES[I][BYTES_UP])
    b_byte = (i_g[:, None] + o_b[None, :]) * 0
    for i in tl.static_range(DIGITS):
        o_i = tl.where(o_b < NB, o_b + i * NB, LEN)
        b_x, m_x = _load(p_x, s_t, s_c, i_g, o_i, m_g, b_n, CLASSES[I][FIRST], LEN, NCG)
        b_d = tl.where(m_x & (b_x == b_x), _finite(b_x, b_big) - b_zero[:, None], 0.0)
        b_code = tl.where(m_x, _code_of(b_d, b_unit, CLASSES, BOUNDS, LEVELS, I), 0)
        if CLASSES[I][BASE] == 3:
            b_byte = b_byte * 3 + b_code
        else:
            b_byte += b_code * CLASSES[I][BASE] ** i
    if CLASSES[I][BASE] == 3:
        b_byte = (b_byte * 256 + 242) // 243
    m_b = m_g[:, None] & (o_b < NB)[None, :]
    tl.store(p_codes + CLASSES[I][CODES] + i_g[:, None] * NB + o_b[None, :], b_byte.to(tl.uint8), mask=m_b)


@triton.jit
def _scale8(b_scale, b_top):
    """Scales to bytes int32, `blocks.encode_scale8`."""
    b_share = tl.div_rn(b_scale, tl.maximum(b_top, 5.9604644775390625e-08) + b_scale * 0.0)
    b_u = tl.maximum(255.0 + 16.0 * tl.log2(tl.maximum(b_share, 1e-6)), -1.0)
    return tl.minimum(tl.maximum(((b_u + 12582912.0) - 12582912.0).to(tl.int32), 0), 255)


@triton.jit
def _pack(
    p_x, s_n, s_t, s_c, p_count, p_codes, p_scale, p_zero, p_top, p_power, p_notes, TILES_PER,
    CLASSES: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr, LEN: tl.constexpr, NCG: tl.constexpr,
    CODE_BYTES: tl.constexpr, N_SCALE: tl.constexpr, N_ZERO: tl.constexpr, NOTES: tl.constexpr, SCALE8: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """Program (block, run of TILES_PER tiles of groups); with SCALE8, notes fp32 [blocks, 3, NOTES] of unit, scale, magnitude."""
    i_n = tl.program_id(0).to(tl.int64)
    first, last = tl.program_id(1) * TILES_PER, (tl.program_id(1) + 1) * TILES_PER
    p_x += i_n * s_n
    p_codes += i_n * CODE_BYTES
    p_scale += i_n * N_SCALE
    p_zero += i_n * N_ZERO
    p_notes += i_n * 3 * NOTES
    b_n = tl.load(p_count + i_n)
    b_top = 0.0
    for i in tl.static_range(len(CLASSES)):
        for t in range(tl.maximum(first, CLASSES[i][FROM]), tl.minimum(last, CLASSES[i][TO])):
            i_g = (t - CLASSES[i][FROM]) * CLASSES[i][TILE] + tl.arange(0, CLASSES[i][TILE])
            m_g = i_g < CLASSES[i][GROUPS]
            b_x, m_x = _load(p_x, s_t, s_c, i_g, tl.arange(0, BI), m_g, b_n, CLASSES[i][FIRST], LEN, NCG)
            b_zero, b_unit, b_scale, b_big = _measure(b_x, m_x, CLASSES, BOUNDS, LEVELS, i)
            if CLASSES[i][ZERO] >= 0:
                tl.store(p_zero + CLASSES[i][ZERO] + i_g, b_zero.to(tl.float16), mask=m_g)
            if SCALE8:
                if CLASSES[i][PER_BYTE] > 0:
                    p_note = p_notes + CLASSES[i][NOTE] + i_g
                    tl.store(p_note, b_unit, mask=m_g)
                    tl.store(p_note + NOTES, b_scale, mask=m_g)
                    tl.store(p_note + 2 * NOTES, b_big, mask=m_g)
                if CLASSES[i][SCALE] >= 0:
                    b_top = tl.maximum(b_top, tl.max(tl.where(m_g, b_scale, 0.0), 0))
            elif CLASSES[i][PER_BYTE] > 0:
                if CLASSES[i][SCALE] >= 0:
                    tl.store(p_scale + CLASSES[i][SCALE] + i_g, b_scale.to(tl.float16), mask=m_g)
                    if not CLASSES[i][FIT]:
                        b_unit = b_scale  # encoding sees what decoding will see
                _encode(p_x, s_t, s_c, p_codes, i_g, m_g, b_n, b_zero, b_unit, b_big, LEN, NCG,
                        CLASSES, BOUNDS, LEVELS, i)  # fmt: skip
    if SCALE8:
        b_top = b_top.to(tl.float16).to(tl.float32)
        tl.store(p_top + i_n, b_top.to(tl.float16))
        tl.debug_barrier()  # notes of one thread are read by others
        for i in tl.static_range(len(CLASSES)):
            if CLASSES[i][PER_BYTE] > 0:
                for t in range(CLASSES[i][FROM], CLASSES[i][TO]):
                    i_g = (t - CLASSES[i][FROM]) * CLASSES[i][TILE] + tl.arange(0, CLASSES[i][TILE])
                    m_g = i_g < CLASSES[i][GROUPS]
                    p_note = p_notes + CLASSES[i][NOTE] + i_g
                    b_unit = tl.load(p_note, mask=m_g, other=0.0)
                    b_big = tl.load(p_note + 2 * NOTES, mask=m_g, other=0.0)
                    b_zero = b_unit * 0.0
                    if CLASSES[i][ZERO] >= 0:
                        b_zero = tl.load(p_zero + CLASSES[i][ZERO] + i_g, mask=m_g, other=0.0).to(tl.float32)
                    if CLASSES[i][SCALE] >= 0:
                        b_u = _scale8(tl.load(p_note + NOTES, mask=m_g, other=0.0), b_top)
                        tl.store(p_scale + CLASSES[i][SCALE] + i_g, b_u.to(tl.uint8), mask=m_g)
                        if not CLASSES[i][FIT]:
                            b_unit = tl.load(p_power + b_u) * b_top
                    _encode(p_x, s_t, s_c, p_codes, i_g, m_g, b_n, b_zero, b_unit, b_big, LEN, NCG,
                            CLASSES, BOUNDS, LEVELS, i)  # fmt: skip


@cache
def _classes(spec: Spec) -> tuple[tuple, ...]:
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


def pack_blocks_triton(x: Tensor, count: Tensor, spec: Spec) -> Blocks:
    """`pack_blocks` by Triton; arguments as there."""
    n = x.shape[0]
    out = Blocks.empty(spec, n, x.device)
    classes = _classes(spec)
    if n == 0 or not classes:
        return out
    codes = [code for width, code in spec.classes if width]
    bounds, levels = tuple(code.bounds for code in codes), tuple(code.levels for code in codes)
    token, wide = spec.axis == "token", out.top is None
    length = spec.channel_group if token else spec.group
    tiles = classes[-1][TO]
    stored = sum(row[0] for row in classes if row[PER_BYTE])
    notes = x if wide else torch.empty(n, 3, stored, dtype=torch.float32, device=x.device)
    scale, zero, top = (out.codes if t is None else t for t in (out.scale, out.zero, out.top))
    _pack[(n, tiles if wide else 1)](
        x, *x.stride(), count.to(torch.int32).contiguous(), out.codes, scale, zero, top,
        x if wide else scale8_table(x.device), notes, 1 if wide else tiles, classes, bounds, levels, length,
        spec.channels // length if token else 0, spec.code_bytes, spec.n_scale, spec.n_zero, stored, not wide,
        triton.next_power_of_2(length), num_warps=4 if wide else 8,
    )  # fmt: skip
    return out
