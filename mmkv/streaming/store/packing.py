"""Formats that frames are stored in: cache methods, and the names that a store remembers them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmkv.cache import KIVI, CacheMethod, VidKV
from mmkv.cache.formats import PackFormat

FORMATS: dict[str, CacheMethod] = {
    "int8": KIVI(bits=8),
    "int4": KIVI(bits=4),
    "int2": KIVI(bits=2),
    "vidkv": VidKV(),
}
MOST_GROUP = 256  # tokens that share a scale; longer frames are cut evenly


def packed_by(cache: Sequence[CacheMethod]) -> str | None:
    """The name of the format that cache methods store frames in, None for none of them.

    A frame of n tokens is packed when it is stored: groups are cut to fit it, and no newest tokens wait. Options that say so
    otherwise are therefore refused, and so are methods that choose tokens, of which every frame has to keep all.

    Raises:
        TypeError: not a list of cache methods.
        ValueError: a method, or options of one, that cannot pack a frame; more than one.
    """
    if isinstance(cache, str | type) or not isinstance(cache, Sequence):
        raise TypeError(f"cache={cache!r}; give a list: cache=[{_possible()[0]}]")
    if not cache:
        return None
    for method in cache:
        if not isinstance(method, CacheMethod):
            raise TypeError(f"cache=[{method!r}] is not a cache method; possible are {', '.join(_possible())}")
    names = [name for name, method in FORMATS.items() if list(cache) == [method]]
    if not names:
        given = " and ".join(map(_short, cache))
        raise ValueError(
            f"cache: {given} cannot pack the frames of a stream; possible is one of {', '.join(_possible())}"
        )
    return names[0]


def cache_of(name: str | None) -> list[CacheMethod]:
    """The cache methods of a format's name; none for None.

    Raises:
        ValueError: there is no such format.
    """
    return [] if name is None else [_method(name)]


def format_for(name: str, tokens: int) -> PackFormat:
    """A format with groups that fit frames of so many tokens."""
    blocks = -(-tokens // MOST_GROUP)
    return replace(_method(name), group=max(-(-tokens // blocks), 8)).formats()[0]  # type: ignore[call-arg]


def _method(name: str) -> CacheMethod:
    if name not in FORMATS:
        raise ValueError(f"packed {name!r}: possible are None, {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


def _short(method: CacheMethod) -> str:
    """A method with those of its options that are not the default."""
    default = type(method)()
    told = [f"{k}={v!r}" for k, v in vars(method).items() if v != getattr(default, k)]
    return f"{type(method).__name__}({', '.join(told)})"


def _possible() -> list[str]:
    return [f"KIVI(bits={m.bits})" if isinstance(m, KIVI) else _short(m) for m in FORMATS.values()]
