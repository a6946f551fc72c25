"""What the page is told when it starts, and what its controls may be set to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = ("cosine", "dot", "uniform", "recent")  # how frames are retrieved
FORMATS = ("none", "int8", "int4", "int2", "vidkv")  # of stored keys and values
STORES = ("ram", "disk")


def disk_folder(store: str) -> Path | None:
    """The folder of "disk:PATH", None of "ram"."""
    kind, colon, path = store.partition(":")
    if store == "ram":
        return None
    if kind != "disk" or not colon or not path:
        raise ValueError(f"store={store!r}; possible are ram and disk:PATH")
    return Path(path).expanduser()


@dataclass(frozen=True)
class Limits:
    """What one page gives to its users.

    Args:
        minutes: longest video, or time of a webcam.
        megabytes: largest upload.
        users: videos that may be held at once.
        gibibytes: memory of one video, all tiers together.
        fps: pictures a second that are watched.
        side: pixels of a watched picture's longer side; larger ones are shrunk.
        window: tokens, where the controls start.
        retrieve: frames, where the controls start.
        store: "ram", or "disk:PATH", where the controls start.
    """

    minutes: float = 30.0
    megabytes: int = 200
    users: int = 8
    gibibytes: float = 4.0
    fps: float = 2.0
    side: int = 448
    window: int = 4096
    retrieve: int = 32
    store: str = "ram"

    def __post_init__(self) -> None:
        for name in ("megabytes", "users", "side", "window", "retrieve"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; possible are whole numbers from 1")
        for name, most in (("minutes", 24 * 60), ("fps", 60), ("gibibytes", 2**20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name}={value!r}; possible are numbers above 0, up to {most}")
        disk_folder(self.store)


@dataclass(frozen=True)
class Controls:
    """How one video is watched and asked about, as a user set it. Checked, since it comes from outside.

    Args:
        window: tokens that a frame sees while it is written, 1 to 1,000,000.
        retrieve: frames that each layer brings back for a question, 1 to 1024.
        method: one of METHODS.
        packed: one of FORMATS.
        store: one of STORES.
    """

    window: int
    retrieve: int
    method: str = "cosine"
    packed: str = "none"
    store: str = "ram"

    def __post_init__(self) -> None:
        for name, most in (("window", 1_000_000), ("retrieve", 1024)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r}; possible are whole numbers from 1 to {most}")
        for name, possible in (("method", METHODS), ("packed", FORMATS), ("store", STORES)):
            value = getattr(self, name)
            if value not in possible:
                raise ValueError(f"{name}={value!r}; possible are {', '.join(possible)}")
