"""What a packed block of keys or values looks like: codes, scales, zero points, and which bits lie where.

A *block* holds up to `group` consecutive tokens of one KV head. `Code` says how one number becomes a small integer and
back; `Spec` says how the numbers of a block are grouped. Both are plain constants, so a Triton kernel can be
specialised on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

CODES_PER_BYTE = {1: 0, 2: 8, 3: 5, 4: 4, 16: 2, 256: 1}  # by number of levels; 5 trits fit a byte (3**5 = 243)


@dataclass(frozen=True)
class Code:
    """A scalar quantizer: `x ~ levels[code] * scale + zero` with one scale and zero per group.

    Encoding: `u = (x - zero) / unit`, `code = number of bounds below u`. `unit` is a statistic of the group;
    what is stored as scale is `unit` itself, the least-squares fit of the levels ("fit"), or nothing ("one", scale 1).

    Args:
        name: shown in reports.
        levels: 1, 2, 3, 4, 16 or 256 decode levels, ascending. One level stores no codes: the group's zero point stands
            for all.
        bounds: len(levels) - 1 ascending decision thresholds in units of `unit`.
        zero: "none" (0), "min" or "mean" of the group.
        unit: "range" ((max - min) / (len(levels) - 1)), "absmax" (max |x| / levels[-1]), "std" or "mean_abs" of
            x - zero.
        scale: "unit", "fit" (least squares given the codes) or "one".
        refine: rounds of Lloyd's algorithm on (zero, scale): choose codes, fit both to them by least squares. Only with
            zero "min", unit "range" and scale "unit", which are its start.
    """

    name: str
    levels: tuple[float, ...]
    bounds: tuple[float, ...]
    zero: Literal["none", "min", "mean"] = "none"
    unit: Literal["range", "absmax", "std", "mean_abs"] = "absmax"
    scale: Literal["unit", "fit", "one"] = "unit"
    refine: int = 0

    def __post_init__(self):
        if len(self.levels) not in CODES_PER_BYTE:
            raise ValueError(f"{self.name}: {len(self.levels)} levels; possible are {sorted(CODES_PER_BYTE)}")
        if len(self.bounds) != len(self.levels) - 1:
            raise ValueError(
                f"{self.name}: {len(self.levels)} levels need {len(self.levels) - 1} bounds, not {len(self.bounds)}"
            )

        if self.refine and (self.zero, self.unit, self.scale) != ("min", "range", "unit"):
            raise ValueError(f"{self.name}: refine needs zero 'min', unit 'range' and scale 'unit'")

    @property
    def per_byte(self) -> int:
        """Codes per byte; 0 where nothing is stored."""
        return CODES_PER_BYTE[len(self.levels)]

    @property
    def has_scale(self) -> bool:
        return self.scale != "one" and len(self.levels) > 1

    @property
    def has_zero(self) -> bool:
        return self.zero != "none"

    def nbytes(self, n: int) -> int:
        """Bytes for n codes of one group. Code i lies in byte i % nbytes, digit i // nbytes (planar)."""
        return -(-n // self.per_byte) if self.per_byte else 0


@dataclass(frozen=True)
class Spec:
    """How a block of [tokens <= group, channels] is stored.

    axis "channel": a group is one channel over the block's tokens. `classes` splits the (already permuted) channels
    into runs, each with its own code. Codes of a block: for class after class, for channel after channel,
    `code.nbytes(group)` bytes along the tokens.
    axis "token": a group is `channel_group` channels of one token; there is exactly one class. Codes of a block: for
    token after token, for channel group after channel group, `code.nbytes(channel_group)` bytes along the channels.

    Scales and zeros lie in the same order (channels of the classes that have them; or tokens x channel groups), fp16.
    With scale_bits 8 a scale is one byte u: `top * 2 ** ((u - 255) / 16)`, 0 for u = 0, with one fp16 `top` per block
    (the largest scale in it); the relative error is at most 2.2 %.
    """

    axis: Literal["channel", "token"]
    group: int
    classes: tuple[tuple[int, Code], ...]
    channel_group: int = 0
    scale_bits: Literal[8, 16] = 16

    def __post_init__(self):
        if self.axis not in ("channel", "token"):
            raise ValueError(f"axis {self.axis!r}: possible are 'channel', 'token'")
        if self.axis == "token":
            if len(self.classes) != 1:
                raise ValueError(f"a per-token format has one class of channels, not {len(self.classes)}")
            if self.channel_group < 1 or self.channels % self.channel_group:
                raise ValueError(f"channel group {self.channel_group} does not divide head size {self.channels}")
        if self.group < 1 or self.group > 32767:
            raise ValueError(f"group of {self.group} tokens; possible are 1 to 32767")

    @cached_property
    def channels(self) -> int:
        return sum(n for n, _ in self.classes)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of codes per block."""
        if self.axis == "token":
            ((channels, code),) = self.classes
            return self.group * (channels // self.channel_group) * code.nbytes(self.channel_group)
        return sum(n * code.nbytes(self.group) for n, code in self.classes)

    @cached_property
    def n_scale(self) -> int:
        """Scales per block."""
        return sum(self._groups(n) for n, code in self.classes if code.has_scale)

    @cached_property
    def n_zero(self) -> int:
        """Zero points per block."""
        return sum(self._groups(n) for n, code in self.classes if code.has_zero)

    def _groups(self, channels: int) -> int:
        return channels if self.axis == "channel" else self.group * (channels // self.channel_group)

    @cached_property
    def bits(self) -> float:
        """True bits per element of a full block: codes, scales and zero points."""
        bits = (
            8 * self.code_bytes
            + self.scale_bits * self.n_scale
            + 16 * self.n_zero
            + (16 if self.scale_bits == 8 and self.n_scale else 0)
        )
        return bits / (self.group * self.channels)
