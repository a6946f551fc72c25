"""The Triton twins against the references: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels import group_mean, group_members, group_total
from mmkv.kernels.group_mean import group_mean_reference, group_total_reference

from .naive import rms
from .pretend import as_if_on_a_gpu

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def by_triton(x, index, count, weight=None):
    from mmkv.kernels.group_mean_triton import group_mean_triton

    return group_mean_triton(
        x.to(DEVICE), None if weight is None else weight.to(DEVICE), group_members(index.to(DEVICE), count)
    ).cpu()


def some_groups(b, n, count):
    """Groups of many sizes, the last one empty, and pruned tokens."""
    index = (torch.rand(b, n) ** 2 * count).long().clamp(max=max(count - 2, 0))
    return index.masked_fill(torch.rand(b, n) < 0.2, -1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "count", "c"), [(1, 1, 64), (3, 17, 80), (17, 3, 1), (129, 20, 130), (65, 2, 513)])
def test_sizes(n, count, c, dtype, weighted):
    x, index = torch.randn(2, n, c).to(dtype), some_groups(2, n, count)
    weight = torch.rand(2, n) * 3 if weighted else None
    have, want = by_triton(x, index, count, weight), group_mean_reference(x, index, count, weight)
    assert have.dtype == dtype
    assert torch.equal(have == 0, want == 0)
    assert rms(have, want) <= (1e-5 if dtype == torch.float32 else 1e-2)  # the interpreter cuts bf16 off


def test_the_only_member_stays_to_the_bit():
    index = torch.stack([torch.randperm(20) for _ in range(3)])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 20, 7).to(dtype)
        for weight in (None, torch.rand(3, 20) * 9 + 1e-3):
            assert torch.equal(by_triton(x, index, 20, weight).gather(1, index[..., None].expand_as(x)), x)


def test_one_group_of_all_and_none():
    x = torch.randn(1, 300, 5)
    assert rms(by_triton(x, torch.zeros(1, 300, dtype=torch.int64), 1), x.mean(1, keepdim=True)) <= 1e-5
    assert by_triton(x, torch.full((1, 300), -1), 2).tolist() == torch.zeros(1, 2, 5).tolist()
    assert by_triton(x, torch.zeros(1, 300, dtype=torch.int64), 1, torch.zeros(1, 300)).tolist() == [[[0.0] * 5]]
    assert by_triton(x[:, :0], torch.zeros(1, 0, dtype=torch.int64), 2).tolist() == torch.zeros(1, 2, 5).tolist()
    assert by_triton(x[:0], torch.zeros(0, 300, dtype=torch.int64), 2).shape == (0, 2, 5)
    assert by_triton(x[..., :0], torch.zeros(1, 300, dtype=torch.int64), 2).shape == (1, 2, 0)


def test_strides():
    x, index = torch.randn(2, 12, 31).transpose(1, 2), some_groups(2, 31, 6)
    weight = torch.rand(31, 2).half().T
    assert rms(by_triton(x, index, 6, weight), group_mean_reference(x, index, 6, weight)) <= 1e-5
    x, weight = x[:1].expand(2, -1, -1), weight[:1].expand(2, -1)
    assert rms(by_triton(x, index, 6, weight), group_mean_reference(x, index, 6, weight)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_totals(dtype):
    from mmkv.kernels.group_mean_triton import group_total_triton

    for n, count in ((1, 1), (33, 40), (200, 3)):
        values, index = torch.rand(2, n).to(dtype), some_groups(2, n, count)
        have = group_total_triton(values.to(DEVICE), group_members(index.to(DEVICE), count)).cpu()
        assert have.dtype == dtype
        assert rms(have, group_total_reference(values.float(), index, count)) <= (
            1e-5 if dtype == torch.float32 else 1e-2
        )


def test_the_way_of_a_gpu(monkeypatch):
    """The wrappers sort, launch, and leave autograd to torch."""
    x, index, weight = (t.to(DEVICE) for t in (torch.randn(2, 9, 4), some_groups(2, 9, 4), torch.rand(2, 9)))
    want, total = group_mean_reference(x, index, 4, weight), group_total_reference(weight, index, 4)
    seen = as_if_on_a_gpu(monkeypatch, "group_mean_triton", "group_mean_triton", "group_total_triton")
    assert rms(group_mean(x, index, 4, weight), want) <= 1e-5
    assert rms(group_total(weight, index, 4, group_members(index, 4)), total) <= 1e-5
    assert seen == ["group_mean_triton", "group_total_triton", "group_total_triton"]
    x.requires_grad_()
    group_mean(x, index, 4, weight).sum().backward()
    assert x.grad is not None
    assert len(seen) == 3
    with torch.no_grad():
        group_mean(x, index, 4)
    assert len(seen) == 4
