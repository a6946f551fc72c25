"""The Triton twin of `prefill_sparse` against the reference: on a GPU where there is one, else in Triton's interpreter."""

import math

import pytest
import torch

from mmkv.kernels import prefill_sparse
from mmkv.kernels.prefill_sparse import has_flash, prefill_sparse_gathered

from .naive import rms

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def twin(q, k, v, index, scale=0.2, softcap=None, sinks=None):
    from mmkv.kernels.prefill_sparse_triton import prefill_sparse_triton

    q, k, v, index, sinks = (t if t is None else t.to(DEVICE) for t in (q, k, v, index, sinks))
    return prefill_sparse_triton(q, k, v, index, scale=scale, softcap=softcap, sinks=sinks).cpu()


def agree(q, k, v, index, tol=1e-5, **options):
    have = twin(q, k, v, index, **options)
    want = prefill_sparse(q.float(), k.float(), v.float(), index, scale=0.2, **options)
    assert have.dtype == q.dtype
    assert have.shape == want.shape
    assert have.isfinite().all()
    assert rms(have, want) < tol
    others = torch.ones(q.shape[1], dtype=torch.bool)
    others[index] = False
    assert not have[:, others].any()


def tensors(hq, hkv, t, d, dv=None, dtype=torch.float32):
    return tuple(torch.randn(h, t, c).to(dtype) for h, c in ((hq, d), (hkv, d), (hkv, dv or d)))


def some(t, n):
    return torch.randperm(t)[:n].sort().values


def test_by_hand():
    """Token 1 is not chosen. Token 2 sees token 0 with score 0 and itself with log 3."""
    q, k, v = torch.ones(1, 3, 16), torch.zeros(1, 3, 16), torch.tensor([[[4.0], [100.0], [8.0]]])
    k[0, 1], k[0, 2] = 7.0, math.log(3) / 16
    out = twin(q, k, v, torch.tensor([0, 2]), scale=1.0)
    assert torch.allclose(out, torch.tensor([[[4.0], [0.0], [7.0]]]))
    out = twin(q, k, v, torch.tensor([0, 2]), scale=1.0, sinks=torch.tensor([math.log(4)]))
    assert torch.allclose(out, torch.tensor([[[0.8], [0.0], [3.5]]]))


@pytest.mark.parametrize(("d", "heads"), [(64, (2, 2)), (80, (7, 1)), (96, (4, 1)), (128, (4, 2)), (256, (1, 1))])
@pytest.mark.parametrize(("n", "t"), [(1, 9), (3, 3), (17, 40), (65, 90)])
def test_sizes(d, heads, n, t):
    agree(*tensors(*heads, t, d), some(t, n))


@pytest.mark.parametrize("n", [129, 150, 257])
def test_more_rows_than_a_tile(n):
    agree(*tensors(2, 1, 300, 16), some(300, n))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap, sinks):
    logits = torch.tensor([0.5, -torch.inf, 30.0, -2.0]) if sinks else None
    agree(*tensors(4, 2, 80, 32, dv=24), some(80, 70), softcap=softcap, sinks=logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    agree(*tensors(4, 1, 100, 64, dtype=dtype), some(100, 80).int(), tol=1e-2)


def test_strides():
    q, k, v = torch.randn(70, 4, 40), torch.randn(70, 2, 40), torch.randn(2, 16, 70)
    agree(
        q.transpose(0, 1)[..., :32], k.transpose(0, 1)[..., ::2][..., :32].repeat(1, 1, 2)[..., :32], v.mT, some(70, 30)
    )
    agree(*tensors(2, 1, 80, 16), torch.arange(0, 80, 4)[::2])


def test_what_is_not_chosen_is_not_read():
    q, k, v = tensors(2, 1, 50, 16)
    index = some(50, 20)
    others = torch.ones(50, dtype=torch.bool)
    others[index] = False
    k[:, others] = v[:, others] = q[:, others] = torch.nan
    assert twin(q, k, v, index).isfinite().all()


def test_nobody_is_chosen():
    q, k, v = tensors(2, 1, 50, 16)
    assert not twin(q, k, v, torch.zeros(0, dtype=torch.int64)).any()


def test_bad_input():
    q, k, v = tensors(2, 1, 8, 16)
    with pytest.raises(TypeError, match="index is float32"):
        prefill_sparse(q, k, v, torch.ones(3), scale=1.0)
    with pytest.raises(ValueError, match="sinks are"):
        prefill_sparse(q, k, v, torch.arange(3), scale=1.0, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="softcap is"):
        prefill_sparse(q, k, v, torch.arange(3), scale=1.0, softcap=0.0)
    with pytest.raises(ValueError, match="520 channels"):
        twin(*tensors(1, 1, 4, 520), torch.arange(3))


def test_which_tensors_flash_attention_takes():
    q, k, v = tensors(2, 1, 8, 16, dtype=torch.bfloat16)
    assert has_flash(q, k, v)
    assert not has_flash(q, k, v[..., :8])
    assert not has_flash(q, k.float(), v)
    assert not has_flash(q.float(), k.float(), v.float())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("gather", [False, True, None])
def test_both_ways_on_a_gpu(gather):
    q, k, v = (t.cuda() for t in tensors(8, 2, 5000, 128, dtype=torch.bfloat16))
    index = some(5000, 3000).cuda()
    have = prefill_sparse(q, k, v, index, scale=0.1, gather=gather)
    want = prefill_sparse_gathered(q.float(), k.float(), v.float(), index, scale=0.1, softcap=None, sinks=None)
    assert rms(have, want) < 1e-2
