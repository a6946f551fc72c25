"""The kernel that multiplies codes as bit patterns against the reference: on a GPU where there is one, else interpreted."""

import pytest
import torch

from mmkv.kernels import Spec, gaussian, lloyd, mean_only, minmax, sign, symmetric, ternary
from mmkv.kernels.attend_packed import attend_packed_reference

from .naive import case, close

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOL = 1e-3  # queries and weights are rounded to fp16, twice, which has 11 bits
VALUES = {
    "1": sign(), "2": minmax(2), "4": lloyd(4), "8": minmax(8), "trits": gaussian(1.58, zero="none", scale="fit"),
    "trits-mean": ternary(zero=True), "trits-unscaled": ternary(0.5, scale="one"), "symmetric": symmetric(4),
}  # fmt: skip


def both(c, splits=None, scale=0.1, softcap=None, causal=False, window=None, tol=TOL):
    from mmkv.kernels import attend_packed_triton as triton_twin
    from mmkv.kernels.attend_planes_triton import fits

    assert fits(c.keys.spec, c.values.spec)
    at = c.q_positions if causal or window is not None else None
    kw = {"scale": scale, "softcap": softcap, "causal": causal, "window": window}
    want = attend_packed_reference(c.q, c.keys, c.values, c.table, q_positions=at, **kw)
    here = [x.to(DEVICE) for x in (c.q, c.keys, c.values, c.table)]
    at = None if at is None else at.to(DEVICE)
    out, lse = triton_twin.attend_packed_triton(*here, q_positions=at, splits=splits, **kw)
    close((out.cpu(), lse.cpu()), want, tol)


def keys(group=64, d=48, *codes, scale_bits=16) -> Spec:
    """By channel: classes of 16 channels, the last one takes the rest."""
    widths = [16] * (len(codes) - 1) + [d - 16 * (len(codes) - 1)]
    return Spec("channel", group, tuple(zip(widths, codes)), scale_bits=scale_bits)


def values(group=64, dv=48, code="2", scale_bits=16) -> Spec:
    """By token."""
    return Spec("token", group, ((dv, VALUES[code]),), dv, scale_bits=scale_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_width_of_keys(bits, dtype):
    both(case(keys(64, 48, lloyd(bits)), values(), b=1, hkv=2, g=3, dtype=dtype))


def test_eight_bits():
    both(case(keys(32, 32, minmax(8)), values(32, 64, "8"), b=1, hkv=1, g=2, dtype=torch.float16))


@pytest.mark.parametrize("code", VALUES)
@pytest.mark.parametrize("dv", [32, 96])
def test_every_code_of_values(code, dv):
    both(case(keys(64, 32, minmax(2)), values(64, dv, code), b=1, hkv=1, g=2, dtype=torch.float16))


@pytest.mark.parametrize("dv", [16, 40, 80, 128, 144])
def test_odd_numbers_of_ternary_channels(dv):
    """Bytes of a token's trits: 4, 8, 16, 26, 29."""
    both(case(keys(32, 32, minmax(2)), values(32, dv, "trits"), b=1, hkv=1, g=2, slots=2, dtype=torch.float16))


@pytest.mark.parametrize(
    "codes",
    [
        (lloyd(4), lloyd(2), lloyd(1), mean_only()),
        (lloyd(2), sign(zero=True)),
        (symmetric(4), mean_only(), minmax(8)),
        (mean_only(), symmetric(8), minmax(1)),
    ],
)
@pytest.mark.parametrize("group", [32, 128])
def test_classes_of_different_widths_share_an_order_of_tokens(codes, group):
    spec = keys(group, 80, *codes)
    both(case(spec, values(group, 48, "trits"), b=1, hkv=1, g=2, slots=2, dtype=torch.float16))


def test_scales_of_8_bits():
    both(case(keys(64, 48, lloyd(2), lloyd(1), scale_bits=8), values(64, 48, "trits", 8), dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("g", "tq", "mask"),
    [
        (7, 1, {"window": 90}),
        (1, 3, {"causal": True, "window": 70, "softcap": 3.0}),
        (4, 3, {"causal": True}),
        (2, 50, {"causal": True, "softcap": 1.0}),
        (16, 1, {}),
    ],
)
def test_masks_and_heads(g, tq, mask):
    both(case(keys(64, 48, lloyd(2)), values(code="trits"), b=2, hkv=1, g=g, tq=tq, dtype=torch.float16), 2, **mask)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_do_not_show(splits):
    c = case(keys(32, 48, lloyd(2)), values(32), b=1, hkv=2, g=2, slots=5, dtype=torch.float16)
    c.table.count[0] = 0
    both(c, splits=splits)


def test_positions_of_each_token_and_shared_blocks():
    c = case(keys(32, 48, lloyd(2)), values(32), b=2, hkv=1, g=2, tq=2, shared=True, dtype=torch.float16)
    at = torch.randperm(len(c.keys) * 32).view(-1, 32).int() % 96
    c.table = type(c.table)(c.table.block, c.table.count, c.table.start, at)
    both(c, causal=True, window=50)


def test_queries_beyond_half_precision():
    """Queries of 1e6 and of 1e-6 are brought to at most 1 before they are rounded."""
    for size in (1e6, 1e-6):
        c = case(keys(32, 48, lloyd(2)), values(32), b=1, hkv=1, g=2, dtype=torch.bfloat16)
        c.q = c.q * size
        both(c, scale=0.1 / size)


def test_query_of_odd_strides_and_zero():
    c = case(keys(32, 48, lloyd(2)), values(32), b=2, hkv=1, g=2, tq=3)
    c.q = torch.randn(3, 48, 2, 2).permute(2, 3, 0, 1).half()
    c.q[0, 0] = 0
    both(c)


def test_nothing_to_see():
    c = case(keys(32, 48, lloyd(2)), values(32), b=1, hkv=1, slots=1, dtype=torch.float16)
    c.table.count[:] = 0
    both(c)
    c.q = c.q[:, :, :0]
    both(c)


def test_codes_that_do_not_lie_at_a_word_are_moved():
    c = case(keys(32, 48, lloyd(2)), values(32), b=1, hkv=1, dtype=torch.float16)
    shifted = torch.zeros(c.keys.codes.numel() + 1, dtype=torch.uint8)[1:].view_as(c.keys.codes)
    shifted.copy_(c.keys.codes)
    object.__setattr__(c.keys, "codes", shifted)
    both(c)


def test_what_does_not_fit_goes_to_the_general_kernel():
    from mmkv.kernels.attend_planes_triton import fits

    good = keys(64, 48, lloyd(2))
    assert fits(good, values())
    assert not fits(keys(64, 48, gaussian(2)), values()), "levels that are not evenly spaced"
    assert not fits(keys(80, 48, lloyd(2)), values(80)), "a group that is no power of two"
    assert not fits(keys(64, 48, ternary()), values()), "ternary keys"
    assert not fits(good, Spec("token", 64, ((48, minmax(2)),), 24)), "two scales a token"
    assert not fits(good, Spec("channel", 64, ((48, minmax(2)),))), "values by channel"
    assert not fits(keys(16, 48, lloyd(1)), values(16)), "half words of bytes"


def test_queries_of_a_16_bit_model_in_another_basis_are_not_exact():
    """They come in fp32 and take the fast kernel when told so; by themselves they are exact."""
    c = case(keys(32, 48, lloyd(2)), values(32), b=1, hkv=1)
    from mmkv.kernels.attend_packed_triton import attend_packed_triton

    kw = {"scale": 0.1, "softcap": None, "q_positions": None, "causal": False, "window": None}
    want = attend_packed_reference(c.q, c.keys, c.values, c.table, **kw)
    here = [x.to(DEVICE) for x in (c.q, c.keys, c.values, c.table)]
    close([x.cpu() for x in attend_packed_triton(*here, **kw)], want, 1e-5)
    close([x.cpu() for x in attend_packed_triton(*here, exact=False, **kw)], want, TOL)
    with pytest.raises(AssertionError):  # it did take another way
        close([x.cpu() for x in attend_packed_triton(*here, exact=False, **kw)], want, 1e-6)
