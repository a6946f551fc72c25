"""What the Triton kernels that score dense keys share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def in_powers_of_two(b_s, scale, softcap, SOFTCAP: tl.constexpr):
    """Products q.k to scores times log2(e), so that exp2 takes them."""
    if SOFTCAP:  # tanh by an exponential that cannot overflow
        b_s *= scale
        b_e = tl.exp2(tl.abs(b_s) * (-2.0 * LOG2E) / softcap)
        b_s = tl.where(b_s < 0, -softcap, softcap) * (1.0 - b_e) / (1.0 + b_e) * LOG2E
    else:
        b_s *= scale * LOG2E
    return b_s


@triton.jit
def span(p_at, m_p, k_start, window, T, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Of rows whose positions are at p_at: keys behind the first and up to the second of two int32, -1 ... T - 1, are seen."""
    b_after = tl.zeros(p_at.shape, dtype=tl.int32) - 1
    b_until = b_after + T
    if CAUSAL or WINDOW:
        b_at = tl.load(p_at, mask=m_p, other=0) - k_start
        if CAUSAL:
            b_until = tl.minimum(tl.maximum(b_at, -1), T - 1).to(tl.int32)
        if WINDOW:
            b_after = tl.minimum(tl.maximum(b_at - window, -1), T - 1).to(tl.int32)
    return b_after, b_until


@triton.jit
def seen(m_s, o_r, o_t, b_after, b_until, p_mask, s_mt, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Which keys o_t rows see whose span is given and whose masks begin at o_r; shapes broadcast."""
    if CAUSAL:
        m_s = m_s & (o_t <= b_until)
    if WINDOW:
        m_s = m_s & (o_t > b_after)
    if MASK:
        m_s = m_s & (tl.load(p_mask + o_r + o_t.to(tl.int64) * s_mt, mask=m_s, other=0) != 0)
    return m_s


def product_type(*tensors: torch.Tensor) -> tl.dtype:
    """The type in which products are taken: the tensors' own where they share one of 16 bits, else fp32.

    Both are exact, sums being fp32. Triton's interpreter multiplies bf16 numbers as if they were integers.
    """
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or triton.knobs.runtime.interpret:
        return tl.float32
    return names.get(dtypes.pop(), tl.float32)


def architecture() -> int:
    """What the current GPU's kernels are compiled for: 80, 89, 90, ..."""
    return triton.runtime.driver.active.get_current_target().arch
