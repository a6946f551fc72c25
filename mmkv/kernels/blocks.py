"""A pool of packed blocks of one format: codes, scales and zero points as they lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from .spec import Spec


@dataclass(frozen=True, eq=False)
class Blocks:
    """NB blocks, each up to `spec.group` tokens of one KV head.

    Args:
        codes: uint8 [NB, spec.code_bytes].
        scale: [NB, spec.n_scale], fp16 (or uint8 with `scale_bits` 8); None if the format has no scales.
        zero: fp16 [NB, spec.n_zero]; None if the format has no zero points.
        top: fp16 [NB], largest scale of each block; only with `scale_bits` 8.
        spec: the format.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    top: Tensor | None
    spec: Spec

    def __post_init__(self):
        nb, spec = len(self), self.spec
        wide = spec.scale_bits == 16
        want = {
            "codes": ((nb, spec.code_bytes), torch.uint8),
            "scale": ((nb, spec.n_scale), torch.float16 if wide else torch.uint8) if spec.n_scale else None,
            "zero": ((nb, spec.n_zero), torch.float16) if spec.n_zero else None,
            "top": ((nb,), torch.float16) if spec.n_scale and not wide else None,
        }
        for name, what in want.items():
            t = getattr(self, name)
            have = None if t is None else (tuple(t.shape), t.dtype)
            if have != what:
                raise ValueError(f"{name} is {have}, this format wants {what}")

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are held."""
        return tuple(t for t in (self.codes, self.scale, self.zero, self.top) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind the tensors, a storage counted once, slack of views included."""
        storages = [t.untyped_storage() for t in self.tensors()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def _map(self, fn) -> Blocks:
        parts = {n: getattr(self, n) for n in ("codes", "scale", "zero", "top")}
        return replace(self, **{n: None if t is None else fn(t) for n, t in parts.items()})

    def select(self, ids: Tensor) -> Blocks:
        """The blocks `ids` (int [n]), copied."""
        return self._map(lambda t: t.index_select(0, ids.to(t.device)))

    def cat(self, other: Blocks) -> Blocks:
        """This pool followed by `other`, which must have the same format."""
        if other.spec != self.spec:
            raise ValueError("only blocks of the same format can be joined")
        parts = {n: (getattr(self, n), getattr(other, n)) for n in ("codes", "scale", "zero", "top")}
        return replace(self, **{n: None if a is None else torch.cat([a, b]) for n, (a, b) in parts.items()})

    def to(self, device: torch.device | str) -> Blocks:
        return self._map(lambda t: t.to(device))

    def decode_scale(self) -> Tensor | None:
        """Scales as numbers, fp32 [NB, spec.n_scale]; None if the format has none."""
        if self.scale is None:
            return None
        return self.scale.float() if self.top is None else decode_scale8(self.scale, self.top)

    @classmethod
    def empty(cls, spec: Spec, n: int = 0, device: torch.device | str = "cpu") -> Blocks:
        """A pool of `n` blocks with undefined content."""
        f16 = {"dtype": torch.float16, "device": device}
        u8 = {"dtype": torch.uint8, "device": device}
        wide = spec.scale_bits == 16
        return cls(
            codes=torch.empty(n, spec.code_bytes, **u8),
            scale=torch.empty(n, spec.n_scale, **(f16 if wide else u8)) if spec.n_scale else None,
            zero=torch.empty(n, spec.n_zero, **f16) if spec.n_zero else None,
            top=torch.empty(n, **f16) if spec.n_scale and not wide else None,
            spec=spec,
        )


def encode_scale8(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales fp32 [NB, n] >= 0 to (uint8 [NB, n], top fp16 [NB]): `top * 2 ** ((u - 255) / 16)`, 0 for u = 0.

    Scales below 2 ** -15.9 of the block's largest become 0. Relative error of the others <= 2 ** (1/32) - 1 = 2.2 %.
    """
    top = scale.amax(-1).clamp(max=65504).half()
    ratio = scale / top.float().clamp(min=2**-24).unsqueeze(-1)
    return (255 + 16 * ratio.log2()).round().clamp(0, 255).to(torch.uint8), top


def decode_scale8(u: Tensor, top: Tensor) -> Tensor:
    """The inverse of `encode_scale8`, fp32 [NB, n]."""
    share = scale8_table(u.device).index_select(0, u.reshape(-1).int()).view(u.shape)
    return share.mul_(top.float().unsqueeze(-1))


@cache
def scale8_table(device: torch.device) -> Tensor:
    """`2 ** ((u - 255) / 16)`, 0 for u = 0, fp32 [256]; a table since exp2 differs in the last bit by tensor shape."""
    table = ((torch.arange(256, dtype=torch.float64) - 255) / 16).exp2().float()
    table[0] = 0.0
    return table.to(device)
