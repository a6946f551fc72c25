"""`wrap`, `unwrap`, `wrapped`: join a model and methods, and part them again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch

from mmkv._chunks import check_chunk
from mmkv._presets import preset as find_preset
from mmkv._session import Session
from mmkv.cache import CacheMethod, pipeline
from mmkv.models import adapter_for
from mmkv.parts.budget import bytes_of
from mmkv.parts.calibration import Identity


def wrap(
    model, preset=None, *, tokens=(), cache=(), positions="stock", max_bytes=None, prefill_chunk=None, graphs=False
):
    """Make a Hugging Face model store its KV cache as the given methods say. Works in place, undone by `unwrap`.

    Args:
        model: a transformers model, PEFT-wrapped or not; the error for another family lists the supported ones.
        preset: a name from `mmkv.presets()`; None with no methods keeps everything, which is stock `generate` to the bit.
        tokens: vision-token methods (a later version).
        cache: cache methods in the order in which they act, for example `[SnapKV(budget=0.25), VidKV()]`: each sees what the
            one before left. Not together with a preset.
        positions: "stock" (position ids of the installed transformers) or "trained" (the rule Qwen2-VL and Qwen2.5-VL were
            trained with: text after a video continues behind its last frame; transformers from 5.3 on differs).
        max_bytes: the cache never holds more after a forward, however long the answer: a number of bytes, or "64MiB". Each
            layer has an equal share; what the end of the prompt attended to least goes first.
        prefill_chunk: tokens of a prompt that run through the decoder at a time, compressed in between, so that the peak of
            the cache falls too; the vision tower still runs once. What a method keeps of a chunk is decided before the
            rest of the prompt was read.
        graphs: CUDA graphs for decode steps (a later version).

    Returns:
        the same model object.

    Raises:
        TypeError: not a transformers model, or not a cache method.
        ValueError: unsupported family or head size, options of another model, unknown preset, model already wrapped.
    """
    base = _base(model)
    if getattr(base, "_mmkv", None) is not None:
        raise ValueError(f"this {type(base).__name__} is already wrapped; call mmkv.unwrap(model) first")
    if positions not in ("stock", "trained"):
        raise ValueError(f"positions {positions!r}: possible are 'stock', 'trained'")
    limit = None if max_bytes is None else bytes_of(max_bytes, "max_bytes")
    check_chunk(prefill_chunk)
    for name, value in (("tokens", tokens), ("graphs", graphs)):
        if value is not None and value is not False and value != () and value != []:
            raise NotImplementedError(f"wrap({name}=...) comes with a later version of mmkv; leave it out")
    adapter = adapter_for(base)
    method = _method(preset, cache)
    if method is not None:
        if method.next_scale:
            raise ValueError(
                f"{type(method).__name__} is for visual autoregressive models, {type(base).__name__} is a language model"
            )
        method.check(*adapter.head_dims())
        shape = Identity.of(adapter.text_config)
        method.check_model(shape.layers, shape.heads)
    if method is not None or limit is not None:
        _check_device(base)
    session = Session(adapter, method, positions, limit, prefill_chunk)
    try:
        session.attach()
    except BaseException:
        session.detach()
        raise
    return model


def unwrap(model):
    """Take `wrap` back: the model is what it was, to the bit. Returns the same model object.

    Raises:
        ValueError: the model is not wrapped.
    """
    session(model).detach()
    return model


@contextmanager
def wrapped(model, preset=None, **options):
    """`with mmkv.wrapped(model, "vidkv") as model:` wraps for the block, and unwraps whatever happens in it."""
    wrap(model, preset, **options)
    try:
        yield model
    finally:
        unwrap(model)


def session(model) -> Session:
    """The session of a wrapped model.

    Raises:
        ValueError: the model is not wrapped.
    """
    found = getattr(_base(model), "_mmkv", None)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not wrapped by mmkv")
    return found


def _check_device(model) -> None:
    """The kernels run on CPU and CUDA; say so now and not after a long prefill."""
    kinds = {p.device.type for p in model.parameters()} - {"cpu", "cuda", "meta"}
    if kinds:
        raise ValueError(f"device {', '.join(sorted(kinds))}: mmkv's kernels run on cpu and cuda")
    if any(p.is_cuda and p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError("float64 on cuda: mmkv's kernels take float16, bfloat16 and float32 there")


def _base(model):
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _method(preset, cache) -> CacheMethod | None:
    if isinstance(preset, CacheMethod):
        raise TypeError(f"pass methods as cache=[{type(preset).__name__}(...)]; the second argument is a preset's name")
    if isinstance(cache, str):
        raise TypeError(f"cache={cache!r} is a name; presets go second: mmkv.wrap(model, {cache!r})")
    if cache is None:
        cache = ()
    cache = tuple(cache) if isinstance(cache, Iterable) else (cache,)
    if preset is not None and cache:
        raise ValueError("give a preset or cache=[...], not both")
    methods = find_preset(preset).cache if preset is not None else cache
    for method in methods:
        if isinstance(method, type) and issubclass(method, CacheMethod):
            raise TypeError(f"cache=[{method.__name__}] is a class; give an instance: {method.__name__}()")
        if not isinstance(method, CacheMethod):
            raise TypeError(f"cache={method!r} is not a cache method; mmkv.methods() lists them")
    return pipeline(tuple(methods))
