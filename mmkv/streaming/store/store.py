"""`Store`: the frames of one stream, in the order of their times."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkv.parts.storage import storage_bytes

from .chunk import Chunk, Shape
from .disk import Part
from .records import Record
from .tiers import Tiers


class Store:
    """Keys and values of every frame of a stream; `open_store` makes one.

    Threads may append, fetch and prefetch at the same time. On a GPU, fetch from one CUDA stream. Where RAM and device hold
    what is told in `Tiers`; packed frames stay packed in every tier, a fetch decodes those that it returns.

    Attributes:
        times: seconds of each frame; one whose file's header is lost has the time of the frame before.
        content: content hash that the last `append` was given ("" where none was, None where its file is damaged).
        layers, heads, tokens_per_frame: sizes.
    """

    def __init__(self, shape: Shape, record: Record, tiers: Tiers):
        self.shape, self._record, self._tiers = shape, record, tiers
        self.layers, self.heads, self.tokens_per_frame = shape.layers, shape.heads, shape.tokens
        self.device = tiers.device
        self._index = torch.empty(shape.layers, 0, shape.heads * shape.dim, device=self.device)
        self.times: list[float] = []
        self.content: str | None = ""
        self._contents: dict[int, str | None] = {0: ""}
        self._writing = threading.Lock()  # one append at a time; fetches go on meanwhile
        self._closed = False
        self.refresh()

    # ---- what is known

    @property
    def frames(self) -> int:
        """Frames that are stored."""
        return len(self.times)

    @property
    def index(self) -> Tensor:
        """fp32 `[layers, frames, Hkv * D]` of all frames, on the device; zeros where a file is damaged. Do not write to it."""
        return self._index[:, : len(self.times)]

    @property
    def damaged(self) -> list[int]:
        """Frames that cannot be read, ascending; each was reported by a warning when it was found."""
        return sorted(self._tiers.damaged)

    def bytes(self) -> dict[str, int]:
        """Bytes held on the "device", in "ram" and on "disk", index included. Without a GPU all but the disk is "ram"."""
        held = self._tiers.bytes()
        held["device" if self._tiers.gpu else "ram"] += storage_bytes([self._index])
        return held

    def counters(self) -> dict[str, int]:
        """Since opening: "hits", frames of a layer that were on the device (without a GPU: in RAM) when they were wanted, and
        "misses", those that were not; "bytes_to_device", copied to a GPU, and "bytes_from_disk"."""
        with self._tiers.lock:
            return dict(self._tiers.count)

    # ---- writing

    def append(self, chunk: Chunk, content: str = "") -> int:
        """Store a chunk; returns its first frame. When it returns, the chunk is safe: with a disk, file and folder are synced.

        Args:
            chunk: new frames.
            content: hash of all frames so far, these included (`advance`); compared on resuming by `check_content`.

        Raises:
            ValueError: a chunk of other sizes, times that do not ascend, a store that is closed or only read.
            MemoryError: more than `ram_bytes`. OSError: the disk is full or fails. What was stored before is intact.
        """
        with self._writing, torch.no_grad():
            self._open()
            tiers = self._tiers
            if tiers.disk is not None and not tiers.disk.writes:
                raise ValueError("the store was opened for reading; open it with mode='write'")
            self.shape.check(chunk, self.times[-1] if self.times else -float("inf"))
            first, frames = self.frames, len(chunk.times)
            if tiers.disk is None and not tiers.room(frames * self.layers):
                size = self.layers * self._record.size
                raise MemoryError(
                    f"{frames} more frames beside {first} take {(first + frames) * size} bytes of RAM, ram_bytes is "
                    f"{tiers.ram.limit * tiers.size}: raise it, pack, or use a disk store"
                )
            rows = [self._record.encode(k, v).cpu() for k, v in zip(chunk.keys, chunk.values)]
            tiers.reserve(frames * self.layers)  # whatever can fail comes before the frames are there
            self._grow(first + frames)
            if tiers.disk is not None:
                tiers.disk.write(rows, chunk, content)
            tiers.add(first, rows)
            self._take(first, chunk.index, chunk.times, content)
            return first

    def check_content(self, content: str) -> None:
        """Raise ValueError unless `content` is the hash that the last append was given: on resuming, of the same first frames."""
        if self.content != content:
            raise ValueError(
                f"the first {self.frames} frames are not those that this store remembers; use another store for this video"
            )

    def content_at(self, frames: int) -> str | None:
        """The content hash after so many frames; None where no append ended there, or its file is damaged."""
        return self._contents.get(frames)

    def _take(self, first: int, index: Tensor, times: Sequence[float], content: str | None) -> None:
        self._index[:, first : first + len(times)] = index.to(self.device)
        self.content = self._contents[first + len(times)] = content
        self.times.extend(times)  # last: now the frames are there

    def _grow(self, frames: int) -> None:
        """Room in the index, half as much again each time: a frame is copied a bounded number of times on average."""
        have = self._index.shape[1]
        if frames > have:
            room = max(frames, have + have // 2)
            grown = torch.empty(self.layers, room, self._index.shape[2], device=self.device)
            grown[:, : self.frames] = self.index
            self._index = grown

    # ---- reading

    def refresh(self) -> int:
        """Take in what a writer has stored since; returns how many frames are new. A writer has nothing to take in."""
        with self._writing:
            self._open()
            before = self.frames
            if self._tiers.disk is not None:
                for part in self._tiers.disk.scan():
                    self._meet(part)
            return self.frames - before

    def _meet(self, part: Part) -> None:
        """Take in a chunk's file; of a damaged one only that there were frames."""
        self._grow(part.first + part.count)
        if not part.wrong and self.times and part.times and part.times[0] <= self.times[-1]:
            part.wrong = "its times do not ascend"
        if not part.wrong and part.index is not None and part.times is not None:
            self._take(part.first, part.index, part.times, part.content)
        else:
            with self._tiers.lock:
                self._tiers.report(dict.fromkeys(range(part.first, part.first + part.count), part.wrong))
            nothing = torch.zeros(self.layers, part.count, self._index.shape[2])
            self._take(part.first, nothing, [self.times[-1] if self.times else 0.0] * part.count, None)
        part.index = None

    def fetch(self, layer: int, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys `[Hkv, len(frames) * n, D]` and values `[Hkv, len(frames) * n, Dv]` of frames, in the order given.

        They are on the device and in the model's dtype, and the caller's own.

        Raises:
            ValueError: no such layer or frame.
            DamagedFrames: some cannot be read; the others can be fetched without them.
        """
        self._check(layer, frames)
        return self._record.decode(self._tiers.rows(layer, frames))

    def prefetch(self, layer: int, frames: Sequence[int]) -> None:
        """Begin to load frames that a fetch of this layer will want, in a thread and on a side stream; the fetch waits for it.

        One prefetch per layer is under way at a time: a second one replaces the first.
        """
        self._check(layer, frames)
        self._tiers.ahead(layer, frames)

    def _check(self, layer: int, frames: Sequence[int]) -> None:
        self._open()
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer}; there are 0 to {self.layers - 1}")
        for frame in frames:
            if not 0 <= frame < self.frames:
                raise ValueError(f"frame {frame}; {self.frames} are stored, counted from 0")

    # ---- the end

    def _open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed; open it again")

    def close(self) -> None:
        """Let go of memory and of the folder; what is on disk stays. Closing twice does nothing."""
        with self._writing:
            self._closed = True
            self._tiers.close()
            self._index = self._index[:, :0].clone()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()
