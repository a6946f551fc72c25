"""How one frame of one layer lies in a row of bytes: a `Record` writes rows and reads them.

All frames of all layers have rows of one size, in every tier, so a tier is a pool of rows and a frame is read alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mmkv.cache.formats import Packer, PackFormat
from mmkv.kernels import Blocks, Spec, unpack_blocks

from .chunk import DTYPES, Shape
from .packing import format_for

ALIGN = 16  # bytes; a field can then be viewed in any dtype


class Field(NamedTuple):
    """A tensor of one frame: its place in the row, dtype and shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


class Record(ABC):
    """Rows of `size` bytes, from and to keys `[Hkv, F * n, D]` and values `[Hkv, F * n, Dv]`."""

    def __init__(self, shape: Shape, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.shape, self.fields, at = shape, {}, 0
        for name, (dtype, sizes) in tensors.items():
            self.fields[name] = Field(at, dtype, sizes)
            at = -(-self.fields[name].end // ALIGN) * ALIGN
        self.size = at

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Rows uint8 `[F, size]`, where the keys are."""
        frames = keys.shape[1] // self.shape.tokens
        rows = torch.zeros(frames, self.size, dtype=torch.uint8, device=keys.device)
        by_frame = (t.unflatten(1, (frames, -1)).transpose(0, 1) for t in (keys, values.to(keys.device)))
        for name, t in self._split(*by_frame).items():
            field = self.fields[name]
            rows[:, field.start : field.end] = t.reshape(frames, -1).contiguous().view(torch.uint8)
        return rows

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows uint8 `[F, size]`, in the store's dtype."""
        parts = {n: rows[:, f.start : f.end].view(f.dtype).unflatten(1, f.shape) for n, f in self.fields.items()}
        keys, values = self._join(parts)
        dtype = DTYPES[self.shape.dtype]
        return tuple(t.transpose(0, 1).to(dtype).flatten(1, 2) for t in (keys, values))  # type: ignore[return-value]

    @abstractmethod
    def _split(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Tensors `[F, ...]` of each field, from `[F, Hkv, n, D]` and `[F, Hkv, n, Dv]`."""

    @abstractmethod
    def _join(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `_split`."""


class Dense(Record):
    """Keys and values as they are."""

    def __init__(self, shape: Shape):
        dtype, sizes = DTYPES[shape.dtype], (shape.heads, shape.tokens)
        super().__init__(shape, {"keys": (dtype, (*sizes, shape.dim)), "values": (dtype, (*sizes, shape.value_dim))})

    def _split(self, keys, values):
        return dict(keys=keys, values=values)

    def _join(self, parts):
        return parts["keys"], parts["values"]


class Packed(Record):
    """Keys per channel over a frame's tokens, values per token, in a format of mmkv.cache.

    A frame of n tokens is cut into k = ceil(n / 256) groups of ceil(n / k) tokens (at least 8), so no group reaches into
    another frame; at most k - 1 tokens of padding are stored where k does not divide n. The order of the key channels
    (VidKV) is found from a whole chunk and stored with each frame.
    """

    def __init__(self, shape: Shape, form: PackFormat):
        self.group, self.blocks = form.group, -(-shape.tokens // form.group)
        sizes = (1, shape.heads, shape.dim, shape.value_dim)
        self.form, self.sizes = form, sizes
        packer = Packer(form, *sizes, "cpu")
        self.specs: dict[str, Spec] = {"keys": packer.key_spec, "values": packer.value_spec}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for side, spec in self.specs.items():
            for name, t in _parts(Blocks.empty(spec, shape.heads * self.blocks)):
                tensors[f"{side}.{name}"] = t.dtype, tuple(t.shape)
        if packer.order is not None:
            tensors["order"] = torch.int16, tuple(packer.order.shape[1:])
        super().__init__(shape, tensors)
        # what the packer does to channels, their order aside, is orthonormal: these undo it (None: nothing to undo)
        self._undo = {
            "keys": _undoing(packer.stored_keys, shape.dim),
            "values": _undoing(packer.stored_values, shape.value_dim),
        }

    def _split(self, keys, values):
        frames, heads = keys.shape[:2]
        packer = Packer(self.form, *self.sizes, keys.device)
        packer.fit(0, keys.transpose(0, 1).flatten(1, 2))
        owner = torch.arange(heads, device=keys.device).repeat_interleave(self.blocks).repeat(frames)
        count = torch.full((frames * heads, self.blocks), self.group, dtype=torch.int32, device=keys.device)
        count[:, -1] = self.shape.tokens - (self.blocks - 1) * self.group
        packed = packer.pack(0, self._cut(keys), self._cut(values), owner, count.flatten())
        parts = {
            f"{side}.{name}": t.unflatten(0, (frames, -1))
            for side, blocks in zip(self.specs, packed)
            for name, t in _parts(blocks)
        }
        if packer.order is not None:
            parts["order"] = packer.order.expand(frames, -1, -1)
        return parts

    def _cut(self, x: Tensor) -> Tensor:
        """`[F, Hkv, n, D]` to blocks `[F * Hkv * k, group, D]`."""
        missing = self.blocks * self.group - x.shape[2]
        return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (self.blocks, -1)).flatten(0, 2)

    def _join(self, parts):
        keys, values = (self._unpacked(side, parts) for side in self.specs)
        if "order" in parts:
            order = parts["order"].long()[:, :, None].expand_as(keys)
            keys = torch.empty_like(keys).scatter_(-1, order, keys)
        return keys, values

    def _unpacked(self, side: str, parts: dict[str, Tensor]) -> Tensor:
        """fp32 `[F, Hkv, n, D]`."""
        spec = self.specs[side]
        found = {name: parts.get(f"{side}.{name}") for name in ("codes", "scale", "zero", "top")}
        frames = len(parts[f"{side}.codes"])
        blocks = Blocks(**{n: None if t is None else t.flatten(0, 1).contiguous() for n, t in found.items()}, spec=spec)
        x = unpack_blocks(blocks)
        undo = self._undo[side]
        if undo is not None:
            x = x @ undo.to(x.device)
        x = x.unflatten(0, (frames, self.shape.heads, self.blocks)).flatten(2, 3)
        return x[:, :, : self.shape.tokens]


def _parts(blocks: Blocks) -> list[tuple[str, Tensor]]:
    named = ((name, getattr(blocks, name)) for name in ("codes", "scale", "zero", "top"))
    return [(name, t) for name, t in named if t is not None]


def _undoing(stored, channels: int) -> Tensor | None:
    """Matrix `[D, D]` that brings stored channels back: y @ M. `stored` is the packer's method."""
    basis = stored(torch.eye(channels)[None], 0, torch.zeros(1, dtype=torch.int64))[0]
    return None if torch.equal(basis, torch.eye(channels)) else basis.T.contiguous()


def record(shape: Shape) -> Record:
    """The record of a shape."""
    if shape.packed is None:
        return Dense(shape)
    return Packed(shape, format_for(shape.packed, shape.tokens))
