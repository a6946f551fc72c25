"""The Triton twin against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels import rotate
from mmkv.kernels.rotate import rotate_reference

from .naive import rms
from .pretend import as_if_on_a_gpu

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def both(x, cos, sin, interleaved=False, inverse=False, inplace=False):
    from mmkv.kernels.rotate_triton import rotate_triton

    options = dict(interleaved=interleaved, inverse=inverse, inplace=inplace)
    want = rotate_reference(x, cos, sin, **{**options, "inplace": False})
    x = x.clone(memory_format=torch.preserve_format).to(DEVICE)
    have = rotate_triton(x, cos.to(DEVICE), sin.to(DEVICE), **options)
    assert have.dtype == x.dtype
    assert (have is x) == inplace
    assert have.isfinite().all()
    assert rms(have.cpu(), want) <= (1e-6 if x.dtype == torch.float32 else 1e-2)  # the interpreter cuts bf16 off
    stay = slice(2 * cos.shape[-1], None)
    assert torch.equal(have.cpu()[..., stay], want[..., stay])


def some_tables(*shape):
    angle = torch.randn(shape) * 9
    return angle.cos() * 1.2, angle.sin() * 1.2


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "pairs"),
    [((1, 64), 32), ((3, 17, 80), 40), ((2, 3, 65, 96), 20), ((1, 2, 129, 17), 8), ((1, 7, 1, 256), 128)],
)
def test_shapes(shape, pairs, interleaved, inverse, inplace):
    both(torch.randn(shape), *some_tables(shape[-2], pairs), interleaved, inverse, inplace)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype, interleaved):
    x, (cos, sin) = torch.randn(2, 3, 9, 40).to(dtype), some_tables(9, 16)
    both(x, cos, sin, interleaved)
    both(x, cos.to(dtype), sin.to(dtype), interleaved, inverse=True, inplace=True)


def test_strides_and_tables_by_sequence_and_head():
    x = torch.randn(2, 11, 4, 24).transpose(1, 2)
    cos, sin = some_tables(2, 4, 11, 12)
    for inplace in (False, True):
        both(x, cos, sin, inplace=inplace)
        both(x, cos[:, :1], sin[:, :1], interleaved=True, inplace=inplace)
        both(x, cos[0], sin[0], inplace=inplace)
        both(x, cos[0, 0, :1].T.contiguous().T, sin[0, 0, :1], inplace=inplace)
    both(x.transpose(2, 3), *some_tables(24, 5), interleaved=True)


def test_programs_of_several_heads(monkeypatch):
    from mmkv.kernels import rotate_triton

    assert rotate_triton.heads_per_program(2700 // 32, 28, 132) == 2
    assert rotate_triton.heads_per_program(1, 28, 132) == 1
    assert rotate_triton.heads_per_program(10**6, 4, 132) == 4
    for heads in (2, 3, 8):
        monkeypatch.setattr(rotate_triton, "heads_per_program", lambda *_, n=heads: n)
        both(torch.randn(2, 7, 5, 8), *some_tables(2, 1, 5, 3))


def test_nothing():
    from mmkv.kernels.rotate_triton import rotate_triton

    options = dict(interleaved=False, inverse=False, inplace=False)
    none = torch.zeros(0, 4, device=DEVICE)
    assert rotate_triton(torch.randn(2, 0, 8, device=DEVICE), none, none, **options).shape == (2, 0, 8)
    x, none = torch.randn(3, 8, device=DEVICE), torch.zeros(3, 0, device=DEVICE)
    assert torch.equal(rotate_triton(x, none, none, **options), x)


def test_the_way_of_a_gpu(monkeypatch):
    x, cos, sin = (t.to(DEVICE) for t in (torch.randn(2, 5, 8), *some_tables(5, 4)))
    want = rotate_reference(x, cos, sin, interleaved=False, inverse=True, inplace=False)
    seen = as_if_on_a_gpu(monkeypatch, "rotate_triton", "rotate_triton")
    assert rms(rotate(x, cos, sin, inverse=True), want) <= 1e-6
    assert len(seen) == 1
    x.requires_grad_()
    rotate(x, cos, sin).sum().backward()  # torch's operations, since Triton's leave no gradient
    assert x.grad is not None
    assert len(seen) == 1
