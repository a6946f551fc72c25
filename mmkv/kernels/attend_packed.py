"""Attention straight from packed codes: no floating-point copy of the cache ever exists.

The reference decodes a bounded number of blocks at a time to *bare levels* (a table look-up per byte) and leaves scales
and zero points out of the tile:

- per-channel keys: sum_d q_d (l_dt s_d + z_d) = sum_d (q_d s_d) l_dt + q.z, so scales go into q, zeros are one number;
- per-token keys: the scale of a token multiplies its score, its zero adds z_t * sum(q);
- per-channel values: out_d = s_d sum_t p_t l_td + z_d sum_t p_t; per-token values: scale and zero go into p.

Tiles are joined by a running maximum and sum, the way of FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_choice, check_device, check_float, check_numbers, check_rank, group_size
from ._sight import checked_positions
from .blocks import Blocks
from .digits import decode_digits, deinterleave, interleave
from .no_gradient import without_gradient
from .pack import unpack_blocks
from .spec import Code, Spec
from .table import Table

TILE_TOKENS = 8192  # tokens, over all rows, that are decoded at a time
TILE_SCORES = 1 << 21  # largest of (scores, scaled queries, partial outputs) that exist at a time


def attend_packed(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    table: Table,
    *,
    scale: float,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    exact: bool | None = None,
    merged: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q over the blocks that the table names. It has no gradient: a backward pass raises RuntimeError.

    Args:
        q: [B, Hq, Tq, D], channels in the keys' stored order and basis.
        keys: pool of [NB, group, D]; values: pool of [NB, group, Dv].
        table: rows R = B * Hkv; query head i uses KV head i // (Hq // Hkv). What it holds is looked at on a CPU alone.
        scale: factor on q.k.
        softcap: scores become `softcap * tanh(score / softcap)`.
        q_positions: int [B, Tq] or [Tq], logical positions; needed for causal and window.
        causal: hide keys at positions > the query's.
        window: hide keys at positions <= the query's - window.
        exact: on a GPU, products of fp32 numbers; else of fp16 or TF32 ones. None: as q's dtype has it. The CPU is always exact.
        merged: False leaves the S runs of slots apart that programs of a GPU share, for `merge` to join with other parts.

    Returns:
        out fp32 [B, Hq, Tq, Dv] in the values' stored order and basis, lse fp32 [B, Hq, Tq] (natural log); a row that
        sees no key gives (0, -inf). Not merged, out [S, B, Hq, Tq, Dv] and lse [S, B, Hq, Tq].
    """
    check_numbers(scale, softcap, window)
    check_choice(exact=exact)
    q_positions = _check(q, keys, values, table, q_positions, causal, window)
    options = {"scale": scale, "softcap": softcap, "q_positions": q_positions, "causal": causal, "window": window}
    with torch.no_grad():
        out, lse = _attend(q, keys, values, table, exact, merged, options)
    out, lse = without_gradient(q, out, lse)
    return out, lse


def _attend(q, keys, values, table, exact, merged, options) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        from .attend_packed_triton import attend_packed_triton

        with torch.cuda.device(q.device):  # Triton launches on the current device, a split model has several
            return attend_packed_triton(q, keys, values, table, exact=exact, merged=merged, **options)
    out, lse = attend_packed_reference(q, keys, values, table, **options)
    return (out, lse) if merged else (out[None], lse[None])


def _check(q, keys, values, table, q_positions, causal, window) -> Tensor | None:
    """Raises on what does not fit; returns the positions as int [B, Tq]."""
    check_float(q=q)
    check_rank(4, q=q)
    pools = {f"keys[{i}]": t for i, t in enumerate(keys.tensors())}
    pools |= {f"values[{i}]": t for i, t in enumerate(values.tensors())}
    check_device(q.device, **pools, **{f"table[{i}]": t for i, t in enumerate(table.tensors())})
    b, hq, _, d = q.shape
    if d != keys.spec.channels:
        raise ValueError(f"q has {d} channels, the keys have {keys.spec.channels}")
    if keys.spec.group != values.spec.group or len(keys) != len(values):
        raise ValueError(
            f"keys are {len(keys)} blocks of {keys.spec.group} tokens, values {len(values)} of {values.spec.group}"
        )
    if table.rows % b if b else table.rows:
        raise ValueError(f"{table.rows} table rows do not divide over a batch of {b}")
    group_size(hq, table.rows // b if b else 1)
    if not q.is_cuda and table.count.numel():  # where nobody has to wait for the answer
        most, ids = int(table.count.max()), table.block[table.count > 0]
        if most > keys.spec.group:
            raise ValueError(f"the table counts {most} tokens in a block of {keys.spec.group}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(keys):
            raise ValueError(f"the table names blocks {int(ids.min())} ... {int(ids.max())}, there are {len(keys)}")
    return checked_positions(q, q_positions, causal, window)


class Tile(NamedTuple):
    """Some decoded blocks of one class: bare levels (interleaved along the group), scales and zeros."""

    code: Code
    levels: Tensor | None  # fp32, "channel": [n, channels, tokens]; "token": [n, tokens, channel groups, channels]
    scale: Tensor | None  # fp32 [n, channels] or [n, tokens, channel groups]
    zero: Tensor | None  # the same


def decode_tile(blocks: Blocks, ids: Tensor) -> list[Tile]:
    """The blocks `ids`, one `Tile` per class."""
    spec, some = blocks.spec, blocks.select(ids)
    scale, zero = some.decode_scale(), None if some.zero is None else some.zero.float()
    at_code = at_scale = at_zero = 0
    tiles = []
    for width, code in spec.classes:
        token = spec.axis == "token"
        length = spec.channel_group if token else spec.group
        lead = (spec.group, width // length) if token else (width,)
        k = spec.group * (width // length) if token else width
        levels = s = z = None
        if code.per_byte:
            nb = code.nbytes(length)
            levels = decode_digits(some.codes[:, at_code : at_code + k * nb].unflatten(-1, (*lead, nb)), code)
            at_code += k * nb
        if code.has_scale:
            s = scale[:, at_scale : at_scale + k].unflatten(-1, lead)
            at_scale += k
        if code.has_zero:
            z = zero[:, at_zero : at_zero + k].unflatten(-1, lead)
            at_zero += k
        tiles.append(Tile(code, levels, s, z))
    return tiles


def key_scores(q: Tensor, tiles: list[Tile] | Tensor, spec: Spec) -> Tensor:
    """q fp32 [n, M, D] times decoded keys of n blocks to fp32 [n, M, group]."""
    if isinstance(tiles, Tensor):
        return torch.bmm(q, tiles.transpose(1, 2))
    if spec.axis == "token":
        (tile,) = tiles
        q = q.unflatten(-1, (-1, spec.channel_group)).transpose(1, 2)  # [n, channel groups, M, channels]
        s = q.new_zeros(())
        if tile.levels is not None:
            s = torch.matmul(interleave(q, tile.code), tile.levels.permute(0, 2, 3, 1))
            if tile.scale is not None:
                s = s.mul_(tile.scale.transpose(1, 2).unsqueeze(2))
            s = s.sum(1)
        if tile.zero is not None:
            s = s + torch.bmm(q.sum(-1).transpose(1, 2), tile.zero.transpose(1, 2))
        return s.expand(q.shape[0], q.shape[2], spec.group)
    total = q.new_zeros(q.shape[0], q.shape[1], spec.group)
    for qc, tile in zip(q.split([w for w, _ in spec.classes], -1), tiles, strict=True):
        if tile.levels is not None:
            s = torch.bmm(qc if tile.scale is None else qc * tile.scale.unsqueeze(1), tile.levels)
            total += deinterleave(s, tile.code, spec.group)
        if tile.zero is not None:
            total += torch.bmm(qc, tile.zero.unsqueeze(-1))
    return total


def value_sums(p: Tensor, tiles: list[Tile] | Tensor, spec: Spec) -> Tensor:
    """Weights p fp32 [n, M, group] (0 where invalid) times decoded values of n blocks to fp32 [n, M, Dv]."""
    if isinstance(tiles, Tensor):
        return torch.bmm(p, tiles)
    n, m, _ = p.shape
    if spec.axis == "token":
        (tile,) = tiles
        out = p.new_zeros(n, spec.channels // spec.channel_group, m, spec.channel_group)
        if tile.levels is not None:
            pg = p.unsqueeze(1) if tile.scale is None else p.unsqueeze(1) * tile.scale.transpose(1, 2).unsqueeze(2)
            out = deinterleave(torch.matmul(pg, tile.levels.transpose(1, 2)), tile.code, spec.channel_group)
        if tile.zero is not None:
            out = out + torch.bmm(p, tile.zero).transpose(1, 2).unsqueeze(-1)
        return out.transpose(1, 2).flatten(2)
    parts = []
    mass = p.sum(-1, keepdim=True)
    for (width, code), tile in zip(spec.classes, tiles, strict=True):
        out = p.new_zeros(n, m, width)
        if tile.levels is not None:
            out = torch.bmm(interleave(p, code), tile.levels.transpose(1, 2))
            if tile.scale is not None:
                out *= tile.scale.unsqueeze(1)
        if tile.zero is not None:
            out += mass * tile.zero.unsqueeze(1)
        parts.append(out)
    return torch.cat(parts, -1)


def _decode_whole(blocks: Blocks, ids: Tensor) -> Tensor:
    """The blocks `ids` with scales and zeros applied, fp32 [n, group, C]."""
    return unpack_blocks(blocks.select(ids))


def _by_row(x: Tensor, row: Tensor, rows: int, how: str) -> Tensor:
    """x [n, G, Tq, c] of n blocks, reduced over the blocks of each row to [rows, G, Tq, c]."""
    if rows == 1:
        return x.amax(0, keepdim=True) if how == "amax" else x.sum(0, keepdim=True)
    out = x.new_full((rows, *x.shape[1:]), -torch.inf if how == "amax" else 0.0)
    if how == "sum":
        return out.index_add_(0, row, x)
    return out.scatter_reduce_(0, row.view(-1, 1, 1, 1).expand_as(x), x, "amax")


def attend_packed_reference(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    table: Table,
    *,
    scale: float,
    softcap: float | None,
    q_positions: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`attend_packed` in torch; arguments as there, q_positions [B, Tq] or None."""
    b, hq, tq, d = q.shape
    hkv, group, dv = table.rows // b if b else 1, keys.spec.group, values.spec.channels
    g = hq // hkv
    q = q.float().mul(scale).reshape(b * hkv, g, tq, d)
    acc = q.new_zeros(b * hkv, g, tq, dv)
    total = q.new_zeros(b * hkv, g, tq, 1)
    top = q.new_full((b * hkv, g, tq, 1), -torch.inf)

    used_row, used_slot = table.count.nonzero(as_tuple=True)  # sorted by row; ragged rows cost what they hold
    step = max(1, TILE_TOKENS // group)
    token = torch.arange(group, device=q.device)
    for i in range(0, used_row.numel(), step):
        row, slot = used_row[i : i + step], used_slot[i : i + step]
        ids = table.block[row, slot]
        # with more query rows than tokens in a block, folding costs more than scaling the tile once
        decode = decode_tile if g * tq <= group else _decode_whole
        key_tiles, value_tiles = decode(keys, ids), decode(values, ids)
        valid = token < table.count[row, slot].unsqueeze(-1)  # [n, group]
        if q_positions is not None:
            at = table.start[row, slot].unsqueeze(-1) + token if table.positions is None else table.positions[ids]
        span = slice(int(row[0]), int(row[-1]) + 1)  # the rows that this tile touches
        local, rows = row - row[0], span.stop - span.start
        width = max(1, TILE_SCORES // (row.numel() * g * max(d, dv, group)))  # queries at a time
        for j in range(0, tq, width):
            cols = slice(j, min(j + width, tq))
            n = cols.stop - cols.start
            qi = q[span, :, cols].flatten(1, 2)
            qi = qi.expand(row.numel(), -1, -1) if rows == 1 else qi[local]
            s = key_scores(qi, key_tiles, keys.spec).unflatten(1, (g, n))
            if softcap is not None:
                s = (s / softcap).tanh_().mul_(softcap)
            seen = valid[:, None, None]
            if q_positions is not None:
                gap = q_positions[row // hkv, cols].unsqueeze(-1) - at.unsqueeze(1)  # [n blocks, n, group]
                ok = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
                seen = seen & (ok if window is None else ok & (gap < window)).unsqueeze(1)
            s = s.masked_fill(~seen, -torch.inf)
            old = top[span, :, cols]
            new = torch.maximum(old, _by_row(s.amax(-1, keepdim=True), local, rows, "amax"))
            base = new.masked_fill(new == -torch.inf, 0.0)  # exp(-inf - 0) = 0 for rows without a key yet, not NaN
            p = s.sub_(base[local]).exp_()
            fade = (old - base).exp()
            out = value_sums(p.flatten(1, 2), value_tiles, values.spec).unflatten(1, (g, n))
            acc[span, :, cols].mul_(fade).add_(_by_row(out, local, rows, "sum"))
            total[span, :, cols].mul_(fade).add_(_by_row(p.sum(-1, keepdim=True), local, rows, "sum"))
            top[span, :, cols] = new
        del key_tiles, value_tiles  # else the next ones are decoded while these are still held
    out = acc / total.clamp(min=torch.finfo(torch.float32).tiny)
    lse = (top + total.log()).squeeze(-1)
    return out.view(b, hq, tq, dv), lse.view(b, hq, tq)
