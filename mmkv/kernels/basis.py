"""Orthonormal changes of channel basis. `y = M @ x` per token; since M is orthonormal, q.k = (M q).(M k)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def _dct(n: int) -> Tensor:
    """Orthonormal DCT-II, fp64 [n, n]."""
    k = torch.arange(n, dtype=torch.float64)
    m = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * math.sqrt(2 / n)
    m[0] /= math.sqrt(2)
    return m


@cache
def hadamard(n: int, seed: int = 0) -> Tensor:
    """Random-sign Hadamard rotation, fp32 [n, n], for any n >= 1.

    With n = 2^a * m, m odd: (Sylvester Hadamard of 2^a) Kronecker (orthonormal DCT of m), columns multiplied by random
    signs. For 80 = 16 * 5 and 96 = 32 * 3 every output still mixes all inputs. The result is shared:
    do not write to it.
    """
    if n < 1:
        raise ValueError(f"hadamard of size {n}")
    power = n & -n
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < power:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) * math.sqrt(0.5)
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return (torch.kron(h, _dct(n // power)) * signs).float()


@cache
def real_fft(n: int) -> Tensor:
    """Orthonormal real Fourier basis, fp32 [n, n]: `rfft` as a rotation (VidKV's easy key channels, arXiv 2503.16257).

    Rows: the real parts k = 0 .. n//2 (DC first, Nyquist last when n is even), then the imaginary parts
    k = 1 .. (n-1)//2, signed as `torch.fft.rfft` has them. All rows but DC and Nyquist carry sqrt(2/n), those
    sqrt(1/n). The result is shared: do not write to it.
    """
    if n < 1:
        raise ValueError(f"real_fft of size {n}")
    j = torch.arange(n, dtype=torch.float64)
    real = torch.cos(2 * math.pi / n * torch.arange(n // 2 + 1, dtype=torch.float64)[:, None] * j) * math.sqrt(2 / n)
    real[0] /= math.sqrt(2)
    if n % 2 == 0:
        real[-1] /= math.sqrt(2)
    imag = -torch.sin(2 * math.pi / n * torch.arange(1, (n + 1) // 2, dtype=torch.float64)[:, None] * j)
    return torch.cat([real, imag * math.sqrt(2 / n)]).float()
