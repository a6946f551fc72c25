"""Triton twin of `rotate`: one pass; a program reads its tokens' tables once for several heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._splits import multiprocessors

TILE_PAIRS = 2048  # pairs of channels that a program turns at a time


@triton.jit
def _rotate(
    p_x, p_y, p_cos, p_sin, s_xb, s_xh, s_xt, s_xd, s_yb, s_yh, s_yt, s_yd,
    s_cb, s_ch, s_ct, s_cp, s_sb, s_sh, s_st, s_sp, H, T, P, D, TILES, RUNS, HEADS,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (batch element, run of HEADS heads with one table, tile of tokens). BR > 0: channels that stay are copied."""
    i_p = tl.program_id(0).to(tl.int64)
    i_t, i_h, i_b = i_p % TILES, i_p // TILES % RUNS * HEADS, i_p // TILES // RUNS
    o_t, o_p = i_t * BT + tl.arange(0, BT), tl.arange(0, BP).to(tl.int64)
    m_t = o_t < T
    m_p = m_t[:, None] & (o_p < P)[None, :]
    p_c = p_cos + i_b * s_cb + i_h * s_ch + (o_t * s_ct)[:, None] + (o_p * s_cp)[None, :]
    p_s = p_sin + i_b * s_sb + i_h * s_sh + (o_t * s_st)[:, None] + (o_p * s_sp)[None, :]
    b_cos = tl.load(p_c, mask=m_p, other=1.0).to(tl.float32)
    b_sin = tl.load(p_s, mask=m_p, other=0.0).to(tl.float32)
    if INVERSE:
        b_power = b_cos * b_cos + b_sin * b_sin
        b_cos, b_sin = tl.div_rn(b_cos, b_power), tl.div_rn(-b_sin, b_power)
    p_xh = p_x + i_b * s_xb + i_h * s_xh + (o_t * s_xt)[:, None]
    p_yh = p_y + i_b * s_yb + i_h * s_yh + (o_t * s_yt)[:, None]
    for _ in range(tl.minimum(HEADS, H - i_h)):
        if INTERLEAVED:
            o_d = tl.arange(0, 2 * BP).to(tl.int64)
            m_d = m_t[:, None] & (o_d < 2 * P)[None, :]
            b_x = tl.load(p_xh + (o_d * s_xd)[None, :], mask=m_d, other=0.0).to(tl.float32)
            b_0, b_1 = tl.split(b_x.reshape(BT, BP, 2))
            b_y = tl.join(b_0 * b_cos - b_1 * b_sin, b_1 * b_cos + b_0 * b_sin).reshape(BT, 2 * BP)
            tl.store(p_yh + (o_d * s_yd)[None, :], b_y, mask=m_d)
        else:
            b_0 = tl.load(p_xh + (o_p * s_xd)[None, :], mask=m_p, other=0.0).to(tl.float32)
            b_1 = tl.load(p_xh + ((o_p + P) * s_xd)[None, :], mask=m_p, other=0.0).to(tl.float32)
            tl.store(p_yh + (o_p * s_yd)[None, :], b_0 * b_cos - b_1 * b_sin, mask=m_p)
            tl.store(p_yh + ((o_p + P) * s_yd)[None, :], b_1 * b_cos + b_0 * b_sin, mask=m_p)
        if BR > 0:
            o_r = 2 * P + tl.arange(0, BR).to(tl.int64)
            m_r = m_t[:, None] & (o_r < D)[None, :]
            tl.store(p_yh + (o_r * s_yd)[None, :], tl.load(p_xh + (o_r * s_xd)[None, :], mask=m_r), mask=m_r)
        p_xh += s_xh
        p_yh += s_yh


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool, inplace: bool) -> Tensor:
    """`rotate` by Triton; arguments as there."""
    y = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x4, y4 = (t.view((1,) * (4 - t.dim()) + t.shape) for t in (x, y))
    (b, h, t, d), pairs = x4.shape, cos.shape[-1]
    if not x.numel():
        return y
    cos, sin = (table.expand(b, h, t, pairs) for table in (cos, sin))
    bp = triton.next_power_of_2(max(pairs, 1))
    bt = max(1, min(triton.next_power_of_2(t), TILE_PAIRS // bp))
    tiles = triton.cdiv(t, bt)
    alike = h > 1 and cos.stride(1) == 0 and sin.stride(1) == 0
    heads = heads_per_program(b * tiles, h, multiprocessors(x.device)) if alike else 1
    runs = triton.cdiv(h, heads)
    rest = 0 if inplace or d == 2 * pairs else triton.next_power_of_2(d - 2 * pairs)
    _rotate[(b * runs * tiles,)](
        x4, y4, cos, sin, *x4.stride(), *y4.stride(), *cos.stride(), *sin.stride(), h, t, pairs, d, tiles, runs, heads,
        interleaved, inverse, bt, bp, rest, num_warps=4,
    )  # fmt: skip
    return y


def heads_per_program(programs: int, heads: int, processors: int) -> int:
    """Heads that share one reading of the tables: as many as leave about eight programs for each multiprocessor, at most 8."""
    return max(1, min(8, heads, programs * heads // (8 * processors)))
