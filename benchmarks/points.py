"""What benchmarks/pareto.py measures: every registered cache method at several sizes, and mixes that evict, then quantize.

A method without an entry in `SETTINGS` makes tests/test_benchmarks.py fail. The prompts have some 1030 tokens. All keep
the newest 32 dense; those that store also keep 4 sinks dense and have blocks of 124 tokens, of which such a prompt fills
eight, so that no row carries tokens that merely wait for a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import mmkv
from mmkv.cache import (
    GEAR,
    GUIKV,
    H2O,
    KIVI,
    AdaKV,
    CacheMethod,
    InfiniPotV,
    KVMerger,
    MiKV,
    PrefixKV,
    PyramidKV,
    RazorAttention,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    VidKV,
    WaterfillKV,
    ZipCache,
    ZipVL,
)
from mmkv.parts.retrieval_heads import repeated_tokens

BUDGETS = (0.5, 0.25, 0.1, 0.05)
TAIL, SINKS, GROUP = 32, 4, 124
STORED = dict(group=GROUP, residual=TAIL, sinks=SINKS)


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        family: the method's name, or both names of a mix; one line in the plot.
        setting: what tells it from others of its family.
        cache: what `mmkv.wrap(model, cache=...)` takes.
    """

    family: str
    setting: str
    cache: tuple[CacheMethod, ...]

    @property
    def mix(self) -> bool:
        return len(self.cache) > 1


DENSE = Point("dense", "", ())


def evicting(kind: type, budget: float | int, **options) -> Point:
    """A method that evicts, at a share of the tokens or a number of them."""
    share = f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.3g} %"
    return Point(kind.__name__, share, (kind(budget=budget, **options),))


def alone(point: Point, share: float) -> Point:
    """The evicting part of a mix at a budget that takes as many bytes as a share of the dense cache."""
    first = point.cache[0]
    return Point(type(first).__name__, f"{100 * share:.3g} %", (replace(first, budget=round(share, 4)),))


def at_budgets(kind: type) -> Callable:
    return lambda model: [evicting(kind, budget) for budget in BUDGETS]


def kivi(bits: int, group: int = GROUP) -> Point:
    return Point("KIVI", f"{bits} bits", (KIVI(bits=bits, **STORED | dict(group=group)),))


def waterfill(key_bits: float, value_bits: float, group: int = GROUP) -> Point:
    method = WaterfillKV(key_bits=key_bits, value_bits=value_bits, **STORED | dict(group=group))
    return Point("WaterfillKV", f"{key_bits:g} / {value_bits:g} bits", (method,))


def vidkv(key_bits: float, value_bits: float) -> Point:
    method = VidKV(key_bits=key_bits, value_bits=value_bits, **STORED)
    return Point("VidKV", f"{key_bits:g} / {value_bits:g} bits", (method,))


def gear(bits: int) -> Point:
    return Point("GEAR", f"{bits} bits, rank 4", (GEAR(bits=bits, **STORED),))


def mixed(kind: type, ratio: float, high: int, low: int, **options) -> Point:
    method = kind(ratio=ratio, high=high, low=low, residual=TAIL, sinks=SINKS, **options)
    return Point(kind.__name__, f"{ratio:.0%} at {high} bits, rest {low}", (method,))


def zipvl(tau: float, store: str) -> Point:
    how = "evicts" if store == "evict" else "4 and 2 bits"
    return Point(f"ZipVL, {how}", f"tau {tau:g}", (ZipVL(tau=tau, store=store, group=62, residual=TAIL, sinks=SINKS),))


def razor(model) -> list[Point]:
    """At each budget the paper's share of retrieval heads or, where they do not fit, as many as do; buffers fill it up."""
    text = model.config.text_config
    layers_heads = text.num_hidden_layers * text.num_key_value_heads
    period = 250
    found = RetrievalHeads(period=period)
    with mmkv.wrapped(model, cache=[found]), torch.no_grad():
        model(input_ids=repeated_tokens(text.vocab_size, period)[None], use_cache=True, logits_to_keep=1)
    least = (TAIL + SINKS) / 1028  # of a local head
    points = []
    for budget in BUDGETS:
        for share in (0.14, 0.1, 0.05, 0.0):  # of the query heads
            heads = found.heads(0.01 if share == 0.14 else 0.0, share)
            whole = len(heads) / layers_heads
            if whole + (1 - whole) * least <= budget:
                break
        buffer = (budget - whole) / (1 - whole)
        method = RazorAttention(heads=heads, buffer=buffer, least=0, sinks=SINKS)
        points.append(Point("RazorAttention", f"{100 * budget:g} %, {len(heads)} of {layers_heads} heads", (method,)))
    return points


SETTINGS: dict[str, Callable] = {
    "SnapKV": at_budgets(SnapKV),
    "StreamingLLM": at_budgets(StreamingLLM),
    "H2O": at_budgets(H2O),
    "PyramidKV": at_budgets(PyramidKV),
    "AdaKV": at_budgets(AdaKV),
    "PrefixKV": at_budgets(PrefixKV),
    "KVMerger": at_budgets(KVMerger),
    "GUIKV": at_budgets(GUIKV),
    "InfiniPotV": at_budgets(InfiniPotV),
    "RazorAttention": razor,
    "KIVI": lambda model: [kivi(bits) for bits in (4, 2, 1)],
    "VidKV": lambda model: [vidkv(k, v) for k, v in ((2, 2), (1.5, 1.58), (1, 1.58))],
    "WaterfillKV": lambda model: [
        *(waterfill(k, v) for k, v in ((4, 4), (2, 2), (1.5, 1.58), (1, 1.58), (1, 1), (0.5, 1))),
        waterfill(0.25, 1, group=248),
    ],
    "GEAR": lambda model: [gear(bits) for bits in (4, 2, 1)],
    "ZipCache": lambda model: [mixed(ZipCache, *how, group=62) for how in ((0.6, 4, 2), (0.2, 4, 2), (0.2, 2, 1))],
    "MiKV": lambda model: [mixed(MiKV, *how) for how in ((0.5, 8, 2), (0.2, 8, 2), (0.2, 4, 2), (0.05, 4, 1))],
    "ZipVL": lambda model: (
        [zipvl(tau, "quantize") for tau in (0.975, 0.6)] + [zipvl(tau, "evict") for tau in (0.975, 0.8, 0.6)]
    ),
}

# tokens that stay: the newest, the sinks and whole blocks of 64 or 128 of the others
KEPT = (548, 292, 164, 100)


def mix(kind: type, tokens: int, quantized: Callable, *bits) -> Point:
    """Evict down to a number of tokens, then quantize them."""
    first, second = evicting(kind, tokens), quantized(*bits, group=128 if tokens > 100 else 64)
    name = f"{first.family} + {second.family}"
    return Point(name, f"{first.setting}, {second.setting}", first.cache + second.cache)


def mixes() -> list[Point]:
    out = []
    for kind in (SnapKV, GUIKV):
        out += [mix(kind, tokens, waterfill, 1.5, 1.58) for tokens in KEPT]
        out += [mix(kind, tokens, waterfill, 1, 1) for tokens in KEPT[:3]]
        out += [mix(kind, tokens, kivi, 2) for tokens in KEPT]
    out += [mix(SnapKV, tokens, kivi, 4) for tokens in KEPT]
    out += [mix(KVMerger, tokens, waterfill, 1.5, 1.58) for tokens in KEPT]
    out += [mix(KVMerger, tokens, kivi, 2) for tokens in KEPT]
    return out


def points(model) -> list[Point]:
    """All of them, dense first.

    Raises:
        KeyError: a registered method has no settings.
    """
    named = [m.name for m in mmkv.methods() if m.kind == "cache" and not m.method.next_scale]
    missing = sorted(set(named) - set(SETTINGS))
    if missing:
        raise KeyError(f"no settings for {', '.join(missing)}; add them to SETTINGS of benchmarks/points.py")
    return [DENSE, *(point for name in named for point in SETTINGS[name](model)), *mixes()]
