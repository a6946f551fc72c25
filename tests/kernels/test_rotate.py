"""`rotate` by its reference, in both conventions, there and back; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from mmkv.kernels import rotary_tables, rotate

from .naive import rms


def tables(t, pairs, scale=1.0):
    return rotary_tables(torch.arange(t) + 3, 100.0 ** -(torch.arange(pairs) / pairs), scale=scale)


def by_pair(x, cos, sin, interleaved):
    """Pair by pair as complex numbers, fp64."""
    out, p = x.double().clone(), cos.shape[-1]
    for i in range(p):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, p + i)
        turned = torch.complex(out[..., a], out[..., b]) * torch.complex(cos[..., i].double(), sin[..., i].double())
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 5, 8])
@pytest.mark.parametrize("shape", [(7, 16), (3, 7, 16), (2, 3, 7, 17)])
def test_against_complex_numbers(shape, pairs, interleaved):
    x, (cos, sin) = torch.randn(shape), tables(7, pairs)
    have = rotate(x, cos, sin, interleaved=interleaved)
    assert rms(have, by_pair(x, cos, sin, interleaved)) < 1e-6
    assert torch.equal(have[..., 2 * pairs :], x[..., 2 * pairs :])


def test_by_hand():
    x = torch.tensor([[1.0, 2, 3, 4, 9]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # the first pair by a quarter
    assert rotate(x, cos, sin).tolist() == [[-3.0, 2, 1, 4, 9]]
    assert rotate(x, cos, sin, interleaved=True).tolist() == [[-2.0, 1, 3, 4, 9]]
    assert rotate(x, cos, sin, inverse=True).tolist() == [[3.0, 2, -1, 4, 9]]
    assert rotate(x, cos * 2, sin * 2, inverse=True).tolist() == [[1.5, 1, -0.5, 2, 9]]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.35])
def test_there_and_back(interleaved, scale):
    x, (cos, sin) = torch.randn(2, 3, 9, 12), tables(9, 6, scale)
    for c, s in (
        (cos, sin),
        (cos.bfloat16(), sin.bfloat16()),
    ):  # 16-bit tables are no rotations, and undone all the same
        there = rotate(x, c, s, interleaved=interleaved)
        assert rms(rotate(there, c, s, interleaved=interleaved, inverse=True), x) < 1e-6


def test_a_table_for_each_sequence_and_head():
    x = torch.randn(2, 3, 5, 8)
    angle = torch.randn(2, 3, 5, 4)
    for some in (angle, angle[:, :1], angle[:1, :, :1], angle[0], angle[0, 0]):
        have = rotate(x, some.cos(), some.sin())
        want = [
            [rotate(x[b, h], *(f(some.expand(2, 3, 5, 4)[b, h]) for f in (torch.cos, torch.sin))) for h in range(3)]
            for b in range(2)
        ]
        assert torch.equal(have, torch.stack([torch.stack(row) for row in want]))


def test_dtypes_and_in_place():
    x, (cos, sin) = torch.randn(2, 4, 16), tables(4, 8)
    low = rotate(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, rotate(x.bfloat16().float(), cos, sin).bfloat16())  # fp32 in between
    assert rotate(x.double(), cos, sin).dtype == torch.float64
    for interleaved in (False, True):
        want, y = rotate(x, cos[:, :5], sin[:, :5], interleaved=interleaved), torch.cat([x, x])[:2]
        assert rotate(y, cos[:, :5], sin[:, :5], interleaved=interleaved, inplace=True) is y
        assert torch.equal(y, want)


def test_gradients():
    x, (cos, sin) = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), tables(3, 3)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: rotate(x, cos, sin, interleaved=i, inverse=True), (x,))


def test_nothing():
    assert rotate(torch.randn(2, 0, 8), *tables(0, 4)).shape == (2, 0, 8)
    x = torch.randn(3, 8)
    assert torch.equal(rotate(x, torch.ones(3, 0), torch.ones(3, 0)), x)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "error"),
    [
        (torch.ones(1, 1, 1, 3, 8), torch.ones(3, 4), torch.ones(3, 4), ValueError),
        (torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 8), ValueError),  # Hugging Face's tables as they are
        (torch.ones(3, 8), torch.ones(4, 4), torch.ones(4, 4), ValueError),
        (torch.ones(3, 8), torch.ones(3, 4), torch.ones(3, 3), ValueError),
        (torch.ones(3, 8), torch.ones(1, 3, 4), torch.ones(1, 3, 4), ValueError),
        (torch.ones(2, 3, 8), torch.ones(4), torch.ones(4), ValueError),
        (torch.ones(3, 8).int(), torch.ones(3, 4), torch.ones(3, 4), TypeError),
        (torch.ones(3, 8), torch.ones(3, 4).int(), torch.ones(3, 4).int(), TypeError),
        (torch.ones(3, 8), torch.ones(3, 4, device="meta"), torch.ones(3, 4), ValueError),
    ],
)
def test_refusals(x, cos, sin, error):
    with pytest.raises(error) as caught:
        rotate(x, cos, sin)
    assert "\n" not in str(caught.value)


def test_in_place_wants_memory_of_its_own():
    with pytest.raises(ValueError, match="shares memory"):
        rotate(torch.ones(1, 8).expand(3, 8), *tables(3, 4), inplace=True)


def test_tables_of_one_axis():
    cos, sin = rotary_tables(torch.tensor([0, 2]), torch.tensor([1.0, 0.25]), scale=2.0)
    assert cos.tolist() == [[2.0, 2.0], pytest.approx([2 * math.cos(2), 2 * math.cos(0.5)])]
    assert sin[1].tolist() == pytest.approx([2 * math.sin(2), 2 * math.sin(0.5)])


def test_tables_of_three_axes():
    at, frequencies = torch.tensor([[1], [10], [100]]), torch.ones(8)
    for interleaved, axes in ((False, "ttttthhw"), (True, "thwthtth")):
        sections = (5, 2, 1) if not interleaved else (4, 3, 1)
        cos, _ = rotary_tables(at, frequencies, sections=sections, interleaved=interleaved)
        want = torch.tensor([[1.0, 10.0, 100.0]["thw".index(axis)] for axis in axes]).cos()
        assert torch.equal(cos[0], want)


def test_tables_are_refused():
    with pytest.raises(ValueError, match="sections"):
        rotary_tables(torch.ones(3, 5), torch.ones(4))
    with pytest.raises(ValueError, match="sections"):
        rotary_tables(torch.ones(3, 5), torch.ones(4), sections=(1, 1, 1))
    with pytest.raises(ValueError, match="frequencies"):
        rotary_tables(torch.ones(3, 5), torch.ones(4, 1), sections=(2, 1, 1))
