"""VisionZip: dominant tokens as they are, contextual ones merged."""

from __future__ import annotations

import pytest
import torch
from visions import image, video

from mmkv.tokens import frames
from mmkv.tokens.visionzip import VisionZip

SCORE = [[0.1, 0.5, 0.0, 0.2], [0.9, 0.3, 0.1, 0.05]]
GRID = torch.tensor([[[1, 0], [9, 9], [2, 0.1], [0, 3]], [[8, 8], [0, 1], [1, 0.5], [0.2, 4]]])


def test_by_hand():
    """Dominant 4 and 1. Of the rest 0 2 3 5 6 7 every third is contextual, 0 and 5; 2 and 6 point to 0, 3 and 7 to 5."""
    choice = VisionZip(dominant=2, contextual=2).before_decoder(image(GRID, visionzip=SCORE))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    assert choice.into.tolist() == [0, 1, 0, 5, 4, 5, 0, 5]
    kept = choice.features[choice.keep]
    want = torch.tensor([[4 / 3, 0.2], [9, 9], [8, 8], [0.2 / 3, 8 / 3]])
    torch.testing.assert_close(kept, want)
    official = VisionZip(dominant=2, contextual=2, contextual_merge="official")
    kept = official.before_decoder(image(GRID, visionzip=SCORE)).features[choice.keep]
    torch.testing.assert_close(kept, torch.tensor([[2.5, 0.3], [9, 9], [8, 8], [0.1, 4.5]]))


def test_dominant_only_drops_the_rest():
    choice = VisionZip(dominant=2, contextual=0).before_decoder(image(GRID, visionzip=SCORE))
    assert choice.into.tolist() == [-1, 1, -1, -1, 4, -1, -1, -1]
    assert choice.features is None


def reference(x, score, dominant, contextual, merge):
    """One frame `[m, C]`, token by token: {kept index: vector}, {index: target}."""
    m = len(x)
    best = sorted(sorted(range(m), key=lambda i: -float(score[i]))[:dominant])
    out, into = {i: x[i].double() for i in best}, {i: i for i in best}
    rest = [i for i in range(m) if i not in out]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    for i in rest:
        into[i] = i if i in targets else max(targets, key=lambda t: float(unit[i] @ unit[t]))
    for t in targets:
        members = [x[i].double() for i in rest if into[i] == t and i != t]
        if merge == "official":
            out[t] = x[t].double() + (sum(members) / len(members) if members else 0)
        else:
            out[t] = (x[t].double() + sum(members)) / (1 + len(members))
    return out, into


@pytest.mark.parametrize("merge", ["mean", "official"])
@pytest.mark.parametrize("tile", [1, 1 << 24])
@pytest.mark.parametrize(("dominant", "contextual"), [(7, 4), (0.25, 0.125), (1, 13), (20, 1)])
def test_frames_against_a_loop(monkeypatch, tile, dominant, contextual, merge):
    monkeypatch.setattr(frames, "TILE", tile)
    x, score = torch.randn(3, 4, 6, 5), torch.rand(3, 24)
    method = VisionZip(dominant, contextual, contextual_merge=merge)
    choice = method.before_decoder(video(x, newline=True, visionzip=score))
    d, c = (n if isinstance(n, int) else round(n * 24) for n in (dominant, contextual))
    assert choice.keep.view(-1)[:-1].view(3, 24).sum(1).tolist() == [d + c] * 3
    assert bool(choice.keep[-1]) and int(choice.into[-1]) == 72
    for f in range(3):
        out, into = reference(x[f].reshape(24, 5), score[f], d, c, merge)
        assert choice.keep[f * 24 : f * 24 + 24].nonzero()[:, 0].tolist() == sorted(out)
        assert choice.into[f * 24 : f * 24 + 24].tolist() == [f * 24 + into[i] for i in range(24)]
        for i, want in out.items():
            torch.testing.assert_close(choice.features[f * 24 + i], want.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_dominant_to_the_bit(dtype):
    x = torch.randn(2, 4, 6, 64).to(dtype)
    given = video(x, visionzip=torch.rand(2, 24))
    choice = VisionZip(5, 0.1).before_decoder(given)
    full = VisionZip(5, 0.1).before_decoder(video(x.float(), visionzip=given.notes["visionzip"]))
    assert choice.features.dtype == dtype
    assert torch.equal(choice.keep, full.keep) and torch.equal(choice.into, full.into)
    torch.testing.assert_close(choice.features[choice.keep].float(), full.features[full.keep], atol=1e-2, rtol=1e-2)
    alone = choice.keep & (torch.bincount(choice.into, minlength=48) == 1)
    assert torch.equal(choice.features[alone], given.features[alone])
    assert torch.equal(given.features, x.view(48, 64)), "the features given were changed"


def test_ties_go_to_the_earlier_token():
    choice = VisionZip(3, 2).before_decoder(image(torch.ones(2, 5, 4), visionzip=torch.ones(10)))
    assert choice.keep.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6]
    assert choice.into.tolist() == [0, 1, 2, 3, 3, 3, 6, 3, 3, 3]


def test_small_images_and_keeping_everything():
    given = video(torch.randn(2, 4, 4, 8), visionzip=torch.rand(2, 16))
    assert VisionZip(12, 4).before_decoder(given) is None
    assert VisionZip(12, 3).before_decoder(given) is not None
    assert VisionZip().before_decoder(given) is None  # 16 are fewer than 54 + 10
    for method in (VisionZip(1, 1), VisionZip(0.1, 0.1)):
        assert method.keeping_everything().before_decoder(given) is None


def test_refusals():
    for bad in (dict(dominant=0), dict(dominant=1.5), dict(dominant=True), dict(contextual=-1), dict(contextual=False)):
        with pytest.raises(ValueError, match="possible are a ratio"):
            VisionZip(**bad)
    with pytest.raises(ValueError, match="sum up to 1"):
        VisionZip(0.9, 0.2)
    with pytest.raises(ValueError, match="scores='text'"):
        VisionZip(scores="text")
    with pytest.raises(ValueError, match="contextual_merge='sum'; possible are 'mean', 'official'"):
        VisionZip(contextual_merge="sum")
    with pytest.raises(ValueError, match="was not noted"):
        VisionZip(1, 1).before_decoder(image(GRID))
