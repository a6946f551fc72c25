"""The Triton twin against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from mmkv.kernels import Spec, gaussian, mean_only, minmax, pack_blocks, sign, symmetric, ternary, unpack_blocks
from mmkv.kernels.pack import pack_blocks_reference

from .conftest import interpreted
from .naive import CODES, rms

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = [
    n for n, c in CODES.items() if c.unit in ("range", "absmax") and c.zero != "mean" and not c.refine
]  # no sums: bit for bit


@pytest.fixture(autouse=True)
def _junk_in_fresh_memory(monkeypatch):
    interpreted()
    empty = torch.empty

    def filled(*args, **kw):
        t = empty(*args, **kw)
        return t.fill_(torch.nan if t.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", filled)


def both(x, count, spec, exact=False):
    from mmkv.kernels.pack_triton import pack_blocks_triton

    have = pack_blocks_triton(x.to(DEVICE), count.to(DEVICE), spec).to("cpu")
    want = pack_blocks_reference(x, count, spec)
    for a, b in zip(have.tensors(), want.tensors(), strict=True):
        if exact or not a.numel():
            assert torch.equal(a, b)
        else:  # sums in another order: a rare change by one in the last place of a scale, or of a code at a threshold
            assert (a != b).float().mean() <= 0.01
    valid = torch.arange(spec.group) < count[:, None]
    if valid.any():
        assert rms(unpack_blocks(have)[valid], unpack_blocks(want)[valid]) <= (0 if exact else 2e-3)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("name", CODES)
def test_every_code(name, axis):
    spec = Spec(axis, 37, ((20, CODES[name]),), 10 if axis == "token" else 0)
    x = torch.randn(3, 37, 20)
    x[1, 3, 4], x[1, 5, 6] = torch.nan, torch.inf
    x[:, :, 8] = 2.5
    both(x, torch.tensor([37, 20, 0]), spec, exact=name in EXACT)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("group", [32, 160])
def test_classes(group, scale_bits):
    classes = ((16, gaussian(2)), (5, minmax(4)), (0, sign()), (8, mean_only()), (3, ternary(scale="one")))
    x = torch.randn(2, group, 32) * torch.logspace(-2, 2, 32)
    both(x, torch.tensor([group, 17]), Spec("channel", group, classes, scale_bits=scale_bits))


@pytest.mark.parametrize("group", [16, 37, 128])
def test_scales_of_8_bits_are_shares_of_the_largest_of_all_classes(group):
    """Bit for bit where statistics are no sums: the largest scale may be in any class, and in any tile of groups."""
    classes = ((70, minmax(2)), (3, mean_only()), (9, symmetric(8)), (8, minmax(4)))
    for loud in (0, 69, 75, 89):
        x = torch.randn(3, group, 90)
        x[..., loud] *= 50
        x[..., 70:73] = 1.5  # a mean that is exact
        x[2] = 0.0
        both(x, torch.tensor([group, 5, group]), Spec("channel", group, classes, scale_bits=8), exact=True)
    both(x, torch.tensor([group, 5, 0]), Spec("token", group, ((90, minmax(2)),), 9, scale_bits=8), exact=True)


def test_one_launch(monkeypatch):
    from mmkv.kernels import pack_triton

    kernel, grids = pack_triton._pack, []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(pack_triton, "_pack", Counted())
    classes = ((40, minmax(2)), (8, minmax(4)))
    for scale_bits, grid in ((16, (2, 3)), (8, (2, 1))):
        x = torch.randn(2, 128, 48)
        both(x, torch.tensor([128, 9]), Spec("channel", 128, classes, scale_bits=scale_bits), exact=True)
        assert grids.pop() == grid
        assert not grids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_and_strides(dtype):
    x = torch.randn(2, 48, 32).to(dtype).transpose(1, 2)
    both(x, torch.tensor([32, 9]), Spec("channel", 32, ((48, minmax(2)),)), exact=True)
    x = torch.randn(32, 2, 96).to(dtype).transpose(0, 1)[..., ::2]
    both(x, torch.tensor([32, 9]), Spec("token", 32, ((48, minmax(4)),), 16), exact=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_does_not_wait_for_the_device(scale_bits):
    spec = Spec("channel", 128, ((48, minmax(2)), (16, mean_only())), scale_bits=scale_bits)
    x, count = torch.randn(2, 128, 64, device="cuda"), torch.tensor([128, 9], device="cuda")
    pack_blocks(x, count, spec)  # compiles, and makes the table of scales
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_blocks(x, count, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padding_and_huge_numbers():
    spec = Spec("token", 32, ((24, minmax(4)),), 24, scale_bits=8)
    x = torch.randn(2, 32, 24)
    x[:, 20:] = torch.nan
    x[0, 0, 0], x[1, 1, 1] = 1e38, -1e38
    both(x, torch.tensor([20, 3]), spec)
    both(x[:0], torch.tensor([], dtype=torch.int64), spec)


def test_cpu_tensors_take_the_reference():
    x = torch.randn(1, 32, 8)
    spec = Spec("channel", 32, ((8, gaussian(2)),))
    a, b = pack_blocks(x, torch.tensor([32]), spec), pack_blocks_reference(x, torch.tensor([32]), spec)
    assert torch.equal(a.codes, b.codes)
