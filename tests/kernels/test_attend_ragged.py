"""Attention over rows of different lengths, against a loop in fp64."""

import pytest
import torch

from mmkv.kernels import attend_ragged

from .naive import close, rms


def naive(q, k, v, offsets, scale, softcap, positions, q_positions, window):
    b, hq, tq, _ = q.shape
    heads = (len(offsets) - 1) // b
    out = torch.zeros(b, hq, tq, v.shape[-1], dtype=torch.float64)
    lse = torch.full((b, hq, tq), -torch.inf, dtype=torch.float64)
    for i in range(b):
        for h in range(hq):
            r = i * heads + h // (hq // heads)
            at = slice(offsets[r], offsets[r + 1])
            for t in range(tq):
                s = k[at].double() @ q[i, h, t].double() * scale
                s = s if softcap is None else softcap * (s / softcap).tanh()
                if window is not None:
                    s = s[positions[at] > q_positions[i, t] - window]
                    values = v[at][positions[at] > q_positions[i, t] - window]
                else:
                    values = v[at]
                if len(s):
                    out[i, h, t], lse[i, h, t] = s.softmax(0) @ values.double(), s.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("lengths", [[5, 0, 17, 33], [9, 9, 9, 9], [0, 0, 0, 0], [1, 40, 2, 0]], ids=str)
def test_against_a_loop(lengths, softcap, window):
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    k, v = torch.randn(offsets[-1], 16), torch.randn(offsets[-1], 24)
    q = torch.randn(2, 6, 3, 16)
    positions = torch.cat([torch.randperm(60)[:n].sort().values for n in lengths]).int()
    q_positions = torch.tensor([[60, 61, 62], [70, 71, 72]])
    out, lse = attend_ragged(
        q, k, v, offsets, scale=0.4, softcap=softcap, positions=positions, q_positions=q_positions, window=window
    )
    want, want_lse = naive(q, k, v, offsets, 0.4, softcap, positions, q_positions, window)
    assert out.dtype == lse.dtype == torch.float32
    assert out.isfinite().all()
    seen = want_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert (out[~seen] == 0).all()
    if seen.any():
        assert rms(out[seen], want[seen]) < 1e-5
        assert torch.allclose(lse[seen].double(), want_lse[seen], atol=1e-5)


def test_what_does_not_fit():
    q, k = torch.randn(1, 4, 1, 16), torch.randn(10, 16)
    with pytest.raises(ValueError, match="offsets end"):
        attend_ragged(q, k, k, [0, 4, 9], scale=1.0)
    with pytest.raises(ValueError, match="query heads"):
        attend_ragged(q, k, k, [0, 4, 9, 10], scale=1.0)
    with pytest.raises(ValueError, match="window needs"):
        attend_ragged(q, k, k, [0, 4, 10], scale=1.0, window=4)


@pytest.mark.parametrize("seen", [{}, {"window": 9}, {"causal": True, "window": 9}], ids=str)
@pytest.mark.parametrize("counts", [[6, 6, 6, 6], [0, 0, 0, 0], [6, 0, 2, 10]], ids=str)
@pytest.mark.parametrize("start", [[0, 10, 20, 30], [1, 7, 13, 19], [30, 20, 0, 10], [5, 5, 5, 5]], ids=str)
def test_rows_by_tensors(start, counts, seen):
    """Gaps, any order and shared rows, evenly spaced or not, against rows gathered one behind the other."""
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(40, 16), torch.randn(40, 24)
    at, first = torch.randint(0, 20, (40,)), torch.tensor([3, 0, 9, 5])
    rows = [torch.arange(s, s + n) for s, n in zip(start, counts)]
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    seen |= {"q_positions": torch.tensor([[4, 8, 30], [12, 16, 5]])} if seen else {}
    kw = {"counts": torch.tensor(counts), "longest": 10, "scale": 0.4, "softcap": 3.0, **seen}
    index = torch.cat(rows)
    for places in ({"positions": at}, {"k_start": first}):
        gathered = at[index] if "positions" in places else torch.cat([f + r - r[:1] for f, r in zip(first, rows)])
        want = attend_ragged(
            q, k[index], v[index], offsets, scale=0.4, softcap=3.0, positions=gathered if seen else None, **seen
        )
        close(attend_ragged(q, k, v, torch.tensor(start), **kw, **(places if seen else {})), want)
    out, lse = attend_ragged(q, k, v, torch.tensor(start), merged=False, **kw, **(places if seen else {}))
    assert out.shape == (1, 2, 4, 3, 24)
    assert lse.shape == (1, 2, 4, 3)
