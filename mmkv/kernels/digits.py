"""Small integers to bytes and back, planar: number i of n lies in byte i % nbytes as digit i // nbytes.

Digits of base 2, 4, 16 and 256 come lowest first. Five trits are a fraction of 243ths, its first trit the highest, stored as
the next 256th above: times three, a byte's overflow is its next trit, which needs neither division nor table.

Decoding a byte with a table gives its digits side by side, so decoded numbers come out *interleaved*: byte 0's digits
first (numbers 0, nbytes, 2 nbytes, ...). Attention multiplies in that order and reorders only the small operand
(`interleave`, `deinterleave`), never the decoded tile.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import Code


def base(code: Code) -> int:
    """What a digit is worth: digits of a byte are base 2, 3, 4, 16 or 256 numbers."""
    return len(code.levels)


def pack_digits(codes: Tensor, code: Code) -> Tensor:
    """Codes uint8 [..., n] to bytes uint8 [..., code.nbytes(n)]; missing digits of the last bytes are 0."""
    n = codes.shape[-1]
    nb = code.nbytes(n)
    if nb == 0:
        return codes.new_empty(*codes.shape[:-1], 0)
    planes = F.pad(codes, (0, nb * code.per_byte - n)).unflatten(-1, (code.per_byte, nb))
    if base(code) == 3:
        whole = planes[..., 0, :].int()
        for digit in range(1, code.per_byte):
            whole = whole * 3 + planes[..., digit, :]
        return ((whole * 256 + 242) // 243).to(torch.uint8)
    out = planes[..., 0, :].clone()
    for digit in range(1, code.per_byte):
        out += planes[..., digit, :] * base(code) ** digit
    return out


@cache
def _table(code: Code, device: torch.device) -> Tensor:
    """Levels of each digit of each byte, fp32 [256, per_byte]; rows of 8 and 16 bytes as one wide element.

    Gathering wide elements of a vector is 3 to 6 times faster on CPU than gathering rows of a matrix.
    """
    bytes_, place = torch.arange(256).unsqueeze(1), torch.arange(code.per_byte)
    if base(code) == 3:
        digits = bytes_ * 3 ** (place + 1) // 256 % 3
    else:
        digits = bytes_ // base(code) ** place % base(code)
    table = torch.tensor(code.levels, dtype=torch.float32)[digits].to(device)
    wide = {2: torch.int64, 4: torch.complex128}.get(code.per_byte)
    return table if wide is None else table.view(wide).squeeze(1)


def unit_steps(code: Code) -> bool:
    """Levels are consecutive integers, so decoding is an addition."""
    return code.levels[-1] - code.levels[0] == len(code.levels) - 1 and code.levels == tuple(
        code.levels[0] + i for i in range(len(code.levels))
    )


def decode_digits(packed: Tensor, code: Code) -> Tensor:
    """Bytes uint8 [..., nb] to levels fp32 [..., nb * per_byte], interleaved."""
    if code.per_byte == 1 and unit_steps(code):
        return packed.float().add_(code.levels[0])
    rows = _table(code, packed.device).index_select(0, packed.reshape(-1).int())
    return rows.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * code.per_byte)


def interleave(x: Tensor, code: Code) -> Tensor:
    """Natural order [..., n] to decoded order [..., nb * per_byte]; the places of missing digits get 0."""
    n, per = x.shape[-1], code.per_byte
    if per == 1:
        return x
    nb = code.nbytes(n)
    return F.pad(x, (0, nb * per - n)).unflatten(-1, (per, nb)).transpose(-1, -2).flatten(-2)


def deinterleave(x: Tensor, code: Code, n: int) -> Tensor:
    """Decoded order [..., nb * per_byte] to natural order [..., n]."""
    per = code.per_byte
    if per == 1:
        return x
    return x.unflatten(-1, (code.nbytes(n), per)).transpose(-1, -2).flatten(-2)[..., :n]
