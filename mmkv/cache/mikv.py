"""MiKV: the tokens that others would evict stay, at low precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.fill import Fill
from mmkv.cache.formats import ChannelClass, Side
from mmkv.cache.mixed import MixedPrecision
from mmkv.kernels import code
from mmkv.parts.probe_rows import check_newest_or_all, newest_or_all
from mmkv.parts.registry import register
from mmkv.parts.saliency import per_kv_head


@register("cache", "MiKV, arXiv 2402.18096")
@dataclass(frozen=True)
class MiKV(MixedPrecision):
    """Stores the tokens that an eviction would drop at low precision, and the important ones at high precision.

    Importance is attention summed over queries, as eviction methods have it. Every token's keys and values are quantized by
    their own minimum and maximum; before that, key channels are balanced by b = sqrt(max |q| / max |k|): k b is stored and
    q / b asks, so that neither's outlier channels are lost.

    Paper: No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization
    (arXiv 2402.18096).

    Args:
        ratio: share of important tokens among those that leave the residual window; 0.5.
        high, low, group, residual, sinks: as in `MixedPrecision`; here 8 and 2 bits (the paper: fp16 or 8 bits, and 2 to 4;
            3 there is no code for).
        probe_rows: queries whose attention is summed: a number of the newest (64), or "all" of the prompt as in the paper. All
            of them cost a second pass over every query-key product, in fp32; 64 of n tokens cost 64 / n of that.
        channel_group: channels that share a minimum and scale; 0 for the whole head (0.25 bit at head size 128).

    Where we differ: the paper has no public code, and goes on choosing while it decodes. Here decoded tokens are not
    demoted: they are packed at `high` bits, group by group (with 16 they stay dense), and so is everything in layers with a
    sliding window. The balancer is that of the prompt that opens a segment, for the tokens that join it later as well.
    """

    high: int = 8
    group: int = 32
    probe_rows: int | str = 64
    channel_group: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_newest_or_all(self.probe_rows)

    def sides(self, bits: int) -> tuple[Side, Side]:
        quantizer = (ChannelClass(1.0, code("minmax", bits)),)
        keys = Side("token", quantizer, channel_group=self.channel_group, balance="query_key")
        return keys, Side("token", quantizer, channel_group=self.channel_group)

    def score(self, fill: Fill) -> torch.Tensor:
        mass = fill.mass(newest_or_all(fill.length, self.probe_rows, fill.fresh)).sum
        return per_kv_head(mass, fill.heads)[:, : fill.old]
