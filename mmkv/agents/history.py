"""Which screenshots of the past a prompt shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmkv.agents.action import PastStep


def recent(steps: Sequence[PastStep], screenshots: int, slack: int = 0) -> list[PastStep]:
    """The steps, of which only the newest keep their screenshots; older ones are told as text.

    Args:
        steps: oldest first.
        screenshots: pictures in the prompt, the current one included, which is not among the steps.
        slack: how many more there may be: the window moves once in `slack + 1` steps, by as many, since each move changes the
            prompt from its oldest picture on and so costs the KV of all that follows.

    Raises:
        ValueError: numbers out of range.
    """
    if type(screenshots) is not int or screenshots < 1:
        raise ValueError(f"screenshots={screenshots!r}; possible are whole numbers from 1 (the current one)")
    if type(slack) is not int or slack < 0:
        raise ValueError(f"slack={slack!r}; possible are whole numbers of screenshots from 0")
    first = max(len(steps) - (screenshots - 1), 0) // (slack + 1) * (slack + 1)
    return [step if index >= first else replace(step, screenshot=None) for index, step in enumerate(steps)]
