"""Infinity, a visual autoregressive model that paints an image scale by scale from text (arXiv 2412.04431)."""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "Infinity": "adapter",
    "InfinityConfig": "configuration",
    "named_config": "configuration",
    "Text": "conditioning",
    "InfinityModel": "transformer",
    "InfinityForImageGeneration": "model",
    "Schedule": "schedules",
    "scale_schedule": "schedules",
    "InfinityVAE": "autoencoder",
    "InfinityVAEConfig": "vae_configuration",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
