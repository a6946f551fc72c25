"""What a cache holds and what attention over it must give, worked out the slow way: unpack everything, dense fp64.

Uses the kernels' `unpack_blocks` (tested for itself in tests/kernels) and the format's description, none of the
attention, merging, masking or table code of the product.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch

import mmkv
from mmkv.cache import (
    GEAR,
    KIVI,
    AdaKV,
    CacheState,
    KVLayer,
    KVMerger,
    MiKV,
    Pipeline,
    PrefixKV,
    RazorAttention,
    SnapKV,
    VidKV,
    ZipCache,
    ZipVL,
    pipeline,
)
from mmkv.cache.cache import settle_jointly
from mmkv.cache.dense import DenseSegment
from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Asked
from mmkv.cache.gear_segment import GearBlocks
from mmkv.cache.summary import SummarySegment
from mmkv.cache.view import View
from mmkv.kernels import hadamard, real_fft, unpack_blocks
from mmkv.layout import VIDEO, TokenLayout

KIVI8 = KIVI(bits=8, group=32, residual=32)
METHODS = {
    "kivi-2": KIVI(bits=2, group=32, residual=32),
    "kivi-4": KIVI(bits=4, group=32, residual=32, channel_group=8, scale_bits=8),
    "vidkv": VidKV(group=32, residual=32, sinks=0),
    "vidkv-stp": VidKV(stp=0.2, group=32, residual=32, sinks=0),
    "vidkv-official": VidKV(official=True, group=32, residual=32, sinks=0),
    "vidkv-paper": VidKV(codebook="minmax", value_basis="channel", stp=0.3, group=32, residual=32, sinks=0),
    "vidkv-1.25": VidKV(key_bits=1.25, value_bits=2, fft=False, group=32, residual=32, sinks=0),
    "vidkv-sinks": VidKV(group=32, residual=32, sinks=4),
    "gear-outliers": GEAR(outliers=0.07, rank=2, group=32, residual=32),
}


def _small(method):
    """With groups and a residual window that a test's short prompt reaches, where the method has such options."""
    names = {field.name for field in dataclasses.fields(method)} & {"group", "residual", "least"}
    sinks = {"sinks": 0} if hasattr(method, "sinks") else {}
    return dataclasses.replace(method, **dict.fromkeys(names, 32), **sinks)


# registering a method puts it into the shared test matrix: here where it stores every token, else into CHOOSING
_REGISTERED = {entry.name: _small(entry.method()) for entry in mmkv.methods() if entry.kind == "cache"}
METHODS |= {f"registered {name}": method for name, method in _REGISTERED.items() if not method.decides}
CHOOSING = {name: method for name, method in _REGISTERED.items() if method.decides and not method.next_scale}
CHOOSING |= {
    "zipvl that evicts": ZipVL(store="evict", tau=0.8, text=False, sinks=0),
    "zipvl, dense prefill": ZipVL(sparse=False, tau=0.9, high=16, text=False, group=32),
    "snapkv-kivi": pipeline((SnapKV(budget=0.5), KIVI(bits=4, group=32, residual=32))),
    "snapkv-vidkv-sinks": pipeline((SnapKV(budget=0.4), VidKV(group=32, residual=32, sinks=4))),
    "snapkv by modality": SnapKV(budget={"text": 0.6, "video": 0.3, "image": 0.5}),
    "snapkv in tokens": SnapKV(budget=64),
    "snapkv-gear": pipeline((SnapKV(budget=0.6), GEAR(outliers=0.07, rank=2, group=32, residual=32))),
    "snapkv-zipcache": pipeline((SnapKV(budget=0.6), ZipCache(group=32))),
    "zipcache-sinks-16": ZipCache(high=16, group=32, sinks=4),
    "mikv-16": MiKV(high=16, ratio=0.2),
    "adakv-kivi": pipeline((AdaKV(budget=0.5), KIVI(bits=4, group=32, residual=32))),
    "razor-kivi": pipeline((RazorAttention(heads=((0, 1),), least=32), KIVI(bits=4, group=32, residual=32))),
    "kvmerger merges all": KVMerger(budget={"text": 0.6, "video": 0.3, "image": 0.5}, threshold=-1.0),
    "prefixkv by modality": PrefixKV(budget={"text": 0.6, "video": 0.3, "image": 0.5}, probe_rows=16),
}


def keep_all(method):
    """The setting of a choosing method that drops nothing and stores 16 bits."""
    if isinstance(method, Pipeline):
        return keep_all(method.methods[0])
    if isinstance(method, Eviction):
        return dataclasses.replace(method, budget=1.0)
    return method.keeping_everything()


def key_rotation(side, channels: int, order: torch.Tensor) -> torch.Tensor:
    """fp64 [D, D] matrix M of one head: stored key = M @ key; orthonormal."""
    matrix = torch.eye(channels, dtype=torch.float64)[order.long()]
    if side.basis == "hadamard":
        matrix = hadamard(channels).double() @ matrix
    out, at = torch.eye(channels, dtype=torch.float64), 0
    for size, cls in zip(side.sizes(channels), side.classes):
        if cls.basis == "fft" and size:
            out[at : at + size, at : at + size] = real_fft(size).double()
        at += size
    return out @ matrix


def decoded(pool, block: int, axis: str) -> torch.Tensor:
    """fp64 [group, C] of one block as it was quantized; what GEAR stores beside the codes is put back, entry by entry."""
    one = torch.tensor([block])
    if not isinstance(pool, GearBlocks):
        return unpack_blocks(pool.select(one))[0].double()
    x = unpack_blocks(pool.backbone.select(one))[0].double()
    for end in range(pool.place.shape[2]):
        at, exact = pool.place[block, :, end].long(), pool.outlier[block, :, end].double()
        vectors = torch.arange(len(at))
        if axis == "channel":
            x[at, vectors] = exact
        else:
            x[vectors, at] = exact
    for k in range(pool.left.shape[2]):
        x += torch.outer(pool.left[block, :, k].double(), pool.right[block, :, k].double())
    return x


def unpacked(segment, row: int, head: int):
    """Positions [n] and keys, values fp64 [n, D] of one KV head of a packed segment, in the model's channels."""
    packer = segment.packer
    r = row * segment.heads + head
    k, v, at = [], [], []
    for slot in range(segment.count.shape[1]):
        count = int(segment.count[r, slot])
        if not count:
            continue
        block = int(segment.block[r, slot])
        k.append(decoded(segment.keys, block, packer.form.keys.axis)[:count])
        v.append(decoded(segment.values, block, packer.form.values.axis)[:count])
        first = int(segment.start[r, slot])
        positions = segment.positions
        if positions is not None:
            positions = positions[r if len(positions) == len(segment.block) else row, slot, :count].long()
        at.append(torch.arange(first, first + count) if positions is None else positions)
    if not k:
        return torch.zeros(0, dtype=torch.long), None, None
    d, dv = k[0].shape[-1], v[0].shape[-1]
    order = torch.arange(d)
    if packer.order is not None:
        order = packer.order[row, head if packer.order.shape[1] > 1 else 0]
    keys = torch.cat(k) @ key_rotation(packer.form.keys, d, order)
    back = hadamard(dv).double() if packer.form.values.basis == "hadamard" else torch.eye(dv, dtype=torch.float64)
    values = torch.cat(v) @ back
    if packer.key_balance is not None:
        keys = keys * packer.key_balance[row, head].double()
    if packer.value_balance is not None:
        values = values * packer.value_balance[row, head].double()
    return torch.cat(at), keys, values


def held_by_head(layer, row: int, head: int):
    """All tokens of one KV head, sorted by position: positions, keys [n, D], values [n, Dv], packed (bool)."""
    parts = [(*unpacked(s, row, head), True) for s in layer.packed]
    for s in layer.segments:
        if isinstance(s, DenseSegment):
            r = row * s.heads + head
            at = slice(s.offsets[r], s.offsets[r + 1])
            parts.append((s.positions[at].long(), s.keys[at].double(), s.values[at].double(), False))
    parts = [p for p in parts if p[0].numel()]
    at = torch.arange(layer.start, layer.seen)
    keep = layer.state.layout.valid[row, layer.start : layer.seen] & (at >= layer.packed_to[row])
    parts.append((at[keep], layer.keys[row, head, keep].double(), layer.values[row, head, keep].double(), False))
    at = torch.cat([p[0] for p in parts])
    packed = torch.cat([torch.full((p[0].numel(),), p[3]) for p in parts])
    order = at.argsort()
    return at[order], torch.cat([p[1] for p in parts])[order], torch.cat([p[2] for p in parts])[order], packed[order]


def held(layer, row: int):
    """All tokens of one batch element where its heads hold the same: positions [n], keys and values [Hkv, n, D], packed [n]."""
    heads = [held_by_head(layer, row, head) for head in range(layer.keys.shape[1])]
    at, _, _, packed = heads[0]
    assert all(torch.equal(at, h[0]) and torch.equal(packed, h[3]) for h in heads), "heads hold different tokens"
    return at, torch.stack([h[1] for h in heads]), torch.stack([h[2] for h in heads]), packed


def dense_attention(layer, row, query, *, scaling, softcap=None, s_aux=None):
    """fp64 output [Hq, Tq, Dv] of the newest Tq tokens of one batch element over everything that is held."""
    heads, new, _ = query.shape
    group = heads // layer.keys.shape[1]
    mine = torch.arange(layer.seen - new, layer.seen)[:, None]
    outs = []
    for h in range(heads):
        at, keys, values, _ = held_by_head(layer, row, h // group)
        bias = torch.zeros(at.numel(), dtype=torch.float64)
        for s in layer.segments:
            if isinstance(s, SummarySegment):  # one token that weighs as much as `counts` of them
                at = torch.cat([at, torch.full((s.counts.shape[2],), -1)])
                keys = torch.cat([keys, s.keys[row, h // group].double()])
                values = torch.cat([values, s.values[row, h // group].double()])
                bias = torch.cat([bias, s.counts[row, h // group].double().log()])
        scores = query[h].double() @ keys.T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + bias
        seen = at[None] <= mine
        if layer.window is not None:
            seen &= at[None] > mine - layer.window
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[h].double().expand(new, 1)], -1)
            values = torch.nn.functional.pad(values, (0, 0, 0, 1))
        outs.append(torch.nan_to_num(scores.softmax(-1)) @ values)
    return torch.stack(outs)


@contextmanager
def checked_attention(limit: float = 1e-4):
    """Within the block, every merged attention call is compared with `dense_attention`; yields the list of errors.

    Also asserts at every call that each valid token is held exactly once (for a sliding layer: each one it can see); where
    the method evicts, that none is held twice and that the newest of the residual window are.
    """
    errors: list[float] = []
    original = View.attend

    def attend(self, stock, stock_name, module, query, mask, **kwargs):
        layer, new = self.layer, self.new
        if not layer.segments:
            return original(self, stock, stock_name, module, query, mask, **kwargs)
        want, valid = [], layer.state.layout.valid[:, : layer.seen]
        options = {name: kwargs.get(name) for name in ("scaling", "softcap", "s_aux")}
        for row in range(query.shape[0]):
            for head in range(layer.keys.shape[1]):
                at = held_by_head(layer, row, head)[0]
                should = valid[row].nonzero()[:, 0]
                if layer.window is not None:
                    oldest = layer.seen - new - layer.window + 1
                    at, should = at[at >= oldest], should[should >= oldest]
                elif layer.evicted_to[row]:
                    assert at.unique().numel() == at.numel()
                    assert set(at.tolist()) <= set(should.tolist())
                    newest = should[should >= layer.evicted_to[row]]
                    method = layer.state.method
                    assert newest.numel() >= (32 if method is None else method.residual_window)
                    assert torch.equal(at[-newest.numel() :], newest)
                    continue
                assert torch.equal(at, should), f"layer {layer.index}, row {row}: tokens lost or held twice"
            want.append(dense_attention(layer, row, query[row], **options))
        rows_seen = [valid[row, layer.seen - new :] for row in range(query.shape[0])]
        out, weights = original(self, stock, stock_name, module, query, mask, **kwargs)
        for row, ok in enumerate(rows_seen):
            if not ok.any():  # padding alone
                continue
            a, b = out[row].transpose(0, 1).double()[:, ok], want[row][:, ok]
            error = (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12)
            errors.append(float(error))
            assert error < limit, f"layer {layer.index}, row {row}: relative RMS {error:.1e}"
        return out, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "attend", attend)
        yield errors


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """RMS of a - b in units of the standard deviation of b."""
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().std())


class Bare:
    """Layers of a cache without a model: `feed` appends random keys and values and settles, as a forward would.

    Args:
        method: cache method or None.
        batch, heads, dim, layers: B, Hkv, D and how many layers.
    """

    def __init__(self, method, batch=1, heads=2, dim=16, layers=1, window=None, dtype=torch.float32, seed=0, group=2):
        self.state = CacheState(method, layers=layers)
        self.group = group
        self.layers = [KVLayer(self.state, i, window) for i in range(layers)]
        self.batch, self.heads, self.dim, self.dtype = batch, heads, dim, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = [torch.zeros(batch, heads, 0, dim, dtype=dtype) for _ in self.layers]  # all that was fed
        self.values = [torch.zeros(batch, heads, 0, dim, dtype=dtype) for _ in self.layers]

    def feed(self, count: int, valid=None, medium=None, embeds=None, keys=None, queries=None, chunk=None, values=None):
        """Queries `[B, group * Hkv, count, D]` are random where none are given; `chunk` replaces a plain text layout."""
        chunk = TokenLayout.text(self.batch, count, start=self.state.seen) if chunk is None else chunk
        if valid is not None:
            chunk.valid = valid
        if medium is not None:
            chunk.medium[:] = medium
            chunk.modality[:] = VIDEO
        self.state.extend(chunk, embeds)
        for i, layer in enumerate(self.layers):
            shape = (self.batch, self.heads, count, self.dim)
            k = torch.randn(shape, generator=self.generator).to(self.dtype) if keys is None else keys.to(self.dtype)
            v = torch.randn(shape, generator=self.generator).to(self.dtype) if values is None else values.to(self.dtype)
            self.keys[i], self.values[i] = torch.cat([self.keys[i], k], 2), torch.cat([self.values[i], v], 2)
            layer.update(k, v)
            q = queries
            if q is None and self.state.method is not None and self.state.method.decides:
                shape = (self.batch, self.heads * self.group, count, self.dim)
                q = torch.randn(shape, generator=self.generator).to(self.dtype)
            layer.settle(None if q is None else Asked(q, self.dim**-0.5))
        settle_jointly(self.layers)
        return self

    @property
    def layer(self):
        return self.layers[0]


def codes(layer) -> list[tuple]:
    """Content of every packed block of a layer by (segment, batch element, head, first position): bytes, for comparison."""
    out = []
    for segment in layer.packed:
        found = {}
        for row in range(segment.batch):
            for head in range(segment.heads):
                r = row * segment.heads + head
                for slot in range(segment.count.shape[1]):
                    if segment.count[r, slot]:
                        block = int(segment.block[r, slot])
                        parts = [t[block].clone() for pool in (segment.keys, segment.values) for t in pool.tensors()]
                        found[row, head, int(segment.start[r, slot])] = parts
        out.append(found)
    return out


def same_codes(before, after) -> bool:
    """Every block of `before` is in `after`, byte for byte."""
    return all(
        key in b and all(torch.equal(x, y) for x, y in zip(parts, b[key]))
        for a, b in zip(before, after)
        for key, parts in a.items()
    )
