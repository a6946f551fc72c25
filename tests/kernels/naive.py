"""What the kernels must equal, written in the plainest way, in fp64; and makers of test cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkv.kernels import Blocks, Spec, Table, gaussian, lloyd, mean_only, minmax, pack_blocks, sign, symmetric, ternary

CODES = {
    "minmax1": minmax(1), "minmax2": minmax(2), "minmax4": minmax(4), "minmax8": minmax(8),
    "symmetric2": symmetric(2), "symmetric4": symmetric(4), "symmetric8": symmetric(8),
    "sign": sign(), "sign-mean": sign(zero=True),
    "ternary": ternary(), "ternary-mean": ternary(zero=True), "ternary-unscaled": ternary(0.5, scale="one"),
    "gaussian0": gaussian(0), "gaussian1": gaussian(1), "gaussian1.58": gaussian(1.58), "gaussian2": gaussian(2),
    "lloyd1": lloyd(1), "lloyd2": lloyd(2),
    "gaussian4": gaussian(4), "gaussian4-fit": gaussian(4, scale="fit"), "rotated1.58": gaussian(1.58, zero="none"),
    "nothing": gaussian(0, zero="none"), "mean": mean_only(),
}  # fmt: skip


def rms(x: Tensor, y: Tensor) -> float:
    """Relative RMS error of x against y."""
    x, y = x.double(), y.double()
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def close(have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tol: float = 1e-5) -> None:
    """Asserts that (out, lse) pairs agree: the same empty rows, and relative RMS error <= tol on the others."""
    (out, lse), (out2, lse2) = have, want
    assert out.dtype == lse.dtype == torch.float32
    assert out.shape == out2.shape
    assert lse.shape == lse2.shape
    full = lse2 > -torch.inf
    assert torch.equal(lse > -torch.inf, full)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    assert (out[~full] == 0).all()
    if full.any():
        assert rms(out[full], out2[full]) <= tol
        assert rms(lse[full], lse2[full]) <= tol


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, softcap: float | None = None):
    """One head, fp64: q [Tq, D], k [T, D], v [T, Dv], mask [Tq, T] -> out, lse."""
    if k.shape[0] == 0:
        return q.new_zeros(q.shape[0], v.shape[1]).double(), q.new_full((q.shape[0],), -torch.inf).double()
    s = q.double() @ k.double().T * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask, -torch.inf)
    return torch.softmax(s, -1).nan_to_num(0.0) @ v.double(), s.logsumexp(-1)


@dataclass
class Case:
    """A cache and queries. k, v: what the blocks decode to, fp32 [NB, group, D | Dv]."""

    q: Tensor
    keys: Blocks
    values: Blocks
    table: Table
    k: Tensor
    v: Tensor
    q_positions: Tensor

    def naive(self, scale=0.1, softcap=None, causal=False, window=None, q_positions=None):
        b, hq, tq, _ = self.q.shape
        out = torch.zeros(b, hq, tq, self.v.shape[-1], dtype=torch.float64)
        lse = torch.zeros(b, hq, tq, dtype=torch.float64)
        hkv, t = self.table.rows // b, self.table
        for i in range(b):
            for h in range(hq):
                row = i * hkv + h // (hq // hkv)
                ks, vs, at = [self.k[0, :0]], [self.v[0, :0]], [torch.zeros(0, dtype=torch.int64)]
                for s in range(t.slots):
                    n, block = int(t.count[row, s]), int(t.block[row, s])
                    if n:
                        ks.append(self.k[block, :n])
                        vs.append(self.v[block, :n])
                        first = int(t.start[row, s])
                        at.append(torch.arange(first, first + n) if t.positions is None else t.positions[block, :n])
                at = torch.cat(at)
                mask = torch.ones(tq, at.numel(), dtype=torch.bool)
                if causal:
                    mask &= at <= self.q_positions[i][:, None]
                if window is not None:
                    mask &= at > self.q_positions[i][:, None] - window
                k, v = torch.cat(ks), torch.cat(vs)
                out[i, h], lse[i, h] = attention(self.q[i, h], k, v, scale, mask, softcap)
        return out, lse


def case(spec_k: Spec, spec_v: Spec, b=2, hkv=2, g=2, tq=1, slots=3, dtype=torch.float32, shared=False) -> Case:
    """Random blocks with ragged counts (full, empty and partial), in a shuffled table."""
    from mmkv.kernels import unpack_blocks

    rows, group = b * hkv, spec_k.group
    nb = rows * slots
    count = torch.randint(1, group + 1, (nb,))
    count[torch.rand(nb) < 0.4] = group
    count[torch.rand(nb) < 0.2] = 0
    keys = pack_blocks(torch.randn(nb, group, spec_k.channels) * 2 + 0.5, count, spec_k)
    values = pack_blocks(torch.randn(nb, group, spec_v.channels) + 0.3, count, spec_v)
    block = torch.randperm(nb).view(rows, slots)
    if shared:
        block[1:] = block[0]
    start = torch.arange(slots).mul(group).expand(rows, slots)[:, torch.randperm(slots)]
    table = Table(block.int(), count[block].int(), start.int().contiguous())
    return Case(
        q=torch.randn(b, hkv * g, tq, spec_k.channels).to(dtype),
        keys=keys,
        values=values,
        table=table,
        k=unpack_blocks(keys),
        v=unpack_blocks(values),
        q_positions=torch.randint(0, slots * group, (b, tq)),
    )
