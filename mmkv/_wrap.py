"""`wrap`, `unwrap`, `wrapped`: join a model and methods, and part them again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch

from mmkv import compat
from mmkv._chunks import check_chunk
from mmkv._graphs import check_graphs
from mmkv._presets import preset as find_preset
from mmkv._recorders import recorder_for
from mmkv._scales import check_painting, fitted
from mmkv._session import Session
from mmkv._vision.looking import facts_of
from mmkv._vision.vit import VitSession, check_vit
from mmkv.cache import CacheMethod, pipeline
from mmkv.models import adapter_for
from mmkv.models.timm_vit import TimmViT, is_timm_vit
from mmkv.parts.budget import bytes_of
from mmkv.parts.calibration import Identity
from mmkv.tokens.method import TokenMethod


def wrap(
    model, preset=None, *, tokens=(), cache=(), positions="stock", max_bytes=None, prefill_chunk=None, graphs=False
):
    """Make a Hugging Face model store its KV cache as the given methods say. Works in place, undone by `unwrap`.

    Args:
        model: a transformers model, PEFT-wrapped or not; the error for another family lists the supported ones. Or a timm vision
            transformer, with `tokens` that merge inside it. Or one that paints scale by scale (`mmkv.models.infinity`), with
            cache methods.
        preset: a name from `mmkv.presets()`; None with no methods keeps everything, which is stock `generate` to the bit.
        tokens: methods that drop or merge vision tokens, in the order in which they are asked, for example
            `[VisionZip(), FastV()]`; with a preset or cache methods as well, which then store what is left.
        cache: cache methods in the order in which they act, for example `[SnapKV(budget=0.25), VidKV()]`: each sees what the
            one before left. Not together with a preset.
        positions: "stock" (position ids of the installed transformers) or "trained" (the rule Qwen2-VL and Qwen2.5-VL were
            trained with: text after a video continues behind its last frame; transformers from 5.3 on differs).
        max_bytes: the cache never holds more after a forward, however long the answer: a number of bytes, or "64MiB". Each
            layer has an equal share; what the end of the prompt attended to least goes first.
        prefill_chunk: tokens of a prompt that run through the decoder at a time, compressed in between, so that the peak of
            the cache falls too; the vision tower still runs once. What a method keeps of a chunk is decided before the
            rest of the prompt was read.
        graphs: decode steps are recorded as CUDA graphs and replayed, which spares the launches of their kernels. For a model on
            one CUDA device; not with methods that decide again while decoding (H2O, ZipCache, ZipVL), `max_bytes`
            or sliding windows. The cache then has room for up to 1,024 further tokens, which the report counts.

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
    if not isinstance(graphs, bool):
        raise ValueError(f"graphs={graphs!r}: possible are True and False")
    if is_timm_vit(base):
        given = dict(
            preset=preset, cache=cache, max_bytes=max_bytes, prefill_chunk=prefill_chunk, graphs=graphs or None
        )
        return _wrap_vit(
            model, base, _instances(tokens), {name: v for name, v in given.items() if v not in (None, (), [])}
        )
    adapter = adapter_for(base)
    if adapter.next_scale:
        check_painting(base, tokens=_instances(tokens), prefill_chunk=prefill_chunk, positions=positions)
    token_methods = _tokens(_instances(tokens), adapter, prefill_chunk)
    method = _method(preset, cache)
    if method is not None:
        method = fitted(method, adapter)
        method.check(*adapter.head_dims())
        shape = Identity.of(adapter.text_config)
        method.check_model(shape.layers, shape.heads)
    if method is not None or limit is not None:
        _check_device(base)
    recorder = None
    if graphs:
        check_graphs(adapter, method, token_methods, limit)
        recorder = recorder_for(base)
    session = Session(adapter, method, positions, limit, prefill_chunk, token_methods, recorder)
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


def _wrap_vit(model, base, methods: tuple[TokenMethod, ...], others: dict):
    """`wrap` for a timm vision transformer."""
    adapter = TimmViT(base)
    check_vit(methods, adapter, others)
    session = VitSession(adapter, methods)
    facts = session.hooks.facts()
    for method in methods:
        method.check(facts)
    session.attach()
    return model


def _instances(tokens) -> tuple[TokenMethod, ...]:
    """The token methods as a tuple.

    Raises:
        TypeError: not a token method.
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens={tokens!r} is a name; give instances: tokens=[mmkv.tokens.FastV()]")
    methods = () if tokens is None else tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)
    for method in methods:
        if isinstance(method, type) and issubclass(method, TokenMethod):
            raise TypeError(f"tokens=[{method.__name__}] is a class; give an instance: {method.__name__}()")
        if not getattr(method, "for_vlm", True):
            raise TypeError(f"{type(method).__name__} is for backbones of 3D detection: see mmkv.models.toc3d")
        if not isinstance(method, TokenMethod):
            raise TypeError(f"tokens={method!r} is not a token method; mmkv.methods() lists them")
    return methods


def _tokens(methods: tuple[TokenMethod, ...], adapter, prefill_chunk) -> tuple[TokenMethod, ...]:
    """The token methods, each of which works on this model.

    Raises:
        ValueError: the model lacks what one needs, or they do not go with another option.
    """
    if not methods:
        return ()
    facts = facts_of(adapter, adapter.vision_tower())
    name = type(adapter.model).__name__
    if not facts.depth:
        raise ValueError(f"tokens=[{type(methods[0]).__name__}()] on {name}, which sees no images; use cache methods")
    if any(window is not None for window in compat.layer_windows(adapter.text_config)):
        raise ValueError(f"tokens=... on {name}: a sliding window would reach further where tokens are dropped")
    for method in methods:
        method.check(facts)
        if method.decoder_layers(facts.layers) and prefill_chunk is not None:
            raise ValueError(
                f"prefill_chunk with {type(method).__name__}, which looks at the whole prompt between layers; leave one out"
            )
        if method.position_ids == "renumbered" and facts.axes > 1:
            raise ValueError(
                f"position_ids='renumbered' on {name}, whose positions have {facts.axes} axes; possible is 'original'"
            )
    return methods


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
