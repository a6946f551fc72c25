"""Frames that cannot be read: how they are named, and what a fetch of them raises."""

from __future__ import annotations

from collections.abc import Sequence


class DamagedFrames(OSError):
    """Frames that a fetch needs cannot be read; choose others. `frames` names them; `Store.damaged` now holds them."""

    def __init__(self, frames: Sequence[int]):
        self.frames = list(frames)
        super().__init__(f"{listed(self.frames)} cannot be read; choose without those in Store.damaged")


def listed(frames: Sequence[int]) -> str:
    """ "frame 3", "frames 3 to 9", "frames 3, 5, 9", or the first few."""
    frames = sorted(frames)
    if len(frames) == 1:
        return f"frame {frames[0]}"
    if len(frames) > 2 and frames[-1] - frames[0] == len(frames) - 1:
        return f"frames {frames[0]} to {frames[-1]}"
    return f"frames {', '.join(map(str, frames[:8]))}" + f" and {len(frames) - 8} more" * (len(frames) > 8)
