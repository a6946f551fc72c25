"""Triton twin of `group_mean` and `group_total`: each group's program gathers its members; nothing is added atomically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_mean import Members

GROUPS = 16  # that a program sums numbers of
CHANNELS = 512  # at most, of a program that averages vectors
MEMBERS = 4  # whose loads are under way at a time, of that program; most groups of a matching are smaller


@triton.jit
def _total(
    p_v, p_order, p_bounds, p_out, s_vb, s_vn, N, COUNT, TILES, BG: tl.constexpr, BJ: tl.constexpr
):  # fmt: skip
    """Program (batch element, tile of groups): sums of numbers, in fp32."""
    i_p = tl.program_id(0)
    i_b = (i_p // TILES).to(tl.int64)
    o_g = i_p % TILES * BG + tl.arange(0, BG)
    m_g = o_g < COUNT
    p_bound = p_bounds + i_b * (COUNT + 1) + o_g
    b_first = tl.load(p_bound, mask=m_g, other=0)
    b_last = tl.load(p_bound + 1, mask=m_g, other=0)
    b_sum = tl.zeros((BG,), dtype=tl.float32)
    for j in range(0, tl.max(b_last - b_first, 0), BJ):
        o_j = b_first[:, None] + j + tl.arange(0, BJ)[None, :]
        m_j = o_j < b_last[:, None]
        o_n = tl.load(p_order + i_b * N + o_j, mask=m_j, other=0)
        b_sum += tl.sum(tl.load(p_v + i_b * s_vb + o_n * s_vn, mask=m_j, other=0.0).to(tl.float32), 1)
    tl.store(p_out + i_b * COUNT + o_g, b_sum, mask=m_g)


@triton.jit
def _mean(
    p_x, p_w, p_whole, p_order, p_bounds, p_out, s_xb, s_xn, s_xc, s_wb, s_wn, N, COUNT, C, TILES,
    WEIGHTED: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (batch element, group, tile of channels): the mean of the group's members."""
    i_p = tl.program_id(0).to(tl.int64)
    i_g = i_p // TILES  # counted over the batch
    i_b = i_g // COUNT
    o_c = (i_p % TILES).to(tl.int32) * BC + tl.arange(0, BC)
    m_c = o_c < C
    p_bound = p_bounds + i_g + i_b
    b_first, b_last = tl.load(p_bound), tl.load(p_bound + 1)
    b_whole = (b_last - b_first).to(tl.float32)
    if WEIGHTED:
        b_whole = tl.load(p_whole + i_g)
    b_sum = tl.zeros((BC,), dtype=tl.float32)
    for j in range(0, b_last - b_first, BJ):
        o_j = b_first + j + tl.arange(0, BJ)
        m_j = o_j < b_last
        o_n = tl.load(p_order + i_b * N + o_j, mask=m_j, other=0)
        b_share = m_j.to(tl.float32)
        if WEIGHTED:
            b_share = tl.load(p_w + i_b * s_wb + o_n * s_wn, mask=m_j, other=0.0).to(tl.float32)
        b_share = tl.div_rn(b_share, tl.zeros((BJ,), dtype=tl.float32) + tl.where(b_whole > 0, b_whole, 1.0))
        b_share = tl.where(b_whole > 0, b_share, 0.0)
        p_xj = p_x + i_b * s_xb + o_n[:, None] * s_xn + (o_c.to(tl.int64) * s_xc)[None, :]
        b_x = tl.load(p_xj, mask=m_j[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_share[:, None], 0)
    tl.store(p_out + i_g * C + o_c, b_sum, mask=m_c)


def group_total_triton(values: Tensor, members: Members) -> Tensor:
    """`group_total` by Triton; arguments as there."""
    batch, n = values.shape
    count = members.bounds.shape[1] - 1
    out = torch.empty(batch, count, dtype=values.dtype, device=values.device)
    tiles = triton.cdiv(count, GROUPS)
    if batch * count:
        _total[(batch * tiles,)](
            values, *(t.contiguous() for t in members), out, *values.stride(), n, count, tiles, GROUPS, 16, num_warps=2
        )
    return out


def group_mean_triton(x: Tensor, weight: Tensor | None, members: Members) -> Tensor:
    """`group_mean` by Triton; arguments as there."""
    batch, n, c = x.shape
    count = members.bounds.shape[1] - 1
    out = torch.empty(batch, count, c, dtype=x.dtype, device=x.device)
    if not batch * count * c:
        return out
    w, whole, strides = x, x, (0, 0)  # never read
    if weight is not None:
        w = weight.float()
        strides = w.stride()
        whole = group_total_triton(w, members)
    bc = min(CHANNELS, triton.next_power_of_2(c))
    tiles = triton.cdiv(c, bc)
    _mean[(batch * count * tiles,)](
        x, w, whole, *(t.contiguous() for t in members), out, *x.stride(), *strides, n, count, c, tiles,
        weight is not None, MEMBERS, bc, num_warps=4 if bc > 128 else 1,
    )  # fmt: skip
    return out
