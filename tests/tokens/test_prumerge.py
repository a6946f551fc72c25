"""PruMerge: outliers, their neighbourhoods, and one token for the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from visions import image, video

from mmkv.tokens import frames, prumerge
from mmkv.tokens.prumerge import PruMerge


def reference(x, a, plus, neighbours, weights, iqr=1.5):
    """One frame `[m, C]`, token by token: {kept index: vector}, {index: target}."""
    m, x, a = len(x), x.double(), [float(v) for v in a]
    low, high = np.percentile(a, 25), np.percentile(a, 75)
    kept = [i for i in range(m) if a[i] > high + iqr * (high - low)] or [int(np.argmax(a))]
    if plus:
        step = max(1, int(int(m / len(kept)) / 3))
        kept = sorted(set(kept) | set(range(0, m, step)))
    cos = lambda i, j: float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))  # noqa: E731
    out, taken = {}, {}
    for i in kept:
        near = sorted((j for j in range(m) if j != i), key=lambda j: -cos(i, j))[:neighbours]
        out[i] = x[i] * (a[i] if weights == "normalized" else 1)
        for j in near:
            out[i] = out[i] + a[j] * x[j]
            taken.setdefault(j, []).append(i)
        if weights == "normalized":
            out[i] = out[i] / (a[i] + sum(a[j] for j in near))
    dropped = [j for j in range(m) if j not in kept]
    if dropped:
        extra = max(dropped, key=lambda j: a[j])
        out[extra] = sum(a[j] * x[j] for j in dropped)
        if weights == "normalized":
            out[extra] = out[extra] / sum(a[j] for j in dropped)
    into = {i: i for i in out}
    for j in dropped:
        if j not in into:
            into[j] = max(taken[j], key=lambda i: cos(i, j)) if j in taken else extra
    return out, into


def attention(frames, size):
    """A heavy tail, so that frames have outliers, and not equally many."""
    a = torch.rand(frames, size) ** 8 + 0.01
    return a / a.sum(1, keepdim=True)


@pytest.mark.parametrize("weights", ["official", "normalized"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("neighbours", [0, 3, 32])
@pytest.mark.parametrize("tile", [1, 200, 1 << 24])
def test_frames_against_the_double_loop(monkeypatch, tile, neighbours, plus, weights):
    monkeypatch.setattr(frames, "TILE", tile)
    monkeypatch.setattr(prumerge, "TILE", tile)
    x, a = torch.randn(3, 6, 8, 7), attention(3, 48)
    method = PruMerge(plus=plus, neighbours=neighbours, weights=weights)
    choice = method.before_decoder(video(x, newline=True, prumerge=a))
    assert bool(choice.keep[-1]) and int(choice.into[-1]) == 144
    assert choice.features[-1].tolist() == [7.0] * 7
    counts = set()
    for f in range(3):
        out, into = reference(x[f].reshape(48, 7), a[f], plus, neighbours, weights)
        counts.add(len(out))
        assert choice.keep[f * 48 : f * 48 + 48].nonzero()[:, 0].tolist() == sorted(out)
        assert choice.into[f * 48 : f * 48 + 48].tolist() == [f * 48 + into[i] for i in range(48)]
        for i, want in out.items():
            torch.testing.assert_close(choice.features[f * 48 + i], want.float(), atol=1e-5, rtol=1e-5)
    assert len(counts) > 1, "frames of one count do not test the padding"


def test_by_hand():
    """Attention 0.02 but for two outliers; one neighbour each. 0 takes 1 in, 4 takes 5; 1 2 3 5 6 7 make the extra token."""
    a = torch.tensor([0.5, 0.02, 0.03, 0.02, 0.37, 0.02, 0.02, 0.02])
    x = torch.tensor([[10, 0], [9, 1], [1, -1], [-1, -1], [0, 10], [1, 9], [-1, 0], [0, -1.0]])
    choice = PruMerge(neighbours=1).before_decoder(image(x.view(2, 4, 2), prumerge=a))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 2, 4]  # 2 has the most attention of the dropped
    assert choice.into.tolist() == [0, 0, 2, 2, 4, 4, 2, 2]
    # sum over the dropped: 0.02 (9 - 1 + 1 - 1 + 0) + 0.03 = 0.19; 0.02 (1 - 1 + 9 + 0 - 1) - 0.03 = 0.13
    want = torch.tensor([[10.18, 0.02], [0.19, 0.13], [0.02, 10.18]])
    torch.testing.assert_close(choice.features[choice.keep], want)
    choice = PruMerge(neighbours=1, weights="normalized").before_decoder(image(x.view(2, 4, 2), prumerge=a))
    want = torch.tensor([[5.18 / 0.52, 0.02 / 0.52], [0.19 / 0.13, 1.0], [0.02 / 0.39, 3.88 / 0.39]])
    torch.testing.assert_close(choice.features[choice.keep], want)


def test_the_grid_of_plus():
    """Of 36 tokens two stand out: every floor(floor(36 / 2) / 3) = 6th stays besides, 0 6 12 18 24 30."""
    a = torch.linspace(0.0096, 0.0104, 36)
    a[7], a[12] = 0.3, 0.4
    choice = PruMerge(plus=True).before_decoder(image(torch.randn(6, 6, 4), prumerge=a))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 6, 7, 12, 18, 24, 30, 35]  # 35: the most attended of the dropped


def test_no_outlier_keeps_one_and_no_attention_sums_nothing():
    x = torch.randn(2, 4, 3)
    choice = PruMerge().before_decoder(image(x, prumerge=torch.full((8,), 0.125)))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 1]
    choice = PruMerge(weights="normalized", neighbours=2).before_decoder(image(x, prumerge=torch.zeros(8)))
    assert choice.keep.nonzero()[:, 0].tolist() == [0]
    assert torch.equal(choice.features[0], x[0, 0])
    assert (choice.into >= 0).sum() == 3  # itself, and two that it took in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, a = torch.randn(2, 6, 8, 64).to(dtype), attention(2, 48)
    choice = PruMerge(neighbours=5).before_decoder(video(x, prumerge=a))
    full = PruMerge(neighbours=5).before_decoder(video(x.float(), prumerge=a))
    assert choice.features.dtype == dtype
    assert torch.equal(choice.keep, full.keep) and torch.equal(choice.into, full.into)
    torch.testing.assert_close(choice.features[choice.keep].float(), full.features[full.keep], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_frames(size):
    choice = PruMerge(plus=True).before_decoder(image(torch.randn(1, size, 3), prumerge=torch.rand(size)))
    assert bool(choice.keep.any())


def test_keeping_everything_and_refusals():
    assert PruMerge(plus=True).keeping_everything().before_decoder(image(torch.randn(4, 4, 3))) is None
    for bad in (dict(iqr=-1), dict(iqr=math.inf), dict(iqr=math.nan), dict(iqr=True), dict(iqr="1.5")):
        with pytest.raises(ValueError, match="iqr="):
            PruMerge(**bad)
    for bad in (dict(neighbours=-1), dict(neighbours=True), dict(neighbours=2.0)):
        with pytest.raises(ValueError, match="neighbours="):
            PruMerge(**bad)
    with pytest.raises(ValueError, match="plus=1; possible are True, False"):
        PruMerge(plus=1)
    with pytest.raises(ValueError, match="weights='softmax'; possible are 'official', 'normalized'"):
        PruMerge(weights="softmax")
