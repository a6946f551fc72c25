"""Numbers to packed blocks and back.

Per group (one channel over the block's tokens, or some channels of one token) the statistics are taken in fp32 over the
valid tokens, the zero point and the scale are rounded to what is stored, and only then are the codes chosen, so that
they are the right ones for what will be decoded. Rules for the odd cases:

- A constant group has scale 0 and decodes to its zero point: exact where fp16 holds the constant.
- NaN counts in no statistic and gets the code of "no deviation from the zero point". +-inf stands for the largest
  finite magnitude of its group. Neither changes what the other groups decode to.
- Magnitudes over 1e15 are read as 1e15 (their square must fit fp32); scales and zero points saturate at 65504.
- Padding (tokens at or after `count`) enters no statistic; its codes are 0, and so are padded tokens' scales and zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import check_device, check_float, check_integer
from .blocks import Blocks, decode_scale8, encode_scale8
from .digits import decode_digits, deinterleave, pack_digits, unit_steps
from .spec import Code, Spec

TILE_NUMBERS = 1 << 22  # numbers that are in work as fp32 at a time
FP16_MAX = 65504.0


def pack_blocks(x: Tensor, count: Tensor, spec: Spec) -> Blocks:
    """Packs N blocks.

    NaN enters no statistic and is stored as its group's zero point, an infinity as the largest finite number of its group: one
    overflow does not take a whole group with it. Nothing is said about either.

    Args:
        x: [N, group, C], floating point, channels already permuted or rotated.
        count: int [N], valid tokens of each block; the rest is padding of any content.
        spec: the format.

    Returns:
        `Blocks` of length N.
    """
    check_float(x=x)
    check_device(x.device, count=count)
    if x.dim() != 3 or x.shape[1:] != (spec.group, spec.channels):
        raise ValueError(f"x is {tuple(x.shape)}, this format wants [N, {spec.group}, {spec.channels}]")
    check_integer(count=count)
    if count.shape != x.shape[:1]:
        raise ValueError(f"count is {tuple(count.shape)}, wanted is [{x.shape[0]}]")
    if x.is_cuda:
        from .pack_triton import pack_blocks_triton

        with torch.cuda.device(x.device):  # Triton launches on the current device, a split model has several
            return pack_blocks_triton(x, count, spec)
    return pack_blocks_reference(x, count, spec)


def pack_blocks_reference(x: Tensor, count: Tensor, spec: Spec) -> Blocks:
    """`pack_blocks` in torch, a bounded number of blocks at a time."""
    n = x.shape[0]
    out = Blocks.empty(spec, n, x.device)
    step = max(1, TILE_NUMBERS // (spec.group * spec.channels))
    for i in range(0, n, step):
        _pack_tile(x[i : i + step], count[i : i + step], out, slice(i, i + step))
    return out


def _pack_tile(x: Tensor, count: Tensor, out: Blocks, where: slice) -> None:
    spec, n = out.spec, x.shape[0]
    valid = torch.arange(spec.group, device=x.device) < count[:, None]  # [n, group]
    groups = [_Group(v, ok, code) for v, ok, code in _split(x.float(), valid, spec)]

    scales = [g.scale.reshape(n, -1) for g in groups if g.code.has_scale]
    if scales and spec.scale_bits == 8:
        u, top = encode_scale8(torch.cat(scales, 1))
        out.scale[where], out.top[where] = u, top
        stored = decode_scale8(u, top)
    elif scales:
        out.scale[where] = torch.cat(scales, 1)  # already rounded to fp16
        stored = out.scale[where].float()
    zeros = [g.zero.reshape(n, -1) for g in groups if g.code.has_zero]
    if zeros:
        out.zero[where] = torch.cat(zeros, 1)

    at_scale = at_code = 0
    for g in groups:
        if g.code.has_scale:
            width = g.scale[0].numel()
            g.scale = stored[:, at_scale : at_scale + width].view_as(g.scale)
            at_scale += width
        if g.code.per_byte:
            packed = pack_digits(g.codes(), g.code).reshape(n, -1)
            out.codes[where, at_code : at_code + packed.shape[1]] = packed
            at_code += packed.shape[1]


def _split(x: Tensor, valid: Tensor, spec: Spec):
    """Yields (numbers [n, groups.., length], valid of the same rank, code) with groups in storage order."""
    if spec.axis == "token":
        ((_, code),) = spec.classes
        yield x.unflatten(-1, (-1, spec.channel_group)), valid[:, :, None, None], code
        return
    for part, (_, code) in zip(x.split([w for w, _ in spec.classes], -1), spec.classes, strict=True):
        yield part.transpose(1, 2).contiguous(), valid[:, None, :], code


class _Group:
    """One code's numbers [n, groups.., length]: deviation from the stored zero point, and the scale [n, groups..]."""

    def __init__(self, v: Tensor, valid: Tensor, code: Code):
        self.code, self.valid = code, valid
        if bool(v.isfinite().all()):
            ok = valid
            v = v.clamp(-1e15, 1e15)
        else:
            ok = valid & ~v.isnan()
            big = v.abs().where(valid & v.isfinite(), 0.0).amax(-1, keepdim=True).clamp(max=1e15)
            v = v.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-big, big)
        n = (ok.sum(-1, keepdim=True) * (v.shape[-1] // ok.shape[-1])).clamp(min=1)  # ok may broadcast over v
        self.zero = self._zero(v, ok, n)
        if code.refine:
            self._refine(v, ok, n)
            return
        d = torch.where(ok, v - self.zero, 0.0)
        self.d, self.zero = d, self.zero.squeeze(-1)
        if code.per_byte:
            self.unit = self._unit(d, ok, n)
        if code.has_scale:
            self.scale = (_round_fp16(self.unit) if code.scale == "unit" else self._fit(d, ok)).squeeze(-1)

    def _zero(self, v: Tensor, ok: Tensor, n: Tensor) -> Tensor:
        if self.code.zero == "none":
            return v.new_zeros(*v.shape[:-1], 1)
        if self.code.zero == "mean":
            return _round_fp16(torch.where(ok, v, 0.0).sum(-1, keepdim=True) / n)
        low = torch.where(ok, v, torch.inf).amin(-1, keepdim=True)
        return _round_fp16(low.masked_fill(low == torch.inf, 0.0))

    def _unit(self, d: Tensor, ok: Tensor, n: Tensor) -> Tensor:
        """The statistic of the deviations that thresholds are measured in, fp32 [n, groups.., 1]."""
        levels = self.code.levels
        if self.code.unit == "range":
            # d is 0 where absent; with zero "min" it never exceeds the true range
            high = torch.where(ok, d, -torch.inf).amax(-1, keepdim=True)
            low = d.new_zeros(()) if self.code.zero == "min" else torch.where(ok, d, torch.inf).amin(-1, keepdim=True)
            return (high - low).clamp(min=0.0).nan_to_num(0.0) / max(len(levels) - 1, 1)
        if self.code.unit == "absmax":
            return d.abs().amax(-1, keepdim=True) / max(levels[-1], 1.0)
        if self.code.unit == "mean_abs":
            return d.abs().sum(-1, keepdim=True) / n
        return (d.square().sum(-1, keepdim=True) / n).sqrt()  # about the *stored* zero point; RMS where there is none

    def _fit(self, d: Tensor, ok: Tensor) -> Tensor:
        """Least-squares scale of the chosen levels."""
        levels = torch.tensor(self.code.levels, device=d.device)[encode(d, self.unit, self.code).long()]
        levels = torch.where(ok, levels, 0.0)
        power = levels.square().sum(-1, keepdim=True)
        return _round_fp16(((levels * d).sum(-1, keepdim=True) / power.clamp(min=1e-30)).clamp(min=0.0))

    def _refine(self, v: Tensor, ok: Tensor, n: Tensor) -> None:
        """Lloyd's algorithm on zero point and scale, from the min-max ones: an outlier or a crowd gets its own level."""
        d = torch.where(ok, v - self.zero, 0.0)
        unit, shift = self._unit(d, ok, n), torch.zeros_like(self.zero)
        mean = d.sum(-1, keepdim=True) / n
        for _ in range(self.code.refine):
            level = torch.where(ok, encode(d - shift, unit, self.code).float(), 0.0) + self.code.levels[0] * ok
            middle = level.sum(-1, keepdim=True) / n
            spread = level.square().sum(-1, keepdim=True) / n - middle.square()
            slope = (level * d).sum(-1, keepdim=True) / n - middle * mean
            unit = torch.where(spread > 1e-6, slope / spread.clamp(min=1e-6), unit).clamp(min=0.0)
            shift = torch.where(spread > 1e-6, mean - unit * middle, shift)
        zero = _round_fp16(self.zero + shift)
        self.d, self.zero = torch.where(ok, v - zero, 0.0), zero.squeeze(-1)
        self.unit = _round_fp16(unit)
        self.scale = self.unit.squeeze(-1)

    def codes(self) -> Tensor:
        """uint8 [n, groups.., length], 0 at padding; must be called after `scale` is what decoding will see."""
        unit = self.scale.unsqueeze(-1) if self.code.has_scale and self.code.scale == "unit" else self.unit
        return encode(self.d, unit, self.code).masked_fill_(~self.valid, 0)


def encode(d: Tensor, unit: Tensor, code: Code) -> Tensor:
    """Deviations fp32 [..., n] to codes uint8 [..., n]; unit [..., 1], where it is 0 the deviation counts as 0.

    For min-max and absmax codes the decision at a tie is round-half-to-even, as KIVI's code has it.
    """
    u = torch.where(unit > 0, d / unit.clamp(min=1e-37), 0.0)
    if code.unit in ("range", "absmax") and unit_steps(code):
        return u.sub_(code.levels[0]).round_().clamp_(0, len(code.levels) - 1).to(torch.uint8)
    if len(code.bounds) <= 3:
        out = torch.zeros_like(u, dtype=torch.uint8)
        for bound in code.bounds:
            out += u > bound
        return out
    return torch.bucketize(u, torch.tensor(code.bounds, device=u.device), out_int32=True).to(torch.uint8)


def _round_fp16(t: Tensor) -> Tensor:
    return t.clamp(-FP16_MAX, FP16_MAX).half().float()


def unpack_blocks(blocks: Blocks) -> Tensor:
    """Decodes whole blocks, for tests, deep crops and pictures; attention never does this to a cache.

    Returns:
        fp32 [N, group, C]. Tokens at or after a block's count hold nothing of meaning.
    """
    spec, n = blocks.spec, len(blocks)
    scale = blocks.decode_scale()
    zero = None if blocks.zero is None else blocks.zero.float()
    parts, at_code, at_scale, at_zero = [], 0, 0, 0
    for width, code in spec.classes:
        token = spec.axis == "token"
        length = spec.channel_group if token else spec.group
        lead = (spec.group, width // length) if token else (width,)
        k = lead[0] * lead[1] if token else width
        y = torch.full((n, *lead, length), code.levels[0], device=blocks.device)
        if code.per_byte:
            size = k * code.nbytes(length)
            packed = blocks.codes[:, at_code : at_code + size].unflatten(-1, (*lead, code.nbytes(length)))
            y = deinterleave(decode_digits(packed, code), code, length)
            at_code += size
        if code.has_scale:
            y = y * scale[:, at_scale : at_scale + k].unflatten(-1, lead).unsqueeze(-1)
            at_scale += k
        if code.has_zero:
            y = y + zero[:, at_zero : at_zero + k].unflatten(-1, lead).unsqueeze(-1)
            at_zero += k
        parts.append(y.flatten(2) if token else y.transpose(1, 2))
    return torch.cat(parts, -1) if parts else torch.empty(n, spec.group, 0, device=blocks.device)
