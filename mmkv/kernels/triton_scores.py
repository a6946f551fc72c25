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


def product_type(*tensors: torch.Tensor) -> tl.dtype:
    """The type in which products are taken: the tensors' own where they share one of 16 bits, else fp32.

    Both are exact, sums being fp32. Triton's interpreter, on the CPU, multiplies bf16 numbers as if they were integers.
    """
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    dtypes = {t.dtype for t in tensors}
    return names.get(dtypes.pop(), tl.float32) if len(dtypes) == 1 and tensors[0].is_cuda else tl.float32


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def architecture() -> int:
    """What the current GPU's kernels are compiled for: 80, 89, 90, ..."""
    return triton.runtime.driver.active.get_current_target().arch
