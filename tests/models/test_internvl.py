"""InternVL: what its tokens are, and its tower, whose blocks scale what their MLP gives."""

from __future__ import annotations

import random_models as rm
import torch

from mmkv._vision.tower import TowerHooks
from mmkv.layout import IMAGE
from mmkv.models import adapter_for
from mmkv.models.tower import encoder_tower
from mmkv.tokens import ToMe


def test_layout():
    """An image of four tiles and a thumbnail would be five; frames of a video are images of one tile."""
    model = rm.make("internvl")
    given = rm.inputs(model, [[20, rm.Image(64, 32), 21, rm.Video(2)]])
    chunk = adapter_for(model).layout(given, *given["input_ids"].shape, None)
    assert chunk.modality[0].tolist() == [0, 0] + [IMAGE] * 8 + [0] * 4 + [IMAGE] * 4 + [0] * 3 + [IMAGE] * 4 + [0]
    assert chunk.medium[0].tolist() == [-1, -1] + [0] * 8 + [-1] * 4 + [1] * 4 + [-1] * 3 + [2] * 4 + [-1]
    assert chunk.frame[0, 2:10].tolist() == [0] * 4 + [1] * 4
    assert chunk.row[0, 2:10].tolist() == [0, 0, 1, 1] * 2
    assert chunk.col[0, 2:10].tolist() == [0, 1] * 4


def test_a_prompt_that_is_cut_within_a_tile_has_no_grid():
    model = rm.make("internvl")
    given = rm.inputs(model, [[20, rm.Image(32, 32)]])
    given["input_ids"] = given["input_ids"][:, :4]
    chunk = adapter_for(model).layout(given, 1, 4, None)
    assert chunk.visual[0].tolist() == [False, False, True, True]
    assert chunk.row[0].tolist() == [-1] * 4 and chunk.medium[0, 2:].tolist() == [0, 0]


def test_notes_follow_the_fold():
    """The model's own pixel shuffle says which four patches become a token."""
    model = rm.make("internvl")
    given = rm.inputs(model, [[20, rm.Image(64, 32), 21, rm.Video(1)]])
    adapter = adapter_for(model)
    chunk = adapter.layout(given, *given["input_ids"].shape, None)
    media = [chunk.take(chunk.medium[0] == m) for m in (0, 1)]
    patches = torch.arange(48, dtype=torch.float32).view(3, 16)
    want = model.model.pixel_shuffle(patches.view(3, 4, 4, 1)).mean(-1).flatten(1)
    got = adapter.notes_of_media(patches, IMAGE, media)
    assert torch.equal(got[0], want[:2].flatten()) and torch.equal(got[1], want[2])
    assert adapter.notes_of_media(patches[:2], IMAGE, media) is None


def test_merging_in_the_last_block_leaves_the_others_as_they_are():
    """No attention follows, so a token that was not merged comes out as in stock, its MLP's output scaled as ever."""
    tower = rm.make("internvl").model.vision_tower
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        stock = tower(pixels).last_hidden_state
        with TowerHooks(encoder_tower(tower), [ToMe(4, first_block=2)]) as hooks:
            got = tower(pixels).last_hidden_state
            state = hooks.state
        assert torch.equal(tower(pixels).last_hidden_state, stock)
    assert state.tokens_per_block == [17, 17, 13]
    for row in range(2):
        size = state.size[row].gather(0, state.source[row])
        assert int((size == 1).sum()) >= 9
        assert torch.allclose(got[row, size == 1], stock[row, size == 1], atol=1e-5)
        assert not torch.allclose(got[row, size > 1], stock[row, size > 1], atol=1e-3)
        group = state.source[row, size > 1]
        for value in group.unique():
            same = got[row, state.source[row] == value]
            assert torch.equal(same, same[:1].expand_as(same))
