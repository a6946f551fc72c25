"""Triton twin of `merge`: any number of parts, each of any number of splits, in one launch.

Work is cut by numbers of the output, not by rows: a program has a run of them, takes a block of splits at a time and keeps a
running maximum and sum for each number. Weights are computed once per number instead of once per row, which is cheaper than
leaving a GPU idle: one decoded token of a batch of one has 28 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._splits import busy

MOST_PARTS = 8  # in a launch; more are merged in rounds
MOST_SPLITS = 16  # that a program reads at a time
MOST_NUMBERS = 2048  # of all these splits


@triton.jit(do_not_specialize=["N", "HQ", "TQ"])
def merge_parts(
    p_outs, p_lses, splits, p_sinks, p_out, p_lse, N, HQ, TQ,
    DV: tl.constexpr, SINKS: tl.constexpr, INDEX: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Program (run of BE numbers of the output): out [B, TQ, HQ, DV] and lse [B, HQ, TQ] of N = B * HQ * TQ rows.

    Args:
        p_outs, p_lses: tuples of parts `[splits, B, HQ, TQ, DV]` and `[splits, B, HQ, TQ]`.
        INDEX: type of indices; 32 bits where they suffice, their divisions are cheap.
        splits: of each part, as `2 n + 3`: odd and above 1, so that Triton compiles no variant for it.
    """
    o_e = tl.program_id(0).to(INDEX) * BE + tl.arange(0, BE)
    i_n = o_e // DV  # row of each number
    s_n = tl.zeros((), dtype=INDEX) + N
    m_e = i_n < s_n
    b_top = tl.full((BE,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BE,), dtype=tl.float32)
    b_o = tl.zeros((BE,), dtype=tl.float32)
    for i in tl.static_range(len(p_outs)):
        n = (splits[i] - 3) // 2
        for first in range(0, n, BS):
            o_s = first + tl.arange(0, BS)
            m_s = (o_s < n)[:, None] & m_e[None, :]
            b_l = tl.load(p_lses[i] + o_s[:, None] * s_n + i_n[None, :], mask=m_s, other=float("-inf")).to(tl.float32)
            b_x = tl.load(p_outs[i] + o_s[:, None] * (s_n * DV) + o_e[None, :], mask=m_s, other=0.0).to(tl.float32)
            b_new = tl.maximum(b_top, tl.max(b_l, 0))
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: exp(-inf - 0) = 0, not NaN
            b_w = tl.exp(b_l - b_base[None, :])
            b_fade = tl.exp(b_top - b_base)
            b_o = b_o * b_fade + tl.sum(b_w * b_x, 0)
            b_sum = b_sum * b_fade + tl.sum(b_w, 0)
            b_top = b_new
    i_h, i_b, i_t = i_n // TQ % HQ, i_n // TQ // HQ, i_n % TQ
    if SINKS:  # one more key, with value zero
        b_sink = tl.load(p_sinks + i_h, mask=m_e, other=0.0).to(tl.float32)
        b_new = tl.maximum(b_top, b_sink)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_fade = tl.exp(b_top - b_base)
        b_o *= b_fade
        b_sum = b_sum * b_fade + tl.exp(b_sink - b_base)
        b_top = b_new
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing seen: out 0, lse -inf
    tl.store(p_lse + i_n, b_top + tl.log(b_sum), mask=m_e & (o_e % DV == 0))
    o_out = ((i_b * TQ + i_t) * HQ + i_h) * DV + o_e % DV
    tl.store(p_out + o_out, (b_o / b_sum).to(p_out.dtype.element_ty), mask=m_e)


def merge_triton(
    parts: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`merge` by Triton; arguments as there. Output lies in memory as [B, Tq, Hq, Dv], which is what a model goes on with."""
    while len(parts) > MOST_PARTS:
        parts = [merge_triton(parts[:MOST_PARTS]), *parts[MOST_PARTS:]]
    whole = [(o if o.dim() == 5 else o[None], lse if lse.dim() == 4 else lse[None]) for o, lse in parts]
    whole = [(o.contiguous(), lse.contiguous()) for o, lse in whole]
    _, b, hq, tq, dv = whole[0][0].shape
    device, n = whole[0][0].device, b * hq * tq
    out = torch.empty(b, tq, hq, dv, dtype=dtype, device=device)
    lse = torch.empty(b, hq, tq, dtype=torch.float32, device=device)
    if out.numel():
        splits = [len(o) for o, _ in whole]
        missing = triton.next_power_of_2(len(whole)) - len(whole)  # fewer variants of the kernel; they are not read
        outs, lses = zip(*whole, *whole[:1] * missing)
        block = min(MOST_SPLITS, triton.next_power_of_2(max(splits)))
        run = _run(n * dv, block, device)
        wide = max(o.numel() for o, _ in whole) + block * n * dv + run >= 2**31
        merge_parts[(triton.cdiv(n * dv, run),)](
            outs, lses, tuple(2 * s + 3 for s in splits + [0] * missing), lse if sinks is None else sinks.contiguous(),
            out, lse, n, hq, tq, dv, sinks is not None, tl.int64 if wide else tl.int32, block, run,
            num_warps=max(1, min(8, run * block // 128)),
        )  # fmt: skip
    return out.transpose(1, 2), lse


def _run(numbers: int, block: int, device: torch.device) -> int:
    """Numbers of the output per program: a warp's width, more where the device is busy without and registers hold a block."""
    return max(32, min(512, MOST_NUMBERS // block, triton.next_power_of_2(triton.cdiv(numbers, busy(device)))))
