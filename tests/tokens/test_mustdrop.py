"""MustDrop: merging in the tower and behind the projector, the key set, and the filter between decoder layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decoder_views import after, random_attention, view
from visions import attention, image, tower, video

from mmkv.layout import IMAGE
from mmkv.tokens.method import TowerFacts
from mmkv.tokens.mustdrop import MustDrop, weak_by_both


def block(hidden: torch.Tensor, grid, prefix=1, index=0, depth=24, notes=None, **options):
    """A block of a tower with these hidden states [B, N, C] and random attention."""
    made = tower(images=hidden.shape[0], tokens=hidden.shape[1], prefix=prefix, block=index, depth=depth)
    return replace(made, hidden=hidden, grid=grid, notes={} if notes is None else notes, **options)


def flat_grid(rows: int, cols: int, flat, channels: int = 16) -> torch.Tensor:
    """Random features [rows, cols, C] whose 3x3 windows `flat` (window row, window column) are nearly constant."""
    x = torch.randn(rows, cols, channels)
    for down, right in flat:
        x[3 * down : 3 * down + 3, 3 * right : 3 * right + 3] = torch.randn(channels) + 0.01 * torch.randn(
            3, 3, channels
        )
    return x


# stage 1a, in the tower


def test_windows_merge_in_the_first_block():
    x = flat_grid(6, 9, [(0, 1), (1, 2)])
    seen = block(torch.cat([torch.randn(1, 16), x.view(54, 16)])[None], (6, 9))
    group = MustDrop().in_tower(seen)
    assert group.count == 1 + 54 - 2 * 8
    out, size = group.apply(seen.hidden, seen.size)
    assert torch.equal(out[0, 0], seen.hidden[0, 0])
    # raster order: three patches, the merged window at (0, 3), three more
    torch.testing.assert_close(out[0, 1:8], torch.cat([x[0, :3], x[:3, 3:6].mean((0, 1))[None], x[0, 6:]]))
    torch.testing.assert_close(size, torch.ones(1, 39))  # attention afterwards is not proportional to size
    torch.testing.assert_close(group.unmerge(out)[0, 1:].view(6, 9, 16)[5, 8], x[3:, 6:].mean((0, 1)))


def test_images_of_a_batch_merge_equally_many():
    x = torch.stack([flat_grid(9, 9, [(0, 0), (1, 1), (2, 2)]), flat_grid(9, 9, [(2, 0)])]).view(2, 81, 16)
    group = MustDrop().in_tower(block(x, (9, 9), prefix=0))
    assert group.count == 81 - 8
    assert group.index[1, 6 * 9] == group.index[1, 8 * 9 + 2] == 54


def test_nothing_flat_and_nothing_asked():
    assert MustDrop().in_tower(block(torch.randn(1, 37, 16), (6, 6))) is None
    assert MustDrop().tower_blocks(24) == (0, 23)
    assert MustDrop(tau=1.01).tower_blocks(24) == MustDrop().keeping_everything().tower_blocks(24) == (23,)
    assert MustDrop(key_rate=0).tower_blocks(24) == (0,)
    assert MustDrop().tower_blocks(1) == (0,)
    assert MustDrop().tower_blocks(0) == ()


@pytest.mark.parametrize("window", [2, 3, (1, 3), (3, 1), (2, 4)])
def test_windows_that_do_not_divide_the_grid(window):
    rows, cols = (window, window) if isinstance(window, int) else window
    group = MustDrop(window=window).in_tower(block(torch.ones(1, 1 + 7 * 5, 4), (7, 5)))
    assert group.count == 1 + 35 - (7 // rows) * (5 // cols) * (rows * cols - 1)
    assert MustDrop(window=8).in_tower(block(torch.ones(1, 1 + 7 * 5, 4), (7, 5))) is None  # no window fits


def test_packed_images_are_left_to_the_projector():
    seen = block(torch.ones(1, 36, 4), (6, 6), prefix=0, spans=torch.tensor([0, 36]))
    assert MustDrop().in_tower(seen) is None
    assert MustDrop().in_tower(block(torch.ones(1, 36, 4), None, prefix=0)) is None
    assert seen.notes == {}


def test_a_tower_that_has_lost_tokens_is_refused():
    with pytest.raises(ValueError, match="windows of all 6x6 patches, but 30 are left"):
        MustDrop().in_tower(block(torch.ones(1, 31, 4), (6, 6)))


# stage 1, from the tower to the decoder


def through_the_tower(method: MustDrop, x: torch.Tensor, prefix=1):
    """Runs both blocks on images [B, rows, cols, C]; gives the last block's view, too, and what the decoder is offered."""
    images, rows, cols, channels = x.shape
    flat = torch.cat([torch.randn(images, prefix, channels), x.flatten(1, 2)], 1)
    first = block(flat, (rows, cols), prefix)
    group = method.in_tower(first)
    out = flat if group is None else group.merge(flat)
    source = torch.arange(flat.shape[1]).expand(images, -1) if group is None else group.index
    last = block(out, (rows, cols), prefix, index=23, notes=first.notes, source=source)
    assert method.in_tower(last) is None
    whole = out if group is None else group.unmerge(out)
    notes = {name: note.view(images, rows, cols) for name, note in last.notes.items()}
    return last, video(whole[:, prefix:].unflatten(1, (rows, cols)), kind=IMAGE, **notes)


@pytest.mark.parametrize("prefix", [1, 0])
def test_the_decoder_reads_one_token_a_window_and_knows_the_key_set(prefix):
    torch.manual_seed(5)
    last, vision = through_the_tower(MustDrop(), flat_grid(9, 12, [(0, 0), (1, 3)])[None], prefix)
    choice = MustDrop().before_decoder(vision)
    left = [p for p in range(108) if p // 12 > 2 or p % 12 > 2 or p == 0]  # all but window (0, 0)'s other eight
    left = [p for p in left if not (3 <= p // 12 < 6 and p % 12 >= 9) or p == 45]
    assert choice.keep.nonzero()[:, 0].tolist() == left
    assert choice.into[0] == choice.into[26] == 0 and choice.into[71] == 45 and choice.into[3] == 3
    torch.testing.assert_close(choice.features[left], vision.features[left])
    # the key set: ceil(.08 * 92) = 8 of the merged sequence, by the last block's CLS row or column means
    weights = attention(last, 0)
    score = weights[0, prefix:] if prefix else weights.mean(0)
    expected = sorted(left[i] for i in score.topk(8).indices.tolist())
    assert choice.notes["key"].nonzero()[:, 0].tolist() == expected


def test_a_window_merged_in_the_tower_is_all_that_merges():
    # another window is flat only behind the projector: it stays
    _, vision = through_the_tower(MustDrop(), flat_grid(6, 6, [(0, 0)])[None])
    vision.features.view(6, 6, 16)[3:, 3:] = 1.0
    choice = MustDrop().before_decoder(vision)
    assert int(choice.keep.sum()) == 36 - 8


def test_key_sets_are_taken_frame_by_frame():
    last, vision = through_the_tower(MustDrop(tau=1.01), torch.randn(3, 4, 5, 8))
    choice = MustDrop(tau=1.01).before_decoder(vision)
    assert choice.keep.all() and choice.into is None and choice.features is None
    expected = [20 * b + i for b in range(3) for i in sorted(attention(last, b)[0, 1:].topk(2).indices.tolist())]
    assert choice.notes["key"].nonzero()[:, 0].tolist() == expected  # ceil(.08 * 20) = 2 each


# stage 1a, behind the projector


def test_projected_features_merge_where_the_tower_did_not():
    x = torch.stack([flat_grid(7, 6, [(0, 0), (1, 1)]), flat_grid(7, 6, [(1, 0)])])
    score = torch.rand(2, 7, 6)
    vision = video(x, newline=True, **{"mustdrop.score": score})
    choice = MustDrop().before_decoder(vision)
    gone = set()
    for frame, down, right in ((0, 0, 0), (0, 1, 1), (1, 1, 0)):
        places = [frame * 42 + (3 * down + i) * 6 + 3 * right + j for i in range(3) for j in range(3)]
        gone |= set(places[1:])
        torch.testing.assert_close(choice.features[places[0]], vision.features[places].mean(0))
        assert choice.into[places].tolist() == [places[0]] * 9
    assert set((~choice.keep).nonzero()[:, 0].tolist()) == gone  # each frame its own number, the seventh row whole
    untouched = [i for i in range(85) if choice.keep[i] and int((choice.into == i).sum()) == 1]
    assert torch.equal(choice.features[untouched], vision.features[untouched])
    assert choice.notes["key"].view(-1)[:42].sum() == math.ceil(0.08 * 26)
    assert choice.notes["key"].view(-1)[42:84].sum() == math.ceil(0.08 * 34)
    assert choice.notes["key"][84] == 0 and choice.keep[84]  # a newline stays, and is no key


def test_averaged_notes_leave_the_merging_to_the_projector():
    _, vision = through_the_tower(MustDrop(), flat_grid(12, 12, [])[None])
    pooled = {name: torch.nn.functional.avg_pool2d(note.view(1, 12, 12), 2) for name, note in vision.notes.items()}
    choice = MustDrop().before_decoder(video(flat_grid(6, 6, [(1, 1)])[None], **pooled))
    assert int(choice.keep.sum()) == 36 - 8
    assert choice.notes["key"].sum() == math.ceil(0.08 * 28)


def test_an_image_smaller_than_a_window_and_an_empty_key_set():
    assert MustDrop(key_rate=0).before_decoder(image(torch.ones(2, 2, 4))) is None
    assert MustDrop(key_rate=0).before_decoder(image(torch.ones(3, 3, 4))).notes == {}
    assert MustDrop(key_rate=0).keeping_everything().before_decoder(image(torch.ones(9, 9, 4))) is None


def test_without_scores_from_the_tower_it_says_so():
    with pytest.raises(ValueError, match=r"'mustdrop\.score' was not noted in the vision tower"):
        MustDrop().before_decoder(image(torch.randn(6, 6, 4)))


# stage 2


def naive_filter(weights, start, length, gamma, alpha, key) -> set[int]:
    """Kept places of the image, from attention [H, L, L], as the paper has it."""
    mean = weights.double().mean(0)[start + length :, start : start + length]
    total, top = mean.sum(0), mean.max(0).values
    dropped = {j for j in range(length) if total[j] < gamma * total.sum() and top[j] < alpha}
    return set(range(length)) - dropped | key


@pytest.mark.parametrize(
    ("gamma", "alpha"), [(0.02, 0.035), (0.018, 0.03), (0.03, 0.03), (0.02, 1.0), (1.0, 0.04), (1.0, 2.0)]
)
def test_the_filter_against_the_naive_way(gamma, alpha):
    weights, key = random_attention(4, 80, seed=7), {3, 17, 44}
    note = torch.zeros(80)
    note[[6 + j for j in key]] = 1
    choice = MustDrop(gamma=gamma, alpha=alpha).in_decoder(
        view("T" * 6 + "I" * 50 + "T" * 24, weights, notes={"key": note})
    )
    expected = {*range(6), *range(56, 80), *(6 + j for j in naive_filter(weights, 6, 50, gamma, alpha, key))}
    assert 33 < len(expected) < 80 or (gamma, alpha) == (1.0, 2.0)
    assert set(choice.keep.nonzero()[:, 0].tolist()) == expected
    if (gamma, alpha) == (1.0, 2.0):
        assert expected == {*range(6), *range(56, 80), 9, 23, 50}  # all go but the key set


def test_the_filter_by_hand():
    # two rows over four tokens: sums .1, .4, .2, .3 of 1; largest .06, .3, .2, .15
    total, top = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([0.06, 0.3, 0.2, 0.15])
    assert weak_by_both(total, top, 0.25, 0.1).tolist() == [True, False, False, False]
    assert weak_by_both(total, top, 0.25, 0.21).tolist() == [True, False, True, False]
    assert weak_by_both(total, top, 0.1, 1.0).tolist() == [False] * 4  # not below: .1 is the share itself
    assert weak_by_both(2 * total, top, 0.25, 0.21).tolist() == [True, False, True, False]  # gamma is a share


@pytest.mark.parametrize(
    "method", [MustDrop(gamma=1.0, alpha=0.0), MustDrop(gamma=0, alpha=1), MustDrop().keeping_everything()]
)
def test_thresholds_that_keep_all(method):
    assert method.in_decoder(view("TIIITT")) is None
    assert method.decoder_layers(32) == (2, 6, 10, 14)


def test_rows_are_read_a_tile_at_a_time(monkeypatch):
    from mmkv.tokens import between_layers

    whole = MustDrop(gamma=0.03, alpha=0.05).in_decoder(view("T" * 4 + "I" * 40 + "T" * 30))
    monkeypatch.setattr(between_layers, "TILE", 300)
    assert torch.equal(
        MustDrop(gamma=0.03, alpha=0.05).in_decoder(view("T" * 4 + "I" * 40 + "T" * 30)).keep, whole.keep
    )
    assert 34 < int(whole.keep.sum()) < 74


def test_which_text_looks():
    weights = torch.zeros(1, 6, 6)
    weights[0, 2, 0] = 1.0
    weights[0, 5] = torch.tensor([0.0, 0.4, 0, 0.1, 0.4, 0.1])
    method = MustDrop(gamma=0.12, alpha=0.12)
    assert method.in_decoder(view("IITIIT", weights)).keep.tolist() == [True, True, True, False, True, True]
    method = replace(method, rows="after_last")
    assert method.in_decoder(view("IITIIT", weights)).keep.tolist() == [False, True, True, False, True, True]


def test_prompts_without_text_behind_the_image_or_without_an_image():
    with pytest.raises(ValueError, match="MustDrop judges images by the text behind them, and this prompt has none"):
        MustDrop().in_decoder(view("TTII"))
    assert MustDrop().in_decoder(view("TTT")) is None


def test_the_key_set_outlives_every_stage():
    torch.manual_seed(11)
    method = MustDrop(gamma=0.011, alpha=0.1)
    _, vision = through_the_tower(method, flat_grid(12, 12, [(0, 1), (2, 2), (3, 3)])[None])
    chosen = method.before_decoder(vision)
    left = chosen.keep.nonzero()[:, 0]
    key = set(left[chosen.notes["key"][left] > 0].tolist())
    assert len(left) == 144 - 24 and len(key) == math.ceil(0.08 * 120)
    seen = view(
        "T" * 3 + "I" * 120 + "T" * 10,
        random_attention(4, 133, sharp=4.0),
        torch.cat([torch.zeros(3, 16), chosen.features[left], torch.zeros(10, 16)]),
    )
    seen.notes = {
        "key": torch.cat([torch.zeros(3), chosen.notes["key"][left], torch.zeros(10)]),
        "place": torch.cat([torch.full((3,), -1.0), left.float(), torch.full((10,), -1.0)]),  # to follow them
    }
    counts = [120]
    for layer in method.decoder_layers(32):
        choice = method.in_decoder(seen)
        if choice is not None:
            seen = after(seen, choice, random_attention(4, int(choice.keep.sum()), layer, sharp=4.0), layer)
        assert key <= set(seen.notes["place"].int().tolist())
        counts.append(len(seen) - 13)
    assert counts == sorted(counts, reverse=True) and len(key) < counts[-1] < counts[2] < counts[1] < 120


# options


def test_presets():
    assert [(m.gamma, m.alpha) for m in map(MustDrop.for_tokens, (192, 128, 64))] == [
        (0.001, 0.001),
        (0.0012, 0.001),
        (0.011, 0.01),
    ]
    assert MustDrop.for_tokens(64, key_rate=0.1).key_rate == 0.1
    with pytest.raises(ValueError, match="tokens=100; possible are 192, 128, 64"):
        MustDrop.for_tokens(100)


def test_layers():
    assert MustDrop().decoder_layers(16) == (2, 6, 10, 14)
    assert MustDrop().decoder_layers(12) == (0, 2, 3, 5)
    assert MustDrop().decoder_layers(4) == (0, 1)
    assert MustDrop(layers=(1, 3)).decoder_layers(5) == (1, 3)
    with pytest.raises(ValueError, match="behind layer 3 of a decoder of 4 layers; possible are layers 0 to 2"):
        MustDrop(layers=(1, 3)).check(TowerFacts(depth=2, layers=4))


def test_towers_that_do_not_fit():
    MustDrop().check(TowerFacts(depth=2, layers=8))
    with pytest.raises(ValueError, match=r"MustDrop\(scores='cls'\) on a vision tower without CLS token"):
        MustDrop(scores="cls").check(TowerFacts(depth=2, layers=8))
    with pytest.raises(ValueError, match="MustDrop needs a vision tower and this model has none"):
        MustDrop().check(TowerFacts(layers=8))
    MustDrop(key_rate=0).check(TowerFacts(layers=8))


def test_flags_for_whoever_applies_it():
    assert MustDrop().trims_cache and MustDrop().whole_prompt and MustDrop().position_ids == "original"
    assert not MustDrop(trims_cache=False).trims_cache
    assert MustDrop(position_ids="renumbered").position_ids == "renumbered"


@pytest.mark.parametrize(
    "options",
    [
        {"tau": "0.8"}, {"tau": float("nan")}, {"window": 1}, {"window": (1, 1)}, {"window": (3, 3, 3)}, {"window": 2.5},
        {"window": True}, {"key_rate": 1.5}, {"key_rate": True}, {"scores": "max"}, {"gamma": -0.1}, {"alpha": -0.1},
        {"gamma": 1.5, "alpha": 2.0, "key_rate": 0}, {"layers": (2, 2)}, {"layers": [2]}, {"rows": "all"}, {"trims_cache": 1},
        {"position_ids": "fixed"},
    ],
)  # fmt: skip
def test_refusals(options):
    with pytest.raises(ValueError, match=r"^[^\n]*(possible are|needed|lower one)[^\n]*$"):
        MustDrop(**options)
