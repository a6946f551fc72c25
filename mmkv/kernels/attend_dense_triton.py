"""Triton kernel of `attend_dense` and `attend_ragged`: flash decoding over keys and values as they are.

One program holds a tile of query rows, all query heads of a KV head side by side, and a run of keys (FlashAttention, arXiv
2205.14135, split over keys as FlashDecoding does). What a query may see comes from positions, so that no mask has to exist;
tiles of keys that none of a program's queries sees are never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sight import Sight
from ._splits import split_count
from .merge_triton import merge_triton
from .triton_scores import LOG2E, in_powers_of_two, product_type

MAX_CHANNELS = 512
STRIDES = ["s_mb", "s_mh", "s_mg", "s_mq", "s_wb", "s_wh", "s_wt", "s_pb", "s_pt"]
SIZES = ["k_start", "window", "T", "TQ", "KEYS_PER_SPLIT", *STRIDES]  # they grow and differ: one variant serves all


@triton.jit
def _near(b_x):
    """Distances int64 as int32; those that are too far count as very far."""
    return tl.minimum(tl.maximum(b_x, -2147483647), 2147483647).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def attend(
    p_q, s_qb, s_qh, s_qt, s_qd, p_k, s_kb, s_kh, s_kt, s_kd, p_v, s_vb, s_vh, s_vt, s_vd,
    p_start, p_count, p_mask, s_mb, s_mh, s_mg, s_mq, s_mt, p_weight, s_wb, s_wh, s_wt, p_at, p_qpos, s_pb, s_pt,
    p_out, p_lse, scale, softcap, k_start, window, T, TQ, R, HKV, KEYS_PER_SPLIT,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr,
    WEIGHT: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, AT: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TYPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Program (row and tile of query rows, run of keys): partial out [splits, R, G, TQ, DV], lse [splits, R, G, TQ].

    Args:
        p_start, p_count: with RAGGED, each row's first key and number of keys; else rows are batch elements and KV heads
            of T keys.
        MASK: "none", "keys" (the same for all queries of a KV head) or "all".
        AT: where a key's position comes from: "k_start" (of key 0), "row" (p_at has each row's first) or "key" (p_at has all).
        TYPE: of the numbers that are multiplied.
    """
    TILES = (G * TQ + BM - 1) // BM
    i_r, i_m = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    i_s = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_r // HKV, i_r % HKV
    o_m = i_m * BM + tl.arange(0, BM)  # query row: head within the group * TQ + token
    m_m = o_m < G * TQ
    o_g, o_tq = (o_m // TQ).to(tl.int64), (o_m % TQ).to(tl.int64)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    m_d, m_v = o_d < D, o_v < DV
    p_qm = p_q + i_b * s_qb + (i_h * G + o_g) * s_qh + o_tq * s_qt
    b_q = tl.load(p_qm[:, None] + (o_d.to(tl.int64) * s_qd)[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_q = b_q.to(TYPE)

    b_n = tl.zeros((), dtype=tl.int32) + T
    if RAGGED:
        b_first = tl.load(p_start + i_r).to(tl.int64)
        b_n = tl.minimum(tl.load(p_count + i_r).to(tl.int32), b_n)
        p_kr, p_vr = p_k + b_first * s_kt, p_v + b_first * s_vt
    else:
        p_kr, p_vr = p_k + i_b * s_kb + i_h * s_kh, p_v + i_b * s_vb + i_h * s_vh
    first = (i_s * KEYS_PER_SPLIT).to(tl.int32)
    last = tl.minimum(first + KEYS_PER_SPLIT, b_n)
    b_at, b_low = tl.zeros((BM,), dtype=tl.int32), tl.zeros((BM,), dtype=tl.int32)
    b_zero = tl.zeros((), dtype=tl.int64) + k_start  # what positions count from: key 0, or the first query
    if CAUSAL or WINDOW:
        if AT == "row":
            b_zero = tl.load(p_at + i_r).to(tl.int64)
        if AT == "key":
            b_zero = tl.load(p_qpos + i_b * s_pb).to(tl.int64)
        b_true = tl.load(p_qpos + i_b * s_pb + o_tq * s_pt, mask=m_m, other=0).to(tl.int64) - b_zero
        b_at, b_low = _near(b_true), _near(b_true - window)
        if AT != "key":  # keys are consecutive: leave out those that no query sees
            if CAUSAL:
                last = tl.minimum(last, tl.max(tl.where(m_m, tl.minimum(b_at, T), -1), 0) + 1)
            if WINDOW:
                first = tl.maximum(first, tl.min(tl.where(m_m, tl.minimum(b_low, T), T), 0) + 1)

    b_top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)
    b_o = tl.zeros((BM, BV), dtype=tl.float32)
    for t in range(first, last, BT):
        o_t = (t + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < last
        p_kt = p_kr + (o_t * s_kt)[:, None] + (o_d.to(tl.int64) * s_kd)[None, :]
        b_k = tl.load(p_kt, mask=m_t[:, None] & m_d[None, :], other=0.0).to(TYPE)
        b_s = in_powers_of_two(tl.dot(b_q, tl.trans(b_k), input_precision=PREC), scale, softcap, SOFTCAP)
        if WEIGHT:
            b_w = tl.load(p_weight + i_b * s_wb + i_h * s_wh + o_t * s_wt, mask=m_t, other=0.0)
            b_s += tl.where(b_w > 0, tl.log2(tl.where(b_w > 0, b_w, 1.0)), float("-inf"))[None, :]
        m_s = m_t[None, :]
        if MASK == "keys":
            m_s = m_s & (tl.load(p_mask + i_b * s_mb + i_h * s_mh + o_t * s_mt, mask=m_t, other=0) != 0)[None, :]
        if MASK == "all":
            p_mm = p_mask + i_b * s_mb + i_h * s_mh + o_g * s_mg + o_tq * s_mq
            m_s = m_s & m_m[:, None]
            m_s = m_s & (tl.load(p_mm[:, None] + (o_t * s_mt)[None, :], mask=m_s, other=0) != 0)
        if CAUSAL or WINDOW:
            b_kat = t + tl.arange(0, BT)
            if AT == "key":
                b_kat = _near(tl.load(p_at + b_first + o_t, mask=m_t, other=0).to(tl.int64) - b_zero)
            if CAUSAL:
                m_s = m_s & (b_kat[None, :] <= b_at[:, None])
            if WINDOW:
                m_s = m_s & (b_kat[None, :] > b_low[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: exp(-inf - 0) = 0, not NaN
        b_p = tl.exp2(b_s - b_base[:, None])
        b_fade = tl.exp2(b_top - b_base)
        b_top = b_new
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        p_vt = p_vr + (o_t * s_vt)[:, None] + (o_v.to(tl.int64) * s_vd)[None, :]
        b_v = tl.load(p_vt, mask=m_t[:, None] & m_v[None, :], other=0.0).to(TYPE)
        b_o = tl.dot(b_p.to(TYPE), b_v, b_o * b_fade[:, None], input_precision=PREC)

    o_row = (i_s * R + i_r) * G * TQ + o_m
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing seen: out 0, lse -inf
    tl.store(p_lse + o_row, (b_top + tl.log2(b_sum)) / LOG2E, mask=m_m)
    b_o = b_o / b_sum[:, None]
    tl.store(p_out + o_row[:, None] * DV + o_v[None, :], b_o, mask=m_m[:, None] & m_v[None, :])


class Tiles(NamedTuple):
    """Sizes of a program: query rows, keys of a turn, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(rows: int, channels: int, wide: bool, by_query: bool = False) -> Tiles:
    """Sizes for `rows` query rows of a KV head, such that 99 KiB of shared memory suffice and next to no register is spilled.

    Args:
        channels: of keys or values, the larger, rounded up to a power of two.
        wide: products of fp32 numbers, which are made without tensor cores where they have to be exact.
        by_query: there is a mask that differs among queries; scores take another shape in registers then.
    """
    most, keys, warps, stages = 128, 64, 4, 2
    if channels > 128 or by_query:
        most, keys = 32, 32
    if channels > 256:
        most, keys = 16, 16
    if wide:
        most, keys, warps, stages = 32 if channels <= 128 else 16, 32 if channels <= 256 else 16, 8, 1
    bm = min(most, max(16, triton.next_power_of_2(rows)))
    return Tiles(bm, keys, 8 if bm == 128 else warps, stages)


def launch(
    q: Tensor, k: Tensor, v: Tensor, rows: tuple[Tensor, Tensor] | None, longest: int, heads: int, sight: Sight, *,
    scale: float, exact: bool | None, splits: int | None, merged: bool, places: str = "k_start",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel.

    Args:
        q: [B, Hq, Tq, D].
        k, v: [B, Hkv, T, D | Dv]; with `rows`, flat, [N, D | Dv].
        rows: int [R] first key and int [R] number of keys of each row.
        longest: keys of the longest row.
        heads: Hkv.
        sight: with `rows`, positions are one number, int [R] of each row's first key or int [N] of all.
        splits: runs of keys, None for as many as make the device busy.
        places: "k_start", "row" or "key", which of them it is.
    """
    b, hq, tq, d = q.shape
    dv, n = v.shape[-1], b * hq * tq
    if max(d, dv) > MAX_CHANNELS:
        raise ValueError(
            f"heads of {d} and {dv} channels: the Triton kernel holds up to {MAX_CHANNELS}; use dense attention"
        )
    exact = q.dtype == torch.float32 if exact is None else exact
    same = q.dtype == k.dtype == v.dtype
    wide = exact or not same or q.dtype == torch.float32
    bd, bv = (max(16, triton.next_power_of_2(c)) for c in (d, dv))
    g = hq // heads
    mask, masked = _as_bytes(None if sight.mask is None else sight.mask.expand(b, heads, g, tq, longest))
    size = tiles(g * tq, max(bd, bv), wide, masked == "all")
    programs = b * heads * triton.cdiv(g * tq, size.rows)
    steps = triton.cdiv(longest, size.keys)
    splits = split_count(programs, steps, q.device) if splits is None else splits
    per_split = size.keys * max(1, triton.cdiv(steps, splits))
    splits = max(1, triton.cdiv(longest, per_split))
    part = torch.empty(splits, b, hq, tq, dv, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, b, hq, tq, dtype=torch.float32, device=q.device)
    if n and dv:
        at, qpos = sight.at, sight.q_positions
        weight = sight.weight
        attend[(programs, splits)](
            q, *q.stride(), k, *_strides(k), v, *_strides(v), *(rows or (q, q)), *(mask or (q, 0, 0, 0, 0, 0)),
            *((q, 0, 0, 0) if weight is None else (weight, *weight.stride())), at if isinstance(at, Tensor) else q,
            *((q, 0, 0) if qpos is None else (qpos, *qpos.stride())), part, lse, scale, sight.softcap or 1.0,
            0 if isinstance(at, Tensor) else at, sight.window or 0, longest, tq, b * heads, heads, per_split, g, d, dv,
            rows is not None, masked, weight is not None, sight.softcap is not None, sight.causal,
            sight.window is not None, places, size.rows, size.keys, bd, bv,
            tl.float32 if wide else product_type(q, k, v),
            "ieee" if exact or not wide else "tf32", num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
    if not merged:
        return part, lse
    return (part[0], lse[0]) if splits == 1 else merge_triton([(part, lse)])


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 4 else (0, 0, *x.stride())


def _as_bytes(mask: Tensor | None) -> tuple[tuple | None, str]:
    """Pointer and strides of a mask [B, Hkv, G, Tq, T], and whether it differs among queries of a KV head."""
    if mask is None:
        return None, "none"
    shared = all(size == 1 or stride == 0 for size, stride in zip(mask.shape[2:4], mask.stride()[2:4]))
    return (mask.view(torch.uint8), *mask.stride()), "keys" if shared else "all"


def attend_dense_triton(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, *, scale: float, exact: bool | None = None,
    splits: int | None = None, merged: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend_dense` by Triton; splits: runs of keys."""
    _, heads, t, _ = k.shape
    return launch(q, k, v, None, t, heads, sight, scale=scale, exact=exact, splits=splits, merged=merged)
