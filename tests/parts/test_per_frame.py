"""The best tokens of each frame, by hand and against a loop."""

from __future__ import annotations

import math

import torch

from mmkv.parts.per_frame import best_share


def test_by_hand():
    score = torch.tensor([0.1, 0.9, 0.9, 0.3, 0.5, 0.2, 0.6])
    frame = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    present = torch.tensor([True, True, False, True, True, True, True])
    # ceil(.4 * 3) = 2 of each frame
    assert best_share(score, frame, present, 0.4).tolist() == [False, True, False, True, True, False, True]
    # equal ones: the earlier
    assert best_share(torch.ones(7), frame, present, 0.3).tolist() == [True, False, False, False, True, False, False]
    assert not best_share(score, frame, present, 0.0).any()
    assert torch.equal(best_share(score, frame, present, 1.0), present)
    assert not best_share(score, frame, torch.zeros(7, dtype=torch.bool), 1.0).any()
    assert best_share(score[:0], frame[:0], present[:0], 0.5).shape == (0,)


def test_against_a_loop():
    torch.manual_seed(4)
    score, frame, present = torch.randn(200), torch.randint(-1, 6, (200,)), torch.rand(200) > 0.3
    for share in (0.08, 0.5, 0.93):
        expected = set()
        for one in range(-1, 6):
            mine = [i for i in range(200) if int(frame[i]) == one and present[i]]
            expected |= set(sorted(mine, key=lambda i: -float(score[i]))[: math.ceil(share * len(mine))])
        assert set(best_share(score, frame, present, share).nonzero()[:, 0].tolist()) == expected
