"""Triton twin of `attend_packed`: flash decoding over packed codes.

One program holds all query heads of a KV head and a run of slots; unpacking happens in registers. Runs are merged by logsumexp
in a last kernel, so a batch of one fills the GPU as well. Inexact products with evenly spaced codes take the kernel of
`attend_planes_triton`, everything else the general one here (rows padded to 16 for `tl.dot`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._splits import split_count
from .attend_planes_triton import SIZES, attend_planes, fits, order
from .blocks import Blocks, scale8_table
from .merge_triton import merge_triton
from .table import Table
from .triton_codes import classes, decode_levels, level_table, load_scale

MAX_VALUE_CHANNELS = 512
TILE_KEYS = 16384  # numbers of a block's keys that are unpacked at a time


@triton.jit
def _key_class(
    b_s, p_q, m_m, s_qd, p_codes, p_scale, p_zero, b_top, p_lut, p_power, o_t, m_t,
    CLASSES: tl.constexpr, I: tl.constexpr, SCALE8: tl.constexpr, BC: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds the scores of one class of channels, groups along tokens, to b_s [BM, BT]."""
    for c in range(0, CLASSES[I][0], BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < CLASSES[I][0]
        o_q = (CLASSES[I][1] + o_c).to(tl.int64) * s_qd
        b_q = tl.load(p_q[:, None] + o_q[None, :], mask=m_m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        if CLASSES[I][10] >= 0:
            b_z = tl.load(p_zero + CLASSES[I][10] + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_s += tl.sum(b_q * b_z[None, :], 1)[:, None]
        if CLASSES[I][4] > 1:
            if CLASSES[I][9] >= 0:
                b_q *= load_scale(p_scale, CLASSES[I][9] + o_c, m_c, b_top, p_power, SCALE8)[None, :]
            o_b = CLASSES[I][2] + o_c[:, None] * CLASSES[I][3] + (o_t % CLASSES[I][3])[None, :]
            b_byte = tl.load(p_codes + o_b, mask=m_c[:, None] & m_t[None, :], other=0)
            b_k = decode_levels(b_byte, (o_t // CLASSES[I][3])[None, :], p_lut, CLASSES, I)  # [BC, BT]
            b_s += tl.dot(b_q, b_k, input_precision=PREC)
    return b_s


@triton.jit
def _key_tokens(
    b_s, p_q, m_m, s_qd, p_codes, p_scale, p_zero, b_top, p_lut, p_power, o_t, m_t,
    CLASSES: tl.constexpr, I: tl.constexpr, CG: tl.constexpr, SCALE8: tl.constexpr, BC: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Adds the scores of keys with groups along channels to b_s [BM, BT]."""
    NCG: tl.constexpr = CLASSES[I][0] // CG
    for g in range(NCG):
        b_g = tl.zeros_like(b_s)
        b_sum = tl.sum(b_g, 1)
        for c in range(0, CG, BC):
            o_c = c + tl.arange(0, BC)
            m_c = o_c < CG
            o_q = (g * CG + o_c).to(tl.int64) * s_qd
            b_q = tl.load(p_q[:, None] + o_q[None, :], mask=m_m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_sum += tl.sum(b_q, 1)
            if CLASSES[I][4] > 1:
                o_b = (o_t * NCG + g)[None, :] * CLASSES[I][3] + (o_c % CLASSES[I][3])[:, None]
                b_byte = tl.load(p_codes + o_b, mask=m_c[:, None] & m_t[None, :], other=0)
                b_k = decode_levels(b_byte, (o_c // CLASSES[I][3])[:, None], p_lut, CLASSES, I)  # [BC, BT]
                b_g += tl.dot(b_q, b_k, input_precision=PREC)
        if CLASSES[I][9] >= 0:
            b_g *= load_scale(p_scale, o_t * NCG + g, m_t, b_top, p_power, SCALE8)[None, :]
        b_s += b_g
        if CLASSES[I][10] >= 0:
            b_s += b_sum[:, None] * tl.load(p_zero + o_t * NCG + g, mask=m_t, other=0.0).to(tl.float32)[None, :]
    return b_s


@triton.jit
def _value_class(
    b_v, b_scale, b_zero, p_codes, p_scale, p_zero, b_top, p_lut, p_power, o_t, m_t, o_v,
    CLASSES: tl.constexpr, I: tl.constexpr, SCALE8: tl.constexpr,
):  # fmt: skip
    """Fills the columns of one class into levels b_v [BT, BV], scales and zeros [BV]."""
    o_c = o_v - CLASSES[I][1]
    m_c = (o_c >= 0) & (o_c < CLASSES[I][0])
    if CLASSES[I][10] >= 0:
        b_zero += tl.load(p_zero + CLASSES[I][10] + o_c, mask=m_c, other=0.0).to(tl.float32)
    if CLASSES[I][4] > 1:
        o_b = CLASSES[I][2] + o_c[None, :] * CLASSES[I][3] + (o_t % CLASSES[I][3])[:, None]
        b_byte = tl.load(p_codes + o_b, mask=m_t[:, None] & m_c[None, :], other=0)
        b_level = decode_levels(b_byte, (o_t // CLASSES[I][3])[:, None], p_lut, CLASSES, I)
        b_v = tl.where(m_c[None, :], b_level, b_v)
        if CLASSES[I][9] >= 0:
            b_new = load_scale(p_scale, CLASSES[I][9] + o_c, m_c, b_top, p_power, SCALE8)
            b_scale = tl.where(m_c, b_new, b_scale)
    return b_v, b_scale, b_zero


@triton.jit
def _value_tokens(
    p_codes, p_scale, p_zero, b_top, p_lut, p_power, o_t, m_t, o_v,
    CLASSES: tl.constexpr, I: tl.constexpr, CG: tl.constexpr, SCALE8: tl.constexpr,
):  # fmt: skip
    """Values with groups along channels, decoded to fp32 [BT, BV]."""
    NCG: tl.constexpr = CLASSES[I][0] // CG
    o_c = o_v % CG
    m_tv = m_t[:, None] & (o_v < CLASSES[I][0])[None, :]
    o_g = o_t[:, None] * NCG + (o_v // CG)[None, :]
    b_v = tl.zeros(o_g.shape, dtype=tl.float32)
    if CLASSES[I][4] > 1:
        b_byte = tl.load(p_codes + o_g * CLASSES[I][3] + (o_c % CLASSES[I][3])[None, :], mask=m_tv, other=0)
        b_v = decode_levels(b_byte, (o_c // CLASSES[I][3])[None, :], p_lut, CLASSES, I)
    if CLASSES[I][9] >= 0:
        b_v *= load_scale(p_scale, o_g, m_tv, b_top, p_power, SCALE8)
    if CLASSES[I][10] >= 0:
        b_v += tl.load(p_zero + o_g, mask=m_tv, other=0.0).to(tl.float32)
    return b_v


@triton.jit(do_not_specialize=SIZES)
def _attend(
    p_q, s_qb, s_qh, s_qt, s_qd,
    p_kc, p_ks, p_kz, p_kt, p_kl, p_vc, p_vs, p_vz, p_vt, p_vl, p_power,
    p_block, p_count, p_start, p_pos, p_qpos, s_pb, s_pt, p_out, p_lse,
    scale, softcap, window, R, HKV, TQ, S, SLOTS_PER_SPLIT,
    G: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, K_CG: tl.constexpr, K_BYTES: tl.constexpr, K_NS: tl.constexpr, K_NZ: tl.constexpr,
    K_SCALE8: tl.constexpr,
    VALUES: tl.constexpr, V_CG: tl.constexpr, V_BYTES: tl.constexpr, V_NS: tl.constexpr, V_NZ: tl.constexpr,
    V_SCALE8: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Program (row, tile of query rows, split of slots): partial out [splits, R, G, TQ, DV], lse [splits, R, G, TQ]."""
    i_r, i_m, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_r // HKV, i_r % HKV
    o_m = i_m * BM + tl.arange(0, BM)  # query row: head within the group * TQ + token
    m_m = o_m < G * TQ
    o_g, o_tq = (o_m // TQ).to(tl.int64), (o_m % TQ).to(tl.int64)
    p_qm = p_q + i_b * s_qb + (i_h * G + o_g) * s_qh + o_tq * s_qt
    b_at = tl.zeros((BM,), dtype=tl.int64)
    if CAUSAL or WINDOW:
        b_at = tl.load(p_qpos + i_b * s_pb + o_tq * s_pt, mask=m_m, other=0).to(tl.int64)
    o_v = tl.arange(0, BV)
    b_top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)
    b_o = tl.zeros((BM, BV), dtype=tl.float32)

    first = i_s * SLOTS_PER_SPLIT
    for i_slot in range(first, tl.minimum(first + SLOTS_PER_SPLIT, S)):
        b_n = tl.load(p_count + i_r * S + i_slot)
        i_block = tl.load(p_block + i_r * S + i_slot, mask=b_n > 0, other=0).to(tl.int64)
        b_start = tl.load(p_start + i_r * S + i_slot)
        b_ktop, b_vtop = 1.0, 1.0
        if K_SCALE8:
            b_ktop = tl.load(p_kt + i_block).to(tl.float32)
        if V_SCALE8:
            b_vtop = tl.load(p_vt + i_block).to(tl.float32)
        for t in range(0, b_n, BT):
            o_t = t + tl.arange(0, BT)
            m_t = o_t < b_n
            p_c, p_s, p_z = p_kc + i_block * K_BYTES, p_ks + i_block * K_NS, p_kz + i_block * K_NZ
            b_s = tl.zeros((BM, BT), dtype=tl.float32)
            if K_CG > 0:
                b_s = _key_tokens(b_s, p_qm, m_m, s_qd, p_c, p_s, p_z, b_ktop, p_kl, p_power, o_t, m_t,
                                  KEYS, 0, K_CG, K_SCALE8, BC, PREC)  # fmt: skip
            else:
                for i in tl.static_range(len(KEYS)):
                    b_s = _key_class(b_s, p_qm, m_m, s_qd, p_c, p_s, p_z, b_ktop, p_kl, p_power, o_t, m_t,
                                     KEYS, i, K_SCALE8, BC, PREC)  # fmt: skip
            b_s *= scale
            if SOFTCAP:  # tanh by an exponential that cannot overflow
                b_e = tl.exp(-2.0 * tl.abs(b_s) / softcap)
                b_s = tl.where(b_s < 0, -softcap, softcap) * (1.0 - b_e) / (1.0 + b_e)
            m_s = m_m[:, None] & m_t[None, :]
            if CAUSAL or WINDOW:
                b_kat = (b_start + o_t).to(tl.int64)
                if POSITIONS:
                    b_kat = tl.load(p_pos + i_block * GROUP + o_t, mask=m_t, other=0).to(tl.int64)
                if CAUSAL:
                    m_s = m_s & (b_kat[None, :] <= b_at[:, None])
                if WINDOW:
                    m_s = m_s & (b_kat[None, :] > b_at[:, None] - window)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: exp(-inf - 0) = 0, not NaN
            b_p = tl.exp(b_s - b_base[:, None])
            b_fade = tl.exp(b_top - b_base)
            b_top = b_new
            b_sum = b_sum * b_fade + tl.sum(b_p, 1)
            b_o *= b_fade[:, None]

            p_c, p_s, p_z = p_vc + i_block * V_BYTES, p_vs + i_block * V_NS, p_vz + i_block * V_NZ
            if V_CG > 0:
                b_v = _value_tokens(p_c, p_s, p_z, b_vtop, p_vl, p_power, o_t, m_t, o_v, VALUES, 0, V_CG, V_SCALE8)
                b_o += tl.dot(b_p, b_v, input_precision=PREC)
            else:
                b_v = tl.zeros((BT, BV), dtype=tl.float32)
                b_vs = tl.full((BV,), 1.0, dtype=tl.float32)
                b_vz = tl.zeros((BV,), dtype=tl.float32)
                for i in tl.static_range(len(VALUES)):
                    b_v, b_vs, b_vz = _value_class(b_v, b_vs, b_vz, p_c, p_s, p_z, b_vtop, p_vl, p_power, o_t, m_t,
                                                   o_v, VALUES, i, V_SCALE8)  # fmt: skip
                b_o += tl.dot(b_p, b_v, input_precision=PREC) * b_vs[None, :]
                b_o += tl.sum(b_p, 1)[:, None] * b_vz[None, :]

    o_row = (i_s * R + i_r) * G * TQ + o_m
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing seen: out 0, lse -inf
    tl.store(p_lse + o_row, b_top + tl.log(b_sum), mask=m_m)
    b_o = b_o / b_sum[:, None]
    tl.store(p_out + o_row[:, None] * DV + o_v[None, :], b_o, mask=m_m[:, None] & (o_v < DV)[None, :])


def _pool(blocks: Blocks) -> tuple[list[Tensor], tuple]:
    """Pointers (codes, scale, zero, top, levels) and constants of a pool; what a format lacks is never read."""
    spec = blocks.spec
    parts = [blocks.codes, *(blocks.codes if t is None else t for t in (blocks.scale, blocks.zero, blocks.top))]
    pointers = [t.contiguous() for t in parts] + [level_table(spec, blocks.device)]
    cg = spec.channel_group if spec.axis == "token" else 0
    return pointers, (classes(spec), cg, spec.code_bytes, spec.n_scale, spec.n_zero, blocks.top is not None)


def attend_packed_triton(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    table: Table,
    *,
    scale: float,
    softcap: float | None,
    q_positions: Tensor | None,
    causal: bool,
    window: int | None,
    splits: int | None = None,
    exact: bool | None = None,
    merged: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attend_packed` by Triton; arguments as there, q_positions [B, Tq] or None; splits: runs of slots."""
    exact = q.dtype == torch.float32 if exact is None else exact
    b, hq, tq, _ = q.shape
    rows, slots = table.block.shape
    group, dv = keys.spec.group, values.spec.channels
    if dv > MAX_VALUE_CHANNELS:
        raise ValueError(f"the Triton kernel holds value heads up to {MAX_VALUE_CHANNELS} channels, not {dv}")
    by_planes = not exact and fits(keys.spec, values.spec) and len(keys) > 0
    g = hq * b // rows if rows else 1
    n = b * hq * tq
    bm = min(64, max(8 if by_planes else 16, triton.next_power_of_2(g * tq)))
    tiles = triton.cdiv(g * tq, bm)
    if splits is None:
        splits = split_count(rows * tiles, slots, q.device, least=2)
    per_split = max(1, triton.cdiv(slots, splits))
    splits = max(1, triton.cdiv(slots, per_split))
    part = torch.empty(splits, n, dv, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, n, dtype=torch.float32, device=q.device)
    if n:
        at = (table.block, 0, 0) if q_positions is None else (q_positions, *q_positions.stride())
        common = (
            table.block.contiguous(), table.count.contiguous(), table.start.contiguous(),
            table.block if table.positions is None else table.positions.contiguous(), *at, part, part_lse,
            scale, softcap or 1.0, window or 0, rows, rows // b, tq, slots, per_split, g, group,
        )  # fmt: skip
        masks = (softcap is not None, causal, window is not None, table.positions is not None)
        launch = _launch_planes if by_planes else _launch_general
        launch((rows, tiles, splits), q, keys, values, common, masks, bm, exact)
    found = part.view(splits, b, hq, tq, dv), part_lse.view(splits, b, hq, tq)
    if not merged:
        return found
    return (found[0][0], found[1][0]) if splits == 1 else merge_triton([found])


def _launch_general(grid, q: Tensor, keys: Blocks, values: Blocks, common, masks, bm: int, exact: bool) -> None:
    group, dv = keys.spec.group, values.spec.channels
    bt = min(32 if dv > 128 else 64, max(16, triton.next_power_of_2(group)))
    (key_pointers, key_constants), (value_pointers, value_constants) = _pool(keys), _pool(values)
    _attend[grid](
        q, *q.stride(), *key_pointers, *value_pointers, scale8_table(q.device), *common, dv, *key_constants,
        *value_constants, *masks, bm, bt, 32, max(16, triton.next_power_of_2(dv)),
        "ieee" if exact else "tf32",
    )  # fmt: skip


def _launch_planes(grid, q: Tensor, keys: Blocks, values: Blocks, common, masks, bm: int, exact: bool) -> None:
    d, dv = keys.spec.channels, values.spec.channels
    ((key_codes, *key_pointers, _), (k_classes, _, k_bytes, *key_constants)) = _pool(keys)
    ((value_codes, *value_pointers, _), (v_classes, _, *value_constants)) = _pool(values)
    trits, nb = values.spec.classes[0][1].per_byte == 5, values.spec.classes[0][1].nbytes(dv)
    words = max(8, triton.next_power_of_2(-(-nb // 2))) if trits else triton.next_power_of_2(nb // 4)
    widest = triton.next_power_of_2(max(width for width, _ in keys.spec.classes))
    channels = min(max(16, widest), max(16, TILE_KEYS // keys.spec.group))
    attend_planes[grid](
        q, *q.stride(), _as_words(key_codes), *key_pointers, value_codes if trits else _as_words(value_codes),
        *value_pointers, scale8_table(q.device), *common, d, dv, k_classes, k_bytes // 4, *key_constants, v_classes,
        *value_constants, *order(keys.spec), *masks, bm, channels, words, not triton.knobs.runtime.interpret,
        num_warps=4 if keys.spec.group > 64 else 2,
    )  # fmt: skip


def _as_words(codes: Tensor) -> Tensor:
    """Bytes as int32; copied where they do not lie at a word."""
    return (codes if codes.data_ptr() % 16 == 0 else codes.clone()).view(torch.int32)
