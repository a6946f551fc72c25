"""The catalogue of scalar quantizers: which integer codes exist, and what each decodes to.

Sources: min-max is KIVI's quantizer (arXiv 2402.02750), ternary with a threshold of gamma x mean |x| is VidKV's
(arXiv 2503.16257), the Gaussian codebooks are Lloyd-Max quantizers of a standard normal (Max 1960, Lloyd 1982).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from .spec import Code

# Lloyd-Max levels of N(0, 1): the positive half of each symmetric codebook; test_codes.py recomputes them.
_LLOYD_MAX = {
    2: (0.797885,),
    3: (0.0, 1.224006),
    4: (0.452780, 1.510418),
    16: (0.128395, 0.388048, 0.656759, 0.942341, 1.256231, 1.618046, 2.069017, 2.732589),
}
_GAUSSIAN_LEVELS = {0: 1, 1: 2, 1.58: 3, 2: 4, 4: 16}


def _bad_bits(kind: str, bits: float, allowed: tuple) -> ValueError:
    return ValueError(f"{kind}: {bits} bits is not possible; allowed are {', '.join(map(str, allowed))}")


@cache
def minmax(bits: int) -> Code:
    """KIVI's quantizer: zero = min, scale = (max - min) / (L - 1), code = round((x - zero) / scale) to nearest even."""
    if bits not in (1, 2, 4, 8):
        raise _bad_bits("minmax", bits, (1, 2, 4, 8))
    n = 2 ** int(bits)
    return Code(
        f"minmax{bits}", tuple(map(float, range(n))), tuple(i + 0.5 for i in range(n - 1)), zero="min", unit="range"
    )


@cache
def lloyd(bits: int, rounds: int = 4) -> Code:
    """Evenly spaced levels whose zero point and scale are fitted to each group by Lloyd's algorithm (1982).

    Starts from min-max. Video keys are a crowd (background) and outliers (what moves), neither normal nor uniform: one
    bit becomes two-means, two bits keep outliers without giving up the crowd.
    """
    start = minmax(bits)
    return Code(f"lloyd{bits}", start.levels, start.bounds, zero="min", unit="range", refine=rounds)


@cache
def symmetric(bits: int) -> Code:
    """Absmax quantizer without zero point; scale = max |x| / (L/2 - 1).

    The codebook is the two's complement one, -L/2 .. L/2 - 1: its lowest level pads the L - 1 symmetric levels to a
    power of two and is never chosen, since |x| <= scale * (L/2 - 1). So 2 bits hold only -1, 0, 1 (prefer `gaussian` or
    `ternary` there). One bit is `sign()`.
    """
    if bits not in (1, 2, 4, 8):
        raise _bad_bits("symmetric", bits, (1, 2, 4, 8))
    if bits == 1:
        return sign()
    h = 2 ** int(bits) // 2
    return Code(
        f"symmetric{bits}", tuple(map(float, range(-h, h))), tuple(i + 0.5 for i in range(-h, h - 1)), unit="absmax"
    )


@cache
def sign(zero: bool = False) -> Code:
    """One bit: -1 or +1 times the mean absolute deviation (the least-squares scale); from the mean if `zero`."""
    return Code("sign", (-1.0, 1.0), (0.0,), zero="mean" if zero else "none", unit="mean_abs", scale="fit")


@cache
def ternary(gamma: float = 0.7, zero: bool = False, scale: str = "fit") -> Code:
    """VidKV's -1, 0, +1 with threshold gamma x mean |x|.

    Args:
        gamma: threshold in units of the mean absolute value; 0.7 in the paper, 0.5 in its code.
        zero: code the deviation from the mean instead of the value.
        scale: "fit" decodes with the mean |x| of the nonzero codes; "one" with 1, as the paper does.
    """
    if scale not in ("fit", "one"):
        raise ValueError(f"ternary: scale {scale!r}; allowed are 'fit', 'one'")
    if not gamma >= 0:
        raise ValueError(f"ternary: gamma {gamma}; allowed are numbers >= 0")
    name = "ternary" if scale == "fit" else "ternary-unscaled"
    return Code(name, (-1.0, 0.0, 1.0), (-gamma, gamma), zero="mean" if zero else "none", unit="mean_abs", scale=scale)


@cache
def gaussian(bits: float, zero: str = "mean", scale: str = "unit") -> Code:
    """Lloyd-Max codebook of a normal in units of the group's standard deviation.

    Args:
        bits: 0 (mean only), 1, 1.58 (three levels), 2 or 4.
        zero: "mean", or "none" for values that are centred already (rotated ones): the unit is then the RMS.
        scale: "unit" stores the standard deviation, "fit" the least-squares scale of the chosen codes.
    """
    n = _GAUSSIAN_LEVELS.get(bits)
    if n is None:
        raise _bad_bits("gaussian", bits, tuple(_GAUSSIAN_LEVELS))
    if zero not in ("mean", "none"):
        raise ValueError(f"gaussian: zero {zero!r}; allowed are 'mean', 'none'")
    if n == 1:
        return mean_only() if zero == "mean" else Code("nothing", (0.0,), ())
    half = _LLOYD_MAX[n]
    levels = tuple(sorted({-v for v in half if v} | set(half)))
    bounds = tuple((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False))
    return Code(f"gaussian{bits}", levels, bounds, zero=zero, unit="std", scale=scale)


@cache
def mean_only() -> Code:
    """Zero bits: the group's mean stands for all its numbers."""
    return Code("mean", (0.0,), (), zero="mean", unit="std", scale="one")


_KINDS: dict[str, tuple[Callable[[float], Code], tuple[float, ...]]] = {
    "minmax": (minmax, (1, 2, 4, 8)),
    "lloyd": (lloyd, (1, 2, 4)),
    "symmetric": (symmetric, (1, 2, 4, 8)),
    "sign": (lambda bits: sign(zero=True), (1,)),
    "ternary": (lambda bits: ternary(), (1.58,)),
    "gaussian": (gaussian, tuple(_GAUSSIAN_LEVELS)),
    "rotated": (lambda bits: gaussian(bits, zero="none", scale="fit"), (1, 1.58, 2, 4)),
    "mean": (lambda bits: mean_only(), (0,)),
}


def code(kind: str, bits: float) -> Code:
    """The code called `kind` at `bits` bits (1.58 = three levels); "rotated" is `gaussian` without zero point."""
    if kind not in _KINDS:
        raise ValueError(f"unknown code {kind!r}; allowed are {', '.join(_KINDS)}")
    make, allowed = _KINDS[kind]
    if bits not in allowed:
        raise _bad_bits(kind, bits, allowed)
    return make(bits)
