"""The Triton kernel of `attend_dense` against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels._sight import Sight, grouped_mask
from mmkv.kernels.attend_dense import attend_dense_reference

from .naive import close

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(q, k, v, splits=None, scale=0.2, tol=1e-5, exact=None, merged=True, **seen):
    """The kernel against the reference; returns what the kernel gave."""
    from mmkv.kernels.attend_dense_triton import attend_dense_triton

    (b, hq, tq, _), (_, hkv, t, _) = q.shape, k.shape
    if "mask" in seen:
        seen["mask"] = grouped_mask(seen["mask"], b, hq, hkv, tq, t)
    here = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in seen.items()}
    have = attend_dense_triton(
        *(x.to(DEVICE) for x in (q, k, v)), Sight(**here), scale=scale, splits=splits, exact=exact, merged=merged
    )
    have = tuple(x.cpu() for x in have)
    if merged:
        close(have, attend_dense_reference(q.float(), k.float(), v.float(), Sight(**seen), scale), tol)
    return have


def case(b=1, hkv=2, g=2, tq=1, t=65, d=48, dv=48, dtype=torch.float32):
    return (torch.randn(b, n, m, c).to(dtype) for n, m, c in ((hkv * g, tq, d), (hkv, t, d), (hkv, t, dv)))


@pytest.mark.parametrize("t", [0, 1, 3, 17, 64, 65, 129])
@pytest.mark.parametrize("splits", [None, 1, 2, 3])
def test_numbers_of_keys(t, splits):
    both(*case(t=t), splits=splits)


@pytest.mark.parametrize(("g", "tq"), [(1, 1), (4, 3), (7, 1), (7, 20), (1, 129), (2, 0)])
def test_numbers_of_queries(g, tq):
    both(*case(b=2, g=g, tq=tq, t=40, d=16, dv=16))


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 96), (128, 256), (256, 128), (512, 512), (8, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_sizes_and_types(d, dv, dtype):
    both(*case(hkv=1, t=70, d=d, dv=dv, dtype=dtype), scale=d**-0.5, tol=1e-5 if dtype == torch.float32 else 1e-2)


def test_types_that_differ():
    """Decoded blocks are fp32 in a model of 16 bits."""
    q, k, v = case()
    both(q.bfloat16(), k, v, tol=1e-5 if DEVICE == "cpu" else 2e-3)
    both(q, k.bfloat16(), v.half(), tol=1e-5)
    both(q.half(), k.half(), v.half(), exact=True, tol=1e-5)


def test_two_keys_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4."""
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[0.0, 5.0], [torch.log(torch.tensor(3.0)), 7.0]]).view(1, 1, 2, 2)
    v = torch.tensor([[4.0], [8.0]]).view(1, 1, 2, 1)
    out, lse = both(q, k, v, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([7.0])
    assert lse.exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    "shape", [(1, 1, 6, 70), (2, 1, 6, 70), (2, 4, 6, 70), (2, 1, 1, 70), (1, 1, 1, 70), (6, 70), (2, 4, 6, 1), (70,)]
)
def test_masks(shape):
    mask = torch.rand(shape) < 0.3
    mask.view(-1, mask.shape[-1])[0] = False  # a row that sees nothing
    both(*case(b=2, tq=6, t=70), mask=mask, splits=2)


@pytest.mark.parametrize("start", [0, 30, 2**33])
@pytest.mark.parametrize("seen", [{"causal": True}, {"window": 40}, {"causal": True, "window": 25}], ids=str)
def test_positions(start, seen):
    """Queries before, among and behind the keys; those before see nothing."""
    at = start + torch.tensor([[-5, 0, 1, 64, 65, 99], [3, 2, 1, 139, 150, 500]])
    both(*case(b=2, tq=6, t=140), q_positions=at, at=start, splits=2, **seen)


def test_positions_and_padding_and_softcap():
    held = torch.rand(2, 1, 1, 90) < 0.8
    at = torch.arange(20, 90, dtype=torch.int32).expand(2, -1)
    both(*case(b=2, g=1, tq=70, t=90), q_positions=at, causal=True, window=33, mask=held, softcap=2.0)


def test_weights():
    """A key of weight 3 is that key three times; a weight of 0 hides it, also alone."""
    q, k, v = case(t=5)
    weight = torch.tensor([3.0, 1, 0, 2, 1]).expand(1, 2, 5)
    have = both(q, k, v, weight=weight, softcap=3.0)
    repeated = [x.repeat_interleave(weight[0, 0].long(), 2) for x in (k, v)]
    close(have, attend_dense_reference(q, *repeated, Sight(softcap=3.0), 0.2))
    both(q, k, v, weight=torch.zeros(1, 2, 5))


def test_odd_strides_and_large_scores():
    q = torch.randn(3, 48, 2, 4).permute(2, 3, 0, 1)
    k, v = torch.randn(48, 33, 2, 2).permute(3, 2, 1, 0), torch.randn(33, 1, 2, 96).transpose(0, 2)[..., ::2]
    both(q, k, v.expand(2, 2, 33, 48), scale=30.0)


def test_splits_left_apart_merge_to_the_same():
    from mmkv.kernels.merge_triton import merge_triton

    q, k, v = case(b=2, tq=3, t=200)
    out, lse = both(q, k, v, splits=3, merged=False)
    assert out.shape == (3, 2, 4, 3, 48)
    want = attend_dense_reference(q, k, v, Sight(), 0.2)
    close(tuple(x.cpu() for x in merge_triton([(out.to(DEVICE), lse.to(DEVICE))])), want)


def test_memory_past_the_keys_is_not_read():
    q, k, v = case(t=64)
    k[:, :, 33:], v[:, :, 33:] = torch.nan, torch.nan
    out, _ = both(q, k[:, :, :33], v[:, :, :33])
    assert out.isfinite().all()


def test_too_many_channels_raise():
    q, k, v = case(d=520)
    with pytest.raises(ValueError, match="up to 512"):
        both(q, k, v)


@pytest.mark.gpu
def test_offsets_of_64_bits():
    """A row that begins behind 2^31 numbers."""
    k = torch.zeros(2, 1, 2**24 + 3, 128, dtype=torch.float16, device="cuda")
    k[1, 0, -5:] = torch.randn(5, 128, device="cuda").half()
    q = torch.randn(2, 1, 1, 128)
    mask = torch.zeros(1, 1, 1, k.shape[2], dtype=torch.bool)
    mask[..., -5:] = True
    from mmkv.kernels import attend_dense

    have = attend_dense(q.cuda().half(), k, k, scale=0.1, mask=mask.cuda())
    small = k[:, :, -5:].float().cpu()
    close(tuple(x.cpu() for x in have), attend_dense_reference(q, small, small, Sight(), 0.1), 1e-2)
