"""`Disk`: the tier that outlives the process. A `Folder` with a file of identity, a lock, and a file per chunk.

- `store.json`: key, shape and a random id of the store, which every chunk repeats.
- `lock`: held by the one writer (flock; the system lets go of it when a process ends, however it ends).
- `<first frame>-<frames>.safetensors`: all layers of a chunk: `layer.<i>` uint8 `[F, row]` (`records`), `index` and `crc`.
  The metadata holds times, content hash and checksums. A file is complete or absent: it is written under another name,
  synced, renamed, and the folder is synced; only then is it acknowledged. Names of unfinished files end in `.tmp`.

Checksums are CRC-32 (zlib, 3 to 6 GiB/s on one core here), one per frame and layer, so a fetch reads and verifies its own
bytes alone, and one flipped bit costs one frame. They find accidents, not forgery.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import safefile
from .chunk import Chunk, Shape
from .folder import CHUNK, Folder

_FAILS = (errno.ENOENT, errno.EIO, errno.ESTALE)  # of these a file is damaged; others are the process's own trouble


@dataclass(eq=False)
class Part:
    """A chunk's file, as known after its header was read.

    Args:
        first, count: its frames.
        times: of each frame; None where the file is damaged.
        index: fp32 `[layers, F, Hkv * D]`; taken out by the store.
        content: hash of the stream up to its end.
        at: byte in the file where the rows of each layer begin.
        crc: checksum of each layer's rows, `[layers][F]`.
        wrong: why it cannot be read, "" where it can.
    """

    first: int
    count: int
    nbytes: int = 0
    times: list[float] | None = None
    index: Tensor | None = None
    content: str | None = None
    at: list[int] = field(default_factory=list)
    crc: list[list[int]] = field(default_factory=list)
    wrong: str = ""

    @property
    def name(self) -> str:
        return f"{self.first:08d}-{self.count:04d}.safetensors"


class Disk:
    """The chunks in a folder.

    Args:
        folder: where they are.
        shape: of the store.
        row: bytes per row.
    """

    def __init__(self, folder: Folder, shape: Shape, row: int):
        self.folder, self.shape, self.row = folder, shape, row
        self.path, self.writes, self.close = folder.path, folder.writes, folder.close
        self.parts: list[Part] = []
        self.frames = 0

    def write(self, rows: Sequence[Tensor], chunk: Chunk, content: str) -> Part:
        """A chunk's rows uint8 `[F, row]` of each layer, on the CPU; safe on disk when it returns.

        Raises:
            OSError: the disk is full or fails; everything before is intact.
        """
        part = Part(self.frames, len(chunk.times), times=list(chunk.times), content=content)
        part.crc = [
            [crc(row, part.first + i, layer) for i, row in enumerate(of_layer)] for layer, of_layer in enumerate(rows)
        ]
        tensors = {f"layer.{layer}": t.contiguous() for layer, t in enumerate(rows)}
        tensors["index"] = chunk.index.detach().cpu().contiguous()
        tensors["crc"] = torch.tensor(part.crc, dtype=torch.int64)
        told = json.dumps(
            dict(
                store=self.folder.id, first=part.first, times=part.times, content=content,
                index=zlib.crc32(safefile.octets(tensors["index"])), crc=zlib.crc32(safefile.octets(tensors["crc"])),
            )
        )  # fmt: skip
        about = dict(mmkv=told, crc32=str(zlib.crc32(told.encode())))
        try:
            self.folder.put(part.name, lambda fd: safefile.write(fd, tensors, about))
        except OSError as e:
            raise OSError(
                e.errno,
                f"{part.count} frames could not be stored in {self.path} ({e.strerror}); the {self.frames} before are intact",
            ) from None
        fd = os.open(self.path / part.name, os.O_RDONLY)
        try:
            self._place(part, safefile.header(fd)[1])
            part.nbytes = _allocated(fd)
        finally:
            os.close(fd)
        self._add(part)
        return part

    def scan(self) -> list[Part]:
        """Chunks that are new since the last scan, in order of their frames.

        Raises:
            ValueError: files of two different streams.
        """
        found = sorted((int(m[1]), int(m[2])) for m in map(CHUNK.fullmatch, os.listdir(self.path)) if m)
        new = []
        for first, count in found:
            if first < self.frames:
                if not any(p.first == first and p.count == count for p in self.parts):
                    raise ValueError(f"{self.path}: two files hold frame {first}; make the store anew")
                continue
            if first > self.frames:
                new.append(self._add(Part(self.frames, first - self.frames, wrong="the file is missing")))
            new.append(self._add(self._open(first, count)))
        return new

    def _add(self, part: Part) -> Part:
        self.parts.append(part)
        self.frames += part.count
        return part

    def _open(self, first: int, count: int) -> Part:
        """Read and verify a chunk's header and index."""
        part = Part(first, count)
        try:
            fd = os.open(self.path / part.name, os.O_RDONLY)
            try:
                part.nbytes = _allocated(fd)
                about, spans = safefile.header(fd)
                self._read_header(fd, part, about, spans)
            finally:
                os.close(fd)
        except ValueError as e:
            part.wrong = str(e)
        except OSError as e:
            if e.errno not in _FAILS:
                raise
            part.wrong = str(e.strerror)
        return part

    def _read_header(self, fd: int, part: Part, about: dict[str, str], spans: dict[str, tuple[int, int]]) -> None:
        damaged = ValueError("its header is damaged")
        if str(zlib.crc32(str(about.get("mmkv")).encode())) != about.get("crc32"):
            raise damaged
        told = json.loads(about["mmkv"])
        if told["store"] != self.folder.id or told["first"] != part.first or len(told["times"]) != part.count:
            raise ValueError("it belongs to another store")
        part.times, part.content = told["times"], told["content"]
        shape = self.shape
        index = torch.empty(shape.layers, part.count, shape.heads * shape.dim)
        crcs = torch.empty(shape.layers, part.count, dtype=torch.int64)
        for name, t in (("index", index), ("crc", crcs)):
            if name not in spans or spans[name][1] - spans[name][0] != t.numel() * t.element_size():
                raise damaged
            safefile.read_into(fd, spans[name][0], t)
            if zlib.crc32(safefile.octets(t)) != told[name]:
                raise ValueError(f"its {name} is damaged")
        self._place(part, spans)
        part.index, part.crc = index, crcs.tolist()

    def _place(self, part: Part, spans: dict[str, tuple[int, int]]) -> None:
        for layer in range(self.shape.layers):
            start, end = spans.get(f"layer.{layer}", (0, 0))
            if end - start != part.count * self.row:
                raise ValueError("its header is damaged")
            part.at.append(start)

    def read(self, part: Part, layer: int, frames: Sequence[int], out: Tensor) -> dict[int, str]:
        """Fill rows uint8 `[N, row]` on the CPU with frames of one part; returns frame: why, of those that are damaged."""
        wrong: dict[int, str] = {}
        try:
            fd = os.open(self.path / part.name, os.O_RDONLY)
        except OSError as e:
            if e.errno not in _FAILS:
                raise
            return dict.fromkeys(frames, str(e.strerror))
        try:
            for row, frame in zip(out, frames):
                i = frame - part.first
                try:
                    safefile.read_into(fd, part.at[layer] + i * self.row, row)
                    if crc(row, frame, layer) != part.crc[layer][i]:
                        wrong[frame] = "its checksum differs"
                except ValueError as e:
                    wrong[frame] = str(e)
                except OSError as e:
                    if e.errno not in _FAILS:
                        raise
                    wrong[frame] = str(e.strerror)
        finally:
            os.close(fd)
        return wrong

    @property
    def nbytes(self) -> int:
        """Bytes that the chunks take on the disk."""
        return sum(part.nbytes for part in self.parts)


def crc(row: Tensor, frame: int, layer: int) -> int:
    """Checksum of a row uint8 `[row]`, seeded with its place: a row of another place is no row of this one."""
    return zlib.crc32(safefile.octets(row), (frame * 4099 + layer) & 0xFFFFFFFF)


def _allocated(fd: int) -> int:
    """Bytes that an open file takes on the disk."""
    found = os.fstat(fd)
    return getattr(found, "st_blocks", 0) * 512 or found.st_size
