"""What an agent is shown at a step: the earlier steps in its format's words, some screenshots, and the current one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmkv.agents import AgentFormat, Parsed, PastStep
from mmkv.eval.agent_chat import placeholders
from mmkv.eval.agentnetbench.data import Step, Trajectory
from mmkv.eval.agentnetbench.told import told_step


def size_of(image: Path) -> tuple[int, int]:
    """Width and height of an image file, (0, 0) where there is none."""
    if not image.is_file():
        return 0, 0
    with Image.open(image) as picture:
        return picture.size


def messages_at(
    trajectory: Trajectory,
    index: int,
    agent: AgentFormat,
    screenshots: int,
    own: Mapping[int, str] | None = None,
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The chat at a step, and the screenshots in the order in which its image parts stand.

    Args:
        trajectory: the task.
        index: the step that is asked.
        agent: the format.
        screenshots: the most pictures, the current one included; of the steps right before, those whose file is there.
        own: what the model itself answered at earlier steps, by index; a step that it has no answer to, and all without `own`,
            are told as the annotator described them.
    """
    first = index - (screenshots - 1)
    past = [_past(step, agent, step.index >= first, (own or {}).get(step.index)) for step in trajectory.steps[:index]]
    return placeholders(agent.messages(trajectory.instruction, past, trajectory.steps[index].image))


def _past(step: Step, agent: AgentFormat, recent: bool, answer: str | None) -> PastStep:
    picture = step.image if recent and step.image.is_file() else None
    size = size_of(step.image)
    if answer is None:
        return told_step(step, size, agent.resize, picture)
    parsed = agent.parse(answer, size) if all(size) else Parsed(answer)
    # GUI-KV tells an earlier step by the whole output; formats that tell parts find them in it
    return replace(PastStep.of(parsed), screenshot=picture)
