"""A GUI agent's chat as a prompt: pictures become placeholders, and are told apart in the order in which they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def placeholders(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns whose content is a list of `{"type": "text" | "image"}` parts, and what the image parts held, in order.

    Args:
        messages: of `AgentFormat.messages`; a content may be a plain text.
    """
    turns, shown = [], []
    for turn in messages:
        content = turn["content"]
        parts: list[dict[str, Any]] = [dict(type="text", text=content)] if isinstance(content, str) else content
        shown += [part["image"] for part in parts if part["type"] == "image"]
        plain = [dict(type="image") if part["type"] == "image" else dict(part) for part in parts]
        turns.append(dict(role=turn["role"], content=plain))
    return turns, shown
