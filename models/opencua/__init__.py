"""OpenCUA-7B (arXiv 2508.09123): our own port, loaders of its checkpoint and of its processor. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "OpenCUA": "modeling",
    "OpenCUAConfig": "configuration",
    "OpenCUAModel": "modeling",
    "OpenCUAProcessor": "processing",
    "load": "loading",
}

__all__ = ["OpenCUA", "OpenCUAConfig", "OpenCUAModel", "OpenCUAProcessor", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
