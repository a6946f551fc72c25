"""What `wrap` sees to on models that make an image scale by scale, and keeps from all others."""

from __future__ import annotations

from dataclasses import replace

from mmkv.cache import CacheMethod
from mmkv.cache.next_scale import NextScale
from mmkv.models import Adapter
from mmkv.parts.budget import Budget


def check_painting(model, tokens: tuple, prefill_chunk: int | None, positions: str) -> None:
    """Raise ValueError for options of `wrap` that such a model has no use for."""
    name = type(model).__name__
    if tokens:
        raise ValueError(f"tokens=[{type(tokens[0]).__name__}()] on {name}, which reads no images; use cache methods")
    if prefill_chunk is not None:
        raise ValueError(f"prefill_chunk on {name}: a scale attends to itself as a whole and cannot be read in chunks")
    if positions != "stock":
        raise ValueError(
            f"positions={positions!r} on {name}, whose tokens have places and no position ids; leave it out"
        )


def fitted(method: CacheMethod, adapter: Adapter) -> CacheMethod:
    """The method, with what `mmkv calibrate` left in the model's folder where it needs that.

    Raises:
        ValueError: it is for the other kind of model, or was not calibrated.
    """
    name, model = type(method).__name__, type(adapter.model).__name__
    if not adapter.next_scale:
        if method.next_scale:
            raise ValueError(f"{name} is for visual autoregressive models, {model} is a language model")
        return method
    budget = getattr(method, "budget", None)
    if isinstance(budget, Budget) and budget.total is None and budget.image is None:
        raise ValueError(
            f"{name} with a budget for text or video on {model}, whose tokens are an image's; give budget=0.3, say"
        )
    if method.sparse_prefill:
        raise ValueError(f"{name} reads a prompt causally, {model} makes an image scale by scale; leave it out")
    if method.joint:
        raise ValueError(f"{name} decides once about a whole prompt, {model} has none; use HACK, ScaleKV or SnapKV")
    if not isinstance(method, NextScale) or method.calibration is None:
        return method
    option, kind = method.calibration
    if getattr(method, option) is not None or getattr(method, "budgets", None):
        return method
    found = adapter.calibrated(kind)
    if found is None:
        raise ValueError(
            f"{name} needs {option}= of this model: run `mmkv calibrate MODEL`, which leaves {kind.file} in its folder, or give "
            f"{option}={kind.__name__}.load(file)"
        )
    return replace(method, **{option: found})
