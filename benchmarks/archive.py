"""What the memory of a video stream takes: bytes per frame really written, by format, and seconds to write and to fetch.

The shape is Qwen2-7B's (28 layers, 4 KV heads of 128 channels, 196 tokens a frame, bf16), the numbers are random: nothing
here is about quality (benchmarks/low_bit.py is). Frames are written to a folder through `mmkv.streaming.store`, with
file and folder synced, and read back by another store. An hour at 0.5 frames per second is 1,800 frames.

    python benchmarks/archive.py
    python benchmarks/archive.py --frames 12 --formats int2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch
from common import environment, save
from rich.console import Console
from rich.table import Table

from mmkv.streaming.store import FORMATS, Chunk, Key, open_store

SHAPE = dict(layers=28, heads=4, dim=128, value_dim=128, tokens_per_frame=196)
HOUR = 1800  # frames at 0.5 per second
CHUNK = 4  # frames per write
FETCHES = 5


def chunk(first: int, device: str) -> Chunk:
    size = SHAPE["heads"], CHUNK * SHAPE["tokens_per_frame"], SHAPE["dim"]
    keys, values = ([torch.randn(size, device=device).bfloat16() for _ in range(SHAPE["layers"])] for _ in range(2))
    index = torch.stack([k.float().unflatten(1, (CHUNK, -1)).mean(2).transpose(0, 1).flatten(1) for k in keys])
    return Chunk(keys, values, index, [2.0 * (first + i) for i in range(CHUNK)])


def measure(packed: str | None, frames: int, device: str, folder: str) -> dict:
    """One format: write, read back cold (from files, which the system may still cache) and warm (RAM or device)."""
    where, key = f"disk:{folder}/{packed}", Key("random weights", "none")
    options = dict(SHAPE, dtype=torch.bfloat16, device=device, packed=packed)
    torch.manual_seed(0)
    written = []
    with open_store(where, key, ram_bytes=0, **options) as store:
        for first in range(0, frames, CHUNK):
            new = chunk(first, device)
            begun = time.perf_counter()
            store.append(new)
            written.append((time.perf_counter() - begun) / CHUNK)
        disk = store.bytes()["disk"]
        index = store.index.numel() * 4
    with open_store(where, key, mode="read", **options) as store:
        few = list(range(0, frames, max(frames // 8, 1)))[:8]
        cold = _fetching(store, few, range(FETCHES))
        before = store.counters()["bytes_from_disk"]
        warm = _fetching(store, few, range(FETCHES))
        assert store.counters()["bytes_from_disk"] == before
        keys, values = store.fetch(0, [0])
        torch.manual_seed(0)
        true = chunk(0, device)
        n = SHAPE["tokens_per_frame"]
        errors = [
            ((got.float() - want[:, :n].float()).square().mean() / want[:, :n].float().square().mean()).sqrt().item()
            for got, want in ((keys, true.keys[0]), (values, true.values[0]))
        ]
    return dict(
        packed=packed, frames=frames, bytes_per_frame=disk / frames, gib_per_hour=disk / frames * HOUR / 2**30,
        index_gib_per_hour=index / frames * HOUR / 2**30, key_error=errors[0], value_error=errors[1],
        write_ms_per_frame=statistics.median(written) * 1e3, cold_ms_per_frame_layer=cold, warm_ms_per_frame_layer=warm,
    )  # fmt: skip


def _fetching(store, frames: list[int], layers) -> float:
    """Median milliseconds per frame and layer."""
    taken = []
    for layer in layers:
        begun = time.perf_counter()
        store.fetch(layer, frames)
        if store.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - begun) * 1e3 / len(frames))
    return statistics.median(taken)


def checksum_speed() -> float:
    """GiB per second of the checksum, on one core."""
    data = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8).numpy()
    begun = time.perf_counter()
    zlib.crc32(data)
    return (1 << 26) / 2**30 / (time.perf_counter() - begun)


def show(result: dict) -> None:
    table = Table(
        "stored as", "KiB per frame", "GiB per hour", "write ms/frame", "cold fetch ms", "warm fetch ms", "error"
    )
    for r in result["rows"]:
        table.add_row(
            str(r["packed"]), f"{r['bytes_per_frame'] / 1024:.0f}", f"{r['gib_per_hour']:.2f}",
            f"{r['write_ms_per_frame']:.0f}", f"{r['cold_ms_per_frame_layer']:.2f}", f"{r['warm_ms_per_frame_layer']:.2f}",
            f"{r['key_error']:.2f} / {r['value_error']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=36)
    parser.add_argument("--formats", nargs="+", default=["dense", *FORMATS], choices=["dense", *FORMATS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "archive.json"))
    args = parser.parse_args()
    if args.frames < CHUNK or args.frames % CHUNK:
        parser.error(f"--frames {args.frames}: possible are multiples of {CHUNK}")
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.formats:
            rows.append(measure(None if name == "dense" else name, args.frames, args.device, folder))
    result = dict(
        shape=SHAPE, dtype="bfloat16", frames_per_chunk=CHUNK, frames_per_hour=HOUR, rows=rows,
        checksum_gib_per_s=checksum_speed(), environment=environment(),
    )  # fmt: skip
    show(result)
    save(args.out, result)


if __name__ == "__main__":
    main()
