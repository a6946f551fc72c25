"""Triton twin of `pack_blocks`: one kernel, one pass over the data.

A program measures groups, chooses their codes and packs them; what it reads a second time lies in its multiprocessor's cache.
With scales of 16 bits programs share a block's groups. With 8 bits a scale is a share of the block's largest, over all its
classes, so a program takes a whole block: it measures all groups, notes what it found, and then encodes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks, scale8_table
from .spec import Spec
from .triton_measure import (
    BASE,
    BYTES_UP,
    CODES,
    FIRST,
    FIT,
    FROM,
    GROUPS,
    NBYTES,
    NOTE,
    PER_BYTE,
    SCALE,
    TILE,
    TO,
    ZERO,
    code_of,
    finite,
    measure,
    pack_classes,
    scale8,
)


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
        b_d = tl.where(m_x & (b_x == b_x), finite(b_x, b_big) - b_zero[:, None], 0.0)
        b_code = tl.where(m_x, code_of(b_d, b_unit, CLASSES, BOUNDS, LEVELS, I), 0)
        if CLASSES[I][BASE] == 3:
            b_byte = b_byte * 3 + b_code
        else:
            b_byte += b_code * CLASSES[I][BASE] ** i
    if CLASSES[I][BASE] == 3:
        b_byte = (b_byte * 256 + 242) // 243
    m_b = m_g[:, None] & (o_b < NB)[None, :]
    tl.store(p_codes + CLASSES[I][CODES] + i_g[:, None] * NB + o_b[None, :], b_byte.to(tl.uint8), mask=m_b)


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
            b_zero, b_unit, b_scale, b_big = measure(b_x, m_x, CLASSES, BOUNDS, LEVELS, i)
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
                        b_u = scale8(tl.load(p_note + NOTES, mask=m_g, other=0.0), b_top)
                        tl.store(p_scale + CLASSES[i][SCALE] + i_g, b_u.to(tl.uint8), mask=m_g)
                        if not CLASSES[i][FIT]:
                            b_unit = tl.load(p_power + b_u) * b_top
                    _encode(p_x, s_t, s_c, p_codes, i_g, m_g, b_n, b_zero, b_unit, b_big, LEN, NCG,
                            CLASSES, BOUNDS, LEVELS, i)  # fmt: skip


def pack_blocks_triton(x: Tensor, count: Tensor, spec: Spec) -> Blocks:
    """`pack_blocks` by Triton; arguments as there."""
    n = x.shape[0]
    out = Blocks.empty(spec, n, x.device)
    classes = pack_classes(spec)
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
