"""`Key`: what a memory was made from, so that no video is ever answered from another's."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Key:
    """Identity of a store. Each part is any string that differs whenever what it stands for does.

    Args:
        model: hash of configuration and weights.
        preprocessing: how pictures become embeddings: processor settings, sizes, frames per second, prompt.
        video: hash of the file's content; "" for a live stream, whose frames are only known as they come: give `append` a
            running hash of them (`advance`) and compare it on resuming (`Store.check_content`). None, for reading only,
            takes whatever video is stored.
    """

    model: str
    preprocessing: str
    video: str | None = ""

    def __post_init__(self):
        for name, part in asdict(self).items():
            if not isinstance(part, str) and not (name == "video" and part is None):
                raise ValueError(f"key: {name} is {part!r}; give a string (a hash) that differs when the {name} does")

    def check(self, stored: Key, where: str) -> None:
        """Raise ValueError, naming what differs, unless `stored` is the same."""
        mine, its = asdict(self), asdict(stored)
        other = [name for name in mine if mine[name] is not None and mine[name] != its[name]]
        if other:
            told = ", ".join(f"{name} {_short(its[name])}, not {_short(mine[name])}" for name in other)
            raise ValueError(
                f"{where} is the memory of another {' and '.join(other)} ({told}); use another folder for this one"
            )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 24 else text[:24] + "...")


def advance(content: str, data: bytes | bytearray | memoryview) -> str:
    """The running content hash of a stream after `data` (the pictures of new frames), from the one before; "" at first.

    Hashes of hashes: a stream resumes from the stored hash alone, and how frames were cut into calls matters, so hash
    frame by frame. BLAKE2b, 128 bits.
    """
    return hashlib.blake2b(data, digest_size=16, key=content.encode()[:64]).hexdigest()
