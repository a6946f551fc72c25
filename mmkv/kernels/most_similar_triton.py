"""Triton twin of `most_similar`: a matrix product whose tiles are reduced to their row maxima while in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._splits import multiprocessors

EPS = tl.constexpr(1e-12)  # norms below count as this, so that zero vectors give 0


@triton.jit
def _most_similar(
    p_a, p_b, p_score, p_best, s_ab, s_an, s_ad, s_bb, s_bm, s_bd, N, M, D, TILES,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (batch element, tile of a): cosine fp32 and index int64, `[BN]` each, over all of b."""
    i_p = tl.program_id(0)
    i_b, i_t = (i_p // TILES).to(tl.int64), i_p % TILES
    o_n, o_j = i_t * BN + tl.arange(0, BN), tl.arange(0, BM)
    m_n = o_n < N
    p_an = p_a + i_b * s_ab + o_n.to(tl.int64) * s_an
    b_top = tl.full((BN,), float("-inf"), dtype=tl.float32)
    b_at = tl.zeros((BN,), dtype=tl.int32)
    b_sqa = tl.zeros((BN,), dtype=tl.float32)
    for m in range(0, M, BM):
        m_m = m + o_j < M
        p_bm = p_b + i_b * s_bb + (m + o_j).to(tl.int64) * s_bm
        b_s = tl.zeros((BN, BM), dtype=tl.float32)
        b_sqa = tl.zeros((BN,), dtype=tl.float32)
        b_sqb = tl.zeros((BM,), dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)
            m_d = o_d < D
            b_a = tl.load(
                p_an[:, None] + (o_d.to(tl.int64) * s_ad)[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
            )
            b_b = tl.load(
                p_bm[:, None] + (o_d.to(tl.int64) * s_bd)[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0
            )
            if WIDEN:
                b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
            b_s = tl.dot(b_a, tl.trans(b_b), b_s, input_precision="ieee")
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
            b_sqa += tl.sum(b_a * b_a, 1)
            b_sqb += tl.sum(b_b * b_b, 1)
        b_s = b_s * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(b_sqb), EPS))[None, :]
        b_s = tl.where(b_s == b_s, b_s, float("inf"))  # a NaN wins, and is told by this below
        b_s = tl.where(m_m[None, :], b_s, float("-inf"))
        b_new, b_which = tl.max(b_s, 1, return_indices=True, return_indices_tie_break_left=True)
        m_better = b_new > b_top  # on a tie the earlier tile stands
        b_top = tl.where(m_better, b_new, b_top)
        b_at = tl.where(m_better, m + b_which, b_at)
    b_score = b_top * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(b_sqa), EPS))
    b_score = tl.where(b_top == float("inf"), float("nan"), b_score)
    o_out = i_b * N + o_n
    tl.store(p_score + o_out, b_score, mask=m_n)
    tl.store(p_best + o_out, b_at.to(tl.int64), mask=m_n)


def most_similar_triton(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`most_similar` of something by Triton; arguments as there."""
    batch, n, d = a.shape
    m = b.shape[1]
    score = torch.empty(batch, n, dtype=torch.float32, device=a.device)
    best = torch.empty(batch, n, dtype=torch.int64, device=a.device)
    bn, bm, bd = tile_sizes(batch, n, m, d, a.element_size(), multiprocessors(a.device))
    tiles = triton.cdiv(n, bn)
    # Triton's interpreter takes bf16 products for whole numbers
    widen = a.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    _most_similar[(batch * tiles,)](
        a, b, score, best, *a.stride(), *b.stride(), n, m, d, tiles, bn, bm, bd, widen, num_warps=4, num_stages=3
    )
    return score, best


def tile_sizes(batch: int, n: int, m: int, d: int, nbytes: int, processors: int) -> tuple[int, int, int]:
    """Vectors of a, vectors of b and channels that a program holds at a time.

    64 vectors of a read b least often; fewer where that would leave multiprocessors without a program. 128 bytes of
    channels are a whole line of memory.
    """
    bn = 64
    while bn > 16 and batch * triton.cdiv(n, bn) < processors:
        bn //= 2
    return bn, min(64, max(16, triton.next_power_of_2(m))), min(128 // nbytes, max(16, triton.next_power_of_2(d)))
