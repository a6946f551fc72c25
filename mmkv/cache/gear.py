"""GEAR: low-bit codes, corrected by outliers and a low-rank part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmkv.cache.formats import ChannelClass, Side
from mmkv.cache.gear_segment import GearFormat, GearSegment
from mmkv.cache.method import MIN_RESIDUAL, CacheMethod, check_bits, check_numbers
from mmkv.kernels import code
from mmkv.parts.registry import register


@register("cache", "GEAR, arXiv 2403.05527")
@dataclass(frozen=True)
class GEAR(CacheMethod):
    """KIVI's codes, with the outliers of each vector kept in fp16 and the remaining error approximated at low rank.

    Paper: GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (arXiv 2403.05527).

    Args:
        bits: 1, 2, 4 or 8 of the codes, per channel for keys, per token for values.
        outliers: share of each vector (a key channel over a block, a value token over the head) kept in fp16, half of it
            the largest numbers, half the smallest, each rounded to a whole number; 0.02 as in the paper. 0 for none; of
            fewer than 50 numbers the default keeps none.
        rank: of the approximation of the error in each head's block; 4 as in the paper, 0 for none.
        rounds: of power iteration; 3.
        group: tokens per block, over which a key channel has one minimum and scale; the larger, the cheaper the low rank.
        channel_group: channels per value group; 0 for the whole head.
        residual: newest tokens kept dense, at least 32.
        sinks: first tokens kept dense (attention sinks); 0 as in the paper.

    Bytes: the corrections are not small. At 2 bits, group 128 and head size 128 it is 2.25 bits of codes, 0.38 of outliers and
    1 of factors: 3.63 true bits per element. Time: slower than KIVI. Attention decodes blocks to fp32, a bounded number at
    a time, adds the corrections and attends to them densely (about 5 times as long as KIVI on a CPU, 8,192 tokens); no kernel
    reads all three parts at once.

    Where we differ: the paper factors the error of the whole prompt once, and of each streaming buffer of 20 tokens; here each
    block of a head has factors of its own, so that nothing is ever redone. Outliers are replaced by the mean of the other
    numbers, which cannot widen their range. The released kernels leave the outliers out; here they are stored and used.
    """

    bits: int = 2
    outliers: float = 0.02
    rank: int = 4
    rounds: int = 3
    group: int = 128
    channel_group: int = 0
    residual: int = MIN_RESIDUAL
    sinks: int = 0

    segment_class: ClassVar[type[GearSegment]] = GearSegment

    def __post_init__(self):
        super().__post_init__()
        check_numbers(outliers=self.outliers)
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers {self.outliers}: possible are 0 to 0.5 (share of each vector kept in fp16)")
        for name, least, most in (("rank", 0, 64), ("rounds", 1, 32)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} {value!r}: possible are {least} to {most}")
        check_bits(self.bits)
        self.formats()

    def formats(self) -> tuple[GearFormat, ...]:
        quantizer = (ChannelClass(1.0, code("minmax", self.bits)),)
        keys, values = Side("channel", quantizer), Side("token", quantizer, channel_group=self.channel_group)
        return (
            GearFormat(f"gear-{self.bits}", keys, values, self.group, self.outliers, self.rank, self.rounds),
        )  # fmt: skip
