"""EVS: the first frame whole, then what changed."""

from __future__ import annotations

import math

import pytest
import torch
from visions import image, video, vision

from mmkv.tokens import evs
from mmkv.tokens.evs import EVS


def turned(*degrees):
    """Unit vectors `[..., 2]` at these angles."""
    angle = torch.tensor(degrees, dtype=torch.float64) / 180 * math.pi
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def test_by_hand():
    """Two places over four frames. Changes 1 - cos: place 0 turns by 90 degrees once (1), place 1 by 60 (0.5)."""
    clip = turned([[0, 0]], [[90, 0]], [[90, 60]], [[90, 60]])
    kept = lambda **options: EVS(**options).before_decoder(video(clip)).keep.int().tolist()  # noqa: E731
    assert kept(ratio=0.5) == [1, 1, 1, 0, 0, 1, 0, 0]  # floor(0.5 x 8) = 4: the first frame and the two changes
    assert kept(ratio=0.6) == [1, 1, 1, 0, 0, 0, 0, 0]  # floor(3.2) = 3
    assert kept(ratio=0.9) == [1, 1, 0, 0, 0, 0, 0, 0]  # floor(0.8) = 0, but the first frame stays
    assert kept(ratio=0.3) == [1, 1, 1, 1, 0, 1, 0, 0]  # floor(5.6) = 5; of equal changes the earlier
    # changes of the later tokens, ranked: 0 0 0 0 0.5 1; quantiles 0.5 -> 0, 0.8 -> 0.5
    assert kept(ratio=0.5, budget="paper") == [1, 1, 1, 0, 0, 1, 0, 0]
    assert kept(ratio=0.8, budget="paper") == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.75, 0.9, 0.99])
def test_exact_count_against_a_loop(ratio):
    x = torch.randn(6, 3, 5, 8)
    choice = EVS(ratio).before_decoder(video(x, newline=True))
    change = {}
    for f in range(1, 6):
        for p in range(15):
            a, b = x[f].reshape(15, 8)[p].double(), x[f - 1].reshape(15, 8)[p].double()
            change[f * 15 + p] = 1 - float(a @ b / (a.norm() * b.norm()))
    tenths = round((1 - ratio) * 100)
    count = max(15, 90 * tenths // 100)
    best = sorted(change, key=lambda i: -change[i])[: count - 15]
    assert choice.keep.nonzero()[:, 0].tolist() == [*range(15), *sorted(best), 90]
    assert choice.into[choice.keep].tolist() == choice.keep.nonzero()[:, 0].tolist()
    assert (choice.into[~choice.keep] == -1).all()
    assert choice.features is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_static_video(dtype):
    x = torch.randn(1, 3, 3, 64).to(dtype).expand(5, -1, -1, -1)
    paper = EVS(0.5, budget="paper").before_decoder(video(x, newline=True))
    assert paper.keep.nonzero()[:, 0].tolist() == [*range(9), 45]
    official = EVS(0.5).before_decoder(video(x))
    assert official.keep.nonzero()[:, 0].tolist() == list(range(22))  # floor(22.5); ties go to the earlier token


def test_float_ratios_do_not_lose_a_token():
    """100 x (1 - 0.9) is 9.999999999999998 as a float; ten tokens stay."""
    choice = EVS(0.9).before_decoder(video(torch.randn(50, 1, 2, 4)))
    assert int(choice.keep.sum()) == 10


def test_frames_of_different_sizes():
    frame, row = [0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0]
    x = torch.cat([turned(0, 0), turned(0, 90), turned(0), turned(0)])
    choice = EVS(0.3).before_decoder(vision(x, frame, row, row))
    assert choice.keep.int().tolist() == [1, 1, 0, 0, 1, 0]  # floor(2.8) = 2 of 4, floor(1.4) = 1 of 2
    choice = EVS(0.2).before_decoder(vision(x, frame, row, row))
    assert choice.keep.int().tolist() == [1, 1, 0, 1, 1, 0]


def test_untouched():
    x = torch.randn(4, 2, 2, 8)
    assert EVS().before_decoder(image(x[0])) is None
    assert EVS().keeping_everything().before_decoder(video(x)) is None
    assert EVS(0.5).before_decoder(video(x[:1])) is None  # its first frame is all it has


def test_quantile_against_torch():
    x = torch.rand(7, 31)
    for share in (0.0, 0.3, 0.5, 0.99):
        torch.testing.assert_close(evs.quantile(x, share), x.flatten().quantile(share))


def test_refusals():
    for bad in (1.0, -0.1, True, "half", 1.5):
        with pytest.raises(ValueError, match="ratio="):
            EVS(bad)
    with pytest.raises(ValueError, match="budget='exact'; possible are 'official', 'paper'"):
        EVS(budget="exact")
