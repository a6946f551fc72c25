"""GUI agents: prompts, histories of screenshots, parsers of answers, and sessions that keep the KV of earlier steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmkv.agents.action import TYPES, Action, Parsed, PastStep
from mmkv.agents.coordinates import Resize, from_screen, to_screen
from mmkv.agents.formats import FORMATS, AgentFormat, format_for, get_format, image, register, text
from mmkv.agents.history import recent
from mmkv.agents.opencua import OpenCUA
from mmkv.agents.pyautogui import to_pyautogui
from mmkv.agents.tiny import Tiny
from mmkv.agents.ui_tars import UITars

if TYPE_CHECKING:
    from mmkv.agents.agent import Agent, Step

__all__ = [
    "FORMATS",
    "TYPES",
    "Action",
    "Agent",
    "AgentFormat",
    "OpenCUA",
    "Parsed",
    "PastStep",
    "Resize",
    "Step",
    "Tiny",
    "UITars",
    "format_for",
    "from_screen",
    "get_format",
    "image",
    "recent",
    "register",
    "text",
    "to_pyautogui",
    "to_screen",
]


def __getattr__(name: str) -> Any:
    if name in ("Agent", "Step"):  # formats need no torch
        from mmkv.agents import agent

        return getattr(agent, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
