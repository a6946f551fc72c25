"""Small video files for tests, written with PyAV."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(i: int, width: int, height: int) -> np.ndarray:
    """A frame that tells its number by brightness and its left side by red: uint8 `[height, width, 3]`."""
    image = np.full((height, width, 3), (i * 12) % 256, np.uint8)
    image[:, : width // 2, 0] = 200
    return image


def write(
    path: Path,
    count: int = 20,
    fps: int = 10,
    times: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    sound: bool = False,
    faststart: bool = False,
    gop: int = 0,
) -> Path:
    """Write `count` frames at `fps`, or at `times` in milliseconds; count 0 leaves the picture track out."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as out:
        if count:
            stream = out.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.options = {"crf": "18", **({"g": str(gop)} if gop else {})}
            base = Fraction(1, 1000) if times else Fraction(1, fps)
            stream.codec_context.time_base = base
        if sound:
            _add_sound(out)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, base
            out.mux(stream.encode(frame))
        if count:
            out.mux(stream.encode())
    return path


def _add_sound(out: av.container.OutputContainer) -> None:
    track = out.add_stream("aac", rate=16000)
    track.layout = "mono"
    for i in range(16):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, i * 1024
        out.mux(track.encode(frame))
    out.mux(track.encode())


def turn(path: Path, height: int) -> Path:
    """Mark an mp4 file of `height` pixels as shot upright: players turn it a quarter clockwise."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, height << 16, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut(path: Path, part: float) -> Path:
    """Keep the first `part` of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path
