import sys

import pytest
import torch

from mmkv.kernels import probe

from .naive import rms


def naive(q, k, scale, mask, softcap=None):
    b, hq, p, _ = q.shape
    k = k.repeat_interleave(hq // k.shape[1], 1)
    s = (q.double() @ k.double().mT) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    mask = mask.expand(b, hq, p, k.shape[2])
    w = s.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return w.sum(2), w.amax(2), mask.sum(2)


@pytest.mark.parametrize("shape", [None, (1, 1, 6, 40), (2, 1, 6, 40), (2, 4, 6, 40), (2, 1, 1, 40), (6, 1), (6, 40)])
@pytest.mark.parametrize("tiles", [None, (700, 9)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masks(monkeypatch, shape, tiles, softcap):
    if tiles:
        monkeypatch.setattr(sys.modules["mmkv.kernels.probe"], "TILE_SCORES", tiles[0])
        monkeypatch.setattr(sys.modules["mmkv.kernels.probe"], "TILE_KEYS", tiles[1])
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 40, 16)
    mask = None
    if shape:
        mask = torch.rand(shape) < 0.5
        mask.view(-1, mask.shape[-1])[0] = False
    mass = probe(q, k, scale=0.3, mask=mask, softcap=softcap)
    total, top, count = naive(q, k, 0.3, torch.ones(1, 1, 1, 1).bool() if mask is None else mask, softcap)
    assert mass.sum.dtype == mass.max.dtype == torch.float32
    assert rms(mass.sum, total) < 1e-5
    assert rms(mass.max, top) < 1e-5
    assert mass.count.shape[2] == 40
    assert torch.equal(mass.count.expand(2, 4, 40).long(), count)


def test_mass_of_a_row_is_one():
    q, k = torch.randn(1, 7, 5, 32), torch.randn(1, 1, 64, 32)
    mass = probe(q.bfloat16(), k.bfloat16(), scale=0.2)
    assert torch.allclose(mass.sum.sum(-1), torch.full((1, 7), 5.0))
    assert (mass.max <= 1).all()


def test_nothing():
    assert probe(torch.randn(1, 2, 3, 8), torch.randn(1, 1, 0, 8), scale=1.0).sum.shape == (1, 2, 0)
    assert not probe(torch.randn(1, 2, 0, 8), torch.randn(1, 1, 5, 8), scale=1.0).sum.any()
