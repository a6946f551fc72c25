"""WaterfillKV: key bits go to the channels with variance, values are rotated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmkv.cache.formats import ChannelClass, PackFormat, Side, weighed_variance
from mmkv.cache.method import CacheMethod, check_numbers
from mmkv.kernels import code, mean_only
from mmkv.parts.registry import register

# Mean squared error of the best scalar quantizer of a normal, in units of its variance (Max 1960), by bits.
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1175, 4: 0.0095}


@register("cache", "mmkv, water-filling")
@dataclass(frozen=True)
class WaterfillKV(CacheMethod):
    """Key bits by reverse water-filling over channels, values rotated and ternary per token.

    A channel's error costs its variance times its code's distortion, weighed by how large the queries are that it meets, so
    each next bit goes where it removes most: a few channels that move the attention scores much get 4 bits, others 2, the
    rest keep their mean alone. Values have no such channels;
    a random rotation makes every token's value look normal, which three levels and one scale serve well.

    Reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3.

    Args:
        key_bits: average bits per key channel, codes alone; 0.25 to 4.
        value_bits: 1, 1.58, 2 or 4.
        levels: bits a channel may get, among 0, 1, 2, 4, ascending; 1 between 0 and 2 measured no better.
        step: channels are moved between classes in runs of this many.
        group: tokens per key group.
        residual: newest tokens kept dense, at least 32.
        codebook: of keys, "lloyd" (zero point and scale fitted to each group) or "gaussian" (mean and standard deviation).
        scale_bits: 16 (fp16), or 8 for logarithmic bytes.
        sinks: first tokens kept dense (attention sinks have outlier keys).
        aim: what bits are spent on: the attention "scores" (variance times the root mean square of the prompt's queries), or
            the "keys" themselves (variance alone, also where no queries are known).

    Class sizes are shared by the heads of a layer, so that blocks have one layout; which channels are in them is each
    head's own.
    """

    key_bits: float = 1.5
    value_bits: float = 1.58
    levels: tuple[int, ...] = (0, 2, 4)
    step: int = 8
    group: int = 128
    residual: int = 64
    codebook: str = "lloyd"
    scale_bits: int = 16
    sinks: int = 4
    aim: str = "scores"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(key_bits=self.key_bits, value_bits=self.value_bits)
        if not set(self.levels) <= set(DISTORTION) or list(self.levels) != sorted(set(self.levels)) or not self.levels:
            raise ValueError(f"levels {self.levels!r}: possible are ascending choices among {tuple(DISTORTION)}")
        if not self.levels[0] <= self.key_bits <= self.levels[-1] or not self.key_bits > 0:
            raise ValueError(f"key_bits {self.key_bits!r}: possible are those above 0 within levels {self.levels}")
        if self.value_bits not in (1, 1.58, 2, 4):
            raise ValueError(f"value_bits {self.value_bits!r}: possible are 1, 1.58, 2, 4")
        if self.codebook not in ("lloyd", "gaussian"):
            raise ValueError(f"codebook {self.codebook!r}: possible are 'lloyd', 'gaussian'")
        if self.aim not in ("scores", "keys"):
            raise ValueError(f"aim {self.aim!r}: possible are 'scores', 'keys'")
        if not isinstance(self.step, int) or self.step < 1:
            raise ValueError(f"step {self.step!r}: possible are whole numbers from 1")
        self.formats()

    def formats(self) -> tuple[PackFormat, ...]:
        # before the keys are known: as if variance halved with every step
        typical = torch.pow(2.0, -torch.arange(16.0))
        rank = "score" if self.aim == "scores" else "std"
        keys = Side("channel", self._classes(typical, 1), rank=rank, joint_rank=False, scale_bits=self.scale_bits)
        values = (ChannelClass(1.0, code("rotated", self.value_bits)),)
        side = Side("token", values, basis="hadamard", scale_bits=self.scale_bits)
        return (PackFormat(f"waterfill-{self.key_bits:g}/{self.value_bits:g}", keys, side, self.group),)

    def adapt(self, form: PackFormat, keys: torch.Tensor, queries: torch.Tensor | None = None) -> PackFormat:
        """Class sizes from the keys `[Hkv, T, D]`: each head's channels by falling variance, averaged over heads."""
        spread = weighed_variance(keys, queries if self.aim == "scores" else None)
        spread = spread.sort(-1, descending=True).values.mean(0).cpu()
        return replace(form, keys=replace(form.keys, classes=self._classes(spread, self.step)))

    def _classes(self, variance: torch.Tensor, step: int) -> tuple[ChannelClass, ...]:
        bits = waterfill(variance, self.key_bits, self.levels, step)
        shares = [(level, bits.count(level) / len(bits)) for level in reversed(self.levels) if level in bits]
        return tuple(
            ChannelClass(share, code(self.codebook, level) if level else mean_only()) for level, share in shares
        )


def waterfill(variance: torch.Tensor, average: float, levels: tuple[int, ...], step: int = 1) -> list[int]:
    """Bits for each channel, so that their mean is at most `average` and the summed squared error is least.

    Args:
        variance: `[D]`, falling.
        average: bits per channel to spend.
        levels: bits a channel may get, ascending.
        step: channels that get the same number of bits together.

    Returns:
        D numbers, falling; greedy by error removed per bit, which is optimal where `DISTORTION` is convex in the levels.
    """
    runs = [float(v.sum()) for v in variance.double().split(step)]
    sizes = [len(v) for v in variance.split(step)]
    at = [0] * len(runs)  # index into levels
    left = average * len(variance) - levels[0] * len(variance)
    while True:
        best, choice = 0.0, None
        for i, place in enumerate(at):
            if place + 1 == len(levels):
                continue
            low, high = levels[place], levels[place + 1]
            cost = (high - low) * sizes[i]
            gain = runs[i] * (DISTORTION[low] - DISTORTION[high]) / cost
            if cost <= left + 1e-9 and gain > best:
                best, choice = gain, (i, cost)
        if choice is None:
            return [levels[place] for place, size in zip(at, sizes) for _ in range(size)]
        at[choice[0]] += 1
        left -= choice[1]
