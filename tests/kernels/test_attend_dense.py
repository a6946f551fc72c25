import sys

import pytest
import torch

from mmkv.kernels import attend_dense

from .naive import attention, close, rms


def naive(q, k, v, scale, mask=None, softcap=None):
    b, hq, tq, _ = q.shape
    hkv, t = k.shape[1:3]
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    mask = mask.expand(b, hq, tq, t)
    pairs = [
        [
            attention(q[i, h], k[i, h // (hq // hkv)], v[i, h // (hq // hkv)], scale, mask[i, h], softcap)
            for h in range(hq)
        ]
        for i in range(b)
    ]
    return tuple(torch.stack([torch.stack([p[n] for p in row]) for row in pairs]) for n in (0, 1))


@pytest.mark.parametrize(("hkv", "g"), [(1, 1), (2, 4), (1, 7)])
@pytest.mark.parametrize(("tq", "t"), [(1, 1), (1, 77), (5, 33), (50, 50), (3, 0), (0, 4)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shapes(hkv, g, tq, t, softcap):
    q, k, v = torch.randn(2, hkv * g, tq, 48), torch.randn(2, hkv, t, 48), torch.randn(2, hkv, t, 80)
    close(attend_dense(q, k, v, scale=0.2, softcap=softcap), naive(q, k, v, 0.2, softcap=softcap))


@pytest.mark.parametrize("shape", [(1, 1, 6, 40), (2, 1, 6, 40), (2, 4, 6, 40), (2, 1, 1, 40), (6, 40), (2, 4, 6, 1)])
@pytest.mark.parametrize("tiles", [None, (16, 7)])
def test_masks(monkeypatch, shape, tiles):
    if tiles:
        module = sys.modules["mmkv.kernels.attend_dense"]
        monkeypatch.setitem(module.TILE_SCORES, "cpu", tiles[0])
        monkeypatch.setattr(module, "TILE_KEYS", tiles[1])
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.rand(shape) < 0.3
    mask.view(-1, mask.shape[-1])[0] = False  # a row that sees nothing
    close(attend_dense(q, k, v, scale=0.3, mask=mask), naive(q, k, v, 0.3, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    q, k, v = (torch.randn(1, 2, 9, 32).to(dtype) for _ in range(3))
    close(attend_dense(q, k, v, scale=0.2), naive(q, k, v, 0.2))


def test_agrees_with_sdpa():
    q, k, v = torch.randn(1, 4, 20, 32), torch.randn(1, 4, 20, 32), torch.randn(1, 4, 20, 32)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    out, _ = attend_dense(q, k, v, scale=32**-0.5, mask=causal)
    assert rms(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)) < 1e-5


def test_what_does_not_fit_raises():
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="3 query heads"):
        attend_dense(q, k, k, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attend_dense(q[:, :2], k, k[:, :, 1:], scale=1.0)
    with pytest.raises(TypeError, match="must be bool"):
        attend_dense(q[:, :2], k, k, scale=1.0, mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="does not broadcast"):
        attend_dense(q[:, :2], k, k, scale=1.0, mask=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("tiles", [None, (16, 7)])
@pytest.mark.parametrize("seen", [{"causal": True}, {"window": 9}, {"causal": True, "window": 9}], ids=str)
def test_positions_are_a_mask(monkeypatch, seen, tiles):
    if tiles:
        module = sys.modules["mmkv.kernels.attend_dense"]
        monkeypatch.setitem(module.TILE_SCORES, "cpu", tiles[0])
        monkeypatch.setattr(module, "TILE_KEYS", tiles[1])
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    at, key = torch.tensor([[99, 100, 120, 139, 140, 150], [104] * 6]), torch.arange(100, 140)
    held = torch.rand(2, 1, 1, 40) < 0.7
    mask = held & ((key <= at[:, None, :, None]) | ("causal" not in seen))
    mask = mask & (key > at[:, None, :, None] - seen.get("window", 1000))
    want = naive(q, k, v, 0.3, mask)
    close(attend_dense(q, k, v, scale=0.3, mask=held, q_positions=at, k_start=100, **seen), want)
    grouped = held[:, :, None].expand(2, 2, 2, 1, 40)
    close(attend_dense(q, k, v, scale=0.3, mask=grouped, q_positions=at, k_start=100, **seen), want)


def test_weight_counts_a_key_as_often():
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16)
    often = [3, 1, 0, 2]
    weight = torch.tensor(often).float().view(1, 1, 4)
    want = naive(q, *(x.repeat_interleave(torch.tensor(often), 2) for x in (k, v)), 0.3, softcap=2.0)
    close(attend_dense(q, k, v, scale=0.3, weight=weight, softcap=2.0), want)


def test_positions_that_do_not_fit_raise():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="causal needs q_positions"):
        attend_dense(q, k, k, scale=1.0, causal=True)
    with pytest.raises(TypeError, match="int32 or int64"):
        attend_dense(q, k, k, scale=1.0, window=2, q_positions=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="does not broadcast"):
        attend_dense(q, k, k, scale=1.0, window=2, q_positions=torch.zeros(1, 4).int())
    with pytest.raises(ValueError, match="weight is"):
        attend_dense(q, k, k, scale=1.0, weight=torch.ones(1, 2, 4))
