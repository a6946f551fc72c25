"""Codes as half-precision bit patterns: what makes unpacking nearly free on tensor cores.

A whole number n below 2048 is, read as the bits of an fp16 number, exactly n * 2^-24. So a digit of a byte needs no shift and no
conversion: a mask leaves n times a power of two, which is the same for a whole plane of digits and is multiplied out of the
product. One instruction makes two numbers, since a 32-bit word holds two of them.

A *plane* is one digit of all bytes. Numbers come out in the order [words, planes, parity, half]: number 4 w + 2 half + parity of
plane p stands at ((w * planes + p) * 2 + parity) * 2 + half. Attention does not mind the order of its keys, and the order of
channels is set right when the result is stored.

Names: b_ block values; capitals are sizes and flags.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIFT = tl.constexpr(16777216.0)  # 2^24


@triton.jit
def _halves(b_word, MASK: tl.constexpr, ASM: tl.constexpr):
    """The masked low and high half of each word as fp16, `[..., W]` to `[..., W, 2]`."""
    if ASM:  # opaque, since LLVM would take the mask apart into two of 16 bits
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, $3; mov.b32 {$0, $1}, t; }", "=h,=h,r,r", [b_word, MASK],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        b_some = b_word & MASK
        low = (b_some & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (b_some >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _plane(b_word, b_odd, MASK: tl.constexpr, ASM: tl.constexpr):
    """One digit of the even and of the odd bytes, `[R, W]` to `[R, W, half, parity]`."""
    return tl.join(_halves(b_word, MASK, ASM), _halves(b_odd, MASK, ASM))


@triton.jit
def planes(b_word, PLANES: tl.constexpr, ASM: tl.constexpr):
    """Digits of words of bytes, int32 `[R, W]` to fp16 `[R, W, PLANES, parity, half]`: plane p is digit * 2^(p * bits - 24)."""
    b_odd = b_word >> 8
    if PLANES == 1:
        b = _plane(b_word, b_odd, 0x00FF00FF, ASM).permute((0, 1, 3, 2)).expand_dims(2)
    elif PLANES == 2:
        b = tl.join(_plane(b_word, b_odd, 0x000F000F, ASM), _plane(b_word, b_odd, 0x00F000F0, ASM))
        b = b.permute((0, 1, 4, 3, 2))
    elif PLANES == 4:
        b = tl.join(
            tl.join(_plane(b_word, b_odd, 0x00030003, ASM), _plane(b_word, b_odd, 0x000C000C, ASM)),
            tl.join(_plane(b_word, b_odd, 0x00300030, ASM), _plane(b_word, b_odd, 0x00C000C0, ASM)),
        )
        b = b.permute((0, 1, 5, 4, 3, 2)).reshape(b_word.shape[0], b_word.shape[1], PLANES, 2, 2)
    else:
        b = tl.join(
            tl.join(
                tl.join(_plane(b_word, b_odd, 0x00010001, ASM), _plane(b_word, b_odd, 0x00020002, ASM)),
                tl.join(_plane(b_word, b_odd, 0x00040004, ASM), _plane(b_word, b_odd, 0x00080008, ASM)),
            ),
            tl.join(
                tl.join(_plane(b_word, b_odd, 0x00100010, ASM), _plane(b_word, b_odd, 0x00200020, ASM)),
                tl.join(_plane(b_word, b_odd, 0x00400040, ASM), _plane(b_word, b_odd, 0x00800080, ASM)),
            ),
        )
        b = b.permute((0, 1, 6, 5, 4, 3, 2)).reshape(b_word.shape[0], b_word.shape[1], PLANES, 2, 2)
    return b


@triton.jit
def trit_planes(b_pair, ASM: tl.constexpr):
    """Digits of pairs of ternary bytes, int32 `[R, W]` (a byte in each half) to fp16 `[R, W, 4, 2]` and `[R, W, 2]`.

    The first four planes and the fifth, each digit * 2^-16. A byte is a binary fraction; times three, its whole part is a digit.
    """
    b_0 = b_pair * 3
    b_1 = (b_0 & 0x00FF00FF) * 3
    b_2 = (b_1 & 0x00FF00FF) * 3
    b_3 = (b_2 & 0x00FF00FF) * 3
    b_4 = (b_3 & 0x00FF00FF) * 3
    b = tl.join(
        tl.join(_halves(b_0, 0x03000300, ASM), _halves(b_1, 0x03000300, ASM)),
        tl.join(_halves(b_2, 0x03000300, ASM), _halves(b_3, 0x03000300, ASM)),
    )  # [R, W, half, low bit of the plane, high bit]
    b = b.permute((0, 1, 4, 3, 2)).reshape(b_pair.shape[0], b_pair.shape[1], 4, 2)
    return b, _halves(b_4, 0x03000300, ASM)
