"""Packed frames: errors within the bounds of a quantizer written out here, true bytes, each frame alone."""

from __future__ import annotations

import pytest
import torch
from streaming_stores import SHAPE, chunk, frame, opened

from mmkv.streaming.store import FORMATS, Chunk, Shape
from mmkv.streaming.store.records import record

BITS = dict(int8=8, int4=4, int2=2)


def minmax(x: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    """KIVI's quantizer on one frame and head `[n, D]`: one zero point and scale (fp16) for all numbers along a dimension."""
    low = x.amin(along, keepdim=True).half().float()
    scale = ((x.amax(along, keepdim=True) - low) / (2**bits - 1)).half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@pytest.mark.parametrize("packed", BITS)
def test_keys_are_packed_per_channel_of_a_frame_and_values_per_token(packed):
    chunks = [chunk(0, 3), chunk(3, 1)]
    with opened("ram", packed=packed) as store:
        for c in chunks:
            store.append(c)
        keys, values = store.fetch(1, [3, 1])
    for i, number in enumerate([3, 1]):
        k, v = frame(chunks, 1, number)
        cut = slice(12 * i, 12 * i + 12)
        for head in range(2):
            torch.testing.assert_close(keys[head, cut], minmax(k[head], BITS[packed], 0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[head, cut], minmax(v[head], BITS[packed], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 12, 196, 257, 600])
@pytest.mark.parametrize("packed", FORMATS)
def test_any_number_of_tokens_comes_back(packed, tokens):
    """Groups are cut evenly and do not straddle frames; errors stay within what the bits allow."""
    shape = dict(SHAPE, layers=1, dim=32, value_dim=32, tokens_per_frame=tokens)
    c = chunk(0, 3, shape=shape)
    with opened("ram", **shape, packed=packed) as store:
        store.append(c)
        keys, values = store.fetch(0, [0, 1, 2])
    assert keys.shape == c.keys[0].shape
    for got, want in ((keys, c.keys[0]), (values, c.values[0])):
        error = ((got - want).square().mean() / want.square().mean()).sqrt()
        assert error < dict(int8=0.02, int4=0.2, int2=0.75, vidkv=0.75)[packed]


@pytest.mark.parametrize("packed", [None, *FORMATS])
def test_a_frame_is_decoded_alone(packed):
    """Whatever the frames around it in a fetch are, and whatever its chunk's other rows hold."""
    with opened("ram", packed=packed) as store:
        store.append(chunk(0, 5))
        whole = store.fetch(2, range(5))
        for f in range(5):
            alone = store.fetch(2, [f])
            assert all(torch.equal(a, w[:, 12 * f : 12 * f + 12]) for a, w in zip(alone, whole))


@pytest.mark.parametrize("packed", BITS)
def test_a_frame_is_packed_as_if_it_came_alone(packed):
    c = chunk(0, 4)
    one = Chunk([k[:, 24:36] for k in c.keys], [v[:, 24:36] for v in c.values], c.index[:, 2:3], [0.0])
    with opened("ram", packed=packed) as store, opened("ram", packed=packed) as other:
        store.append(c), other.append(one)
        assert all(torch.equal(a, b) for a, b in zip(store.fetch(0, [2]), other.fetch(0, [0])))


def test_vidkv_brings_channels_back_to_their_places():
    """One channel is far wider than the others and so goes first when packed; behind the Fourier basis it must not move."""
    c = chunk(0, 2, shape=dict(SHAPE, tokens_per_frame=128))
    for k in c.keys:
        k[..., 11] *= 50
    with opened("ram", tokens_per_frame=128, packed="vidkv") as store:
        store.append(c)
        keys, values = store.fetch(0, [0, 1])
    size = keys.square().mean((0, 1)).sqrt()
    assert size.argmax() == 11 and size[11] > 20 * size[:11].max()
    for got, want in (
        (keys[..., 11], c.keys[0][..., 11]),
        (keys[..., :11], c.keys[0][..., :11]),
        (values, c.values[0]),
    ):
        together = torch.stack([got.flatten(), want.flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_fetched_has_the_models_dtype(dtype):
    with opened("ram", packed="int8", dtype=dtype) as store:
        store.append(chunk(0, 2, dtype))
        assert {t.dtype for t in store.fetch(0, [0])} == {dtype}


def test_true_bytes_at_the_shape_of_qwen2_7b():
    """4 heads of 128, 196 tokens: codes, then fp16 scale and zero point of 512 key channels and of 784 token heads."""

    def size(packed):
        return record(Shape(28, 4, 128, 128, 196, "bfloat16", packed)).size

    assert size(None) == 2 * 4 * 196 * 128 * 2
    for packed, bits in BITS.items():
        assert size(packed) == 2 * 4 * 196 * 128 * bits // 8 + 512 * 4 + 784 * 4
    hour = 1800 * 28
    assert hour * size(None) / 2**30 > 18.8 and hour * size("int2") / 2**30 < 2.7 and hour * size("vidkv") / 2**30 < 2.1


def test_bytes_in_ram_are_those_of_the_rows():
    with opened("ram", packed="int2") as store:
        store.append(chunk(0, 4))
        rows = 3 * 4 * record(Shape(3, 2, 16, 24, 12, "float32", "int2")).size
        assert store.bytes()["ram"] == rows + store.index.numel() * 4
