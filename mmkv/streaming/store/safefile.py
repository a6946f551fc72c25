"""Files of the safetensors format: written in one go without a copy, read in parts without a memory map.

The library reads through a memory map, where a file that a shared disk loses or cuts kills the process with SIGBUS; a read
call fails like any other. Any reader of the format opens these files.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

_NAMES = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}
_MOST_HEADER = 100_000_000  # bytes, as the format has it


def write(fd: int, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write contiguous CPU tensors and strings about them to an open file.

    Raises:
        OSError: the disk is full, or fails.
    """
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that all lie aligned
    for name, t in ordered:
        end = at + t.numel() * t.element_size()
        header[name] = dict(dtype=_NAMES[t.dtype], shape=list(t.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_all(fd, len(text).to_bytes(8, "little") + text)
    for _, t in ordered:
        write_all(fd, octets(t))


def octets(t: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of it: one call may write less."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def header(fd: int) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Strings about an open file, and where each tensor's bytes lie in it: first and past the last.

    Raises:
        ValueError: no such file, or a truncated one.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise ValueError("it is truncated")
    try:
        found = json.loads(os.pread(fd, length, 8))
        about = found.pop("__metadata__")
        spans = {name: tuple(8 + length + at for at in t["data_offsets"]) for name, t in found.items()}
        if size < max(end for _, end in spans.values()):
            raise ValueError("it is truncated")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("its header is damaged") from None
    return about, spans


def read_into(fd: int, at: int, out: Tensor) -> None:
    """Fill a contiguous CPU tensor from byte `at` on.

    Raises:
        ValueError: the file ends before.
    """
    view = octets(out)
    while view.nbytes:
        got = os.preadv(fd, [view], at)
        if not got:
            raise ValueError("it is truncated")
        view, at = view[got:], at + got
