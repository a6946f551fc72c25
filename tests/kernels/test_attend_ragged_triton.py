"""Rows of any lengths by the Triton kernel, against the reference."""

import pytest
import torch

from mmkv.kernels import attend_ragged
from mmkv.kernels._sight import Sight

from .naive import close

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(q, k, v, start, counts, longest, places="k_start", splits=2, at=0, tol=1e-5, **seen):
    """The kernel against the reference, rows given by device tensors."""
    from mmkv.kernels.attend_ragged_triton import attend_ragged_triton

    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x  # noqa: E731
    sight = Sight(at=move(at), **{name: move(x) for name, x in seen.items()})
    have = attend_ragged_triton(
        *map(move, (q, k, v, start, counts)), longest, sight, scale=0.3, places=places, splits=splits
    )
    positions = {"key": {"positions": at}, "row": {"k_start": at}, "k_start": {}}[places]
    want = attend_ragged(
        q.float(), k.float(), v.float(), start, counts=counts, longest=longest, scale=0.3, **positions, **seen
    )
    close(tuple(x.cpu() for x in have), want, tol)
    return have


def case(lengths, b=2, g=2, tq=3, d=16, dv=24, dtype=torch.float32):
    """Queries, keys and values with a gap between rows, where each begins, how many it has."""
    heads = len(lengths) // b
    counts = torch.tensor(lengths, dtype=torch.int32)
    start = torch.cat([torch.zeros(1), (counts + 2).cumsum(0)[:-1]]).long()
    n = int(counts.sum()) + 2 * len(lengths)
    k, v = torch.randn(n, d).to(dtype), torch.randn(n, dv).to(dtype)
    return torch.randn(b, heads * g, tq, d).to(dtype), k, v, start, counts


@pytest.mark.parametrize("lengths", [[5, 0, 17, 65], [0, 0, 0, 0], [1, 129, 2, 3]], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_lengths(lengths, splits):
    both(*case(lengths), max(lengths), splits=splits)


def test_longest_is_a_bound():
    """More than any row has changes nothing; what a row has beyond it is not seen."""
    q, k, v, start, counts = case([5, 70, 1, 0])
    many, few = both(q, k, v, start, counts, 300, splits=4), both(q, k, v, start, counts, 70)
    close(tuple(x.cpu() for x in many), tuple(x.cpu() for x in few))
    both(q, k, v, start, counts, 40)


def test_rows_that_grow_in_place():
    """The same tensors serve a tail of fixed size while it fills: what lies behind the count is not read."""
    k = torch.full((2 * 2 * 80, 16), torch.nan)
    start, counts = torch.arange(4) * 80, torch.zeros(4, dtype=torch.int32)
    q = torch.randn(2, 4, 1, 16)
    for n in (0, 3, 64, 66):
        counts[:] = n
        k.view(4, 80, 16)[:, :n] = torch.randn(4, n, 16)
        out, _ = both(q, k, k, start, counts, 80)
        assert out.isfinite().all()


@pytest.mark.parametrize("seen", [{"causal": True}, {"window": 20}, {"causal": True, "window": 9}], ids=str)
@pytest.mark.parametrize("places", ["row", "key"])
@pytest.mark.parametrize("first", [0, 2**31 - 20])
def test_positions(seen, places, first):
    q, k, v, start, counts = case([5, 0, 80, 65])
    at = torch.tensor([7, 3, 0, 30]) + first
    if places == "key":
        at = torch.cat([torch.randperm(90)[: n + 2].sort().values for n in counts.tolist()]) + first
    at = at if first else at.int()
    both(
        q,
        k,
        v,
        start,
        counts,
        80,
        places,
        at=at,
        q_positions=torch.tensor([[-3, 8, 11], [60, 70, 400]]) + first,
        **seen,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    both(*case([5, 0, 17, 65], dtype=dtype, d=80, dv=80), 65, tol=1e-2)


@pytest.mark.parametrize("n", [0, 7])
def test_no_queries_or_no_keys(n):
    q, k, v, start, counts = case([n] * 4, tq=0)
    both(q, k, v, start, counts, n)
    both(torch.randn(2, 4, 1, 16), k, v, start, counts, n)


def test_rows_that_do_not_fit():
    q, k, v, start, counts = case([5, 0, 17, 65])
    with pytest.raises(TypeError, match="counts and longest"):
        attend_ragged(q, k, v, start, scale=1.0)
    with pytest.raises(TypeError, match="longest as a number"):
        attend_ragged(q, k, v, start, counts=counts, scale=1.0)
    with pytest.raises(TypeError, match="must be int"):
        attend_ragged(q, k, v, start, counts=counts.float(), longest=65, scale=1.0)
    with pytest.raises(ValueError, match="3 rows do not divide"):
        attend_ragged(q, k, v, start[:3], counts=counts[:3], longest=65, scale=1.0)
    with pytest.raises(ValueError, match="a row lies at"):
        attend_ragged(q, k, v, start + 10, counts=counts, longest=65, scale=1.0)
    with pytest.raises(ValueError, match="k_start of each row"):
        attend_ragged(
            q, k, v, start, counts=counts, longest=65, scale=1.0, window=3, q_positions=torch.zeros(2, 3).int()
        )
