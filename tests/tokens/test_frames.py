"""Tokens by frame, and the amounts and shares that methods take."""

from __future__ import annotations

import pytest
import torch
from visions import video, vision

from mmkv.layout import IMAGE
from mmkv.tokens import frames
from mmkv.tokens.dycoke import DyCoke
from mmkv.tokens.evs import EVS
from mmkv.tokens.frames import check_amount, clips, cosine, pruned, tiles, tokens_of
from mmkv.tokens.method import Vision
from mmkv.tokens.prumerge import PruMerge
from mmkv.tokens.uniform import Uniform
from mmkv.tokens.vidcom2 import VidCom2
from mmkv.tokens.visionzip import VisionZip


def test_a_video_is_one_clip():
    found = clips(video(torch.zeros(3, 2, 2, 4), newline=True))
    assert [c.tolist() for c in found] == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]


def test_tiles_of_other_sizes_are_clips_of_their_own():
    """A base grid of 2, a grid of 3 whose rows end in newlines, then two of 2 again."""
    frame = [0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3]
    row = [0, 0, 0, 0, -1, 1, -1, 0, 0, 0, 0]
    found = clips(vision(torch.zeros(11, 4), frame, row, row, kind=IMAGE))
    assert [c.tolist() for c in found] == [[[0, 1]], [[2, 3, 5]], [[7, 8], [9, 10]]]


def test_nothing_on_a_grid():
    assert clips(vision(torch.zeros(3, 4), [-1] * 3, [-1] * 3, [-1] * 3)) == []


def test_tiles_keep_groups_together(monkeypatch):
    monkeypatch.setattr(frames, "TILE", 100)
    clip = torch.arange(22).view(11, 2)
    assert [len(part) for part in tiles(clip, 10)] == [5, 5, 1]
    assert [len(part) for part in tiles(clip, 10, together=4)] == [4, 4, 3]
    assert [len(part) for part in tiles(clip, 1000, together=4)] == [4, 4, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cosine_in_parts(monkeypatch, dtype):
    monkeypatch.setattr(frames, "TILE", 20)
    x = torch.randn(30, 4).to(dtype)
    left, right = torch.randint(30, (2, 5, 3)).unbind(0)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    want = (unit[left] * unit[right]).sum(-1).float()
    torch.testing.assert_close(cosine(x, left, right), want, atol=1e-6, rtol=1e-5)


def test_pruned():
    assert pruned(torch.ones(3, dtype=torch.bool)) is None
    choice = pruned(torch.tensor([True, False, True]))
    assert choice.into.tolist() == [0, -1, 2]
    assert choice.features is None


@pytest.mark.parametrize(
    ("amount", "size", "count"), [(0.25, 16, 4), (0.25, 1, 1), (1.0, 9, 9), (4, 16, 4), (40, 16, 16), (0.0, 5, 0)]
)
def test_tokens_of(amount, size, count):
    assert tokens_of(amount, size) == count


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, True, "4", None, float("nan")])
def test_no_amount(bad):
    with pytest.raises(ValueError, match="a ratio"):
        check_amount("keep", bad)


def test_none_is_an_amount_where_allowed():
    check_amount("contextual", 0, least=0)
    check_amount("contextual", 0.0, least=0)
    with pytest.raises(ValueError, match="contextual=False"):
        check_amount("contextual", False, least=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method",
    [
        Uniform(0.3),
        EVS(0.6),
        EVS(0.6, budget="paper"),
        DyCoke(redundant="mean"),
        VidCom2(),
        VisionZip(5, 0.1),
        PruMerge(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_chooses_as_the_cpu_does(method, dtype):
    notes = dict.fromkeys(("visionzip", "prumerge"), torch.rand(6, 8, 8) ** 8)
    here = video(torch.randn(6, 8, 8, 64).to(dtype), newline=True, **notes)
    there = Vision(here.features.cuda(), here.layout, here.text, {k: v.cuda() for k, v in here.notes.items()})
    want, got = method.before_decoder(here), method.before_decoder(there)
    assert got.keep.is_cuda and got.into.is_cuda
    assert torch.equal(got.keep.cpu(), want.keep)
    assert torch.equal(got.into.cpu(), want.into)
    if want.features is not None:
        kept = want.keep
        torch.testing.assert_close(got.features.cpu()[kept], want.features[kept], atol=2e-2, rtol=1e-2)
