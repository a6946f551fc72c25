"""`Folder`: a store's place on disk: its identity, its one writer, and files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import safefile
from .chunk import Shape
from .key import Key

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second writer away there
    fcntl = None  # type: ignore[assignment]

CHUNK = re.compile(r"(\d{8,})-(\d{4,})\.safetensors")
_UNFINISHED = re.compile(r"(\d{8,}-\d{4,}\.safetensors|store\.json)\.tmp")
_VERSION = 2  # 1 stored five trits of a block as a whole number, 2 as a fraction


def peek(where: str) -> dict[str, Any]:
    """What a store was made as, without opening it: {"key": {...}, "shape": {...}}; `where` as for `open_store`.

    Raises:
        ValueError: there is none.
    """
    path = Path(where.removeprefix("disk:")).expanduser()
    try:
        found = json.loads((path / "store.json").read_text())
        if found["version"] != _VERSION:
            raise ValueError(
                f"{path} is a store of version {found['version']}; this release reads {_VERSION}; watch the video anew"
            )
        return dict(key=dict(found["key"]), shape=dict(found["shape"]), id=str(found["id"]))
    except FileNotFoundError:
        raise ValueError(f"{path} holds no store; watch a video with this store first") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: store.json is damaged; make the store anew") from None


class Folder:
    """The folder of a store.

    Args:
        path: the folder; a writer makes it.
        key, shape: compared with what is stored.
        write: take the lock, remove unfinished files; else change nothing.
        resume: whether a writer may find frames.
    """

    def __init__(self, path: Path, key: Key, shape: Shape, write: bool, resume: bool):
        self.path, self.shape, self.writes = path, shape, write
        self._lock = -1
        if write:
            self._prepare(key)
        try:
            found = peek(str(path))
            key.check(Key(**found["key"]), str(path))
            if other := shape.differs(found["shape"]):
                raise ValueError(f"{path} holds another kind of memory ({other}); use another folder for this one")
            self.id = found["id"]
            if write and not resume and any(CHUNK.fullmatch(name) for name in os.listdir(path)):
                raise ValueError(f"{path} holds frames already and resume=False; use another folder, or resume")
            if write:
                self._tidy()
        except BaseException:
            self.close()
            raise

    def _prepare(self, key: Key) -> None:
        """Make the folder and its identity, and take the lock."""
        if key.video is None:
            raise ValueError("key: video is None, which is for reading; give the video's hash, or '' for a live stream")
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync(folder.parent)
        names = set(os.listdir(self.path))
        if "store.json" not in names and any(n != "lock" and not _UNFINISHED.fullmatch(n) for n in names):
            raise ValueError(f"{self.path} is not empty and holds no store; give an empty or a new folder")
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self.close()
            if e.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(
                    f"{self.path} is being written by another process or stream; read it, or use another folder"
                ) from None
            raise
        if not (self.path / "store.json").exists():
            told = dict(version=_VERSION, id=uuid4().hex, key=asdict(key), shape=asdict(self.shape))
            self.put("store.json", lambda fd: safefile.write_all(fd, json.dumps(told).encode()))

    def _tidy(self) -> None:
        """Remove what a killed writer left unfinished."""
        for name in os.listdir(self.path):
            if _UNFINISHED.fullmatch(name):
                (self.path / name).unlink(missing_ok=True)

    def put(self, name: str, write) -> None:
        """A file that is there whole or not at all, synced with its folder."""
        unfinished = self.path / f"{name}.tmp"
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            try:
                write(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(unfinished, self.path / name)
            try:
                sync(self.path)
            except BaseException:
                (self.path / name).unlink(missing_ok=True)  # not acknowledged, so not there
                raise
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1


def sync(folder: Path) -> None:
    """Make a folder's entries survive a crash of the machine."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
