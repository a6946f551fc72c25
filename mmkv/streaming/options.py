"""What the options of a stream may be."""

from __future__ import annotations


def check_options(window: int, encode: int, fps: float, mode: str) -> None:
    """Raise ValueError for an impossible option of `Stream`."""
    for name, value in (("window", window), ("encode", encode)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}; possible are whole numbers from 1")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r}; possible are numbers above 0, up to 1000")
    if mode not in ("write", "read"):
        raise ValueError(f"mode={mode!r}; possible are 'write', 'read'")
