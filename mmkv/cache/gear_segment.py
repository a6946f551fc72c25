"""What GEAR stores: packed codes, each vector's outliers, and a low-rank approximation of what is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, reduce

import torch

from mmkv.cache.formats import Packer, PackFormat, Side
from mmkv.cache.segment import PackedSegment
from mmkv.kernels import Blocks, Spec, attend_dense, merge, pack_blocks, unpack_blocks
from mmkv.kernels.pack import FP16_MAX, TILE_NUMBERS

TILE_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}  # tokens, over all rows, that attention decodes at a time


@dataclass(frozen=True)
class GearFormat(PackFormat):
    """A format of codes, and what corrects them.

    Args:
        outliers: share of the numbers of each vector (a key channel over the block's tokens, a value token over the head's
            channels) kept in fp16, half of them its largest, half its smallest; rounded to whole numbers for each half.
        rank: of the low-rank part.
        rounds: of power iteration that finds it.
    """

    outliers: float = 0.02
    rank: int = 4
    rounds: int = 3

    def ends(self, side: Side, channels: int) -> int:
        """Outliers at each end of a vector."""
        return round(self.outliers / 2 * (self.group if side.axis == "channel" else channels))

    def check(self, head_dim: int, value_dim: int) -> None:
        super().check(head_dim, value_dim)
        most = min(self.group, head_dim, value_dim)
        if self.rank > most:
            raise ValueError(f"rank {self.rank}: blocks of {self.group} tokens and {most} channels have at most {most}")

    def bits(self, head_dim: int, value_dim: int | None = None) -> tuple[float, float]:
        """True bits per key element and per value element of full blocks, corrections included."""
        value_dim = value_dim or head_dim
        keys, values = super().bits(head_dim, value_dim)
        return keys + self._more_bits(self.keys, head_dim), values + self._more_bits(self.values, value_dim)

    def _more_bits(self, side: Side, channels: int) -> float:
        length, vectors = (self.group, channels) if side.axis == "channel" else (channels, self.group)
        places = 8 * _place_type(length).itemsize
        more = vectors * 2 * self.ends(side, channels) * (16 + places) + 16 * self.rank * (self.group + channels)
        return more / (self.group * channels)


@dataclass(frozen=True, eq=False)
class GearBlocks:
    """A pool of NB blocks: what `Blocks` holds, and corrections. V vectors a block: its C channels, or its tokens.

    Args:
        backbone: codes of everything but the outliers.
        outlier: fp16 `[NB, V, 2m]`.
        place: uint8 (int16 where vectors are longer than 256) `[NB, V, 2m]`, where in its vector each lies.
        left: fp16 `[NB, group, r]`, right: fp16 `[NB, C, r]`: `left @ right.T` is added to the whole block.
    """

    backbone: Blocks
    outlier: torch.Tensor
    place: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def __len__(self) -> int:
        return len(self.backbone)

    @property
    def _corrections(self) -> dict[str, torch.Tensor]:
        return {"outlier": self.outlier, "place": self.place, "left": self.left, "right": self.right}

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are held."""
        return (*self.backbone.tensors(), *self._corrections.values())

    def select(self, ids: torch.Tensor) -> GearBlocks:
        """The blocks `ids` (int `[n]`), copied."""
        ids = ids.to(self.left.device)
        parts = {name: t.index_select(0, ids) for name, t in self._corrections.items()}
        return replace(self, backbone=self.backbone.select(ids), **parts)

    def cat(self, other: GearBlocks) -> GearBlocks:
        """This pool followed by `other`, which must have the same format."""
        parts = {name: torch.cat([t, getattr(other, name)]) for name, t in self._corrections.items()}
        return replace(self, backbone=self.backbone.cat(other.backbone), **parts)

    def decode(self) -> torch.Tensor:
        """fp32 `[NB, group, C]`; tokens at or after a block's count hold nothing of meaning."""
        exact = _with_outliers(unpack_blocks(self.backbone), self.outlier, self.place, self.backbone.spec)
        return torch.baddbmm(exact, self.left.float(), self.right.float().mT)


class GearPacker(Packer):
    """Makes the blocks of a `GearFormat`."""

    def pack(self, row: int, keys, values, heads, count) -> tuple[GearBlocks, GearBlocks]:
        return (
            self._tiles(self.stored_keys(keys, row, heads), count, self.key_spec, self.form.keys),
            self._tiles(self.stored_values(values, row, heads), count, self.value_spec, self.form.values),
        )

    def _tiles(self, x: torch.Tensor, count: torch.Tensor, spec: Spec, side: Side) -> GearBlocks:
        """A bounded number of blocks at a time, since all of this is done in fp32."""
        form, step = self.form, max(1, TILE_NUMBERS // (spec.group * spec.channels))
        ends = form.ends(side, spec.channels)
        tiles = [
            gear_blocks(part, counts, spec, ends, form.rank, form.rounds)
            for part, counts in zip(x.split(step), count.split(step))
        ]
        return reduce(GearBlocks.cat, tiles)


class GearSegment(PackedSegment):
    """Attends by decoding some slots of the table at a time, all rows together; never all of the cache at once."""

    packer_class = GearPacker

    def attend(
        self, q, *, scale, softcap=None, q_positions=None, window=None, merged=True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PackedSegment.attend`."""
        asked, found = self.packer.query(q), None
        step = max(1, TILE_TOKENS[q.device.type] // (len(self.block) * self.packer.form.group))
        for first in range(0, self.block.shape[1], step):
            slots = slice(first, first + step)
            keys, values = self._decoded(self.keys, slots), self._decoded(self.values, slots)
            mask = self._seen(slots, q_positions, window)[:, :, None]
            part = attend_dense(
                asked, keys, values, scale=scale, mask=mask, softcap=softcap, exact=q.dtype == torch.float32,
                merged=False,
            )  # fmt: skip
            found = part if found is None else [t[None] for t in merge([found, part])]
        out, lse = merge([found]) if merged else found
        return self.packer.output(out), lse

    def _decoded(self, pool: GearBlocks, slots: slice) -> torch.Tensor:
        """fp32 `[B, Hkv, tokens, C]` of some slots."""
        whole = pool.select(self.block[:, slots].flatten()).decode()
        return whole.reshape(self.batch, self.heads, -1, whole.shape[-1])

    def _seen(self, slots: slice, q_positions: torch.Tensor | None, window: int | None) -> torch.Tensor:
        """bool `[B, Hkv, 1 or Tq, tokens]`: what is a token, and in sight."""
        token = torch.arange(self.packer.form.group, device=self.block.device)
        held = (token < self.count[:, slots, None]).view(self.batch, self.heads, 1, -1)
        if window is None:
            return held
        at = self.start[:, slots, None] + token if self.positions is None else self._by_row()[:, slots]
        return held & (at.reshape(self.batch, self.heads, 1, -1) > q_positions[:, None, :, None] - window)


def gear_blocks(x: torch.Tensor, count: torch.Tensor, spec: Spec, ends: int, rank: int, rounds: int) -> GearBlocks:
    """Blocks `[N, group, C]` of `count` int `[N]` tokens each: outliers out, the rest packed, the error approximated.

    NaN counts as 0, what fp16 cannot hold as the largest number that it can.
    """
    x = x.float().nan_to_num(0.0, FP16_MAX, -FP16_MAX).clamp(-FP16_MAX, FP16_MAX)
    valid = (torch.arange(spec.group, device=x.device) < count[:, None])[:, :, None].expand_as(x)
    rest, outlier, place = _without_outliers(x, valid, spec, ends)
    backbone = pack_blocks(rest, count, spec)
    error = x - _with_outliers(unpack_blocks(backbone), outlier, place, spec)
    left, right = low_rank(error.masked_fill_(~valid, 0.0), rank, rounds)
    return GearBlocks(backbone, outlier, place, left, right)


def _vectors(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Blocks `[N, group, C]` as `[N, vectors, length]`; its own inverse."""
    return x.transpose(1, 2) if spec.axis == "channel" else x


def _without_outliers(x: torch.Tensor, valid: torch.Tensor, spec: Spec, ends: int):
    """The blocks with each vector's outliers replaced by the mean of its other numbers; the outliers and their places."""
    v, ok = _vectors(x, spec), _vectors(valid, spec)
    low = v.masked_fill(~ok, torch.inf).topk(ends, dim=-1, largest=False).indices
    high = v.masked_fill(~ok, -torch.inf).topk(ends, dim=-1).indices
    place = torch.cat([low, high], -1)
    outlier = v.gather(-1, place).masked_fill(~ok.gather(-1, place), 0.0)  # a short block has fewer
    inner = ok.scatter(-1, place, False)
    mean = v.masked_fill(~inner, 0.0).sum(-1, keepdim=True) / inner.sum(-1, keepdim=True).clamp(min=1)
    rest = torch.where(inner, v, mean)
    return _vectors(rest, spec).contiguous(), outlier.half(), place.to(_place_type(v.shape[-1]))


def _with_outliers(x: torch.Tensor, outlier: torch.Tensor, place: torch.Tensor, spec: Spec) -> torch.Tensor:
    return _vectors(_vectors(x, spec).scatter(-1, place.long(), outlier.float()), spec)


def _place_type(length: int) -> torch.dtype:
    return torch.uint8 if length <= 256 else torch.int16


def low_rank(error: torch.Tensor, rank: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors fp16 `[N, T, r]`, `[N, C, r]` whose product is close to `[N, T, C]`, by power iteration from a fixed start."""
    right = _start(error.shape[2], rank, error.device).expand(len(error), -1, -1)
    left = error.new_zeros(*error.shape[:2], rank)
    for _ in range(rounds):
        left = _orthonormal(error @ right).half()
        right = error.mT @ left.float()  # the best for the factor as it is stored
    return left.half(), right.clamp(-FP16_MAX, FP16_MAX).half()


@cache
def _start(channels: int, rank: int, device: torch.device) -> torch.Tensor:
    return torch.randn(channels, rank, generator=torch.Generator().manual_seed(0)).to(device)


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of `[N, T, r]`; zeros where there are fewer independent ones.

    Gram-Schmidt, twice for its rounding; a batched QR is slow on GPUs for so few columns, and invents directions for zeros.
    """
    found: list[torch.Tensor] = []
    for column in x.unbind(-1):
        for _ in range(2):
            for other in found:
                column = column - (other * column).sum(-1, keepdim=True) * other
        size = column.norm(dim=-1, keepdim=True)
        found.append(torch.where(size > 0, column / size.clamp(min=1e-30), 0.0))
    return torch.stack(found, -1) if found else x
