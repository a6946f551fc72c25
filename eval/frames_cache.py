"""Decoded frames on disk, so that a video is decoded once for all methods, runs and workers."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mmkv.eval.media import Clip
from mmkv.eval.sampling import Sampling, read_clip

LIMIT = 20 * 2**30  # bytes
SUFFIX = ".npz"


@dataclass
class Throughput:
    """What reading videos cost so far.

    Args:
        decoded, cached: videos that were decoded, and that came from the cache.
        frames: frames decoded.
        seconds: spent decoding, opening and hashing included.
        cached_seconds: spent reading from the cache.
    """

    decoded: int = 0
    cached: int = 0
    frames: int = 0
    seconds: float = 0.0
    cached_seconds: float = 0.0

    def __str__(self) -> str:
        rate = f" ({self.frames / self.seconds:,.0f} frames/s)" if self.seconds else ""
        found = f"; {self.cached} from the cache in {self.cached_seconds:.1f} s" if self.cached else ""
        return f"{self.decoded} videos decoded, {self.frames:,} frames in {self.seconds:.1f} s{rate}{found}"


@dataclass
class FramesCache:
    """A folder of decoded clips, known by the video's content, the sampling and the size; the least recently used go first.

    Several processes may share one folder: entries are written beside and renamed.

    Args:
        folder: where entries lie; None keeps nothing and decodes each time.
        limit: bytes that entries may take together; a clip larger than that is not kept.
        throughput: what reading cost so far.
    """

    folder: Path | None
    limit: int = LIMIT
    throughput: Throughput = field(default_factory=Throughput)

    def read(self, path: str | os.PathLike[str], sampling: Sampling) -> Clip:
        """The chosen frames of a video file; errors as `mmkv.eval.sampling.read_clip`."""
        begun = time.perf_counter()
        entry = None
        if self.folder is not None and Path(path).is_file():
            entry = self.folder / (key(path, sampling) + SUFFIX)
            found = _load(entry)
            if found is not None:
                self.throughput.cached += 1
                self.throughput.cached_seconds += time.perf_counter() - begun
                return found
        clip = read_clip(path, sampling)
        self.throughput.decoded += 1
        self.throughput.frames += len(clip.frames)
        self.throughput.seconds += time.perf_counter() - begun
        if entry is not None and clip.frames.nbytes <= self.limit:
            _save(entry, clip)
            self._trim(entry)
        return clip

    def _trim(self, newest: Path) -> None:
        """Delete the entries that were used longest ago until the rest fits; never the newest."""
        found = []
        for entry in newest.parent.glob(f"*{SUFFIX}"):
            try:
                told = entry.stat()
            except FileNotFoundError:  # another process was faster
                continue
            found.append((told.st_mtime_ns, told.st_size, entry))
        total = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda f: f[0]):
            if total <= self.limit:
                break
            if entry != newest:
                entry.unlink(missing_ok=True)
                total -= size


def key(path: str | os.PathLike[str], sampling: Sampling) -> str:
    """Hex digest of a video file's content and of everything that decides about its frames."""
    found = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode())
    with open(path, "rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:40]


def _load(entry: Path) -> Clip | None:
    """The entry, marked as used just now; None where there is none or it is damaged."""
    try:
        with np.load(entry, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            clip = Clip(frames=stored["frames"], **about | {"timestamps": tuple(about["timestamps"])})
        os.utime(entry)
        return clip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        entry.unlink(missing_ok=True)
        return None


def _save(entry: Path, clip: Clip) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(clip).items() if name != "frames"}
    beside = entry.with_suffix(f".{os.getpid()}.tmp")
    with open(beside, "wb") as file:
        np.savez(file, frames=clip.frames, about=json.dumps(about))
    os.replace(beside, entry)
