"""What methods note in the tower, and which towers they refuse."""

from __future__ import annotations

import pytest
import torch
from visions import attention, image, tower

from mmkv.tokens.method import TowerFacts
from mmkv.tokens.prumerge import PruMerge
from mmkv.tokens.saliency import check_scores, check_tower, note_score, noted, tower_score
from mmkv.tokens.visionzip import VisionZip


def test_cls_where_there_is_one_else_received():
    for prefix in (1, 0):
        view = tower(prefix=prefix)
        for i in range(2):
            weights = attention(view, i)
            want = weights[0] if prefix else weights.mean(0)
            torch.testing.assert_close(tower_score(view, "auto")[i].double(), want, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(tower_score(view, "received")[i].double(), weights.mean(0), atol=1e-6, rtol=1e-5)


def test_notes_are_of_original_patches():
    """Two tokens were merged and one was pruned in blocks before: patches of one token get the same, pruned ones nothing."""
    view = tower(images=1, tokens=4)
    view.source = torch.tensor([[0, 1, 2, 2, -1, 3]])
    note_score(view, "cls", "mine")
    row = attention(view, 0)[0]
    want = torch.stack([row[1], row[2], row[2], row[0] * 0, row[3]])
    torch.testing.assert_close(view.notes["mine"][0].double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("prefix", "block"), [(1, 2), (0, 3)])
def test_visionzip_asks_the_block_that_the_projector_reads(prefix, block):
    noting = []
    for at in VisionZip().tower_blocks(4):
        view = tower(prefix=prefix, block=at)
        assert VisionZip().in_tower(view) is None
        noting += [at] * bool(view.notes)
    assert noting == [block]


def test_prumerge_asks_the_last_block():
    assert PruMerge().tower_blocks(24) == (23,)
    view = tower(block=3)
    assert PruMerge().in_tower(view) is None
    assert view.notes["prumerge"].shape == (2, 5)


@pytest.mark.parametrize("depth", [0, 1])
def test_flat_towers(depth):
    assert VisionZip().tower_blocks(depth) == PruMerge().tower_blocks(depth) == tuple(range(depth))
    for prefix in (0, 1):
        view = tower(prefix=prefix, block=0, depth=1)
        VisionZip().in_tower(view)
        assert "visionzip" in view.notes


@pytest.mark.parametrize("method", [VisionZip, PruMerge])
def test_refuses_cls_on_a_tower_without(method):
    method().check(TowerFacts(depth=4))
    method(scores="cls").check(TowerFacts(depth=4, has_cls=True))
    with pytest.raises(ValueError, match="without CLS token; possible are 'auto', 'received'"):
        method(scores="cls").check(TowerFacts(depth=4))
    with pytest.raises(ValueError, match="needs a vision tower"):
        method().check(TowerFacts())
    with pytest.raises(ValueError, match="no CLS token"):
        method(scores="cls").in_tower(tower(prefix=0, block=3))


def test_refuses_unknown_scores_and_missing_notes():
    with pytest.raises(ValueError, match="scores='text'; possible are 'auto', 'cls', 'received'"):
        check_scores("text")
    with pytest.raises(ValueError, match="pass pixels"):
        noted(image(torch.zeros(2, 2, 3)), "visionzip")
    check_tower("MustDrop", "received", TowerFacts(depth=2))
