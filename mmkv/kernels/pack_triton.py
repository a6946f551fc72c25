"""Triton twin of `pack_blocks`: one kernel measures groups, one chooses codes and packs them, per class of channels.

Between the two, scales of 8 bits need the largest scale of a block over all its classes; that is a torch call on the
small tensor of scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks, decode_scale8, encode_scale8
from .digits import base, unit_steps
from .spec import Code, Spec

TILE_NUMBERS = 4096  # numbers of x that a program holds


@triton.jit
def _load(p_x, i_n, i_g, o_i, m_g, n_tokens, GROUP, C, FIRST: tl.constexpr, LEN: tl.constexpr, NCG: tl.constexpr):
    """Numbers o_i of groups i_g of block i_n, fp32 [BG, BI], and which are valid. NCG 0: groups run along tokens."""
    if NCG == 0:
        o_t, o_c = o_i[None, :] + i_g[:, None] * 0, FIRST + i_g[:, None] + o_i[None, :] * 0
    else:
        o_t, o_c = (i_g // NCG)[:, None] + o_i[None, :] * 0, (i_g % NCG)[:, None] * LEN + o_i[None, :]
    m_x = m_g[:, None] & (o_i < LEN)[None, :] & (o_t < n_tokens)
    return tl.load(p_x + (i_n * GROUP + o_t) * C + o_c, mask=m_x, other=0.0).to(tl.float32), m_x


@triton.jit
def _finite(b_x, b_big):
    """NaN to 0, everything else into [-b_big, b_big]."""
    b_x = tl.minimum(tl.maximum(b_x, -b_big[:, None]), b_big[:, None])
    return tl.where(b_x == b_x, b_x, 0.0)


@triton.jit
def _code_of(b_d, b_unit, BOUNDS: tl.constexpr, LOW: tl.constexpr, ROUND: tl.constexpr):
    """Deviations [BG, BI] in units [BG] to codes int32."""
    b_u = tl.div_rn(b_d, tl.maximum(b_unit, 1e-37)[:, None])
    b_u = tl.where((b_unit > 0)[:, None], b_u, 0.0)
    if ROUND:  # adding and taking 1.5 * 2^23 rounds to nearest even
        b_u = tl.minimum(tl.maximum(b_u - LOW, -1.0), len(BOUNDS) + 1.0)
        b_code = ((b_u + 12582912.0) - 12582912.0).to(tl.int32)
        b_code = tl.minimum(tl.maximum(b_code, 0), len(BOUNDS))
    else:
        b_code = tl.zeros(b_u.shape, dtype=tl.int32)
        for i in tl.static_range(len(BOUNDS)):
            b_code += (b_u > BOUNDS[i]).to(tl.int32)
    return b_code


@triton.jit
def _level_of(b_code, LEVELS_: tl.constexpr, ROUND: tl.constexpr):
    """Codes to levels, fp32."""
    if ROUND:
        b_level = b_code.to(tl.float32) + LEVELS_[0]
    else:
        b_level = tl.zeros(b_code.shape, dtype=tl.float32)
        for i in tl.static_range(len(LEVELS_)):
            b_level = tl.where(b_code == i, LEVELS_[i], b_level)
    return b_level


@triton.jit
def _fp16(b):
    return tl.minimum(tl.maximum(b, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _measure(
    p_x, p_count, p_zero, p_unit, p_scale, GROUP, C, NGROUPS, S_ZERO, S_UNIT,
    FIRST: tl.constexpr, LEN: tl.constexpr, NCG: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr,
    FIT: tl.constexpr, REFINE: tl.constexpr, HAS_ZERO: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr,
    ROUND: tl.constexpr, BG: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Program (block, run of groups): zero fp16, unit fp32 and scale fp32 (a number that fp16 holds) of each group."""
    i_n, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_g = i_t * BG + tl.arange(0, BG)
    m_g = i_g < NGROUPS
    o_i = tl.arange(0, BI)
    b_n = tl.load(p_count + i_n)
    b_x, m_x = _load(p_x, i_n, i_g, o_i, m_g, b_n, GROUP, C, FIRST, LEN, NCG)
    m_ok = m_x & (b_x == b_x)
    b_abs = tl.abs(b_x)
    b_big = tl.max(tl.where(m_ok & (b_abs < float("inf")), b_abs, 0.0), 1)
    b_x = _finite(b_x, tl.minimum(b_big, 1e15))
    b_ok = tl.maximum(tl.sum(m_ok.to(tl.int32), 1), 1).to(tl.float32)

    b_zero = tl.zeros((BG,), dtype=tl.float32)
    if ZERO == "mean":
        b_zero = _fp16(tl.div_rn(tl.sum(tl.where(m_ok, b_x, 0.0), 1), b_ok))
    elif ZERO == "min":
        b_zero = tl.min(tl.where(m_ok, b_x, float("inf")), 1)
        b_zero = _fp16(tl.where(b_zero == float("inf"), 0.0, b_zero))
    if HAS_ZERO and REFINE == 0:
        tl.store(p_zero + i_n * S_ZERO + i_g, b_zero.to(tl.float16), mask=m_g)

    if len(LEVELS) > 1:
        b_d = tl.where(m_ok, b_x - b_zero[:, None], 0.0)
        if UNIT == "range":
            b_high = tl.max(tl.where(m_ok, b_d, float("-inf")), 1)
            b_low = tl.zeros((BG,), dtype=tl.float32)
            if ZERO != "min":
                b_low = tl.min(tl.where(m_ok, b_d, float("inf")), 1)
            b_range = tl.maximum(tl.where(b_high == float("-inf"), 0.0, b_high - b_low), 0.0)
            b_unit = tl.div_rn(b_range, tl.full((BG,), len(LEVELS) - 1, dtype=tl.float32))
        elif UNIT == "absmax":
            b_last = tl.full((BG,), LEVELS[len(LEVELS) - 1], dtype=tl.float32)
            b_unit = tl.div_rn(tl.max(tl.abs(b_d), 1), tl.maximum(b_last, 1.0))
        elif UNIT == "mean_abs":
            b_unit = tl.div_rn(tl.sum(tl.abs(b_d), 1), b_ok)
        else:
            b_unit = tl.sqrt_rn(tl.div_rn(tl.sum(b_d * b_d, 1), b_ok))
        if REFINE > 0:
            b_shift = tl.zeros((BG,), dtype=tl.float32)
            b_mean = tl.div_rn(tl.sum(b_d, 1), b_ok)
            for _ in tl.static_range(REFINE):
                b_level = _level_of(_code_of(b_d - b_shift[:, None], b_unit, BOUNDS, LEVELS[0], ROUND), LEVELS, ROUND)
                b_level = tl.where(m_ok, b_level, 0.0)
                b_middle = tl.div_rn(tl.sum(b_level, 1), b_ok)
                b_spread = tl.div_rn(tl.sum(b_level * b_level, 1), b_ok) - b_middle * b_middle
                b_slope = tl.div_rn(tl.sum(b_level * b_d, 1), b_ok) - b_middle * b_mean
                b_fitted = tl.maximum(tl.div_rn(b_slope, tl.maximum(b_spread, 1e-6)), 0.0)
                b_unit = tl.where(b_spread > 1e-6, b_fitted, b_unit)
                b_shift = tl.where(b_spread > 1e-6, b_mean - b_unit * b_middle, b_shift)
            b_zero = _fp16(b_zero + b_shift)
            tl.store(p_zero + i_n * S_ZERO + i_g, b_zero.to(tl.float16), mask=m_g)
        tl.store(p_unit + i_n * S_UNIT + i_g, b_unit, mask=m_g)
        b_scale = b_unit
        if FIT:
            b_level = _level_of(_code_of(b_d, b_unit, BOUNDS, LEVELS[0], ROUND), LEVELS, ROUND)
            b_level = tl.where(m_ok, b_level, 0.0)
            b_power = tl.maximum(tl.sum(b_level * b_level, 1), 1e-30)
            b_scale = tl.maximum(tl.div_rn(tl.sum(b_level * b_d, 1), b_power), 0.0)
        tl.store(p_scale + i_n * S_UNIT + i_g, _fp16(b_scale), mask=m_g)


@triton.jit
def _encode(
    p_x, p_count, p_zero, p_unit, p_codes, GROUP, C, NGROUPS, S_ZERO, S_UNIT, S_CODE,
    FIRST: tl.constexpr, LEN: tl.constexpr, NCG: tl.constexpr, HAS_ZERO: tl.constexpr,
    BOUNDS: tl.constexpr, LOW: tl.constexpr, ROUND: tl.constexpr, PER_BYTE: tl.constexpr, BASE: tl.constexpr,
    NB: tl.constexpr, BG: tl.constexpr, BI: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Program (block, run of groups): bytes of codes; byte j holds numbers j, j + NB, ..., as `digits.py` says."""
    i_n, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_g = i_t * BG + tl.arange(0, BG)
    m_g = i_g < NGROUPS
    b_n = tl.load(p_count + i_n)
    b_unit = tl.load(p_unit + i_n * S_UNIT + i_g, mask=m_g, other=0.0)
    b_zero = tl.zeros((BG,), dtype=tl.float32)
    if HAS_ZERO:
        b_zero = tl.load(p_zero + i_n * S_ZERO + i_g, mask=m_g, other=0.0).to(tl.float32)
    b_x, m_x = _load(p_x, i_n, i_g, tl.arange(0, BI), m_g, b_n, GROUP, C, FIRST, LEN, NCG)
    b_abs = tl.abs(b_x)
    b_big = tl.minimum(tl.max(tl.where(m_x & (b_abs < float("inf")), b_abs, 0.0), 1), 1e15)

    o_b = tl.arange(0, BB)
    b_byte = tl.zeros((BG, BB), dtype=tl.int32)
    power: tl.constexpr = BASE
    b_power = tl.full((BG, BB), 1, dtype=tl.int32)
    for i in tl.static_range(PER_BYTE):
        b_v, m_v = _load(p_x, i_n, i_g, tl.where(o_b < NB, o_b + i * NB, LEN), m_g, b_n, GROUP, C, FIRST, LEN, NCG)
        m_v = m_v & (b_v == b_v)
        b_d = tl.where(m_v, _finite(b_v, b_big) - b_zero[:, None], 0.0)
        b_code = _code_of(b_d, b_unit, BOUNDS, LOW, ROUND)
        b_code = tl.where(_valid(i_g, o_b + i * NB, b_n, LEN, NCG), b_code, 0)
        if BASE == 3:
            b_byte = b_byte * 3 + b_code
        else:
            b_byte += b_code * b_power
            b_power *= power
    if BASE == 3:
        b_byte = (b_byte * 256 + 242) // 243
    m_b = m_g[:, None] & (o_b < NB)[None, :]
    tl.store(p_codes + i_n * S_CODE + i_g[:, None] * NB + o_b[None, :], b_byte.to(tl.uint8), mask=m_b)


@triton.jit
def _valid(i_g, o_i, n_tokens, LEN: tl.constexpr, NCG: tl.constexpr):
    """Which numbers o_i of groups i_g are not padding, [BG, BI]."""
    if NCG == 0:
        m_v = (o_i < n_tokens)[None, :] & (i_g >= 0)[:, None]
    else:
        m_v = (i_g // NCG < n_tokens)[:, None] & (o_i >= 0)[None, :]
    return m_v & (o_i < LEN)[None, :]


def pack_blocks_triton(x: Tensor, count: Tensor, spec: Spec) -> Blocks:
    """`pack_blocks` by Triton; arguments as there."""
    x, n, c = x.contiguous(), x.shape[0], spec.channels
    count = count.to(torch.int32).contiguous()
    token = spec.axis == "token"
    length = spec.channel_group if token else spec.group
    ncg = c // spec.channel_group if token else 0
    out = Blocks.empty(spec, n, x.device)
    if n == 0:
        return out
    groups = [spec.group * ncg if token else width for width, _ in spec.classes]
    stored = [k if code.per_byte else 0 for k, (_, code) in zip(groups, spec.classes, strict=True)]
    unit = torch.empty(n, sum(stored), dtype=torch.float32, device=x.device)
    scale = torch.empty_like(unit)
    zero = out.codes if out.zero is None else out.zero
    bi = triton.next_power_of_2(length)
    bg = max(1, TILE_NUMBERS // bi)

    runs, first, at_unit, at_zero = [], 0, 0, 0
    for (width, code), k in zip(spec.classes, groups, strict=True):
        runs.append((code, k, first, at_unit, at_zero))
        if k:
            tile = min(bg, triton.next_power_of_2(k))
            _measure[(n, triton.cdiv(k, tile))](
                x, count, zero[:, at_zero:], unit[:, at_unit:], scale[:, at_unit:],
                spec.group, c, k, zero.stride(0), unit.stride(0), first, length, ncg, code.zero, code.unit,
                code.scale == "fit", code.refine, code.has_zero, *_constants(code), tile, bi,
            )  # fmt: skip
        first, at_zero = first + width, at_zero + k * code.has_zero
        at_unit += k if code.per_byte else 0

    _store_scales(out, unit, scale, runs)
    at_code = 0
    for code, k, first, at_unit, at_zero in runs:
        if k and code.per_byte:
            nb = code.nbytes(length)
            tile = min(bg, triton.next_power_of_2(k))
            bounds, levels, rounds = _constants(code)
            _encode[(n, triton.cdiv(k, tile))](
                x, count, zero[:, at_zero:], unit[:, at_unit:], out.codes[:, at_code:],
                spec.group, c, k, zero.stride(0), unit.stride(0), spec.code_bytes, first, length, ncg, code.has_zero,
                bounds, levels[0], rounds, code.per_byte, base(code), nb, tile, bi, triton.next_power_of_2(nb),
            )  # fmt: skip
            at_code += k * nb
    return out


def _constants(code: Code) -> tuple[tuple, tuple, bool]:
    """Bounds, levels, and whether encoding is rounding to nearest even."""
    rounds = code.unit in ("range", "absmax") and unit_steps(code)
    return tuple(map(float, code.bounds)), tuple(map(float, code.levels)), rounds


def _store_scales(out: Blocks, unit: Tensor, scale: Tensor, runs: list[tuple]) -> None:
    """Stores the measured scales; where the scale is the unit, encoding will see what decoding sees."""
    parts = [(code, slice(at, at + k)) for code, k, _, at, _ in runs if code.has_scale]
    if not parts:
        return
    values = torch.cat([scale[:, s] for _, s in parts], 1)
    if out.top is None:
        out.scale.copy_(values)
    else:
        u, top = encode_scale8(values)
        out.scale.copy_(u)
        out.top.copy_(top)
        values = decode_scale8(u, top)
    at = 0
    for code, s in parts:
        width = s.stop - s.start
        if code.scale == "unit":
            unit[:, s] = values[:, at : at + width]
        at += width
