"""Triton twin of `probe`: one kernel finds each row's softmax sum, one adds the probabilities up, key tile by key tile.

Both score each pair of row and key once; no probability leaves the registers. Rows are put together from all query heads of a
KV head, so keys are read once in each kernel. Sums are taken in a fixed order: the same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._splits import multiprocessors
from .probe import Mass, count_shape
from .triton_scores import in_powers_of_two, product_type, seen, span

MOST_CHANNELS = 512
MOST_SPLITS = 64  # of the keys, over programs of the first kernel
SIZES = ["k_start", "window", "P", "T", "N", "ROW_TILES", "PER_SPLIT"]  # they differ and grow: one variant serves all
MERGED = tl.constexpr(8)  # splits that are merged at a time


@triton.jit(do_not_specialize=SIZES)
def _softmax_sums(
    p_q, s_qb, s_qh, s_qp, s_qd, p_k, s_kb, s_kh, s_kt, s_kd, p_mask, s_mb, s_mh, s_mp, s_mt, p_at, s_ab, p_soft,
    scale, softcap, window, k_start, HKV, P, T, N, ROW_TILES, PER_SPLIT,
    G: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, DTYPE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (tile of a KV head's rows, run of keys): top and sum of its part, [splits, 2, N = B * Hq * P], to base 2."""
    i_r, i_s = tl.program_id(0) // ROW_TILES, tl.program_id(1)
    i_b, i_h = (i_r // HKV).to(tl.int64), (i_r % HKV).to(tl.int64)
    o_m = (tl.program_id(0) % ROW_TILES).to(tl.int64) * BM + tl.arange(0, BM)  # head within the group * P + row
    m_m = o_m < G * P
    o_h, o_p = i_h * G + o_m // P, o_m % P
    o_d = tl.arange(0, BD)
    o_q = i_b * s_qb + o_h * s_qh + o_p * s_qp
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :] * s_qd, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
    b_after, b_until = span(p_at + i_b * s_ab + o_p, m_m, k_start, window, T, CAUSAL, WINDOW)
    # keys before the first row's span, and behind the last row's, are seen by none of them
    last = tl.minimum((i_s + 1) * PER_SPLIT, tl.max(tl.where(m_m, b_until, -1), 0) + 1)
    first = i_s * PER_SPLIT
    if WINDOW:
        first += tl.maximum(tl.min(tl.where(m_m, b_after, T), 0) + 1 - first, 0) // BT * BT

    b_top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)
    o_mask = i_b * s_mb + o_h * s_mh + o_p * s_mp
    p_k += i_b * s_kb + i_h * s_kh
    for t in range(first, last, BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < last
        p_kt = p_k + o_t.to(tl.int64)[None, :] * s_kt + o_d[:, None] * s_kd
        b_k = tl.load(p_kt, mask=m_t[None, :] & (o_d < D)[:, None], other=0.0).to(DTYPE)
        b_s = in_powers_of_two(tl.dot(b_q, b_k, input_precision=PREC), scale, softcap, SOFTCAP)
        m_s = m_m[:, None] & m_t[None, :]
        m_s = seen(m_s, o_mask[:, None], o_t[None, :], b_after[:, None], b_until[:, None], p_mask, s_mt,
                    CAUSAL, WINDOW, MASK)  # fmt: skip
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: exp(-inf - 0) = 0, not NaN
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_top = b_new
    o_n = i_s.to(tl.int64) * 2 * N + (i_b * HKV + i_h) * G * P + o_m
    tl.store(p_soft + o_n, b_top, mask=m_m)
    tl.store(p_soft + N + o_n, b_sum, mask=m_m)


@triton.jit
def _merged(p_soft, o_n, m_n, SPLITS, N, BN: tl.constexpr):
    """Top score and 1 / sum of rows o_n [BN] over all splits; (0, 0) where a row sees nothing."""
    b_top = tl.full((BN,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BN,), dtype=tl.float32)
    for s in range(0, SPLITS, MERGED):
        o_s = s + tl.arange(0, MERGED)
        m_s = m_n[:, None] & (o_s < SPLITS)[None, :]
        p_s = p_soft + o_n[:, None] + o_s.to(tl.int64)[None, :] * 2 * N
        b_part = tl.load(p_s, mask=m_s, other=float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_part, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_part - b_base[:, None]) * tl.load(p_s + N, mask=m_s, other=0.0)
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(b_weight, 1)
        b_top = b_new
    m_any = b_sum > 0.0
    return tl.where(m_any, b_top, 0.0), tl.where(m_any, 1.0 / tl.where(m_any, b_sum, 1.0), 0.0)


@triton.jit
def _looking(
    p_at, first_key, last_key, k_start, window, P, T, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BP: tl.constexpr
):
    """The run of rows, first and end, outside of which none sees keys first_key ... last_key; positions may have any order."""
    first, end = P, 0
    for p in range(0, P, 1024):
        o_p = p + tl.arange(0, 1024)
        m_p = o_p < P
        b_after, b_until = span(p_at + o_p, m_p, k_start, window, T, CAUSAL, WINDOW)
        m_p = m_p & (b_until >= first_key) & (b_after < last_key)
        first = tl.minimum(first, tl.min(tl.where(m_p, o_p, P), 0))
        end = tl.maximum(end, tl.max(tl.where(m_p, o_p + 1, 0), 0))
    return first // BP * BP, end


@triton.jit(do_not_specialize=[*SIZES[:5], "SPLITS", "KEY_TILES", "HEAD_TILES", "HEADS", "s_cb", "s_ch"])
def _mass(
    p_q, s_qb, s_qh, s_qp, s_qd, p_k, s_kb, s_kh, s_kt, s_kd, p_mask, s_mb, s_mh, s_mp, s_mt, p_at, s_ab, p_soft,
    p_sum, p_max, p_count, s_cb, s_ch,
    scale, softcap, window, k_start, HKV, P, T, N, SPLITS, KEY_TILES, HEAD_TILES, HEADS,
    G: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, DTYPE: tl.constexpr, PREC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (KV head, HEADS of its query heads, tile of keys): sum, max and count over all rows, BG heads at a time.

    Keys are the tall side of the product, so that few rows waste little, and rows lie side by side to be summed.
    """
    i_t, i_g = tl.program_id(0) % KEY_TILES, tl.program_id(0) // KEY_TILES % HEAD_TILES
    i_r = tl.program_id(0) // KEY_TILES // HEAD_TILES
    i_b, i_h = (i_r // HKV).to(tl.int64), (i_r % HKV).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_d = tl.arange(0, BD)
    p_kt = p_k + i_b * s_kb + i_h * s_kh + o_t.to(tl.int64)[:, None] * s_kt + o_d[None, :] * s_kd
    b_k = tl.load(p_kt, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
    p_at += i_b * s_ab
    first, end = 0, P
    if CAUSAL or WINDOW:
        first, end = _looking(p_at, i_t * BT, tl.minimum(i_t * BT + BT, T) - 1, k_start, window, P, T,
                              CAUSAL, WINDOW, BP)  # fmt: skip
    o_n = tl.arange(0, BG * BP)  # head * BP + row

    for g in range(i_g * HEADS, tl.minimum(i_g * HEADS + HEADS, G), BG):
        o_h = i_h * G + g + o_n // BP
        m_h = g + o_n // BP < tl.minimum(i_g * HEADS + HEADS, G)
        b_sum = tl.zeros((BT, BG), dtype=tl.float32)
        b_max = tl.zeros((BT, BG), dtype=tl.float32)
        b_count = tl.zeros((BT, BG), dtype=tl.int32)
        # where heads or batch elements share a count, the first of them takes it
        o_g = g + tl.arange(0, BG)
        o_first = tl.where(s_cb == 0, i_b, 0) + tl.where(s_ch == 0, i_h * G + o_g, 0)
        counts = (CAUSAL or WINDOW or MASK) and tl.min(o_first, 0) == 0
        for p in range(first, end, BP):
            o_p = p + o_n % BP
            m_n = m_h & (o_p < end)
            o_q = i_b * s_qb + o_h * s_qh + o_p.to(tl.int64) * s_qp
            p_qn = p_q + o_q[None, :] + o_d[:, None] * s_qd
            b_q = tl.load(p_qn, mask=m_n[None, :] & (o_d < D)[:, None], other=0.0).to(DTYPE)
            b_top, b_share = _merged(p_soft, (i_b * HKV * G + o_h) * P + o_p, m_n, SPLITS, N, BG * BP)
            b_s = in_powers_of_two(tl.dot(b_k, b_q, input_precision=PREC), scale, softcap, SOFTCAP)
            b_after, b_until = span(p_at + o_p, m_n, k_start, window, T, CAUSAL, WINDOW)
            o_mask = i_b * s_mb + o_h * s_mh + o_p.to(tl.int64) * s_mp
            m_s = m_t[:, None] & m_n[None, :]
            m_s = seen(m_s, o_mask[None, :], o_t[:, None], b_after[None, :], b_until[None, :], p_mask, s_mt,
                        CAUSAL, WINDOW, MASK)  # fmt: skip
            b_p = tl.where(m_s, tl.exp2(b_s - b_top[None, :]) * b_share[None, :], 0.0)
            b_p = tl.reshape(b_p, (BT, BG, BP))
            b_sum += tl.sum(b_p, 2)
            b_max = tl.maximum(b_max, tl.max(b_p, 2))
            if counts:
                b_count += tl.sum(tl.reshape(m_s.to(tl.int32), (BT, BG, BP)), 2)
        m_o = m_t[:, None] & (o_g < tl.minimum(i_g * HEADS + HEADS, G))[None, :]
        o_o = ((i_b * HKV + i_h) * G + o_g)[None, :] * T + o_t[:, None]
        tl.store(p_sum + o_o, b_sum, mask=m_o)
        tl.store(p_max + o_o, tl.minimum(b_max, 1.0), mask=m_o)
        if counts:
            m_o = m_o & (o_first == 0)[None, :]
            tl.store(p_count + i_b * s_cb + (i_h * G + o_g)[None, :] * s_ch + o_t[:, None], b_count, mask=m_o)


def tiles(channels: int, size: int) -> tuple[int, int]:
    """Rows (and keys of the first kernel) and keys (of the second) of a tile: 64 and 128 of 128 channels of 16 bits, fewer of
    wider ones; powers of two."""
    room = max(1, triton.next_power_of_2(channels) * size // 256)
    return max(16, 64 // room), max(32, 128 // room)


def probe_triton(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    positions: Tensor | None,
    causal: bool,
    window: int | None,
    k_start: int,
    splits: int | None = None,
) -> Mass:
    """`probe` by Triton; arguments as `probe_reference` has them; splits: runs of keys of the first kernel."""
    (b, hq, p, d), (_, hkv, t, _) = q.shape, k.shape
    if d > MOST_CHANNELS:
        raise ValueError(f"the Triton kernel of probe holds heads up to {MOST_CHANNELS} channels, not {d}")
    total = torch.empty(b, hq, t, dtype=torch.float32, device=q.device)
    top = torch.empty_like(total)
    shape = count_shape(b, hq, t, mask, positions)
    limited = mask is not None or positions is not None
    count = (
        torch.empty(shape, dtype=torch.int32, device=q.device) if limited else q.new_full(shape, p, dtype=torch.int32)
    )
    if total.numel() == 0 or p == 0:
        return Mass(total.zero_(), top.zero_(), count.zero_() if p == 0 else count)

    g, n = hq // hkv, b * hq * p
    dtype = product_type(q, k)
    bm, bt = tiles(d, 4 if dtype == tl.float32 else 2)
    sights = q if mask is None else mask.expand(b, hq, p, t).view(torch.uint8)
    at = q if positions is None else positions.contiguous()
    tensors = (q, *q.stride(), k, *k.stride(), sights, *sights.stride(), at, at.stride(0) if at.shape[0] > 1 else 0)
    common = (scale, softcap or 1.0, window or 0, k_start, hkv, p, t, n)
    flags = (g, d, softcap is not None, causal, window is not None, mask is not None, dtype, "tf32x3")
    bd = max(16, triton.next_power_of_2(d))
    wide = mask is not None or dtype == tl.float32  # addresses of a mask, or products in three steps, take registers
    sms = multiprocessors(q.device)

    rows = min(bm, max(16, triton.next_power_of_2(g * p)))
    row_tiles = triton.cdiv(g * p, rows)
    if splits is None:
        splits = min(MOST_SPLITS, triton.cdiv(4 * sms, b * hkv * row_tiles), triton.cdiv(t, 4 * bm))
    per_split = triton.cdiv(triton.cdiv(t, splits), bm) * bm
    splits = triton.cdiv(t, per_split)
    soft = torch.empty(splits, 2, n, dtype=torch.float32, device=q.device)
    _softmax_sums[(b * hkv * row_tiles, splits)](
        *tensors, soft, *common, row_tiles, per_split, *flags, rows, bm, bd, num_warps=8 if wide else 4, num_stages=3
    )

    bp = min(bm, triton.next_power_of_2(p))
    bg = max(min(bm // bp, triton.next_power_of_2(g)), 16 // bp, 1)
    key_tiles = triton.cdiv(t, bt)
    heads = g if b * hkv * key_tiles >= 2 * sms else bg  # few keys: heads on other multiprocessors
    head_tiles = triton.cdiv(g, heads)
    s_cb, s_ch = (t * shape[1] if shape[0] > 1 else 0), (t if shape[1] > 1 else 0)
    _mass[(b * hkv * head_tiles * key_tiles,)](
        *tensors, soft, total, top, count, s_cb, s_ch, *common, splits, key_tiles, head_tiles, heads, *flags,
        bg, bp, bt, bd, num_warps=8 if wide or bg * bp >= 32 else 4, num_stages=2,
    )  # fmt: skip
    return Mass(total, top, count)
