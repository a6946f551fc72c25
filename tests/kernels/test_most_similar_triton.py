"""The Triton twin against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels.most_similar import most_similar_reference

from .naive import rms

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def both(a, b):
    from mmkv.kernels.most_similar_triton import most_similar_triton

    score, best = (t.cpu() for t in most_similar_triton(a.to(DEVICE), b.to(DEVICE)))
    want, which = most_similar_reference(a, b)
    assert (score.dtype, best.dtype) == (torch.float32, torch.int64)
    assert rms(score, want) <= 1e-5  # products of 16-bit numbers are exact
    chosen = torch.nn.functional.cosine_similarity(a.double(), b.double()[torch.arange(len(b))[:, None], best], dim=-1)
    assert rms(chosen, want) <= 1e-5
    assert (best == which).float().mean() >= 0.99  # another only where two are alike to the last digit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 64), (3, 17, 80), (65, 129, 96), (129, 65, 40), (17, 3, 256)])
def test_sizes(n, m, d, dtype):
    both(torch.randn(2, n, d).to(dtype), torch.randn(2, m, d).to(dtype) * 3)


def test_strides():
    x = torch.randn(3, 41, 24)
    both(x[:, 1::2], x[:, 2::2])
    both(x.transpose(1, 2)[:, ::2, :40:2], x.transpose(1, 2)[:, 1:8, 1:40:2])
    both(x[:1].expand(2, -1, -1), x[1:2].expand(2, -1, -1))


def test_by_hand():
    from mmkv.kernels.most_similar_triton import most_similar_triton

    a = torch.tensor([[[3.0, 4], [0, 0], [-1, 0], [torch.nan, 1]]])
    b = torch.tensor([[[0.0, 2], [5, 0], [0, 7]]])
    score, best = most_similar_triton(a.to(DEVICE), b.to(DEVICE))
    assert score.cpu()[0, :3].tolist() == pytest.approx([0.8, 0, 0])
    assert bool(score[0, 3].isnan())
    assert best.cpu().tolist() == [[0, 0, 0, 0]]


def test_the_first_of_equals():
    """Whole numbers, so that equal cosines are equal in every digit: of many tiles, and within one."""
    from mmkv.kernels.most_similar_triton import most_similar_triton

    few = torch.eye(16).repeat(1, 3, 1) * 4
    b = torch.cat([few, few, -few, few], 1)
    a = torch.eye(16)[None].roll(5, 1)
    score, best = most_similar_triton(a.to(DEVICE), b.to(DEVICE))
    want, which = most_similar_reference(a, b)
    assert torch.equal(score.cpu(), want)
    assert torch.equal(best.cpu(), which)
    assert best.cpu()[0].tolist() == torch.arange(16).roll(5).tolist()


def test_nan_wins():
    from mmkv.kernels.most_similar_triton import most_similar_triton

    a, b = torch.randn(1, 5, 16), torch.randn(1, 90, 16)
    b[0, 40, 3] = b[0, 80, 0] = torch.nan
    score, best = most_similar_triton(a.to(DEVICE), b.to(DEVICE))
    assert bool(score.isnan().all())
    assert best.cpu().tolist() == most_similar_reference(a, b)[1].tolist() == [[40] * 5]


def test_tiles_fill_a_gpu():
    from mmkv.kernels.most_similar_triton import tile_sizes

    assert tile_sizes(64, 365, 364, 64, 2, 132) == (64, 64, 64)
    assert tile_sizes(1, 365, 364, 1152, 2, 132) == (16, 64, 64)
    assert tile_sizes(1, 5000, 4, 8, 4, 132) == (32, 16, 16)
