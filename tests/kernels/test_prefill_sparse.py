"""Causal attention among chosen tokens, against a loop in fp64."""

import pytest
import torch

from mmkv.kernels import prefill_sparse

from .naive import rms


def naive(q, k, v, index, scale, softcap, sinks):
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[0]):
        h = head // (q.shape[0] // k.shape[0])
        for token in index.tolist():
            seen = index[index <= token]
            s = k[h, seen].double() @ q[head, token].double() * scale
            s = s if softcap is None else softcap * (s / softcap).tanh()
            extra = torch.zeros(0).double() if sinks is None else sinks[head].double().view(1)
            w = torch.cat([s, extra]).softmax(0)[: len(seen)]
            out[head, token] = w @ v[h, seen].double()
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "n", "t", "dv"), [((4, 2), 37, 61, 24), ((7, 1), 61, 61, 8), ((2, 2), 1, 5, 16)])
def test_against_a_loop(monkeypatch, heads, n, t, dv, softcap, sinks):
    import sys

    monkeypatch.setattr(sys.modules["mmkv.kernels.prefill_sparse"], "TILE_ROWS", 16)
    q, k, v = torch.randn(heads[0], t, 16), torch.randn(heads[1], t, 16), torch.randn(heads[1], t, dv)
    index = torch.randperm(t)[:n].sort().values
    logits = torch.randn(heads[0]) if sinks else None
    out = prefill_sparse(q, k, v, index, scale=0.3, softcap=softcap, sinks=logits)
    want = naive(q, k, v, index, 0.3, softcap, logits)
    assert out.dtype == q.dtype
    assert rms(out, want) < 1e-5
    others = torch.ones(t, dtype=torch.bool)
    others[index] = False
    assert (out[:, others] == 0).all()


def test_nobody_is_chosen():
    q = torch.randn(2, 9, 16)
    assert (prefill_sparse(q, q, q, torch.zeros(0, dtype=torch.int64), scale=1.0) == 0).all()


def test_what_does_not_fit():
    q = torch.randn(3, 9, 16)
    with pytest.raises(ValueError, match="query heads"):
        prefill_sparse(q, q[:2], q[:2], torch.arange(4), scale=1.0)
    with pytest.raises(ValueError, match="fit"):
        prefill_sparse(q, q[:1, :5], q[:1, :5], torch.arange(4), scale=1.0)
