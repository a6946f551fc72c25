"""Triton kernel of `attend_packed` for evenly spaced codes: a block at a time, codes multiplied as fp16 bit patterns.

A program holds all query heads of a KV head and a run of blocks. Keys and values are the large side of both products
(`[tokens, channels] x [channels, queries]` and `[channels, tokens] x [tokens, queries]`), so few queries waste little; codes get
neither shift nor conversion (`triton_planes`); scales and zero points touch the small side alone. Read off the machine code for
sm_90, 2-bit codes of 128 channels take about 2.5 instructions per number where the general kernel takes 20 (docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .spec import Spec
from .triton_codes import affine, load_scale
from .triton_planes import LIFT, planes, trit_planes

MOST_NUMBERS = 32768  # of a block of keys, or values, in shared memory as fp16
LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["window", "TQ", "S", "SLOTS_PER_SPLIT", "s_pb", "s_pt"]  # they grow and differ: one variant serves all


def fits(keys: Spec, values: Spec) -> bool:
    """Whether these formats are ones that the kernel reads: evenly spaced levels, whole words of bytes.

    Keys by channel in powers of two, values by token with one group a token, in powers of two or trits.
    """
    group = keys.group
    if keys.axis != "channel" or values.axis != "token" or values.channel_group != values.channels:
        return False
    if group & (group - 1) or group < 16 or group * values.channels > MOST_NUMBERS:
        return False
    widths = {code.per_byte for _, code in keys.classes}
    whole = all(not per or group % (4 * per) == 0 for per in widths) and widths <= {0, 1, 2, 4, 8} and widths != {0}
    ((channels, code),) = values.classes
    whole &= keys.code_bytes % 4 == 0 and (
        code.per_byte == 5 or (code.per_byte and channels % (4 * code.per_byte) == 0)
    )
    return bool(whole) and all(affine(c) for _, c in (*keys.classes, *values.classes))


def order(spec: Spec) -> tuple[int, int]:
    """Planes into which the tokens of a block fall, and bytes of each: what the class with the most codes a byte has."""
    most = max(code.per_byte for _, code in spec.classes)
    return most, spec.group // most


@triton.jit
def _query(p_q, o_c, m_c, m_m, s_qd):
    """Query rows `[BC, BM]` fp32, channels down."""
    return tl.load(p_q[None, :] + o_c.to(tl.int64)[:, None] * s_qd, mask=m_c[:, None] & m_m[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _class_scores(
    b_s, b_zero, b_peak, p_q, m_m, s_qd, p_codes, p_scale, p_zero, b_top, p_power, i_p,
    CLASSES: tl.constexpr, I: tl.constexpr, SCALE8: tl.constexpr, GROUP: tl.constexpr, NB: tl.constexpr,
    BC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds one class of channels: products with codes to b_s [GROUP, BM], what is the same for all tokens to b_zero [BM]."""
    BYTES: tl.constexpr = CLASSES[I][3] if CLASSES[I][4] > 1 else NB  # of a channel
    P: tl.constexpr = GROUP // BYTES
    RUNS: tl.constexpr = BYTES // NB  # how many runs of NB bytes make a plane
    W: tl.constexpr = BYTES // 4
    BITS: tl.constexpr = 8 // P
    WIDTH: tl.constexpr = CLASSES[I][0]
    for c in tl.static_range(0, WIDTH, BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < WIDTH
        b_q = _query(p_q, CLASSES[I][1] + o_c, m_c, m_m, s_qd) * b_peak[None, :]
        if CLASSES[I][10] >= 0:
            b_z = tl.load(p_zero + CLASSES[I][10] + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_zero += tl.sum(b_q * b_z[:, None], 0)
        if CLASSES[I][4] > 1:
            if CLASSES[I][9] >= 0:
                b_q *= load_scale(p_scale, CLASSES[I][9] + o_c, m_c, b_top, p_power, SCALE8)[:, None]
            if CLASSES[I][6] != 0.0:
                b_zero += CLASSES[I][6] * tl.sum(b_q, 0)
            o_w = tl.arange(0, W)
            b_word = tl.load(p_codes + CLASSES[I][2] // 4 + o_c[:, None] * W + o_w[None, :], mask=m_c[:, None], other=0)
            b_k = planes(b_word, P, ASM)  # [BC, W, P, 2, 2]
            if RUNS > 1:  # to the order of the class with the most codes a byte
                b_k = b_k.reshape(BC, RUNS, W // RUNS, P, 2, 2).permute((0, 2, 3, 1, 4, 5))
            b_k = tl.trans(b_k.reshape(BC, GROUP))
            b_part = tl.dot(b_k, (b_q * CLASSES[I][7]).to(tl.float16))
            b_s += b_part * (tl.exp2(-(i_p // RUNS * BITS).to(tl.float32)) * LIFT)[:, None]
    return b_s, b_zero


@triton.jit(do_not_specialize=SIZES)
def attend_planes(
    p_q, s_qb, s_qh, s_qt, s_qd,
    p_kc, p_ks, p_kz, p_kt, p_vc, p_vs, p_vz, p_vt, p_power,
    p_block, p_count, p_start, p_pos, p_qpos, s_pb, s_pt, p_out, p_lse,
    scale, softcap, window, R, HKV, TQ, S, SLOTS_PER_SPLIT,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, K_WORDS: tl.constexpr, K_NS: tl.constexpr, K_NZ: tl.constexpr, K_SCALE8: tl.constexpr,
    VALUES: tl.constexpr, V_BYTES: tl.constexpr, V_NS: tl.constexpr, V_NZ: tl.constexpr, V_SCALE8: tl.constexpr,
    NP: tl.constexpr, NB: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (row, tile of query rows, split of slots): partial out [splits, R, G, TQ, DV], lse [splits, R, G, TQ].

    Args:
        p_kc: keys' codes as words of four bytes; p_vc: values' codes, words too unless they are trits.
        NP, NB: planes of a block's tokens, and bytes of each.
        BW: words (trits: pairs of bytes) of a token's values, rounded up to a power of two.
    """
    i_r, i_m, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_r // HKV, i_r % HKV
    o_m = i_m * BM + tl.arange(0, BM)  # query row: head within the group * TQ + token
    m_m = o_m < G * TQ
    o_g, o_tq = (o_m // TQ).to(tl.int64), (o_m % TQ).to(tl.int64)
    p_qm = p_q + i_b * s_qb + (i_h * G + o_g) * s_qh + o_tq * s_qt
    b_at = tl.zeros((BM,), dtype=tl.int64)
    if CAUSAL or WINDOW:
        b_at = tl.load(p_qpos + i_b * s_pb + o_tq * s_pt, mask=m_m, other=0).to(tl.int64)

    # queries are brought to at most 1, so that times a scale they fit fp16; scores come out in powers of two
    b_most = tl.zeros((BM,), dtype=tl.float32)
    for c in tl.static_range(0, D, BC):
        o_c = c + tl.arange(0, BC)
        b_most = tl.maximum(b_most, tl.max(tl.abs(_query(p_qm, o_c, o_c < D, m_m, s_qd)), 0))
    b_most = tl.maximum(b_most, 1e-30)
    b_peak = 1.0 / b_most
    b_unit = b_most * scale
    if not SOFTCAP:
        b_unit *= LOG2E

    o_i = tl.arange(0, GROUP)  # order of a block's tokens, see triton_planes
    i_p = o_i // 4 % NP
    o_t = i_p * NB + o_i // (4 * NP) * 4 + o_i % 2 * 2 + o_i // 2 % 2
    TRITS: tl.constexpr = VALUES[0][4] == 3
    V_NB: tl.constexpr = VALUES[0][3]
    VP: tl.constexpr = 4 if TRITS else DV // V_NB
    PER: tl.constexpr = 2 if TRITS else 4
    o_w = tl.arange(0, BW)
    o_n = tl.arange(0, BW * VP * PER)
    b_o = tl.zeros((BW * VP * PER, BM), dtype=tl.float32)
    b_fifth = tl.zeros((BW * 2 if TRITS else 16, BM), dtype=tl.float32)
    b_same = tl.zeros((BM,), dtype=tl.float32)  # what all channels of the output have in common
    b_top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)

    first = i_s * SLOTS_PER_SPLIT
    for i_slot in range(first, tl.minimum(first + SLOTS_PER_SPLIT, S)):
        b_n = tl.load(p_count + i_r * S + i_slot)
        i_block = tl.load(p_block + i_r * S + i_slot, mask=b_n > 0, other=0).to(tl.int64)
        b_ktop, b_vtop = 1.0, 1.0
        if K_SCALE8:
            b_ktop = tl.load(p_kt + i_block).to(tl.float32)
        if V_SCALE8:
            b_vtop = tl.load(p_vt + i_block).to(tl.float32)
        b_s = tl.zeros((GROUP, BM), dtype=tl.float32)
        b_zero = tl.zeros((BM,), dtype=tl.float32)
        for i in tl.static_range(len(KEYS)):
            b_s, b_zero = _class_scores(
                b_s, b_zero, b_peak, p_qm, m_m, s_qd, p_kc + i_block * K_WORDS, p_ks + i_block * K_NS,
                p_kz + i_block * K_NZ, b_ktop, p_power, i_p, KEYS, i, K_SCALE8, GROUP, NB, BC, ASM,
            )  # fmt: skip
        b_s = (b_s + b_zero[None, :]) * b_unit[None, :]
        if SOFTCAP:  # tanh by an exponential that cannot overflow
            b_e = tl.exp(-2.0 * tl.abs(b_s) / softcap)
            b_s = tl.where(b_s < 0, -softcap, softcap) * (1.0 - b_e) / (1.0 + b_e) * LOG2E
        m_t = o_t < b_n
        m_s = m_t[:, None] & m_m[None, :]
        if CAUSAL or WINDOW:
            b_kat = (tl.load(p_start + i_r * S + i_slot) + o_t).to(tl.int64)
            if POSITIONS:
                b_kat = tl.load(p_pos + i_block * GROUP + o_t, mask=m_t, other=0).to(tl.int64)
            if CAUSAL:
                m_s = m_s & (b_kat[:, None] <= b_at[None, :])
            if WINDOW:
                m_s = m_s & (b_kat[:, None] > b_at[None, :] - window)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: exp(-inf - 0) = 0, not NaN
        b_p = tl.exp2(b_s - b_base[None, :])
        b_fade = tl.exp2(b_top - b_base)
        b_top = b_new
        b_sum = b_sum * b_fade + tl.sum(b_p, 0)

        b_same *= b_fade
        if VALUES[0][10] >= 0:
            b_z = tl.load(p_vz + i_block * V_NZ + o_t, mask=m_t, other=0.0).to(tl.float32)
            b_same += tl.sum(b_p * b_z[:, None], 0)
        if VALUES[0][9] >= 0:
            b_p *= load_scale(p_vs + i_block * V_NS, o_t, m_t, b_vtop, p_power, V_SCALE8)[:, None]
        if VALUES[0][6] != 0.0:
            b_same += VALUES[0][6] * tl.sum(b_p, 0)
        b_p = (b_p * VALUES[0][7]).to(tl.float16)
        b_o *= b_fade[None, :]
        if TRITS:
            p_v = p_vc + i_block * V_BYTES + o_t[:, None] * V_NB + 2 * o_w[None, :]
            b_low = tl.load(p_v, mask=m_t[:, None] & (2 * o_w < V_NB)[None, :], other=0).to(tl.int32)
            b_high = tl.load(p_v + 1, mask=m_t[:, None] & (2 * o_w + 1 < V_NB)[None, :], other=0).to(tl.int32)
            b_v, b_last = trit_planes(b_low | (b_high << 16), ASM)
            b_fifth = tl.dot(tl.trans(b_last.reshape(GROUP, BW * 2)), b_p, b_fifth * b_fade[None, :])
        else:
            p_v = p_vc + i_block * (V_BYTES // 4) + o_t[:, None] * (V_NB // 4) + o_w[None, :]
            b_word = tl.load(p_v, mask=m_t[:, None] & (o_w < V_NB // 4)[None, :], other=0)
            b_v = planes(b_word, VP, ASM)
        b_o = tl.dot(tl.trans(b_v.reshape(GROUP, BW * VP * PER)), b_p, b_o)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing seen: out 0, lse -inf
    o_row = (i_s * R + i_r) * G * TQ + o_m
    tl.store(p_lse + o_row, (b_top + tl.log2(b_sum)) / LOG2E, mask=m_m)
    i_v = o_n // PER % VP  # plane of each column
    if TRITS:
        o_v = i_v * V_NB + o_n // (PER * VP) * 2 + o_n % 2
        m_v = (o_n // (PER * VP) * 2 + o_n % 2 < V_NB) & (o_v < DV)
        b_o = b_o * 65536.0
        o_5 = tl.arange(0, BW * 2)
        m_5 = (o_5 < V_NB) & (4 * V_NB + o_5 < DV)
        b_fifth = (b_fifth * 65536.0 + b_same[None, :]) / b_sum[None, :]
        tl.store(p_out + o_row[None, :] * DV + (4 * V_NB + o_5)[:, None], b_fifth, mask=m_m[None, :] & m_5[:, None])
    else:
        BITS: tl.constexpr = 8 // VP
        o_v = i_v * V_NB + o_n // (PER * VP) * 4 + o_n % 2 * 2 + o_n // 2 % 2
        m_v = o_n // (PER * VP) * 4 < V_NB
        b_o = b_o * (tl.exp2(-(i_v * BITS).to(tl.float32)) * LIFT)[:, None]
    b_o = (b_o + b_same[None, :]) / b_sum[None, :]
    tl.store(p_out + o_row[None, :] * DV + o_v[:, None], b_o, mask=m_m[None, :] & m_v[:, None])
