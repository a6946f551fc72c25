"""Which of a tower's tokens became one, noted in the tower and read behind the projector.

Inside a tower merged tokens are expanded again at its end, so that the projector sees a whole grid. Where the decoder's tokens
are the tower's one to one, all members of a group but one are then copies. Where a projector averages several, they are not.
"""

from __future__ import annotations

import torch

from mmkv.tokens.method import TowerView, Vision

EXACT = 1 << 24  # whole numbers below are exact in fp32
PRIME = 4093  # squares of remainders stay exact; no projector averages tokens so far apart


def note_copies(view: TowerView, name: str, target: torch.Tensor) -> None:
    """Note for each patch the number of the group it is now part of, unique among the images of the batch.

    A square is noted, too: the mean of squares is not the square of the mean, so averaged notes are told from copied ones.

    Args:
        view: the block of the tower.
        name: of the note.
        target: int64 `[B, N]`, the patch that each is now part of.
    """
    batch, length = target.shape
    if batch * length >= EXACT:
        return  # numbers would not be exact: as if nothing had been noted
    group = target + torch.arange(batch, device=target.device)[:, None] * length
    view.notes[name] = group.float()
    view.notes[f"{name}.square"] = (group % PRIME).square().float()


def copied_from(vision: Vision, name: str) -> torch.Tensor:
    """int64 `[n]`: the first token of the same group, itself where it is that; -1 throughout frames without groups.

    A frame counts if every one of its tokens is a copy of a tower's; structural tokens are on their own.
    """
    device = vision.features.device
    own = torch.arange(len(vision), device=device)
    lone = vision.structural.to(device)
    if name not in vision.notes:
        return own.where(lone, -1)
    noted, square = (vision.notes[key].to(device) for key in (name, f"{name}.square"))
    group = noted.round().long()
    averaged = ((group != noted) | ((group % PRIME).square() != square)) & ~lone
    frame = vision.layout.frame[0].to(device).long() + 1
    mixed = torch.zeros(int(frame.max()) + 1, dtype=torch.bool, device=device)
    mixed[frame[averaged]] = True
    number = group.where(~lone, -1 - own)  # newlines may carry any note
    inverse = number.unique(return_inverse=True)[1]
    first = torch.full_like(own, len(own)).scatter_reduce(0, inverse, own, "amin")[inverse]
    return first.masked_fill(mixed[frame] & ~lone, -1)
