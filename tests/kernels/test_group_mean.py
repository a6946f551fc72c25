"""`group_mean` and `group_total` by their reference, their gradients, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from mmkv.kernels import group_mean, group_members, group_total

INDEX = torch.tensor([[0, 1, 0, -1, 1], [0, -1, 2, 2, 0]])
X = torch.tensor([[[1.0], [2], [3], [4], [5]], [[6.0], [7], [8], [9], [10]]])


def test_by_hand():
    assert group_mean(X, INDEX, 3)[..., 0].tolist() == [[2.0, 3.5, 0.0], [8.0, 0.0, 8.5]]
    weight = torch.tensor([[1.0, 0, 3, 9, 0], [1.0, 9, 1, 3, 3]])
    assert group_mean(X, INDEX, 3, weight)[..., 0].tolist() == [[2.5, 0.0, 0.0], [9.0, 0.0, 8.75]]
    assert group_total(weight, INDEX, 3).tolist() == [[4.0, 0.0, 0.0], [4.0, 0.0, 4.0]]


def test_members():
    order, bounds = group_members(INDEX, 3)
    assert order.tolist() == [[3, 0, 2, 1, 4], [1, 0, 4, 2, 3]]
    assert bounds.tolist() == [[1, 3, 5, 5], [1, 3, 3, 5]]


def test_the_only_member_stays_to_the_bit():
    x, index = torch.randn(3, 20, 7), torch.stack([torch.randperm(20) for _ in range(3)])
    for weight in (None, torch.rand(3, 20) + 0.1):
        assert torch.equal(group_mean(x, index, 20, weight).gather(1, index[..., None].expand_as(x)), x)
        half = group_mean(x.bfloat16(), index, 20, weight)
        assert torch.equal(half.gather(1, index[..., None].expand_as(x)), x.bfloat16())


def test_sums_are_fp32():
    x = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    x[0, 0] = 4096.0
    assert group_mean(x, torch.zeros(1, 4096, dtype=torch.int64), 1).item() == 2.0  # 8191 / 4096


def test_gradients():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(2, 5, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: group_mean(x, INDEX, 3, w), (x, weight))
    assert torch.autograd.gradcheck(lambda w: group_total(w, INDEX, 3), (weight,))


def test_nothing():
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert group_mean(torch.randn(2, 0, 4), none, 3).tolist() == torch.zeros(2, 3, 4).tolist()
    assert group_total(torch.randn(2, 0), none, 3).tolist() == torch.zeros(2, 3).tolist()
    assert group_mean(torch.randn(2, 5, 0), INDEX, 3).shape == (2, 3, 0)
    assert group_mean(X, torch.full_like(INDEX, -1), 0).shape == (2, 0, 1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: group_mean(X[..., 0], INDEX, 3), ValueError),
        (lambda: group_mean(X, INDEX[:, :4], 3), ValueError),
        (lambda: group_mean(X, INDEX[0], 3), ValueError),
        (lambda: group_mean(X, INDEX, 3, torch.ones(2, 4)), ValueError),
        (lambda: group_mean(X, INDEX, -1), ValueError),
        (lambda: group_mean(X, INDEX.int(), 3), TypeError),
        (lambda: group_mean(X.int(), INDEX, 3), TypeError),
        (lambda: group_mean(X, INDEX, 3, torch.ones(2, 5).int()), TypeError),
        (lambda: group_mean(X, INDEX.to("meta"), 3), ValueError),
        (lambda: group_total(INDEX, INDEX, 3), TypeError),
        (lambda: group_total(X, INDEX, 3), ValueError),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [-2, 3])
def test_a_group_that_is_none(wrong):
    index = torch.tensor([[0, wrong, 2]])
    for call in (lambda: group_mean(torch.randn(1, 3, 4), index, 3), lambda: group_total(torch.randn(1, 3), index, 3)):
        with pytest.raises(ValueError, match=r"possible are 0 to 2, and -1"):
            call()
