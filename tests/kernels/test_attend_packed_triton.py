"""The Triton twin against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels import Blocks, Spec, Table, gaussian, mean_only, minmax, symmetric, ternary
from mmkv.kernels.attend_packed import attend_packed_reference

from .naive import CODES, Case, case, close

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {
    "kivi": lambda d, dv, g: (
        Spec("channel", g, ((d, minmax(2)),)),
        Spec("token", g, ((dv, minmax(2)),), dv // 2),
    ),
    "mixed": lambda d, dv, g: (
        Spec("channel", g, ((16, gaussian(2)), (8, gaussian(4)), (d - 24, mean_only())), scale_bits=8),
        Spec("token", g, ((dv, gaussian(1.58, zero="none")),), dv),
    ),
    "swapped": lambda d, dv, g: (
        Spec("token", g, ((d, symmetric(8)),), d // 2, scale_bits=8),
        Spec("channel", g, ((dv - 24, ternary()), (8, mean_only()), (16, minmax(4))), scale_bits=8),
    ),
}


def both(c: Case, splits: int | None = None, scale=0.1, softcap=None, causal=False, window=None, tol=1e-5):
    from mmkv.kernels.attend_packed_triton import attend_packed_triton

    at = c.q_positions if causal or window is not None else None
    kw = {"scale": scale, "softcap": softcap, "causal": causal, "window": window}
    want = attend_packed_reference(c.q, c.keys, c.values, c.table, q_positions=at, **kw)
    here = [x.to(DEVICE) for x in (c.q, c.keys, c.values, c.table)]
    at = None if at is None else at.to(DEVICE)
    out, lse = attend_packed_triton(*here, q_positions=at, splits=splits, **kw)
    close((out.cpu(), lse.cpu()), want, tol)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("d", "dv", "group"), [(48, 80, 37), (80, 48, 160)])
def test_shapes(fmt, d, dv, group):
    both(case(*FORMATS[fmt](d, dv, group), b=1, hkv=2, g=2, slots=2))


def test_large_heads():
    both(case(*FORMATS["kivi"](128, 256, 32), b=1, hkv=1, g=1, slots=2))
    both(case(*FORMATS["mixed"](256, 128, 64), b=1, hkv=1, g=2, slots=1))


@pytest.mark.parametrize(
    ("g", "tq", "fmt", "mask"),
    [
        (7, 1, "mixed", {"window": 40}),
        (1, 3, "kivi", {"causal": True, "window": 33, "softcap": 3.0}),
        (4, 3, "swapped", {"causal": True}),
        (2, 50, "mixed", {"causal": True, "softcap": 1.0}),
    ],
)
def test_masks_and_heads(g, tq, fmt, mask):
    both(case(*FORMATS[fmt](48, 48, 32), b=2, hkv=1, g=g, tq=tq), splits=2, **mask)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_do_not_show(splits):
    c = case(*FORMATS["kivi"](48, 48, 32), b=1, hkv=2, g=2, slots=5)
    c.table.count[0] = 0
    both(c, splits=splits)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("name", CODES)
def test_every_code_as_keys_and_as_values(name, axis):
    spec = Spec(axis, 32, ((32, CODES[name]),), 16 if axis == "token" else 0)
    both(case(spec, spec, b=1, hkv=1, g=2, slots=2))


def test_positions_of_each_token_and_shared_blocks():
    c = case(*FORMATS["kivi"](48, 48, 32), b=2, hkv=1, g=2, tq=2, shared=True)
    at = torch.randperm(len(c.keys) * 32).view(-1, 32).int() % 96
    c.table = Table(c.table.block, c.table.count, c.table.start, at)
    both(c, causal=True, window=50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_16_bits(dtype):
    """On a GPU their products run in TF32, which keeps ten bits of the mantissa."""
    both(case(*FORMATS["mixed"](48, 48, 32), b=1, hkv=1, dtype=dtype), tol=2e-3 if DEVICE == "cuda" else 1e-5)


def test_query_of_odd_strides_and_large_scores():
    c = case(*FORMATS["kivi"](48, 48, 32), b=2, hkv=1, g=2, tq=3)
    c.q = torch.randn(3, 48, 2, 2).permute(2, 3, 0, 1)
    both(c, scale=30.0)


def test_nothing_to_see():
    c = case(*FORMATS["kivi"](48, 48, 32), b=1, hkv=1, slots=1)
    c.table.count[:] = 0
    both(c)
    c.q = c.q[:, :, :0]
    both(c)


@pytest.mark.gpu
def test_offsets_of_64_bits():
    """Block ids times bytes per block exceed 2^31: the kernel must see the same block at both ends of the pool."""
    k, v = FORMATS["kivi"](48, 48, 32)
    c = case(k, v, b=1, hkv=1, g=1, slots=1)
    n = 2**31 // k.code_bytes + 8
    c.table.count[:] = 32
    small = c.keys.select(torch.zeros(1, dtype=torch.int64)), c.values.select(torch.zeros(1, dtype=torch.int64))
    big = []
    for blocks in small:
        pool = Blocks.empty(blocks.spec, n, DEVICE)
        for a, b in zip(pool.tensors(), blocks.tensors(), strict=True):
            a[-1] = b[0].to(DEVICE)
        big.append(pool)
    from mmkv.kernels.attend_packed_triton import attend_packed_triton

    i = torch.zeros(1, 1, dtype=torch.int32)
    kw = {"scale": 0.1, "softcap": None, "q_positions": None, "causal": False, "window": None}
    want = attend_packed_reference(c.q, *small, Table(i, i + 32, i), **kw)
    out, lse = attend_packed_triton(c.q.to(DEVICE), *big, Table(i + n - 1, i + 32, i).to(DEVICE), **kw)
    close((out.cpu(), lse.cpu()), want)


def test_too_many_value_channels_raise():
    c = case(*FORMATS["kivi"](48, 544, 32), b=1, hkv=1, g=1, slots=1)
    with pytest.raises(ValueError, match="up to 512 channels"):
        both(c)
