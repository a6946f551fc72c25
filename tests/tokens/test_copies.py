"""Groups noted in a tower, read behind a projector that copies tokens or averages them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from visions import tower, video

from mmkv.tokens import copies
from mmkv.tokens.copies import copied_from, note_copies


def noted(target) -> dict[str, torch.Tensor]:
    view = tower(images=len(target), tokens=target.shape[1] + 1)
    note_copies(view, "group", target)
    return view.notes


def alone(images: int, length: int) -> torch.Tensor:
    return torch.arange(length).repeat(images, 1)


def test_copies_are_found_within_their_image_alone():
    target = alone(2, 6)
    target[0, [1, 3]] = 0
    target[1, 5] = 2
    seen = video(torch.zeros(2, 2, 3, 1), newline=True, **noted(target))
    assert copied_from(seen, "group").tolist() == [0, 0, 2, 0, 4, 5, 6, 7, 8, 9, 10, 8, 12]


def test_the_first_copy_that_is_left_stands_for_its_group():
    # unpadding took the first row, and with it the patch that the group is named after
    target = alone(1, 9)
    target[0, [1, 3, 4]] = 0
    notes = {name: note.view(1, 3, 3)[:, 1:] for name, note in noted(target).items()}
    assert copied_from(video(torch.zeros(1, 2, 3, 1), **notes), "group").tolist() == [0, 0, 2, 3, 4, 5]


def test_without_notes_there_are_no_groups():
    assert copied_from(video(torch.zeros(1, 2, 2, 1), newline=True), "group").tolist() == [-1, -1, -1, -1, 4]


@pytest.mark.parametrize("kernel", [2, 3])  # the mean of a 3x3 window is its centre's number
@pytest.mark.parametrize("merged", [False, True])
def test_averaged_tokens_are_told_from_copies(kernel, merged):
    target = alone(2, 36)
    if merged:
        target[:, [1, 6, 7]] = 0
    notes = {name: F.avg_pool2d(note.view(2, 6, 6), kernel) for name, note in noted(target).items()}
    side = 6 // kernel
    assert (copied_from(video(torch.zeros(2, side, side, 1), **notes), "group") == -1).all()


def test_frames_averaged_in_time_are_told_from_copies():
    notes = {name: note.view(3, 36).mean(0).view(1, 6, 6) for name, note in noted(alone(3, 36)).items()}
    assert notes["group"][0, 0, 1] == 37  # a whole number
    assert (copied_from(video(torch.zeros(1, 6, 6, 1), **notes), "group") == -1).all()


def test_interpolated_tokens_are_told_from_copies():
    notes = {
        name: F.interpolate(note.view(1, 1, 27, 27), (14, 14), mode="bilinear")[0]
        for name, note in noted(alone(1, 729)).items()
    }
    assert (copied_from(video(torch.zeros(1, 14, 14, 1), **notes), "group") == -1).all()


def test_one_averaged_frame_leaves_the_others():
    notes = noted(alone(2, 4))
    notes = {name: torch.where(torch.tensor([[True], [False]]), note, note + 0.5) for name, note in notes.items()}
    seen = video(torch.zeros(2, 2, 2, 1), **{name: note.view(2, 2, 2) for name, note in notes.items()})
    assert copied_from(seen, "group").tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_numbers_beyond_what_fp32_counts_are_not_noted(monkeypatch):
    monkeypatch.setattr(copies, "EXACT", 8)
    assert noted(alone(2, 4)) == {}
    assert set(noted(alone(1, 4))) == {"group", "group.square"}
