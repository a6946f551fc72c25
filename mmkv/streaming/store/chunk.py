"""`Chunk`, the frames of one write, and `Shape`, what all chunks of a store have in common."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class Chunk:
    """F frames of n tokens each, all layers.

    Args:
        keys: per layer `[Hkv, F * n, D]`, unrotated, in the model's dtype, on any device.
        values: per layer `[Hkv, F * n, Dv]`.
        index: fp32 `[layers, F, Hkv * D]`, what each frame is found by.
        times: seconds of each frame, ascending.
    """

    keys: list[Tensor]
    values: list[Tensor]
    index: Tensor
    times: list[float]


@dataclass(frozen=True)
class Shape:
    """Sizes of a store.

    Args:
        layers: of the decoder.
        heads: KV heads.
        dim: channels of a key head.
        value_dim: channels of a value head.
        tokens: per frame.
        dtype: of keys and values: "float32", "float16" or "bfloat16".
        packed: how they are stored; None as they are.
    """

    layers: int
    heads: int
    dim: int
    value_dim: int
    tokens: int
    dtype: str
    packed: str | None = None

    def __post_init__(self):
        for name, size in asdict(self).items():
            if name not in ("dtype", "packed") and (type(size) is not int or size < 1):
                raise ValueError(f"{name} {size!r}: possible are integers from 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: possible are {', '.join(DTYPES)}")

    def differs(self, stored: dict[str, Any]) -> str:
        """What differs from a stored shape, in words; "" where nothing does."""
        return ", ".join(f"{k} {stored.get(k)}, not {v}" for k, v in asdict(self).items() if stored.get(k) != v)

    def check(self, chunk: Chunk, after: float) -> None:
        """Raise ValueError where a chunk is not of this shape, or its times do not ascend from `after`."""
        frames, dtype = len(chunk.times), DTYPES[self.dtype]
        if not frames:
            raise ValueError("a chunk without frames; give at least one")
        for name, tensors, width in (("keys", chunk.keys, self.dim), ("values", chunk.values, self.value_dim)):
            if len(tensors) != self.layers:
                raise ValueError(f"{name} of {len(tensors)} layers; this store holds {self.layers}")
            want = (self.heads, frames * self.tokens, width)
            for layer, t in enumerate(tensors):
                if tuple(t.shape) != want or t.dtype != dtype:
                    raise ValueError(
                        f"{name} of layer {layer} are {t.dtype} {tuple(t.shape)}; {dtype} {want} is needed for {frames} "
                        f"frames of {self.tokens} tokens"
                    )
        want_index = (self.layers, frames, self.heads * self.dim)
        if tuple(chunk.index.shape) != want_index or chunk.index.dtype != torch.float32:
            raise ValueError(
                f"index is {chunk.index.dtype} {tuple(chunk.index.shape)}; torch.float32 {want_index} is needed"
            )
        for time in chunk.times:
            if not math.isfinite(time) or time <= after:
                raise ValueError(f"a frame at {time} s after one at {after} s; times have to ascend")
            after = time
