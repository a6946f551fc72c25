import math

import pytest
import torch

from mmkv.kernels import code, gaussian, minmax, sign, symmetric, ternary


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_gaussian_levels_are_lloyd_max(bits):
    """Each level is the mean of a standard normal between its two bounds, and bounds are midpoints."""
    c = gaussian(bits)
    edges = [-math.inf, *c.bounds, math.inf]
    pdf = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    cdf = lambda x: (1 + math.erf(x / math.sqrt(2))) / 2  # noqa: E731
    for lo, hi, level in zip(edges, edges[1:], c.levels):
        assert level == pytest.approx((pdf(lo) - pdf(hi)) / (cdf(hi) - cdf(lo)), abs=1e-4)
    assert c.bounds == pytest.approx([(x + y) / 2 for x, y in zip(c.levels, c.levels[1:])])


def test_catalogue():
    assert minmax(2).levels == (0, 1, 2, 3)
    assert minmax(2).bounds == (0.5, 1.5, 2.5)
    assert symmetric(4).levels == tuple(range(-8, 8))
    assert symmetric(1) == sign()
    assert sign(zero=True).zero == "mean"
    assert ternary().bounds == (-0.7, 0.7)
    assert ternary(scale="one").has_scale is False
    assert gaussian(0).per_byte == 0
    assert gaussian(0, zero="none").has_zero is False
    assert code("gaussian", 1.58) == gaussian(1.58)
    assert code("rotated", 2).zero == "none"


@pytest.mark.parametrize(
    ("kind", "bits", "allowed"),
    [("gaussian", 3, "0, 1, 1.58, 2, 4"), ("minmax", 5, "1, 2, 4, 8"), ("ternary", 1.7, "1.58"), ("nf4", 4, "minmax")],
)
def test_impossible_bits_name_the_possible_ones(kind, bits, allowed):
    with pytest.raises(ValueError, match=allowed) as e:
        code(kind, bits)
    assert "\n" not in str(e.value)


def test_direct_constructors_check_too():
    for make, bad in ((minmax, 3), (symmetric, 5), (gaussian, 1.7), (ternary, -1.0)):
        with pytest.raises(ValueError, match="allowed"):
            make(bad)


def test_distortion_matches_the_literature():
    """Squared error of the Gaussian codebooks on a normal: .363, .190, .118, .0095 (Max 1960)."""
    from mmkv.kernels import Spec, pack_blocks, unpack_blocks

    x = torch.randn(8, 1024, 16)
    for bits, want in ((1, 0.363), (1.58, 0.190), (2, 0.118), (4, 0.0095)):
        spec = Spec("channel", 1024, ((16, gaussian(bits)),))
        y = unpack_blocks(pack_blocks(x, torch.full((8,), 1024), spec))
        assert float((x - y).square().mean()) == pytest.approx(want, rel=0.03)
