"""ZipCache: salient tokens at 4 bits, regular ones at 2, told apart by normalized attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.fill import Fill
from mmkv.cache.formats import ChannelClass, Side
from mmkv.cache.method import check_numbers
from mmkv.cache.mixed import MixedPrecision
from mmkv.kernels import code
from mmkv.parts.probe_rows import check_seed, recent, recent_and_random
from mmkv.parts.registry import register
from mmkv.parts.saliency import normalized, per_kv_head


@register("cache", "ZipCache, NeurIPS 2024, arXiv 2405.14256")
@dataclass(frozen=True)
class ZipCache(MixedPrecision):
    """Salient tokens at 4 bits and regular ones at 2, chosen per KV head by normalized attention of a few probe queries.

    A key's attention is summed over the probe rows and divided by the number of rows that see it, so that early tokens,
    which every row sees, are not favoured. Keys are quantized per channel over groups of tokens, values per token after each
    channel was divided by sqrt(max |v|) (the channel-separable tokenwise quantizer).

    Paper: ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification (arXiv 2405.14256).

    Args:
        ratio: share of salient tokens among those that leave the residual window; 0.6 as in the paper's demo.
        high, low, group, residual, sinks: as in `MixedPrecision`; the paper's bits are 4 and 2, sinks none. Keys have one
            minimum and scale per channel and group of tokens (0.5 bit at 64).
        newest: share of the prompt's rows that are probes, its last ones; 0.05.
        random: share of the rows that are probes, random ones before those; 0.05.
        most: probes of each kind at most, so that a long prompt pays no more; None for no limit, as in the paper.
        seed: of the random rows.
        normalize: "paper" divides by the probe rows that see a token; "official" by all rows that see it (the released code;
            it favours late tokens, whose rows are nearly all probes).
        interval: decoded tokens after which those that left the residual window are classified and packed; 100.

    Costs the attention of the probes once more, up to a tenth of the prompt's. A block that is not full takes the space of a
    full one: 100 decoded tokens lie in 128 places.

    Where we differ: the released code has one minimum and scale per channel for all tokens of a class (and for the whole
    batch), and per token one for all heads, whose tokens at one place differ; here groups are `group` tokens and one head.
    It decompresses everything at each interval and quantizes it anew; here old tokens keep their codes and their class, and
    decoded ones the factors of the segment they join. Decoded tokens are classified, as there, by the last query's
    attention, here over the tokens that are still dense. Random probes do not repeat; the newest `residual` tokens stay
    dense; padding enters nothing. Layers with a sliding window store all at `high` bits.
    """

    ratio: float = 0.6
    newest: float = 0.05
    random: float = 0.05
    most: int | None = 64
    seed: int = 0
    normalize: str = "paper"
    interval: int = 100

    def __post_init__(self):
        super().__post_init__()
        check_numbers(newest=self.newest, random=self.random)
        if not 0 < self.newest <= 1 or not 0 <= self.random <= 1:
            raise ValueError(
                f"newest {self.newest}, random {self.random}: possible are shares of the rows, newest above 0, up to 1"
            )
        if self.most is not None and (isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1):
            raise ValueError(f"most {self.most!r}: possible are whole numbers of queries from 1, or None for no limit")
        check_seed(self.seed)
        if self.normalize not in ("paper", "official"):
            raise ValueError(f"normalize {self.normalize!r}: possible are 'paper', 'official'")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval {self.interval!r}: possible are whole numbers of decoded tokens from 1")

    def packs_undecided(self, sliding: bool) -> bool:
        return sliding and super().packs_undecided(sliding)  # elsewhere decoded tokens wait for the next interval

    def sides(self, bits: int) -> tuple[Side, Side]:
        quantizer = (ChannelClass(1.0, code("minmax", bits)),)
        return Side("channel", quantizer), Side("token", quantizer, balance="sqrt_max")

    def score(self, fill: Fill) -> torch.Tensor:
        if fill.decoding:
            mass = fill.mass(recent(fill.length, 1, fill.fresh)).sum
            return per_kv_head(mass, fill.heads, "sum")[:, : fill.old]
        new = fill.length - fill.fresh
        newest, random = max(round(self.newest * new), 1), round(self.random * new)
        if self.most is not None:
            newest, random = min(newest, self.most), min(random, self.most)
        mass = fill.mass(recent_and_random(fill.length, newest, random, self.seed, fill.fresh))
        seen_by = mass.count
        if self.normalize == "official":
            seen_by = fill.length - torch.arange(fill.length, device=mass.sum.device).clamp(min=fill.fresh)
        return normalized(per_kv_head(mass.sum, fill.heads, "sum"), seen_by)[:, : fill.old]
