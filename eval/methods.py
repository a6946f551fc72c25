"""What `--method` names: "dense", presets, and methods with options, alone or one after the other."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from mmkv._presets import PRESETS
from mmkv.cache import CacheMethod
from mmkv.parts.registry import METHODS, nearest

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """A way to run the model: token methods and cache methods; neither is the dense baseline.

    Args:
        name: as given on the command line; rows and tables know it by this.
        tokens, cache: what `mmkv.wrap` takes.
    """

    name: str
    tokens: tuple[Any, ...] = ()
    cache: tuple[CacheMethod, ...] = ()

    @property
    def reads_question(self) -> bool:
        """Whether what it keeps of a video may depend on the question: it then needs the question in the prompt."""
        chooses = any(m.decides or m.reads_embeddings or m.accumulates or m.sparse_prefill for m in self.cache)
        return bool(self.tokens) or chooses

    def __str__(self) -> str:
        return ", ".join(map(repr, (*self.tokens, *self.cache))) or "nothing"


def methods_of(text: str, baseline: bool = True) -> tuple[Method, ...]:
    """The methods of a list with commas: `kivi-2,SnapKV(budget=0.25)+VidKV()`.

    Args:
        text: names of presets, "dense", or methods with options as in Python, joined by + where one acts after the other.
        baseline: put "dense" in front where the list does not name it.

    Raises:
        ValueError: an unknown name or option, or one named twice.
    """
    names = [name.strip() for name in _split(text, ",")]
    if not all(names):
        raise ValueError(f"--method {text!r}: an empty name; possible are dense, {', '.join(PRESETS)}, or SnapKV(...)")
    if baseline and DENSE not in names:
        names.insert(0, DENSE)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--method {text!r}: {name} stands there twice")
    return tuple(method_of(name) for name in names)


def method_of(name: str) -> Method:
    """One method; raises as `methods_of`."""
    if name == DENSE:
        return Method(DENSE)
    if name in PRESETS:
        return Method(name, cache=PRESETS[name].cache)
    parts = [_made(part.strip()) for part in _split(name, "+")]
    cache = tuple(made for kind, made in parts if kind == "cache")
    return Method(name, tuple(made for kind, made in parts if kind == "tokens"), cache)


def _split(text: str, sign: str) -> list[str]:
    """Cut at a sign that stands in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == sign and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _made(text: str) -> tuple[str, Any]:
    """(kind, instance) of `Name` or `Name(option=value, ...)`; values are literals."""
    name = text.split("(")[0].strip()
    if name.lower() not in METHODS:
        known = [DENSE, *PRESETS, *(entry.name for entry in METHODS.values())]
        raise ValueError(f"no method {name!r}{nearest(name, known)}; `mmkv methods` lists them")
    entry = METHODS[name.lower()]
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(k.arg for k in call.keywords):
            raise ValueError("options are given by name")
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return entry.kind, entry.method(**options)
    except (SyntaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"method {text!r}: {reason}; write it as {entry.name}(option=value)") from error
