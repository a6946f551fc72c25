"""VidCom2: budgets of frames, and the most unusual tokens of each."""

from __future__ import annotations

import math

import pytest
import torch
from visions import image, video

from mmkv.tokens import frames
from mmkv.tokens.vidcom2 import VidCom2, apportion, steady_channels

WIDTHS = (0.125, 0.25, 0.5, 1, 2)


def reference(x, keep, temperature, channels):
    """Real-valued budgets and scores of frames `[F, m, C]`, in fp64 and token by token."""
    total, m, c = x.shape
    flat = x.double().reshape(-1, c)
    spread = [float(((flat[:, i] - flat[:, i].mean()) ** 2).mean()) for i in range(c)]
    chosen = sorted(range(c), key=lambda i: spread[i])[: max(1, int(channels * c))]
    unit = [[x[f, p, chosen].double() / x[f, p, chosen].double().norm() for p in range(m)] for f in range(total)]
    video_center = sum(sum(row) for row in unit) / (total * m)
    like = lambda v, center: sum(math.exp(-float((v - center) @ (v - center)) / (2 * w)) for w in WIDTHS)  # noqa: E731
    to_video = [[like(v, video_center) for v in row] for row in unit]
    to_frame = [[like(v, sum(row) / m) for v in row] for row in unit]
    unlike = [-sum(row) / m for row in to_video]
    top = max(unlike)
    powers = [math.exp((u - top) / temperature) for u in unlike]
    share = [p / sum(powers) for p in powers]
    budgets = [keep * m * (1 + s - 1 / total) for s in share]
    return budgets, [[a + b for a, b in zip(*rows)] for rows in zip(to_video, to_frame)]


@pytest.mark.parametrize("tile", [1, 1 << 24])
@pytest.mark.parametrize(
    "options", [{}, dict(keep=0.1), dict(keep=0.5, channels=1.0), dict(keep=0.33, temperature=1.0)], ids=str
)
def test_against_a_loop(monkeypatch, tile, options):
    monkeypatch.setattr(frames, "TILE", tile)
    x = torch.randn(5, 30, 12) + 2 * torch.randn(1, 1, 12)
    settings = dict(keep=0.25, temperature=0.01, channels=0.5) | options
    budgets, scores = reference(x, **settings)
    choice = VidCom2(**options).before_decoder(video(x.view(5, 5, 6, 12), newline=True))
    kept = choice.keep[:-1].view(5, 30)
    assert bool(choice.keep[-1])
    assert int(kept.sum()) == round(settings["keep"] * 150)
    for f in range(5):
        count = int(kept[f].sum())
        assert abs(count - budgets[f]) < 1, (count, budgets)
        assert kept[f].nonzero()[:, 0].tolist() == sorted(sorted(range(30), key=lambda p: scores[f][p])[:count])
    assert choice.into[choice.keep].tolist() == choice.keep.nonzero()[:, 0].tolist()
    assert (choice.into[~choice.keep] == -1).all() and choice.features is None


def test_the_unique_frame_gets_more():
    """Frames 0 1 3 4 show the same, frame 2 its opposite: at temperature 0.01 the softmax is all its own."""
    x = (torch.randn(1, 1, 1, 16) + 0.1 * torch.randn(5, 4, 5, 16)).clone()
    x[2] = -x[2]
    choice = VidCom2(keep=0.25).before_decoder(video(x))
    # 0.25 x 20 x (1 + 1 - 0.2) = 9 for frame 2, 0.25 x 20 x 0.8 = 4 for the others
    assert choice.keep.view(5, 20).sum(1).tolist() == [4, 4, 9, 4, 4]
    equal = VidCom2(keep=0.25, temperature=1e6).before_decoder(video(x))
    assert equal.keep.view(5, 20).sum(1).tolist() == [5] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_frames_and_tokens_go_to_the_earlier(dtype):
    x = torch.randn(8).to(dtype).expand(3, 2, 5, 8)
    choice = VidCom2(keep=0.25).before_decoder(video(x))  # 7.5 rounds to 8 = 3 + 3 + 2
    kept = choice.keep.view(3, 10)
    assert kept.sum(1).tolist() == [3, 3, 2]
    assert kept.int().tolist() == [[1] * n + [0] * (10 - n) for n in (3, 3, 2)]


def test_apportion():
    share = lambda *wanted: torch.tensor(wanted, dtype=torch.float64)  # noqa: E731
    assert apportion(share(2.5, 3.7, 1.8), 8, 9).tolist() == [2, 4, 2]
    assert apportion(share(3.5, 3.5, 3.0), 10, 9).tolist() == [4, 3, 3]
    assert apportion(share(12.0, 4.0, 4.0), 20, 10).tolist() == [10, 5, 5]  # what the full frame cannot take
    assert apportion(share(0.2, 0.2, 3.6), 4, 9).tolist() == [1, 1, 2]  # at least one each
    assert apportion(share(5.0, 5.0), 10, 5).tolist() == [5, 5]
    for _ in range(50):
        wanted = torch.rand(7, dtype=torch.float64) ** 4 * 30
        total = max(7, min(7 * 16, round(float(wanted.sum()))))
        out = apportion(wanted, total, 16)
        assert int(out.sum()) == total and int(out.min()) >= 1 and int(out.max()) <= 16


def test_steady_channels():
    x = torch.randn(50, 6) * torch.tensor([3.0, 1.0, 5.0, 0.1, 2.0, 4.0])
    tokens = torch.arange(50)
    assert steady_channels(x, tokens, 0.5).tolist() == [1, 3, 4]
    assert steady_channels(x.half(), tokens, 0.01).tolist() == [3]


def test_at_least_one_token_of_each_frame():
    choice = VidCom2(keep=0.01).before_decoder(video(torch.randn(6, 2, 3, 8)))
    assert choice.keep.view(6, 6).sum(1).tolist() == [1] * 6


def test_untouched_and_refusals():
    x = torch.randn(4, 2, 2, 8)
    assert VidCom2().before_decoder(image(x[0])) is None
    assert VidCom2().keeping_everything().before_decoder(video(x)) is None
    for bad in (dict(keep=0), dict(keep=1.2), dict(keep=True), dict(temperature=0), dict(channels=2.0), dict(keep="x")):
        with pytest.raises(ValueError, match="possible are numbers above 0"):
            VidCom2(**bad)
