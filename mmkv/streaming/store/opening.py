"""`open_store`: makes or opens the memory of one stream."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .chunk import Shape
from .disk import Disk
from .folder import Folder
from .key import Key
from .records import record
from .store import Store
from .tiers import Tiers

DEVICE_BYTES = 1 << 30
RAM_CACHE = 4 << 30  # over a disk; without one RAM holds everything


def open_store(
    where: str, key: Key, *, layers: int, heads: int, dim: int, value_dim: int, tokens_per_frame: int, dtype: torch.dtype,
    device: torch.device | str, packed: str | None = None, device_bytes: int = DEVICE_BYTES, ram_bytes: int | None = None,
    resume: bool = True, mode: str = "write",
) -> Store:  # fmt: skip
    """Open the memory of one stream, or make it.

    Args:
        where: "ram", or "disk:PATH" for a folder that outlives the process; one folder holds one stream.
        key: what it is made from; a folder made from anything else is refused.
        layers, heads, dim, value_dim: decoder layers, KV heads, channels of a key head and of a value head.
        tokens_per_frame: n, the same for all frames.
        dtype: of keys and values: torch.float32, float16 or bfloat16.
        device: where fetches and the index go.
        packed: None (as they are), "int8", "int4", "int2" (keys per channel over a frame, values per token, KIVI) or "vidkv"
            (1.5-bit keys, ternary values).
        device_bytes: most bytes of frames kept on a GPU, 1 GiB; unused without one.
        ram_bytes: most bytes of frames in RAM; None for half of the machine's memory ("ram") or 4 GiB ("disk:PATH").
        resume: continue a folder that holds frames; False refuses it.
        mode: "write" (one at a time), or "read" (any number, also while one writes; `Store.refresh` sees what is new).

    Raises:
        ValueError: options out of range; a folder of another model, preprocessing or video, of other sizes, or that is being
            written by another; reading where there is no store.
    """
    shape = Shape(layers, heads, dim, value_dim, tokens_per_frame, str(dtype).removeprefix("torch."), packed)
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r}: possible are 'cpu' and 'cuda'")
    for name, count in (("device_bytes", device_bytes), ("ram_bytes", 0 if ram_bytes is None else ram_bytes)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} {count!r}: possible are integers from 0")
    if mode not in ("write", "read"):
        raise ValueError(f"mode {mode!r}: possible are 'write', 'read'")
    rows = record(shape)
    path = folder_of(where, mode)
    if path is None:
        most = _half_of_memory() if ram_bytes is None else ram_bytes
        return Store(shape, rows, Tiers(rows.size, device, None, device_bytes, most))
    disk = Disk(Folder(path, key, shape, mode == "write", resume), shape, rows.size)
    try:
        most = RAM_CACHE if ram_bytes is None else ram_bytes
        return Store(shape, rows, Tiers(rows.size, device, disk, device_bytes, most))
    except BaseException:
        disk.close()
        raise


def folder_of(where: str, mode: str) -> Path | None:
    """The folder of "disk:PATH", None for "ram".

    Raises:
        ValueError: neither.
    """
    if where == "ram" and mode == "write":
        return None
    if isinstance(where, str) and where.startswith("disk:") and where != "disk:":
        return Path(where.removeprefix("disk:")).expanduser()
    if mode == "read":
        raise ValueError(f"store {where!r}: to read, possible is 'disk:PATH'")
    raise ValueError(f"store {where!r}: possible are 'ram', 'disk:PATH'")


def _half_of_memory() -> int:
    if not hasattr(os, "sysconf"):
        return 8 << 30  # bytes; Windows does not tell this way
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
