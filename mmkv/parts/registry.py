"""The catalogue of methods: a decorator, and what `mmkv.methods()` lists."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One method: its class, "tokens" or "cache", one line on what it does, and its paper."""

    name: str
    kind: str
    summary: str
    paper: str
    method: type


METHODS: dict[str, Entry] = {}


def register(kind: str, paper: str):
    """Class decorator: enters a method under its class name. The docstring's first line becomes the summary.

    Args:
        kind: "tokens" (prunes or merges vision tokens) or "cache" (acts on keys and values).
        paper: title or venue with the arXiv id.
    """
    if kind not in ("tokens", "cache"):
        raise ValueError(f"kind {kind!r}; possible are 'tokens', 'cache'")

    def enter(cls):
        summary = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        METHODS[cls.__name__.lower()] = Entry(cls.__name__, kind, summary, paper, cls)
        return cls

    return enter


def nearest(name: str, known) -> str:
    """` (did you mean 'x'?)` or an empty string, for error messages."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
