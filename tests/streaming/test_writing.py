"""The window: one softmax over the newest tokens and the prompt at the window's end, against a dense reference."""

from __future__ import annotations

import math

import pytest
import random_models as rm
import torch

from mmkv.models import adapter_for
from mmkv.streaming.positions import Positions
from mmkv.streaming.rotary import Rotary
from mmkv.streaming.writing import Writing


def angles(position: int, dim: int) -> torch.Tensor:
    return position / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """A vector at a position, by complex multiplication."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones(half, dtype=torch.float64), angles(position, x.shape[-1])
    )
    return torch.cat([z.real, z.imag], -1)


def reference(q, k, v, init: int, frame: int, window: int, scale: float) -> torch.Tensor:
    """Token by token; q `[Hq, T, D]`, k, v `[Hkv, T, D]`, the first `init` of which are the prompt."""
    heads, length, _ = q.shape
    groups = heads // k.shape[0]
    out = torch.zeros(heads, length, v.shape[-1], dtype=torch.float64)
    for h in range(heads):
        for i in range(length):
            end = init if i < init else init + ((i - init) // frame + 1) * frame  # of the block that i is in
            logits, values = [], []
            for j in range(max(0, i - window + 1), i + 1):
                logits.append(turned(q[h, i], i - j) @ k[h // groups, j].double())
                values.append(v[h // groups, j].double())
            if i >= init:
                for j in range(min(init, max(end - window, 0))):
                    logits.append(turned(q[h, i], window - 1) @ k[h // groups, j].double())
                    values.append(v[h // groups, j].double())
            weights = (torch.stack(logits) * scale).softmax(0)
            out[h, i] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("calls", [(3, 1, 2, 3), (1,) * 9, (9,)])
@pytest.mark.parametrize("window", [20, 13, 100])
def test_against_a_dense_reference(calls, window):
    """H=4, KV=2, frames of 4 tokens, a prompt of 3, in calls of several frames: whatever the calls, the same."""
    adapter = adapter_for(rm.make("llava_onevision"))
    writing = Writing(Rotary(adapter), 1, window)
    init, n, frames, dim = 3, 4, 9, 16
    generator = torch.Generator().manual_seed(0)
    length = init + n * frames
    q = torch.randn(4, length, dim, generator=generator)
    k, v = torch.randn(2, 2, length, dim, generator=generator)
    scale = 1 / math.sqrt(dim)
    got, at = [], 0
    for count in (init, *(n * c for c in calls)):
        some = slice(at, at + count)
        got.append(writing.attend(0, q[None, :, some], k[None, :, some], v[None, :, some], scale)[0])
        if not at:
            writing.positions = Positions(1, init, (2, 2))
        writing.seen += count
        at += count
    want = reference(q, k, v, init, n, window, scale)
    assert torch.allclose(torch.cat(got, 1).double(), want, atol=2e-6)
    keys, values = writing.held[0]
    assert torch.equal(keys[0], k[:, -window:]) and torch.equal(values[0], v[:, -window:])  # unrotated


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_rotation_is_the_models(family):
    adapter = adapter_for(rm.make(family))
    rotary = Rotary(adapter)
    x = torch.randn(1, 2, 5, 16)
    ids = torch.arange(5).expand(adapter.axes, -1)
    want = torch.stack([turned(x[0, :, i], i) for i in range(5)], 1)
    assert torch.allclose(rotary.rotate(x, ids)[0].double(), want, atol=1e-5)


def test_positions_of_three_axes():
    """Hand-written: a prompt of 2, frames of 2 x 3 tokens, 1.5 positions apart."""
    positions = Positions(3, 2, (2, 3), 1.5)
    assert positions.prompt().tolist() == [[0, 1]] * 3
    time, height, width = positions.frames(3).tolist()
    assert time == [2] * 6 + [3] * 6 + [5] * 6
    assert height == [2, 2, 2, 3, 3, 3] * 3
    assert width == [2, 3, 4] * 6
    assert positions.text(3, 2).tolist() == [[6, 7]] * 3
    assert positions.text(1, 2, before=4).tolist() == [[9, 10]] * 3
    assert positions.text(0, 1).tolist() == [[2]] * 3


def test_positions_stay_small():
    """After hours the ids that are rotated by are those of a window."""
    adapter = adapter_for(rm.make("qwen2_5_vl"))
    writing = Writing(Rotary(adapter), 1, 40)
    writing.positions = Positions(3, 5, (2, 2), 2.0)
    writing.seen = 5 + 4 * 100_000
    ids = writing._ids(40, 8)
    assert int(ids.max()) <= 5 + 2 * 13
    assert ids.shape == (3, 48)
