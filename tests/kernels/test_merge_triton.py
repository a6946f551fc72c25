"""The Triton twin of `merge` against the reference."""

import pytest
import torch

from mmkv.kernels.merge import merge_reference, merge_sinks

from .naive import close

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(parts, sinks=None, tol=1e-6):
    from mmkv.kernels.merge_triton import merge_triton

    want = merge_reference(parts)
    want = want if sinks is None else merge_sinks(*want, sinks)
    have = merge_triton(
        [(o.to(DEVICE), lse.to(DEVICE)) for o, lse in parts], None if sinks is None else sinks.to(DEVICE)
    )
    close(tuple(x.cpu() for x in have), want, tol)
    return have


def part(*splits, b=2, hq=3, tq=4, dv=20):
    """One part; a tenth of its rows saw nothing."""
    lse = torch.randn(*splits, b, hq, tq) * 5
    empty = torch.rand(lse.shape) < 0.1
    out = torch.randn(*splits, b, hq, tq, dv).masked_fill(empty[..., None], 0.0)
    return out, lse.masked_fill(empty, -torch.inf)


@pytest.mark.parametrize("splits", [[()], [(1,)], [(7,)], [(), ()], [(3,), (), (40,)], [(2,), (1,)] * 4], ids=str)
def test_parts_and_splits(splits):
    both([part(*s) for s in splits])


@pytest.mark.parametrize(
    ("b", "hq", "tq", "dv"), [(1, 28, 1, 128), (1, 1, 1, 1), (2, 7, 65, 80), (0, 2, 1, 8), (1, 2, 0, 8)]
)
def test_shapes(b, hq, tq, dv):
    out, _ = both([part(5, b=b, hq=hq, tq=tq, dv=dv), part(b=b, hq=hq, tq=tq, dv=dv)])
    assert out.transpose(1, 2).is_contiguous()


def test_more_parts_than_a_launch_takes():
    both([part(*s) for s in [(), (3,)] * 10], torch.randn(3))


def test_nothing_seen():
    nothing = torch.zeros(2, 3, 4, 20), torch.full((2, 3, 4), -torch.inf)
    both([nothing, nothing])
    both([nothing], torch.randn(3))
    both([nothing], torch.full((3,), -torch.inf))
    both([part(), nothing], torch.full((3,), -torch.inf))


def test_sinks_and_types():
    from mmkv.kernels.merge_triton import merge_triton

    parts, sinks = [part(3), part()], torch.randn(3)
    both(parts, sinks)
    both([(parts[0][0].bfloat16(), parts[0][1]), parts[1]], sinks.half())
    out, lse = merge_triton([(o.to(DEVICE), lse.to(DEVICE)) for o, lse in parts], sinks.to(DEVICE), torch.float16)
    want = merge_sinks(*merge_reference(parts), sinks)
    assert out.dtype == torch.float16
    close((out.float().cpu(), lse.cpu()), want, 1e-3)


def test_parts_of_odd_strides():
    parts = [part(), part(2)]
    parts = [(o.mT.contiguous().mT, lse.mT.contiguous().mT) for o, lse in parts]
    both(parts)


def test_far_apart():
    (a, la), b = part(), part()
    out, _ = both([(a, la + 1e4), b])
    seen = la > -torch.inf
    assert torch.equal(out.cpu()[seen], a[seen])


def test_by_hand():
    """lse log 1 and log 3: weights 1/4 and 3/4; with a sink of log 4 everything halves."""
    a = torch.full((1, 1, 1, 1), 4.0), torch.zeros(1, 1, 1)
    b = torch.full((1, 1, 1, 1), 8.0), torch.full((1, 1, 1), 3.0).log()
    assert both([a, b])[0].item() == pytest.approx(7.0)
    assert both([a, b], torch.tensor([4.0]).log())[0].item() == pytest.approx(3.5)
