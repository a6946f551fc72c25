"""The Triton twin of `probe` against the reference: on a GPU where there is one, else in Triton's interpreter."""

import math

import pytest
import torch

from mmkv.kernels import Mass, probe
from mmkv.kernels.probe import _check, probe_reference

from .naive import rms

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def twin(q, k, scale=0.2, splits=None, **options):
    from mmkv.kernels.probe_triton import probe_triton

    q, k = q.to(DEVICE), k.to(DEVICE)
    options = {name: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    given = {name: options.get(name) for name in ("mask", "positions", "window")} | {
        "causal": options.get("causal", False)
    }
    mask, positions = _check(q, k, **given)
    given |= {
        "mask": mask,
        "positions": positions,
        "softcap": options.get("softcap"),
        "k_start": options.get("k_start", 0),
    }
    return Mass(*(t.cpu() for t in probe_triton(q, k, scale=scale, splits=splits, **given)))


def agree(q, k, scale=0.2, splits=None, tol=1e-5, **options):
    have, want = twin(q, k, scale, splits, **options), probe(q, k, scale=scale, **options)
    assert have.sum.shape == have.max.shape == want.sum.shape
    for mine, other in zip(have[:2], want[:2], strict=True):
        assert mine.isfinite().all()
        assert rms(mine, other) < tol
    assert have.count.dtype == torch.int32
    assert torch.equal(have.count, want.count)


def tensors(hq, hkv, p, t, d, b=1, dtype=torch.float32):
    return torch.randn(b, hq, p, d).to(dtype), torch.randn(b, hkv, t, d).to(dtype)


def test_by_hand():
    """Scores 0 and log 3 give 1/4 and 3/4; a causal row at the first key gives it all of its mass."""
    q, k = torch.ones(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)
    k[..., 1, :] = math.log(3) / 16
    mass = twin(q, k, 1.0)
    assert torch.allclose(mass.sum, torch.tensor([0.5, 1.5]))
    assert torch.allclose(mass.max, torch.tensor([0.25, 0.75]))
    assert mass.count.tolist() == [[[2, 2]]]
    mass = twin(q, k, 1.0, positions=torch.tensor([7, 8]), causal=True, k_start=7)
    assert torch.allclose(mass.sum, torch.tensor([1.25, 0.75]))
    assert torch.allclose(mass.max, torch.tensor([1.0, 0.75]))
    assert mass.count.tolist() == [[[2, 1]]]


@pytest.mark.parametrize(("d", "heads"), [(64, (4, 4)), (80, (7, 1)), (96, (4, 1)), (128, (8, 2)), (256, (2, 1))])
@pytest.mark.parametrize(("p", "t"), [(1, 129), (3, 65), (17, 1), (33, 17)])
def test_sizes(d, heads, p, t):
    agree(*tensors(*heads, p, t, d))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    q, k = tensors(7, 1, 20, 150, 128, dtype=dtype)
    agree(q, k, tol=1e-3)
    agree(q, k.float(), tol=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 6, 140), (2, 1, 6, 140), (2, 4, 6, 140), (1, 4, 1, 140), (2, 1, 1, 140), (6, 1)]
)
def test_masks(shape, softcap):
    mask = torch.rand(shape) < 0.5
    mask.view(-1, shape[-1])[0] = False
    agree(*tensors(4, 2, 6, 140, 16, b=2), mask=mask, softcap=softcap)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, 1), (True, 30), (False, 10**6)])
def test_sight(causal, window, splits):
    """Rows in any order and of each batch element's own, before, among and behind the keys."""
    q, k = tensors(3, 1, 21, 150, 16, b=2)
    at = torch.randint(80, 300, (2, 21))
    at[0, 3], at[1, 5] = 2, 10**10
    agree(q, k, splits=splits, positions=at, causal=causal, window=window, k_start=100)
    ordered = at[0].sort().values.int()
    mask = torch.rand(1, 3, 1, 150) < 0.7
    agree(q[:1], k[:1], splits=splits, positions=ordered, causal=causal, window=window, k_start=100, mask=mask)


def test_all_rows_of_a_prompt():
    q, k = tensors(1, 1, 150, 150, 16)
    agree(q, k, positions=torch.arange(150), causal=True)


def test_strides():
    q, k = torch.randn(1, 9, 4, 48), torch.randn(1, 100, 2, 64)
    mask = (torch.rand(100, 9) < 0.5).T
    agree(q.transpose(1, 2)[..., ::2], k.transpose(1, 2)[:, :, :, 40:], mask=mask)


def test_nobody_sees_anything():
    q, k = tensors(2, 1, 5, 40, 16)
    for options in (
        {"mask": torch.zeros(1, 1, 5, 40).bool()},
        {"positions": torch.arange(5), "causal": True, "k_start": 9},
    ):
        mass = twin(q, k, **options)
        assert not any(t.any() for t in mass)


def test_zero_lengths():
    for p, t, b in ((0, 9, 1), (3, 0, 1), (3, 9, 0)):
        q, k = tensors(2, 1, p, t, 16, b=b)
        for options in ({}, {"positions": torch.arange(p), "causal": True}):
            have, want = twin(q, k, **options), probe_reference(q, k, scale=0.2, **_full(q, k, options))
            for mine, other in zip(have, want, strict=True):
                assert torch.equal(mine, other)


def _full(q, k, options):
    mask, positions = _check(q, k, None, options.get("positions"), options.get("causal", False), None)
    return {
        "mask": mask,
        "positions": positions,
        "softcap": None,
        "causal": "causal" in options,
        "window": None,
        "k_start": 0,
    }


def test_the_same_call_gives_the_same_bits():
    q, k = tensors(2, 1, 20, 300, 16)
    first, second = twin(q, k, splits=3), twin(q, k, splits=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert rms(twin(q, k, splits=1).sum, first.sum) < 1e-6


def test_rows_that_see_all_but_are_huge():
    """Scores that overflow an exponential, and equal ones: sums stay finite and a row's mass is one."""
    q, k = torch.full((1, 1, 4, 16), 100.0), torch.full((1, 1, 200, 16), 100.0)
    mass = twin(q, k, 1.0)
    assert torch.allclose(mass.sum, torch.full((1, 1, 200), 4 / 200))


def test_heads_that_are_too_long():
    with pytest.raises(ValueError, match="up to 512 channels, not 520"):
        twin(torch.zeros(1, 1, 1, 520), torch.zeros(1, 1, 1, 520))
