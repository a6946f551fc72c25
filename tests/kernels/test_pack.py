import pytest
import torch

from mmkv.kernels import (
    Code,
    Spec,
    gaussian,
    lloyd,
    mean_only,
    minmax,
    pack_blocks,
    sign,
    symmetric,
    ternary,
    unpack_blocks,
)
from mmkv.kernels.digits import decode_digits, deinterleave, interleave, pack_digits

from .naive import CODES, rms


def one(x, spec, count=None):
    """Packs one block of a [tokens, channels] list."""
    x = torch.as_tensor(x, dtype=torch.float32)[None]
    return pack_blocks(x, torch.tensor([x.shape[1] if count is None else count]), spec)


def token_or_channel(axis, code, group, channels, channel_group=None, scale_bits=16):
    cg = (channel_group or channels) if axis == "token" else 0
    return Spec(axis, group, ((channels, code),), cg, scale_bits)


def test_minmax_by_hand():
    b = one([[0.0], [1.0], [2.0], [3.0]], Spec("channel", 4, ((1, minmax(2)),)))
    assert b.codes.tolist() == [[0 + 1 * 4 + 2 * 16 + 3 * 64]]
    assert b.scale.tolist() == [[1.0]]
    assert b.zero.tolist() == [[0.0]]
    assert unpack_blocks(b).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert b.nbytes == 1 + 2 + 2


def test_trits_by_hand():
    """Five trits to a byte, planar: byte j of 2 holds numbers j, j + 2, ..., j + 8."""
    x = [3.0, -3.0, 0.0, 3.0, -3.0, 0.0, 0.0, 3.0, 3.0, -3.0]
    b = one([[v] for v in x], Spec("channel", 10, ((1, ternary()),)))
    # 2 1 0 1 2 and 0 2 1 2 0 in base 3 are 194 and 69 of 243; the next 256ths above are 205 (204.4) and 73 (72.7)
    assert b.codes.tolist() == [[205, 73]]
    assert b.scale.tolist() == [[3.0]]
    assert unpack_blocks(b).flatten().tolist() == x


def test_signs_and_two_classes_by_hand():
    spec = Spec("channel", 8, ((1, sign()), (1, mean_only()), (1, symmetric(8))))
    col = torch.tensor([1.0, -3, 1, -3, 1, -3, 1, -3])
    b = one(torch.stack([col, col, col * 127 / 3], 1), spec)
    assert b.codes[0, 0] == 0b01010101
    assert b.codes.shape == (1, 1 + 0 + 8)
    assert b.codes[0, 1:].tolist() == [42 + 128, 128 - 127] * 4  # round(127 / 3) = 42
    assert b.scale.tolist() == [[2.0, 1.0]]
    assert b.zero.tolist() == [[-1.0]]


def test_kivi_rounding():
    """Codes are round((x - min) / scale) to nearest even, clamped, with the stored scale and zero."""
    x = torch.randn(6, 32, 40).half()
    x[0, :, 0] = torch.arange(32) / 2  # ties
    for bits in (2, 4, 8):
        b = pack_blocks(x, torch.full((6,), 32), Spec("channel", 32, ((40, minmax(bits)),)))
        low, high = x.float().amin(1), x.float().amax(1)
        scale = ((high - low) / (2**bits - 1)).half()
        assert torch.equal(b.zero, low.half())
        assert torch.equal(b.scale, scale)
        s = scale.float()[:, None]
        want = ((x.float() - low[:, None]) / s).round().clamp(0, 2**bits - 1) * s + low[:, None]
        assert torch.equal(unpack_blocks(b), want)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_minmax_error_is_half_a_step(axis, bits):
    x = torch.randn(4, 37, 48) * 3
    b = pack_blocks(x, torch.full((4,), 37), token_or_channel(axis, minmax(bits), 37, 48, 16))
    s = b.scale.float()
    s = s[:, None] if axis == "channel" else s.view(4, 37, 3).repeat_interleave(16, 2)
    eps = 2e-3 * s + 2e-3 * 3  # of fp16 rounding: of the scale at up to L - 1 steps, of the zero point
    assert ((unpack_blocks(b) - x).abs() <= s / 2 + (eps if bits == 8 else eps / 2)).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [32, 37, 128, 160])
@pytest.mark.parametrize("name", CODES)
def test_bytes_are_those_of_the_spec(name, group, axis):
    spec = token_or_channel(axis, CODES[name], group, 48, 24)
    b = pack_blocks(torch.randn(3, group, 48), torch.tensor([group, 0, 5]), spec)
    want = 3 * (spec.code_bytes + 2 * spec.n_scale + 2 * spec.n_zero)
    assert b.nbytes == want == round(spec.bits * 3 * group * 48 / 8)
    assert unpack_blocks(b).shape == (3, group, 48)


@pytest.mark.parametrize("name", CODES)
def test_codes_decode_to_the_nearest_level(name):
    """Where bounds are midpoints, no other level would have been closer; and levels are those of the code."""
    code = CODES[name]
    x = torch.randn(2, 64, 8).half().float()
    b = pack_blocks(x, torch.full((2,), 64), Spec("channel", 64, ((8, code),)))
    y = unpack_blocks(b)
    s = b.scale.float()[:, None] if code.has_scale else torch.ones(2, 1, 8)
    z = b.zero.float()[:, None] if code.has_zero else torch.zeros(2, 1, 8)
    choices = torch.tensor(code.levels).view(-1, 1, 1, 1) * s + z
    error = (choices - x).abs()
    assert torch.isclose(y, choices, rtol=1e-6, atol=1e-6).any(0).all()
    midpoints = all(abs(v - (p + q) / 2) < 1e-6 for v, p, q in zip(code.bounds, code.levels, code.levels[1:]))
    if midpoints and code.scale == "unit":
        assert ((y - x).abs() <= error.amin(0) * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_padding_enters_nothing(name, axis):
    spec = token_or_channel(axis, CODES[name], 32, 20, 20)
    x = torch.randn(5, 32, 20)
    count = torch.tensor([0, 1, 7, 31, 32])
    pad = torch.arange(32) >= count[:, None]
    clean = pack_blocks(x.masked_fill(pad[..., None], 0.0), count, spec)
    for junk in (1e30, torch.nan, -torch.inf):
        dirty = pack_blocks(x.masked_fill(pad[..., None], junk), count, spec)
        for a, b in zip(clean.tensors(), dirty.tensors(), strict=True):
            assert torch.equal(a, b)
    for a in clean.tensors():
        assert not a[0].any(), "an empty block is all zeros"
    alone = pack_blocks(x[2:3], count[2:3], spec)
    for a, b in zip(clean.tensors(), alone.tensors(), strict=True):
        assert torch.equal(a[2:3], b)


@pytest.mark.parametrize("name", [n for n, c in CODES.items() if c.zero != "none"])
def test_constant_groups_are_exact(name):
    x = torch.full((2, 32, 6), 3.25)
    x[1] = -1000.0
    b = pack_blocks(x, torch.tensor([32, 9]), Spec("channel", 32, ((6, CODES[name]),)))
    if CODES[name].has_scale:
        assert not b.scale.any()
        assert torch.equal(unpack_blocks(b)[0], x[0])
        assert torch.equal(unpack_blocks(b)[1, :9], x[1, :9])
    zeros = pack_blocks(torch.zeros(1, 32, 6), torch.tensor([32]), b.spec)
    assert not any(t.any() for t in zeros.tensors()[1:])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_nonfinite_numbers_stay_in_their_group(name, axis):
    code = CODES[name]
    spec = token_or_channel(axis, code, 32, 8)
    x = torch.randn(1, 32, 8)
    bad = x.clone()
    bad[0, 3, 2] = torch.nan
    bad[0, 5, 6] = torch.inf
    a, b = (unpack_blocks(pack_blocks(v, torch.tensor([32]), spec))[0] for v in (x, bad))
    assert b.isfinite().all()
    same = torch.ones(32, 8, dtype=torch.bool)
    if axis == "channel":
        same[:, [2, 6]] = False
    else:
        same[[3, 5]] = False
    assert torch.equal(a[same], b[same])
    if code.zero == "mean" and code.per_byte and axis == "channel":  # NaN entered no statistic
        rest = torch.cat([x[0, :3, 2], x[0, 4:, 2]]).mean()
        assert float(pack_blocks(bad, torch.tensor([32]), spec).zero[0, 2]) == pytest.approx(float(rest), abs=1e-3)


def test_infinity_stands_for_the_largest_magnitude():
    spec = Spec("channel", 4, ((1, minmax(2)),))
    assert unpack_blocks(one([[1.0], [3.0], [torch.inf], [-torch.inf]], spec)).flatten().tolist() == [1, 3, 3, -3]
    nothing = one([[torch.nan]] * 4, spec)
    assert unpack_blocks(nothing).flatten().tolist() == [0.0] * 4


def test_huge_numbers_saturate():
    x = torch.tensor([[1e38], [-1e38], [0.0], [5.0]])
    for code in CODES.values():
        assert unpack_blocks(one(x, Spec("channel", 4, ((1, code),)))).isfinite().all()


@pytest.mark.parametrize("name", CODES)
def test_permuting_tokens_permutes_outputs(name):
    spec = Spec("channel", 64, ((8, CODES[name]),))
    x = torch.randn(2, 64, 8)
    p = torch.randperm(64)
    a = unpack_blocks(pack_blocks(x, torch.full((2,), 64), spec))
    b = unpack_blocks(pack_blocks(x[:, p], torch.full((2,), 64), spec))
    assert rms(b, a[:, p]) < 1e-3  # sums in another order may move an fp16 rounding


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("name", [n for n, c in CODES.items() if c.has_scale])
def test_scales_of_8_bits(name, axis):
    x = torch.randn(3, 64, 32) * torch.logspace(-1, 1, 32)
    count = torch.tensor([64, 64, 20])
    wide = pack_blocks(x, count, token_or_channel(axis, CODES[name], 64, 32, 16))
    narrow = pack_blocks(x, count, token_or_channel(axis, CODES[name], 64, 32, 16, scale_bits=8))
    assert narrow.scale.dtype == torch.uint8
    a, b = wide.decode_scale(), narrow.decode_scale()
    assert ((a - b).abs() <= 0.0222 * a).all()
    assert narrow.nbytes == narrow.codes.numel() + narrow.scale.numel() + 2 * 3 + 2 * narrow.spec.n_zero * 3
    m = torch.arange(64) < count[:, None]
    assert rms(unpack_blocks(narrow)[m], x[m]) <= rms(unpack_blocks(wide)[m], x[m]) + 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_in(dtype):
    spec = Spec("channel", 32, ((8, gaussian(2)),))
    x = torch.randn(2, 32, 8).to(dtype)
    a, b = (pack_blocks(v, torch.tensor([32, 3]), spec) for v in (x, x.float()))
    for s, t in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(s, t)


def test_what_does_not_fit_raises():
    spec = Spec("channel", 32, ((8, gaussian(2)),))
    with pytest.raises(TypeError, match="float16, bfloat16, float32"):
        pack_blocks(torch.zeros(1, 32, 8, dtype=torch.int32), torch.tensor([3]), spec)
    with pytest.raises(ValueError, match=r"\[N, 32, 8\]"):
        pack_blocks(torch.zeros(1, 32, 9), torch.tensor([3]), spec)
    with pytest.raises(TypeError, match="int32"):
        pack_blocks(torch.zeros(1, 32, 8), torch.tensor([3.0]), spec)


def test_no_blocks_and_empty_classes():
    spec = Spec("channel", 32, ((0, gaussian(2)), (8, gaussian(1)), (0, minmax(4))))
    assert len(pack_blocks(torch.zeros(0, 32, 8), torch.zeros(0, dtype=torch.int64), spec)) == 0
    assert unpack_blocks(pack_blocks(torch.randn(2, 32, 8), torch.tensor([32, 4]), spec)).shape == (2, 32, 8)


def test_tiles_do_not_show(monkeypatch):
    import sys

    spec = Spec("channel", 16, ((5, gaussian(2)), (3, minmax(4))), scale_bits=8)
    x, count = torch.randn(7, 16, 8), torch.randint(0, 17, (7,))
    whole = pack_blocks(x, count, spec)
    monkeypatch.setattr(sys.modules["mmkv.kernels.pack"], "TILE_NUMBERS", 2 * 16 * 8)
    for a, b in zip(whole.tensors(), pack_blocks(x, count, spec).tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 5, 31, 37, 64, 160])
@pytest.mark.parametrize("name", [n for n, c in CODES.items() if c.per_byte])
def test_digits_there_and_back(name, n):
    code = CODES[name]
    codes = torch.randint(0, len(code.levels), (3, n)).to(torch.uint8)
    packed = pack_digits(codes, code)
    assert packed.shape == (3, code.nbytes(n))
    want = torch.tensor(code.levels)[codes.long()]
    levels = decode_digits(packed, code)
    assert torch.equal(deinterleave(levels, code, n), want)
    x = torch.randn(3, n)
    assert rms((interleave(x, code) * levels).sum(-1), (x * want).sum(-1)) < 1e-5


def test_lloyd_by_hand():
    """A crowd and one outlier: one bit becomes two-means, 24 zeros with noise none and 8 tens."""
    x = torch.tensor([0.0] * 24 + [10.0] * 7 + [12.0])[None, :, None]
    spec = Spec("channel", 32, ((1, lloyd(1)),))
    blocks = pack_blocks(x, torch.tensor([32]), spec)
    assert blocks.zero.item() == 0.0
    assert blocks.scale.item() == pytest.approx(82 / 8, abs=0.01)  # the mean of the eight
    assert unpack_blocks(blocks)[0, :24].abs().max() == 0


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "crowd"])
def test_lloyd_is_never_worse_than_minmax(bits, kind):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(8, 128, 16, generator=generator)
    if kind == "crowd":  # a video's keys: mostly background, some tokens far away
        x = torch.where(torch.rand(8, 128, 16, generator=generator) < 0.1, 5 + x, 0.2 * x)
    error = {}
    for name, code in (("lloyd", lloyd(bits)), ("minmax", minmax(bits)), ("gaussian", gaussian(bits))):
        blocks = pack_blocks(x, torch.full((8,), 128), Spec("channel", 128, ((16, code),)))
        error[name] = rms(unpack_blocks(blocks), x)
    assert error["lloyd"] < error["minmax"]
    assert error["lloyd"] < error["gaussian"] * (0.6 if kind == "crowd" else 1.02)


def test_refine_needs_its_start():
    with pytest.raises(ValueError, match="refine needs"):
        Code("x", (0.0, 1.0), (0.5,), zero="mean", unit="std", refine=2)
