"""`Tiers`: rows of bytes on the device, in RAM and on disk, and the way up from one to the next."""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor

from mmkv.parts.storage import storage_bytes

from .damage import DamagedFrames, listed
from .disk import Disk
from .pool import Pool


class Tiers:
    """Rows uint8 `[size]` by (layer, frame).

    RAM holds all rows, or with a disk below those used last; a GPU holds those used last. Without a GPU, RAM is the device, and
    nothing is held twice. What is needed is gathered first and kept afterwards, in place of what was used longest ago, so
    a fetch never evicts what it needs itself.

    Args:
        size: bytes per row.
        device: where rows go.
        disk: the tier below RAM, None for none.
        device_bytes, ram_bytes: most bytes of rows there.
    """

    def __init__(self, size: int, device: torch.device, disk: Disk | None, device_bytes: int, ram_bytes: int):
        self.size, self.device, self.disk = size, device, disk
        self.gpu = device.type == "cuda"
        self.top = Pool(size, device_bytes // size if self.gpu else 0, device)
        self.ram = Pool(size, ram_bytes // size, torch.device("cpu"), pinned=self.gpu)
        self.damaged: set[int] = set()
        self.count = dict(hits=0, misses=0, bytes_to_device=0, bytes_from_disk=0)
        self.lock = threading.RLock()
        self._coming: dict[int, Future[tuple[list[int], Tensor]]] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._side: torch.cuda.Stream | None = None

    # ---- down

    def room(self, rows: int) -> bool:
        """Whether so many further rows fit into RAM beside all others."""
        return len(self.ram) + rows <= self.ram.limit

    def reserve(self, rows: int) -> None:
        """Allocate what `add` of so many rows takes in RAM."""
        with self.lock:
            if rows <= self.ram.limit:
                self.ram.reserve(rows)

    def add(self, first: int, rows: Sequence[Tensor]) -> None:
        """Into RAM: rows uint8 `[F, size]` of each layer; a chunk that is larger than RAM's share stays on disk alone."""
        with self.lock:
            if sum(map(len, rows)) <= self.ram.limit:
                for layer, of_layer in enumerate(rows):
                    self.ram.put([(layer, first + i) for i in range(len(of_layer))], of_layer)

    # ---- up

    def rows(self, layer: int, frames: Sequence[int]) -> Tensor:
        """Rows uint8 `[len(frames), size]` on the device, in the order given.

        Raises:
            DamagedFrames: some cannot be read.
        """
        arrived = self._arrived(layer)
        held, absent = self._held(layer, frames, arrived)
        loaded = self._load(layer, absent)
        if bad := [f for f in dict.fromkeys(frames) if f in self.damaged]:
            raise DamagedFrames(bad)
        self._keep(layer, absent, loaded)
        if absent == list(frames):
            return loaded
        found = {**arrived, **held, **dict(zip(absent, loaded))}
        return torch.stack([found[f] for f in frames])

    def ahead(self, layer: int, frames: Sequence[int]) -> None:
        """Begin to load what `rows` of this layer will want, in a thread and on a side stream; a second call replaces it."""
        with self.lock:
            if self.disk is None and not self.gpu:
                return  # everything is where `rows` takes it from
            absent = [f for f in dict.fromkeys(frames) if not self.top.has((layer, f))]
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "mmkv-store")
            self._coming[layer] = self._worker.submit(self._aside, layer, absent)

    def _aside(self, layer: int, frames: list[int]) -> tuple[list[int], Tensor]:
        if not self.gpu:
            return frames, self._load(layer, frames)
        with ExitStack() as around:
            around.enter_context(torch.cuda.device(self.device))
            if self._side is None:
                self._side = torch.cuda.Stream(self.device)
            around.enter_context(torch.cuda.stream(self._side))
            rows = self._load(layer, frames)
            self._side.synchronize()
        return frames, rows

    def _arrived(self, layer: int) -> dict[int, Tensor]:
        """Rows that were loaded ahead, by frame."""
        with self.lock:
            coming = self._coming.pop(layer, None)
        if coming is None:
            return {}
        frames, rows = coming.result()
        if rows.is_cuda:
            rows.record_stream(torch.cuda.current_stream(self.device))
        self._keep(layer, frames, rows)
        return dict(zip(frames, rows))

    def _held(
        self, layer: int, frames: Sequence[int], arrived: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], list[int]]:
        """Copies of the rows that are on the device, and the frames that are nowhere there."""
        rows, absent = {}, []
        with self.lock:
            for frame in dict.fromkeys(frames):
                if frame in arrived:
                    continue
                row = self.top.get((layer, frame))
                if row is None:
                    absent.append(frame)
                else:
                    rows[frame] = row
            self.count["hits"] += len(rows)
            copies = torch.stack(list(rows.values())) if rows else []
        return dict(zip(rows, copies)), absent

    def _keep(self, layer: int, frames: Sequence[int], rows: Tensor) -> None:
        """On the device, what can be read."""
        if self.top.limit:
            with self.lock:
                good = [i for i, f in enumerate(frames) if f not in self.damaged]
                self.top.put([(layer, frames[i]) for i in good], [rows[i] for i in good])

    def _load(self, layer: int, frames: Sequence[int]) -> Tensor:
        """Rows uint8 `[len(frames), size]` on the device, from RAM and disk; damaged ones are noted and hold anything."""
        out = torch.empty(len(frames), self.size, dtype=torch.uint8, device=self.device)
        absent = []
        with self.lock:
            for i, frame in enumerate(frames):
                row = self.ram.get((layer, frame))
                if row is None:
                    absent.append(i)
                else:
                    out[i].copy_(row, non_blocking=True)
            if self.gpu:
                torch.cuda.current_stream(self.device).synchronize()  # once the lock is free a row may be overwritten
                self.count["bytes_to_device"] += out.numel()
            self.count["misses"] += len(frames) if self.gpu else len(absent)
            self.count["hits"] += 0 if self.gpu else len(frames) - len(absent)
        if absent:
            wanted = [frames[i] for i in absent]
            rows = self._from_disk(layer, wanted)
            out[torch.tensor(absent, device=self.device)] = rows.to(self.device)
            with self.lock:
                good = [i for i, f in enumerate(wanted) if f not in self.damaged]
                self.ram.put([(layer, wanted[i]) for i in good], [rows[i] for i in good])
        return out

    def _from_disk(self, layer: int, frames: list[int]) -> Tensor:
        """Rows uint8 `[len(frames), size]` on the CPU; no lock is held, other frames can be fetched meanwhile."""
        disk = self.disk
        if disk is None:
            raise RuntimeError(f"{listed(frames)} of layer {layer}: not in RAM, and there is no disk")
        rows = torch.empty(len(frames), self.size, dtype=torch.uint8)
        starts = [p.first for p in disk.parts]
        at = 0
        wrong: dict[int, str] = {}
        for i, group in groupby(frames, lambda f: bisect_right(starts, f) - 1):
            of_part, part = list(group), disk.parts[i]
            if not part.wrong:
                wrong |= disk.read(part, layer, of_part, rows[at : at + len(of_part)])
            at += len(of_part)
        with self.lock:
            self.count["bytes_from_disk"] += rows.numel()
            self.report(wrong)
        return rows

    def report(self, wrong: dict[int, str]) -> None:
        """Note damaged frames and why, and warn of those that are new."""
        new = {f: why for f, why in wrong.items() if f not in self.damaged}
        self.damaged |= new.keys()
        for why in dict.fromkeys(new.values()):
            frames = [f for f, w in new.items() if w == why]
            folder = "" if self.disk is None else f"{self.disk.path}: "
            warnings.warn(f"{folder}{listed(frames)} cannot be read ({why}); left out from now on", stacklevel=2)

    # ---- what is held

    def bytes(self) -> dict[str, int]:
        """Bytes of rows by tier."""
        with self.lock:
            arrived = [f.result()[1] for f in self._coming.values() if f.done() and not f.exception()]
            device = storage_bytes([*self.top.slabs, *arrived])
            ram = storage_bytes(self.ram.slabs)
        if not self.gpu:
            device, ram = 0, ram + device
        return dict(device=device, ram=ram, disk=0 if self.disk is None else self.disk.nbytes)

    def close(self) -> None:
        """Let go of everything but what is on disk."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        with self.lock:
            self._coming.clear()
            self.top.clear()
            self.ram.clear()
        if self.disk is not None:
            self.disk.close()
