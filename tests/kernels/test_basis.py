import pytest
import torch

from mmkv.kernels import hadamard, real_fft


@pytest.mark.parametrize("n", [1, 2, 3, 48, 64, 80, 96, 127, 128, 256])
@pytest.mark.parametrize("make", [hadamard, real_fft])
def test_orthonormal_and_cached(make, n):
    m = make(n)
    assert m.dtype == torch.float32
    assert (m.double() @ m.double().T - torch.eye(n)).abs().max() < 1e-6
    assert make(n) is m


@pytest.mark.parametrize("n", [8, 9, 64, 80])
def test_real_fft_is_rfft(n):
    x = torch.randn(5, n, dtype=torch.float64)
    f = torch.fft.rfft(x)
    weight = torch.full((n // 2 + 1,), (2 / n) ** 0.5, dtype=torch.float64)
    weight[0] = n**-0.5
    if n % 2 == 0:
        weight[-1] = n**-0.5
    imag = (f.imag * weight)[:, 1 : (n + 1) // 2]
    assert torch.allclose(x @ real_fft(n).double().T, torch.cat([f.real * weight, imag], 1), atol=1e-5)


@pytest.mark.parametrize("n", [64, 80, 96])
def test_hadamard_spreads_an_outlier(n):
    m = hadamard(n)
    assert m.abs().max() <= (2.0 / n) ** 0.5 * 1.0001 if n & (n - 1) else (m.abs() == m.abs()[0, 0]).all()
    assert torch.equal(m, hadamard(n, 0))
    assert not torch.equal(m, hadamard(n, 1))
