"""From what a method did to what is drawn: for each stage and frame, the group that each token is part of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmkv._vision.tower import TowerState
from mmkv._vision.trace import Trace

NOWHERE, DROPPED, ALONE = -2, -1, 0  # groups count from 1


@dataclass(frozen=True, eq=False)
class Stage:
    """What is left of the vision tokens at one place of the model.

    Args:
        method: name of the method.
        place: where, in words.
        kept, total: tokens that go on from there, and that there were in the beginning; those on no grid (newlines) count.
        group: for each frame int64 `[rows, cols]`: DROPPED, ALONE (kept, nothing merged into it), NOWHERE (no token here), or
            the number of the group that became one token, from 1, the same at all stages at which that token is there; None
            for a frame that this stage does not know.
        lead: for each frame bool `[rows, cols]`: kept tokens; of a group the one that the others were merged into.
        unit: what is counted.
    """

    method: str
    place: str
    kept: int
    total: int
    group: list[np.ndarray | None]
    lead: list[np.ndarray | None]
    unit: str = "tokens"

    @property
    def counts(self) -> str:
        """For example "64 of 256 tokens, 25 %"."""
        return f"{self.kept:,} of {self.total:,} {self.unit}, {100 * self.kept / max(self.total, 1):.3g} %"


def decoder_stages(trace: Trace, method: str) -> list[Stage]:
    """A stage for each place at which tokens of the first prompt's media went; one for "all layers" where none did.

    Raises:
        ValueError: the tokens have no places in a grid.
    """
    layout = trace.layout
    visual = layout.visual[0] & layout.valid[0]
    cells = (visual & (layout.row[0] >= 0)).nonzero()[:, 0]
    if not cells.numel():
        raise ValueError("the vision tokens' places in a grid are unknown; nothing can be drawn")
    places = torch.stack([layout.frame[0], layout.row[0], layout.col[0]])[:, cells].long()
    went = torch.arange(len(layout))
    steps = [("in all layers", went)]
    for layer in sorted(trace.into):
        went = _follow(went, trace.into[layer][0])
        steps.append(("before the decoder" if layer == 0 else f"behind layer {layer - 1}", went))
    out = []
    for place, now in steps[1:] or steps:
        left = visual & (now == torch.arange(len(now)))
        group, lead = _grids(places, now[cells], cells)
        out.append(Stage(method, place, int(left.sum()), int(visual.sum()), group, lead))
    return out


def tower_stage(state: TowerState, prefix: int, method: str, frames: int) -> Stage | None:
    """What was merged or pruned inside the vision tower by its end; None where nothing was, or patches form no grid.

    Args:
        state: of its last forward, B images.
        prefix: tokens in front that are no patches.
        method: name of the method.
        frames: how many frames the decoder knows. Where they are not the tower's images, these are the tiles of one, of which
            the first shows all of it.
    """
    if state.source is None or state.grid is None:
        return None
    source = state.source[:, prefix:].cpu()
    images, patches = source.shape
    own = torch.arange(images * patches).view(images, patches)
    slots = int(source.max()) + 1
    first = torch.full((images, slots + 1), images * patches)
    first.scatter_reduce_(1, source.where(source >= 0, slots), own, "amin")
    went = first.gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)
    kept = int((went == own).sum())
    image, row, col = own // patches, own % patches // state.grid[1], own % patches % state.grid[1]
    group, lead = _grids(torch.stack([image, row, col]).flatten(1), went.flatten(), own.flatten())
    if images != frames:
        group, lead = ([grids[0]] + [None] * (frames - 1) for grids in (group, lead))
    return Stage(method, "in the vision tower", kept, images * patches, group, lead, "patches")


def _follow(went: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Where tokens are that had gone to `went` int64 `[T]`, -1 for dropped ones, after one more step `into` int64 `[T]`."""
    while True:  # two methods at one place can chain: a token went into one that went on
        now = into[went.clamp(min=0)].masked_fill(went < 0, -1)
        if torch.equal(now, went):
            return now
        went = now


def _grids(places: torch.Tensor, went: torch.Tensor, own: torch.Tensor) -> tuple[list, list]:
    """`Stage.group` and `Stage.lead` of tokens at `places` int64 `[3, n]` (frame, row, column).

    Args:
        went: int64 `[n]`, number of the token that each became part of, -1 for dropped ones.
        own: int64 `[n]`, each token's own number, ascending.
    """
    _, inverse, members = went.unique(return_inverse=True, return_counts=True)
    shared = (members[inverse] > 1) & (went >= 0)
    number = torch.searchsorted(own, went.clamp(min=0)) + 1
    group = number.where(shared, ALONE).where(went >= 0, DROPPED)
    out: tuple[list, list] = ([], [])
    for frame in range(int(places[0].max()) + 1):
        here = places[0] == frame
        row, col = places[1:, here]
        shape = (int(row.max()) + 1, int(col.max()) + 1) if bool(here.any()) else (1, 1)
        for values, grids, empty in ((group, out[0], NOWHERE), (went == own, out[1], False)):
            grid = torch.full(shape, empty, dtype=values.dtype)
            grid[row, col] = values[here]
            grids.append(grid.numpy())
    return out
