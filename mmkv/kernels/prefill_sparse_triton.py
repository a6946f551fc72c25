"""Triton twin of `prefill_sparse`: flash attention (arXiv 2205.14135) whose rows are found by an index.

A program holds a tile of one head's chosen queries and walks over the chosen keys up to them; queries, keys and values are read
where they lie and results written where they belong, so that nothing is gathered into memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .triton_scores import LOG2E, architecture, in_powers_of_two, product_type

MOST_CHANNELS = 512


@triton.jit
def _tile(
    b_o, b_top, b_sum, b_q, p_k, s_kt, s_kd, p_v, s_vt, s_vd, p_index, t, o_m, o_d, o_v, N, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, DTYPE: tl.constexpr,
    PREC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One tile of keys, t ... t + BT - 1 of the chosen ones; EDGE: where some come later than some queries."""
    o_t = t + tl.arange(0, BT)
    m_t = o_t < N
    b_at = tl.load(p_index + o_t, mask=m_t, other=0).to(tl.int64)
    p_kt = p_k + b_at[None, :] * s_kt + o_d[:, None] * s_kd
    b_k = tl.load(p_kt, mask=m_t[None, :] & (o_d < D)[:, None], other=0.0).to(DTYPE)
    b_s = in_powers_of_two(tl.dot(b_q, b_k, input_precision=PREC), scale, softcap, SOFTCAP)
    if EDGE:
        b_s = tl.where(o_t[None, :] <= o_m[:, None], b_s, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_fade = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_fade + tl.sum(b_p, 1)
    p_vt = p_v + b_at[:, None] * s_vt + o_v[None, :] * s_vd
    b_v = tl.load(p_vt, mask=m_t[:, None] & (o_v < DV)[None, :], other=0.0).to(DTYPE)
    b_o = tl.dot(b_p.to(DTYPE), b_v, b_o * b_fade[:, None], input_precision=PREC)
    return b_o, b_new, b_sum


@triton.jit(do_not_specialize=["N", "ROW_TILES"])
def _attend(
    p_q, s_qh, s_qt, s_qd, p_k, s_kh, s_kt, s_kd, p_v, s_vh, s_vt, s_vd, p_index, p_sinks, p_out, s_oh,
    scale, softcap, N, ROW_TILES,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    DTYPE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Program (tile of chosen queries, query head); tiles with the most keys come first, that none is left alone at the end."""
    i_m, i_h = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES, (tl.program_id(0) // ROW_TILES).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < N
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    b_row = tl.load(p_index + o_m, mask=m_m, other=0).to(tl.int64)
    p_qm = p_q + i_h * s_qh + b_row[:, None] * s_qt + o_d[None, :] * s_qd
    b_q = tl.load(p_qm, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
    p_k += i_h // G * s_kh
    p_v += i_h // G * s_vh
    b_top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)
    b_o = tl.zeros((BM, BV), dtype=tl.float32)

    whole = i_m * BM // BT * BT  # keys before all of these queries
    for t in range(0, whole, BT):
        b_o, b_top, b_sum = _tile(
            b_o, b_top, b_sum, b_q, p_k, s_kt, s_kd, p_v, s_vt, s_vd, p_index, t, o_m, o_d, o_v, N, scale, softcap,
            D, DV, SOFTCAP, False, DTYPE, PREC, BT,
        )  # fmt: skip
    for t in range(whole, tl.minimum(i_m * BM + BM, N), BT):
        b_o, b_top, b_sum = _tile(
            b_o, b_top, b_sum, b_q, p_k, s_kt, s_kd, p_v, s_vt, s_vd, p_index, t, o_m, o_d, o_v, N, scale, softcap,
            D, DV, SOFTCAP, True, DTYPE, PREC, BT,
        )  # fmt: skip

    if SINKS:  # one more key, with value zero
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_top, b_sink)
        b_fade = tl.exp2(b_top - b_new)
        b_sum = b_sum * b_fade + tl.exp2(b_sink - b_new)
        b_o *= b_fade[:, None]
    p_o = p_out + i_h * s_oh + b_row[:, None] * DV + o_v[None, :]
    tl.store(p_o, (b_o / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_v < DV)[None, :])


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps and stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(channels: int, wide: bool, warp_groups: bool, n: int) -> Tiles:
    """Sizes for `n` queries, the largest that registers and 99 KiB hold (docs/kernels.md).

    Args:
        channels: of keys or values, the larger, a power of two.
        wide: products of fp32.
        warp_groups: four warps multiply together, straight from shared memory (sm_90).
    """
    if wide:
        size = Tiles(*((64, 32, 4, 1) if channels <= 64 else (32, 32, 4, 1) if channels <= 128 else (16, 16, 4, 1)))
    elif channels <= 128:
        size = Tiles(*((128, 64, 8, 3) if channels <= 64 else (128, 64, 8, 2) if warp_groups else (128, 32, 8, 3)))
    else:
        size = Tiles(*((64, 32, 8, 2) if channels <= 256 else (32, 16, 8, 1)))
    return size._replace(rows=min(size.rows, max(16, triton.next_power_of_2(n))))


def prefill_sparse_triton(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`prefill_sparse` by Triton; arguments as there."""
    (hq, t, d), dv, n = q.shape, v.shape[-1], len(index)
    bd, bv = (max(16, triton.next_power_of_2(c)) for c in (d, dv))
    if max(d, dv) > MOST_CHANNELS:
        raise ValueError(
            f"heads of {d} and {dv} channels: the Triton kernel holds up to {MOST_CHANNELS}; pass gather=True"
        )
    out = q.new_zeros(hq, t, dv)
    if n == 0 or out.numel() == 0:
        return out
    dtype = product_type(q, k, v)
    size = tiles(max(bd, bv), dtype == tl.float32, q.is_cuda and architecture() >= 90, n)
    row_tiles = triton.cdiv(n, size.rows)
    _attend[(row_tiles * hq,)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), index.contiguous(), q if sinks is None else sinks.contiguous(),
        out, out.stride(0), scale, softcap or 1.0, n, row_tiles, hq // k.shape[0], d, dv, softcap is not None,
        sinks is not None, dtype, "tf32x3", size.rows, size.keys, bd, bv, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return out
