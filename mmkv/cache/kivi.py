"""KIVI: keys quantized per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass

from mmkv.cache.formats import ChannelClass, PackFormat, Side
from mmkv.cache.method import CacheMethod, check_bits
from mmkv.kernels import code
from mmkv.parts.registry import register


@register("cache", "KIVI, ICML 2024, arXiv 2402.02750")
@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Keys at 2 or 4 bits per channel, values per token, newest tokens dense.

    Keys have fixed outlier channels, so a group is one channel over `group` tokens; values have none, so a group is
    `channel_group` channels of one token.

    Paper: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750).

    Args:
        bits: 1, 2, 4 or 8 per key and value (the paper: 2 or 4).
        group: tokens per key group; default 64 (paper 32, which costs 3.0 true bits at 2; 64 costs 2.5).
        channel_group: channels per value group; 0 for the whole head (2.25 true bits at head size 128).
        residual: newest tokens kept dense, at least 32; default 128 as in the paper.
        scale_bits: 16, or 8 for logarithmic bytes.
        sinks: first tokens kept dense (attention sinks); 0 as in the paper.

    Where we differ: the paper's code flushes keys when exactly `residual` are dense (the window cycles 0 ... residual - 1)
    and values one by one; here both leave the window in whole groups, so at least `residual` tokens always stay
    dense and a rejected draft never reaches a packed group. Constant groups are exact instead of dividing by zero.
    """

    bits: int = 2
    group: int = 64
    channel_group: int = 0
    residual: int = 128
    scale_bits: int = 16
    sinks: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_bits(self.bits)
        self.formats()

    def formats(self) -> tuple[PackFormat, ...]:
        quantizer = (ChannelClass(1.0, code("minmax", self.bits)),)
        keys = Side("channel", quantizer, scale_bits=self.scale_bits)
        values = Side("token", quantizer, channel_group=self.channel_group, scale_bits=self.scale_bits)
        return (PackFormat(f"kivi-{self.bits}", keys, values, self.group),)
