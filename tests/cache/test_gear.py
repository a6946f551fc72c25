"""GEAR: outliers, low rank and bytes against a naive recipe; attention a tile at a time."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, codes, decoded, held, same_codes

import mmkv
from mmkv.cache import GEAR, KIVI, gear_segment
from mmkv.cache.gear_segment import GearBlocks, gear_blocks, low_rank
from mmkv.kernels import Spec, code, unpack_blocks

PLAIN = dict(group=32, residual=32)


def blocks_of(x, axis="channel", ends=1, rank=0, rounds=3, bits=2, count=None):
    n, group, channels = x.shape
    spec = Spec(axis, group, ((channels, code("minmax", bits)),), channels if axis == "token" else 0)
    count = torch.full((n,), group) if count is None else torch.tensor(count)
    return gear_blocks(x, count, spec, ends, rank, rounds)


# --- outliers


def test_outliers_by_hand():
    """One channel of ten tokens, the largest and the smallest kept, the others at 2 bits between 0 and 3."""
    x = torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 100, -50, 0])[None, :, None]
    blocks = blocks_of(x)
    assert blocks.place.tolist() == [[[8, 7]]]
    assert blocks.outlier.tolist() == [[[-50.0, 100.0]]]
    assert blocks.place.dtype == torch.uint8
    # without them: minimum 0, step 1; in their places the others' mean 1.5, which rounds to even
    assert unpack_blocks(blocks.backbone)[0, :, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 2, 2, 0]
    assert blocks.decode()[0, :, 0].tolist() == x[0, :, 0].tolist()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("ends", [0, 1, 3])
def test_outliers_against_a_sort(axis, ends):
    x = torch.randn(3, 24, 16)
    blocks = blocks_of(x, axis, ends)
    assert blocks.place.shape == (3, 16 if axis == "channel" else 24, 2 * ends)
    for n in range(3):
        vectors = x[n].T if axis == "channel" else x[n]
        whole = decoded(blocks, n, axis)
        whole = whole.T if axis == "channel" else whole
        for v, (vector, got) in enumerate(zip(vectors.tolist(), whole.tolist())):
            order = sorted(range(len(vector)), key=vector.__getitem__)
            out = order[:ends] + order[len(order) - ends :]
            assert sorted(blocks.place[n, v].tolist()) == sorted(out)
            rest = [vector[i] for i in order if i not in out]
            step = (max(rest) - min(rest)) / 3
            for i, y in enumerate(got):
                assert abs(y - vector[i]) <= (2e-3 if i in out else step / 2 + 5e-3)


def test_what_lies_past_the_end_of_a_short_block_changes_nothing():
    x = torch.randn(4, 16, 8)
    for axis in ("channel", "token"):
        want = None
        for poison in (0.0, 1e4, torch.inf, torch.nan):
            y, counts = x.clone(), [16, 9, 2, 1]
            for block, count in zip(y, counts):
                block[count:] = poison
            got = blocks_of(y, axis, ends=2, rank=2, count=counts).decode()
            kept = [part[:count] for part, count in zip(got, counts)]
            want = kept if want is None else want
            assert all(torch.equal(a, b) for a, b in zip(kept, want))
            assert all(a.isfinite().all() for a in kept)


@pytest.mark.parametrize(("length", "kind"), [(256, torch.uint8), (257, torch.int16), (1000, torch.int16)])
def test_places_in_long_vectors(length, kind):
    x = torch.randn(1, length, 3)
    x[0, length - 1, 1] = 40
    blocks = blocks_of(x, ends=2)
    assert blocks.place.dtype == kind
    assert length - 1 in blocks.place[0, 1].tolist()
    assert blocks.decode()[0, length - 1, 1] == 40


# --- low rank


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_of_that_rank_is_found(rank):
    made = torch.randn(5, 48, rank) @ torch.randn(5, rank, 32)
    left, right = low_rank(made, rank, rounds=3)
    assert left.dtype == right.dtype == torch.float16
    assert left.shape == (5, 48, rank)
    assert right.shape == (5, 32, rank)
    assert (left.float() @ right.float().mT - made).norm() < 2e-3 * made.norm()


def test_power_iteration_comes_close_to_the_best():
    """The best approximation is the truncated SVD; three rounds lose little, more rounds less."""
    error = torch.rand(6, 64, 32) - 0.5
    u, s, v = torch.linalg.svd(error.double())
    best = (u[:, :, 4:32] * s[:, None, 4:] @ v[:, 4:32]).norm()

    def lost(rounds):
        left, right = low_rank(error, 4, rounds)
        return (error - left.float() @ right.float().mT).norm()

    assert best < lost(20) < 1.003 * best
    assert lost(20) < lost(3) < lost(1)
    assert lost(3) < 1.03 * best  # measured 1.024, of noise with no direction to find


def test_nothing_to_approximate():
    left, right = low_rank(torch.zeros(2, 8, 8), 4, 3)
    assert not left.any()
    assert not right.any()
    one = torch.outer(torch.randn(8), torch.randn(8))[None]  # fewer independent columns than the rank
    left, right = low_rank(one, 4, 3)
    assert torch.allclose(left.float() @ right.float().mT, one, atol=5e-3)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_the_whole_is_codes_and_outliers_and_low_rank(axis):
    """Against the recipe written out: quantize what is left without outliers, approximate the error by an SVD."""
    x = torch.randn(1, 32, 16)
    x[0, 5, 3], x[0, 20, 9] = 30.0, -30.0
    v = (x[0].T if axis == "channel" else x[0]).double()
    order = v.argsort(-1)
    out = torch.zeros_like(v, dtype=torch.bool).scatter(-1, order[:, [0, 1, -2, -1]], True)
    mean = torch.stack([row[~gone].mean() for row, gone in zip(v, out)])[:, None]
    rest = torch.where(out, mean, v)
    low = rest.amin(-1, keepdim=True).half().double()
    step = ((rest.amax(-1, keepdim=True) - low) / 3).half().double()
    got = ((rest - low) / step).round().clamp(0, 3) * step + low
    error = torch.where(out, 0.0, v - got)
    u, s, w = torch.linalg.svd(error)
    wanted = torch.where(out, v, got) + u[:, :4] * s[:4] @ w[:4]
    whole = blocks_of(x, axis, ends=2, rank=4, rounds=30).decode()[0].double()
    whole = whole.T if axis == "channel" else whole
    assert (whole - wanted).norm() < 0.02 * wanted.norm()
    assert (whole - v).norm() < 0.8 * (torch.where(out, v, got) - v).norm()


# --- in a cache


def test_without_corrections_it_is_kivi():
    a, b = Bare(GEAR(outliers=0, rank=0, **PLAIN), dim=32), Bare(KIVI(bits=2, **PLAIN), dim=32)
    a.feed(200)
    b.feed(200)
    ours, kivi = a.layer.packed[0], b.layer.packed[0]
    for pool, other in ((ours.keys, kivi.keys), (ours.values, kivi.values)):
        assert all(torch.equal(x, y) for x, y in zip(pool.backbone.tensors(), other.tensors()))
        assert sum(t.nbytes for t in pool.tensors()) == sum(t.nbytes for t in other.tensors())
    q = torch.randn(1, 4, 3, 32)
    for x, y in zip(ours.attend(q, scale=0.2), kivi.attend(q, scale=0.2)):
        assert torch.allclose(x, y, atol=1e-5)


def test_at_full_rank_it_is_exact():
    bare = Bare(GEAR(rank=16, rounds=4, **PLAIN)).feed(160)
    _, keys, values, packed = held(bare.layer, 0)
    assert int(packed.sum()) == 128
    assert (keys - bare.keys[0][0].double()).abs().max() < 5e-3
    assert (values - bare.values[0][0].double()).abs().max() < 5e-3


def test_each_correction_helps():
    """Keys and values with a few wild numbers, and a common direction in what quantizing loses."""
    wild = lambda: torch.randn(1, 2, 288, 64) * torch.where(torch.rand(1, 2, 288, 64) < 0.01, 20.0, 1.0)  # noqa: E731
    keys, values = wild(), wild()

    def error(method):
        bare = Bare(method, dim=64).feed(288, keys=keys, values=values)
        _, k, v, _ = held(bare.layer, 0)
        return float((k - keys[0].double()).norm()), float((v - values[0].double()).norm())

    both, out, low, none = (
        error(GEAR(outliers=o, rank=r, group=128, residual=32)) for o, r in ((0.04, 4), (0.04, 0), (0, 4), (0, 0))
    )
    for side in range(2):
        assert both[side] < out[side] < none[side]
        assert both[side] < low[side] < none[side]
        assert both[side] < 0.5 * none[side]


@pytest.mark.parametrize("dim", [32, 128])
def test_bytes_are_those_of_the_parts(dim):
    """Codes, scales, minima; fp16 outliers with a byte each for their place; fp16 factors; tables. All of it is counted."""
    method = GEAR(group=128, outliers=0.04, rank=4)
    bare = Bare(method, dim=dim, dtype=torch.bfloat16).feed(128 * 6 + 32)
    (segment,) = bare.layer.packed
    blocks = 2 * 6
    key_ends, value_ends = round(0.02 * 128), round(0.02 * dim)
    keys = 128 * dim // 4 + dim * 4 + dim * 2 * key_ends * 3 + 4 * (128 + dim) * 2
    values = 128 * dim // 4 + 128 * 4 + 128 * 2 * value_ends * 3 + 4 * (128 + dim) * 2
    assert sum(t.nbytes for t in segment.keys.tensors()) == blocks * keys
    assert sum(t.nbytes for t in segment.values.tensors()) == blocks * values
    assert sum(t.nbytes for t in segment.tensors()) == blocks * (keys + values + 12)
    assert method.formats()[0].bits(dim) == pytest.approx((8 * keys / (128 * dim), 8 * values / (128 * dim)))


def test_the_bits_that_the_docstring_says():
    keys, values = GEAR().formats()[0].bits(128)
    assert keys == values == 2.25 + 2 * 24 / 128 + 4 * 256 * 16 / 128**2 == 3.625


def test_attention_decodes_a_bounded_tile(monkeypatch):
    """Ragged rows in tiles of one slot, some slots or all: the same output; never more than a tile is decoded."""
    bare = Bare(GEAR(outliers=0.07, rank=2, **PLAIN), batch=3)
    valid = torch.ones(3, 500, dtype=torch.bool)
    valid[1, :300] = False
    valid[2, :431] = False
    bare.feed(500, valid)
    (segment,) = bare.layer.packed
    assert segment.tokens == [448, 160, 32]
    sizes = []
    original = GearBlocks.decode
    monkeypatch.setattr(GearBlocks, "decode", lambda self: (sizes.append(len(self)), original(self))[1])
    q = torch.randn(3, 4, 2, 16)
    found = {}
    for tile in (1, 6 * 32 * 3, 1 << 20):
        monkeypatch.setitem(gear_segment.TILE_TOKENS, "cpu", tile)
        sizes.clear()
        found[tile] = segment.attend(q, scale=0.25, softcap=20.0)
        assert max(sizes) * 32 <= max(tile, 6 * 32)
    assert len(sizes) == 2
    for out, lse in found.values():
        assert torch.allclose(out, found[1][0], atol=1e-5)
        assert torch.allclose(lse, found[1][1], atol=1e-5)


def test_packing_takes_a_bounded_number_of_blocks(monkeypatch):
    x = torch.randn(1, 2, 352, 16)
    whole = Bare(GEAR(outliers=0.07, rank=2, **PLAIN)).feed(352, keys=x, values=x)
    monkeypatch.setattr(gear_segment, "TILE_NUMBERS", 3 * 32 * 16)
    tiled = Bare(GEAR(outliers=0.07, rank=2, **PLAIN)).feed(352, keys=x, values=x)
    assert same_codes(codes(whole.layer), codes(tiled.layer))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen2", "llava_onevision"])
def test_attention_is_exact_in_other_families(family):
    """Sliding windows, sinks and softcaps among them."""
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model, 160), rm.second_prompt(model, 160) + rm.words(80, 9)])
    with mmkv.wrapped(model, cache=[GEAR(outliers=0.07, rank=2, **PLAIN)]), checked_attention() as errors:
        rm.generate(model, given, new=5)
        rm.generate(model, given, "beam", new=5)
    assert errors


def test_a_sliding_window_hides_single_tokens():
    bare = Bare(GEAR(outliers=0.07, rank=2, **PLAIN), heads=1, window=90).feed(150)
    (segment,) = bare.layer.packed
    at, keys, values, packed = held(bare.layer, 0)
    keys, values, at = keys[0, packed], values[0, packed], at[packed]
    q = torch.randn(1, 2, 1, 16)
    out, lse = segment.attend(q, scale=0.25, q_positions=torch.tensor([[150]]), window=90)
    scores = (0.25 * q[0, :, 0].double() @ keys.T).masked_fill(at <= 60, -torch.inf)
    assert torch.allclose(out[0, :, 0].double(), scores.softmax(-1) @ values, atol=1e-5)
    assert torch.allclose(lse[0, :, 0].double(), scores.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(bits=3), dict(bits="2"), dict(outliers=-0.1), dict(outliers=0.6), dict(outliers=None), dict(rank=-1), dict(rank=2.0),
        dict(rank=65), dict(rank=True), dict(rounds=0), dict(rounds=1.5), dict(group=4), dict(residual=31),
        dict(channel_group=-2), dict(sinks=-1),
    ],
)  # fmt: skip
def test_impossible_settings(wrong):
    with pytest.raises(ValueError) as caught:
        GEAR(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [3, "2", True, 2.5, None])
def test_impossible_bits_are_named(bits):
    with pytest.raises(ValueError, match=f"^bits {bits!r}: possible are 1, 2, 4, 8$"):
        GEAR(bits=bits)


def test_a_rank_above_the_head_size_is_refused():
    with pytest.raises(ValueError, match="rank 17: blocks of 128 tokens and 16 channels have at most 16"):
        mmkv.wrap(rm.make("qwen2"), cache=[GEAR(rank=17)])
