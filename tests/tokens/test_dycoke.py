"""DyCoke's temporal merging, in groups of four frames."""

from __future__ import annotations

import pytest
import torch
from visions import image, video

from mmkv.tokens import frames
from mmkv.tokens.dycoke import DyCoke


def reference(x, ratio):
    """keep `[F][m]` and the chain of each dropped token, one token at a time."""
    total, m = x.shape[:2]
    keep, into = [[True] * m for _ in range(total)], {}
    stay = int(round((1 - ratio) * 1000) * m // 1000)
    for f in range(total):
        before = {0: None, 1: f - 1, 2: f - 2, 3: f - 1}[f % 4]
        if before is None:
            continue
        a, b = x[f].double(), x[before].double()
        cos = [float(a[p] @ b[p] / (a[p].norm() * b[p].norm())) for p in range(m)]
        gone = sorted(range(m), key=lambda p: cos[p])[stay:]
        for p in gone:
            keep[f][p] = False
            into[f, p] = (before, p)
    return keep, into


def end_of(into, place):
    while place in into:
        place = into[place]
    return place


@pytest.mark.parametrize("total", [1, 2, 3, 4, 6, 8, 11])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
def test_against_a_loop(monkeypatch, total, ratio):
    monkeypatch.setattr(frames, "TILE", 10 * 6 * 4)  # one group at a time
    x = torch.randn(total, 10, 6)
    keep, into = reference(x, ratio)
    given = video(x.view(total, 2, 5, 6), newline=True)
    choice = DyCoke(ratio).before_decoder(given)
    if total == 1:
        assert choice is None
        return
    assert choice.keep.tolist() == [k for row in keep for k in row] + [True]
    assert choice.into[choice.keep].tolist() == choice.keep.nonzero()[:, 0].tolist()
    assert (choice.into[~choice.keep] == -1).all()
    assert choice.features is None

    choice = DyCoke(ratio, redundant="mean").before_decoder(given)
    assert choice.keep.tolist() == [k for row in keep for k in row] + [True]
    groups: dict = {}
    for f in range(total):
        for p in range(10):
            end = end_of(into, (f, p))
            groups.setdefault(end, []).append(x[f, p].double())
            assert int(choice.into[f * 10 + p]) == end[0] * 10 + end[1]
    for (f, p), members in groups.items():
        want = torch.stack(members).mean(0).float()
        torch.testing.assert_close(choice.features[f * 10 + p], want, atol=1e-6, rtol=1e-5)
    assert torch.equal(choice.features[-1], given.features[-1])


def test_official_count_of_a_group():
    """(1 + 3 x 0.3) / 4: of 196 tokens a frame, 196 + 3 x 58 of 784 stay."""
    choice = DyCoke().before_decoder(video(torch.randn(4, 14, 14, 8)))
    assert choice.keep.view(4, 196).sum(1).tolist() == [196, 58, 58, 58]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_duplicate_frames_merge_into_themselves(dtype):
    """Of five equal frames of four tokens, half of each compared one goes, the later of equals; a mean of equals is equal."""
    x = torch.randn(1, 2, 2, 16).to(dtype).expand(5, -1, -1, -1)
    choice = DyCoke(0.5, redundant="mean").before_decoder(video(x))
    alike = choice.keep.view(5, 4)
    assert alike.sum(1).tolist() == [4, 2, 2, 2, 4]
    kept = choice.features[choice.keep].float()
    torch.testing.assert_close(kept, video(x).features[choice.keep].float(), atol=1e-2, rtol=1e-2)
    assert choice.features.dtype == dtype


def test_a_chain_by_hand():
    """One token a frame, values 1 2 4 8 along one axis, all redundant: everything ends in the first frame's mean, 3.75."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1, 1).expand(-1, -1, -1, 2)
    choice = DyCoke(0.5, redundant="mean").before_decoder(video(x))
    assert choice.keep.tolist() == [True, False, False, False]
    assert choice.into.tolist() == [0, 0, 0, 0]
    assert choice.features[0].tolist() == [3.75, 3.75]


def test_untouched_and_refusals():
    x = torch.randn(4, 2, 2, 8)
    assert DyCoke().before_decoder(image(x[0])) is None
    assert DyCoke(redundant="mean").keeping_everything().before_decoder(video(x)) is None
    for bad in (1.0, -0.1, True, "half"):
        with pytest.raises(ValueError, match="ratio="):
            DyCoke(bad)
    with pytest.raises(ValueError, match="redundant='sum'; possible are 'drop', 'mean'"):
        DyCoke(redundant="sum")
