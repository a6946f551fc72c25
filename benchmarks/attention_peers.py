"""What packed attention is measured against: attention over dense keys and values, by whatever can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from hf_quantized import importable, stored_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmkv.cache.segment import PackedSegment
from mmkv.kernels import unpack_blocks
from mmkv.parts.storage import storage_bytes

FP8 = "fp8"  # ends the names of those that read half the bytes

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def dense_peers(device: str) -> dict[str, Callable]:
    """Name -> function of (q `[B, Hq, 1, D]`, keys and values `[B, Hkv, T, D]`, scale) that gives the call to time.

    A call that this device or shape does not have raises when it is first made.
    """
    peers: dict[str, Callable] = {name: _sdpa(backend) for name, backend in BACKENDS.items()}
    peers["sdpa flash, heads repeated"] = _repeated
    if device == "cuda":
        peers["flex"] = _flex
        for name, make in (
            ("flash_attn", _flash_attn),
            ("flash_attn_interface", _flash_attn),
            ("flashinfer", _flashinfer),
        ):
            if importlib.util.find_spec(name) is not None:
                peers[name] = partial(make, name)
                peers[f"{name} {FP8}"] = partial(_in_8_bits, make, name)
    return peers


def quantized_peers() -> dict[str, Callable]:
    """The same for transformers' quantized caches, where their backends can be imported."""
    return {f"hf {name} {bits} bit": partial(_hf, kind, bits) for name, kind in importable().items() for bits in (4, 2)}


def _hf(kind, bits, q, keys, values, scale):
    """A step of a `QuantizedCache` of groups of 64: everything is unpacked, then attended to."""
    layer = kind(nbits=bits, q_group_size=64)
    layer.update(keys, values)
    stored = layer._quantized_keys, layer._quantized_values

    def call():
        k, v = (layer._dequantize(part).to(q.dtype) for part in stored)
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    call.nbytes = storage_bytes(t for part in stored for t in stored_tensors(part))
    return call


def _in_8_bits(make, name, q, keys, values, scale):
    return make(name, *(t.to(torch.float8_e4m3fn) for t in (q, keys, values)), scale)


def _sdpa(backend: SDPBackend) -> Callable:
    def make(q, keys, values, scale):
        def call():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)

        return call

    return make


def _repeated(q, keys, values, scale):
    """What transformers does where a backend does not group heads."""
    groups = q.shape[1] // keys.shape[1]

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                q, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), scale=scale
            )

    return call


def _flex(q, keys, values, scale):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, keys, values, scale=scale, enable_gqa=True)


def _flash_attn(name, q, keys, values, scale):
    module = importlib.import_module(name)
    query, k, v = (t.transpose(1, 2).contiguous() for t in (q, keys, values))
    return lambda: module.flash_attn_with_kvcache(query, k, v, softmax_scale=scale)


def _flashinfer(name, q, keys, values, scale):
    module = importlib.import_module(name)
    if q.shape[0] != 1:
        raise ValueError("FlashInfer's single_decode_with_kv_cache takes one sequence; its paged one is not measured")
    k, v = keys[0].transpose(0, 1).contiguous(), values[0].transpose(0, 1).contiguous()
    return lambda: module.single_decode_with_kv_cache(q[0, :, 0], k, v, sm_scale=scale, use_tensor_cores=True)


def unpacked(segment: PackedSegment, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, Hkv, T, D]` that a segment of full rows decodes to, in its stored channels."""
    out = []
    for blocks in (segment.keys, segment.values):
        tokens = unpack_blocks(blocks).to(dtype)[segment.block.long()].flatten(1, 2)  # [B * Hkv, slots * group, D]
        out.append(tokens[:, : segment.held[0]].unflatten(0, (segment.batch, segment.heads)))
    return out[0], out[1]
