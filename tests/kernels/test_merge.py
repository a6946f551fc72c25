import pytest
import torch

from mmkv.kernels import attend_dense, merge, merge_sinks

from .naive import close, rms


def parts(n=4, t=12):
    q = torch.randn(2, 4, 3, 16)
    k, v = torch.randn(2, 2, n * t, 16) * 3, torch.randn(2, 2, n * t, 16)
    split = [attend_dense(q, a, b, scale=0.5) for a, b in zip(k.split(t, 2), v.split(t, 2))]
    return split, attend_dense(q, k, v, scale=0.5)


def test_parts_make_the_whole():
    split, whole = parts()
    close(merge(split), whole, tol=1e-6)


def test_associative_and_commutative():
    (a, b, c, d), whole = parts()
    close(merge([merge([a, b]), merge([c, d])]), whole, tol=1e-6)
    close(merge([d, merge([b, merge([c, a])])]), whole, tol=1e-6)


def test_neutral_element():
    (a, b, *_), _ = parts()
    nothing = (torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf))
    for x in (merge([nothing, a]), merge([a, nothing, nothing]), merge([a])):
        close(x, a, tol=1e-7)
    close(merge([nothing, nothing]), nothing)
    half = (a[0].clone(), a[1].clone())
    half[0][:, :2], half[1][:, :2] = 0.0, -torch.inf
    out, lse = merge([half, b])
    close((out[:, :2], lse[:, :2]), (b[0][:, :2], b[1][:, :2]), tol=1e-7)


def test_far_apart_and_huge():
    (a, b, *_), _ = parts()
    out, lse = merge([(a[0], a[1] + 1e4), b])
    assert torch.equal(out, a[0])
    assert torch.equal(lse, a[1] + 1e4)


def test_half_precision_parts():
    (a, b, *_), _ = parts()
    out, _ = merge([(a[0].bfloat16(), a[1]), (b[0].bfloat16(), b[1])])
    assert out.dtype == torch.float32
    assert rms(out, merge([a, b])[0]) < 5e-3


def test_sinks_are_a_key_with_value_zero():
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    sinks = torch.randn(4)
    have = merge_sinks(*attend_dense(q, k, v, scale=0.3), sinks)
    s = torch.cat([(q @ k.mT * 0.3).double(), sinks.double().view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1)
    close(have, (s.softmax(-1)[..., :-1] @ v.double(), s.logsumexp(-1)))
    out, lse = merge_sinks(torch.zeros(2, 4, 3, 16), torch.full((2, 4, 3), -torch.inf), sinks)
    assert not out.any()
    assert torch.equal(lse, sinks.view(1, 4, 1).expand(2, 4, 3))
    unchanged = merge_sinks(*attend_dense(q, k, v, scale=0.3), torch.full((4,), -torch.inf))
    close(unchanged, attend_dense(q, k, v, scale=0.3), tol=1e-7)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_splits_sinks_and_type_in_one_go():
    (a, b, c, d), whole = parts()
    split = torch.stack([b[0], c[0], d[0]]), torch.stack([b[1], c[1], d[1]])
    close(merge([a, split]), whole, tol=1e-6)
    close(merge([split, a]), whole, tol=1e-6)
    sinks = torch.randn(4)
    out, lse = merge([a, split], sinks=sinks, dtype=torch.float16)
    want = merge_sinks(*whole, sinks)
    assert out.dtype == torch.float16
    close((out.float(), lse), want, tol=1e-3)


def test_parts_that_do_not_fit():
    (a, b, *_), _ = parts()
    with pytest.raises(ValueError, match="part 1 is out"):
        merge([a, (b[0][:, :2], b[1][:, :2])])
    with pytest.raises(ValueError, match="part 0 is out"):
        merge([(a[0], a[1][None])])
    with pytest.raises(ValueError, match="sinks"):
        merge([a], sinks=torch.zeros(3))
