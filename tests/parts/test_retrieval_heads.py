"""Echo and induction scores against a plain softmax, and the heads that follow from them."""

from __future__ import annotations

import pytest
import torch

from mmkv.parts.retrieval_heads import echo_and_induction, repeated_tokens, retrieval_heads


def test_tokens_repeat():
    tokens = repeated_tokens(1000, period=7, times=3, seed=5)
    assert tokens.shape == (21,)
    assert torch.equal(tokens[:7], tokens[7:14]) and torch.equal(tokens[:7], tokens[14:])
    assert torch.equal(tokens, repeated_tokens(1000, 7, 3, 5))
    assert not torch.equal(tokens, repeated_tokens(1000, 7, 3, 6))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_against_a_plain_softmax(softcap):
    period, n = 6, 20
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, n, 8, generator=generator), torch.randn(2, n, 8, generator=generator)
    rows = torch.tensor([7, 12, 13, 19])
    echo, induction = echo_and_induction(query[:, rows], key, rows, period, scale=0.7, softcap=softcap)
    for head in range(4):
        want = [0.0, 0.0]
        for t in rows.tolist():
            scores = key[head // 2, : t + 1].double() @ query[head, t].double() * 0.7
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            p = scores.softmax(0)
            for back in range(period, t + 1, period):
                want[0] += float(p[t - back]) / len(rows)
                want[1] += float(p[t - back + 1]) / len(rows)
        assert echo[head] == pytest.approx(want[0], abs=1e-6)
        assert induction[head] == pytest.approx(want[1], abs=1e-6)


def test_the_best_heads_of_the_model_by_hand():
    """2 layers of 8 query and 4 KV heads: 1 % of 16 is one echo head, 14 % are three induction heads, rounded up."""
    echo = {3: torch.arange(8) / 100, 5: torch.tensor([0, 0, 0, 0, 0, 0.9, 0, 0])}
    induction = {3: torch.tensor([0.8, 0.7, 0, 0, 0, 0, 0, 0]), 5: torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.6])}
    # layer 5, query head 5 -> KV head 2; layer 3, query heads 0 and 1 -> KV head 0; layer 5, query head 7 -> KV head 3
    assert retrieval_heads(echo, induction, 4) == ((3, 0), (5, 2), (5, 3))
    assert retrieval_heads(echo, induction, 8) == ((3, 0), (3, 1), (5, 5), (5, 7))
    assert retrieval_heads(echo, induction, 4, echo_share=2 / 16, induction_share=0.0) == ((3, 3), (5, 2))
