"""What tells data apart in a result: a digest of files, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest(read: Iterable[Path], sized: Iterable[Path] = ()) -> str:
    """16 hex digits of the names and contents of some files, and of the names and sizes of others.

    Args:
        read: annotations.
        sized: media, too large to read each time; one that is missing counts as such.
    """
    found = hashlib.sha256()
    for path in sorted(read):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(set(sized)):
        size = path.stat().st_size if path.is_file() else -1
        found.update(f"{path.name}\0{size}\0".encode())
    return found.hexdigest()[:16]
