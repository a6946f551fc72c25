import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmkv.kernels import (
    Spec,
    Table,
    attend_dense,
    attend_packed,
    gaussian,
    hadamard,
    mean_only,
    merge,
    minmax,
    pack_blocks,
    symmetric,
    ternary,
    unpack_blocks,
)

from .naive import CODES, case, close, rms

KIVI = (lambda d, g: Spec("channel", g, ((d, minmax(2)),)), lambda d, g: Spec("token", g, ((d, minmax(2)),), d // 2))
MIXED = (
    lambda d, g: Spec("channel", g, ((16, gaussian(2)), (16, gaussian(1)), (d - 32, mean_only())), scale_bits=8),
    lambda d, g: Spec("token", g, ((d, gaussian(1.58, zero="none")),), d),
)
SWAPPED = (
    lambda d, g: Spec("token", g, ((d, symmetric(8)),), d // 4, scale_bits=8),
    lambda d, g: Spec("channel", g, ((d - 16, ternary()), (16, minmax(4)))),
)
FORMATS = {"kivi": KIVI, "mixed": MIXED, "swapped": SWAPPED}


def run(c, scale=0.1, **kw):
    return attend_packed(c.q, c.keys, c.values, c.table, scale=scale, **kw)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("d", "dv"), [(48, 64), (64, 48), (80, 80), (96, 96), (128, 256), (256, 128)])
@pytest.mark.parametrize("group", [37, 64, 160])
def test_shapes(fmt, d, dv, group):
    k, v = FORMATS[fmt]
    c = case(k(d, group), v(dv, group), b=2, hkv=1, g=2, tq=2)
    close(run(c), c.naive())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("g", [1, 4, 7])
@pytest.mark.parametrize("tq", [1, 3, 50])
@pytest.mark.parametrize(
    "mask",
    [{}, {"causal": True}, {"window": 40}, {"causal": True, "window": 33, "softcap": 3.0}, {"softcap": 1.5}],
    ids=lambda m: "+".join(m) or "full",
)
def test_masks_and_heads(fmt, g, tq, mask):
    """50 queries x 4 heads exceed a group of 32: the other way of decoding."""
    k, v = FORMATS[fmt]
    c = case(k(48, 32), v(48, 32), b=2, hkv=2, g=g, tq=tq, slots=4)
    at = {"q_positions": c.q_positions} if "causal" in mask or "window" in mask else {}
    close(run(c, **mask, **at), c.naive(**mask))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("name", CODES)
def test_every_code_as_keys_and_as_values(name, axis):
    spec = Spec(axis, 32, ((48, CODES[name]),), 24 if axis == "token" else 0)
    other = Spec("channel", 32, ((48, minmax(8)),))
    for k, v in ((spec, other), (other, spec)):
        c = case(k, v, b=1, hkv=2, g=3, tq=2)
        close(run(c), c.naive())


@pytest.mark.parametrize("tq", [1, 40])
def test_positions_of_each_token(tq):
    k, v = (f(48, 32) for f in MIXED)
    c = case(k, v, tq=tq)
    at = torch.randperm(len(c.keys) * 32).view(-1, 32).int() % 96
    c.table = Table(c.table.block, c.table.count, c.table.start, at)
    for mask in ({"causal": True}, {"causal": True, "window": 20}):
        close(run(c, q_positions=c.q_positions, **mask), c.naive(**mask))


def test_shared_blocks():
    k, v = (f(64, 32) for f in KIVI)
    c = case(k, v, b=3, hkv=1, shared=True)
    close(run(c), c.naive())


def test_a_batch_equals_its_rows_alone():
    k, v = (f(64, 32) for f in MIXED)
    c = case(k, v, b=3, hkv=2, g=2, tq=3, slots=5)
    out, lse = run(c, causal=True, q_positions=c.q_positions)
    for i in range(3):
        o, s = attend_packed(
            c.q[i : i + 1],
            c.keys,
            c.values,
            c.table.select(torch.arange(2 * i, 2 * i + 2)),
            scale=0.1,
            causal=True,
            q_positions=c.q_positions[i],
        )
        close((o, s), (out[i : i + 1], lse[i : i + 1]), tol=1e-6)


@pytest.mark.parametrize("tq", [1, 30])
def test_tiles_do_not_show(monkeypatch, tq):
    k, v = (f(48, 32) for f in SWAPPED)
    c = case(k, v, b=2, hkv=2, g=3, tq=tq, slots=6)
    module = sys.modules["mmkv.kernels.attend_packed"]
    want = c.naive(causal=True)
    for tokens, scores in ((32, 1 << 20), (160, 1 << 12), (96, 1)):
        monkeypatch.setattr(module, "TILE_TOKENS", tokens)
        monkeypatch.setattr(module, "TILE_SCORES", scores)
        close(run(c, causal=True, q_positions=c.q_positions), want)


def test_empty_rows_and_empty_tables():
    k, v = (f(48, 32) for f in KIVI)
    c = case(k, v, b=2, hkv=1, slots=2)
    c.table.count[0] = 0
    out, lse = run(c)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    close((out, lse), c.naive())
    none = torch.zeros(2, 0, dtype=torch.int32)
    out, lse = attend_packed(c.q, c.keys, c.values, Table(none, none, none), scale=1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    hidden = attend_packed(c.q, c.keys, c.values, c.table, scale=1.0, causal=True, q_positions=torch.full((2, 1), -1))
    assert not hidden[0].any()
    assert (hidden[1] == -torch.inf).all()


def test_large_scores_do_not_overflow():
    k, v = (f(64, 32) for f in KIVI)
    c = case(k, v, tq=2)
    close(run(c, scale=50.0), c.naive(scale=50.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_query_types(dtype):
    k, v = (f(64, 32) for f in MIXED)
    c = case(k, v, dtype=dtype, tq=2)
    close(run(c), c.naive())


def test_non_contiguous_query():
    k, v = (f(64, 32) for f in KIVI)
    c = case(k, v, tq=5)
    want = c.naive()
    c.q = c.q.transpose(1, 2).contiguous().transpose(1, 2)
    close(run(c), want)


def test_rotation_needs_no_inverse_on_the_cache():
    """q.k is the same in an orthonormal basis; values are turned back once, on the output."""
    d = 64
    m = hadamard(d)
    k, v = torch.randn(2, 3, 64, d), torch.randn(2, 3, 64, d)
    spec_k, spec_v = Spec("channel", 64, ((d, minmax(8)),)), Spec("token", 64, ((d, minmax(8)),), d)
    n = torch.full((6,), 64)
    keys, values = (pack_blocks(x.view(6, 64, d) @ m.T, n, s) for x, s in ((k, spec_k), (v, spec_v)))
    table = Table(
        torch.arange(6).view(2, 3).int(), torch.full((2, 3), 64).int(), (torch.arange(3) * 64).int().expand(2, 3)
    )
    q = torch.randn(2, 2, 1, d)
    out, lse = attend_packed(q @ m.T, keys, values, table, scale=0.125)
    want, lse2 = attend_dense(q, k.view(2, 1, 192, d), v.view(2, 1, 192, d), scale=0.125)
    assert rms(out @ m, want) < 0.02
    assert rms(lse, lse2) < 0.001


def test_merging_halves_of_the_table():
    k, v = (f(64, 32) for f in MIXED)
    c = case(k, v, tq=3, slots=6)
    parts = []
    for s in (slice(0, 2), slice(2, 3), slice(3, 6)):
        t = Table(c.table.block[:, s], c.table.count[:, s], c.table.start[:, s])
        parts.append(attend_packed(c.q, c.keys, c.values, t, scale=0.1))
    close(merge(parts), c.naive())


class Biggest(TorchDispatchMode):
    """The most bytes that any one operation gave back, views of its arguments aside."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tq", [1, 200])
def test_the_cache_is_never_decoded_as_a_whole(monkeypatch, fmt, tq):
    d, group, slots = 64, 64, 100
    monkeypatch.setattr(sys.modules["mmkv.kernels.attend_packed"], "TILE_TOKENS", 512)
    monkeypatch.setattr(sys.modules["mmkv.kernels.attend_packed"], "TILE_SCORES", 512 * 64)
    k, v = (f(d, group) for f in FORMATS[fmt])
    c = case(k, v, b=1, hkv=2, g=2, tq=tq, slots=slots)
    with Biggest() as seen:
        run(c)
    dense = 2 * slots * group * d * 4
    held = max(t.untyped_storage().nbytes() for t in (*c.keys.tensors(), *c.values.tensors(), c.q))
    assert seen.nbytes <= max(held, 2 * 512 * 64 * 4) < dense / 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(2, 4, 1, 63)}, "63 channels"),
        ({"q": torch.zeros(2, 3, 1, 64)}, "3 query heads"),
        ({"q": torch.zeros(3, 4, 1, 64)}, "batch of 3"),
        ({"q": torch.zeros(2, 4, 1, 64, dtype=torch.int64)}, "allowed on cpu are float16"),
        ({"causal": True}, "q_positions"),
        ({"window": 3}, "q_positions"),
    ],
)
def test_what_does_not_fit_raises(change, match):
    k, v = (f(64, 32) for f in KIVI)
    c = case(k, v)
    q = change.pop("q", c.q)
    with pytest.raises((ValueError, TypeError), match=match):
        attend_packed(q, c.keys, c.values, c.table, scale=1.0, **change)


def test_pools_of_different_groups_raise():
    a, b = case(*(f(64, 32) for f in KIVI)), case(*(f(64, 64) for f in KIVI))
    with pytest.raises(ValueError, match="blocks of 32 tokens"):
        attend_packed(a.q, a.keys, b.values, a.table, scale=1.0)
    assert unpack_blocks(a.keys).shape[1] == 32


def test_a_gradient_is_refused_when_it_is_asked_for():
    """Not before: who forgets torch.no_grad() loses nothing."""
    c = case(*(f(16, 32) for f in KIVI), b=1, hkv=1, g=2, slots=2)
    q = c.q.clone().requires_grad_()
    out, lse = attend_packed(q, c.keys, c.values, c.table, scale=0.1)
    close((out.detach(), lse.detach()), attend_packed(c.q, c.keys, c.values, c.table, scale=0.1))
    with pytest.raises(RuntimeError, match=r"no gradient; call mmkv\.unwrap") as caught:
        out.sum().backward()
    assert "\n" not in str(caught.value)
