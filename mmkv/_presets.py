"""Presets: short names for methods with settled options, and the catalogue of methods."""

from __future__ import annotations

from dataclasses import dataclass

import mmkv.tokens  # noqa: F401  (its methods register themselves)
from mmkv.cache import HACK, KIVI, CacheMethod, ScaleKV, VidKV, WaterfillKV
from mmkv.parts.registry import METHODS, Entry, nearest


@dataclass(frozen=True)
class Preset:
    """A name for a list of cache methods.

    Args:
        name: what `mmkv.wrap(model, name)` and `--method name` take.
        cache: the methods it stands for.
        summary: one line.
    """

    name: str
    cache: tuple[CacheMethod, ...]
    summary: str

    @property
    def next_scale(self) -> bool:
        """Whether it is for models that make an image scale by scale."""
        return any(method.next_scale for method in self.cache)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("kivi-4", (KIVI(bits=4),), "4-bit keys per channel, 4-bit values per token"),
        Preset("kivi-2", (KIVI(bits=2),), "2-bit keys per channel, 2-bit values per token"),
        Preset("vidkv", (VidKV(),), "keys at 1.5 bits by channel class, ternary values"),
        Preset(
            "vidkv-stp",
            (VidKV(stp=0.2),),
            "vidkv, with 2-bit values for the fifth of the vision tokens closest to the text",
        ),
        Preset("waterfill", (WaterfillKV(),), "key bits where they matter (1.5 on average), rotated ternary values"),
        Preset(
            "waterfill-1",
            (WaterfillKV(key_bits=1.25, value_bits=1, scale_bits=8),),
            "key bits where they matter (1.25 on average), rotated values at 1 bit, 8-bit scales",
        ),
        Preset(
            "hack",
            (HACK(),),
            "for models that paint (Infinity): 30 % of the tokens, by kind of head; wants `mmkv calibrate`",
        ),
        Preset(
            "scalekv", (ScaleKV(),), "for models that paint (Infinity): 10 %, by role of layer; wants `mmkv calibrate`"
        ),
        Preset("auto", (WaterfillKV(),), "the default: waterfill, which measured best of those below 2 bits"),
    )
}


def presets() -> dict[str, str]:
    """Names of the presets, each with one line on what it does."""
    return {name: preset.summary for name, preset in PRESETS.items()}


def methods() -> tuple[Entry, ...]:
    """All registered methods: name, kind ("tokens" or "cache"), one-line summary, paper, class."""
    return tuple(METHODS.values())


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none; the message names the nearest, or says that it is a method, and lists all.
    """
    if not isinstance(name, str):
        raise TypeError(f"a preset is a name, not {type(name).__name__}; methods go into cache=[...]")
    if name not in PRESETS and name.lower() in METHODS:
        entry = METHODS[name.lower()]
        raise ValueError(
            f"unknown preset {name!r}: {entry.name} is a method, given in Python as "
            f"{entry.kind}=[mmkv.{entry.kind}.{entry.name}(...)]; presets are {', '.join(PRESETS)}"
        )
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}; possible are {', '.join(PRESETS)}")
    return PRESETS[name]
