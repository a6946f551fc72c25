"""Sets that are made on this machine: written once, and never half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

WHOLE = ".whole"  # stands in a folder that is


def made_once(target: Path, write: Callable[[Path], object]) -> Path:
    """The folder `target`, made by `write` the first time; what is half made is never taken for whole.

    Args:
        target: its name should hold whatever its content depends on.
        write: called with an empty folder that it fills.

    Raises:
        OSError: there is something else in that place.
    """
    if (target / WHOLE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    write(beside)
    (beside / WHOLE).touch()
    try:
        os.rename(beside, target)
    except OSError:  # another process made it meanwhile
        if not (target / WHOLE).is_file():
            raise
    return target
