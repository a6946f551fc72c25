"""`mmkv watch` and `mmkv ask --store`: a video is encoded once, into a folder, and asked about from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkv.streaming.answer import Answer
from mmkv.streaming.pieces import batches
from mmkv.streaming.store import cache_of
from mmkv.streaming.stream import stream
from mmkv.video import Video

MOST_AT_A_TIME = 16  # pictures that are decoded before they are watched


def content_of(path: Path, fps: float) -> str:
    """Hash of a file and of how it is sampled: what a store is told about the video."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return f"{digest} at {fps:g} a second"


def watch(
    model: Any, processor: Any, clip: Video, store: str, *, window: int, packed: str | None, tick: Callable[[int], Any]
) -> tuple[int, dict[str, int]]:
    """Encode a video into a store, from where it was left; returns frames stored, and bytes by tier.

    Args:
        model, processor: that will answer.
        clip: the video, at the pictures per second that are watched.
        store: "disk:PATH".
        window: tokens that a frame sees.
        packed: name of the format of keys and values, as `mmkv.streaming.store.FORMATS` has them; None for none.
        tick: called with the number of pictures that were taken in.
    """
    content = content_of(clip.path, clip.sample_fps)
    with stream(
        model, processor, store=store, window=window, cache=cache_of(packed), fps=clip.sample_fps, video=content
    ) as memory:
        done = memory.frames * memory.reader.pictures
        tick(done)
        new = ((frame.image, n / clip.sample_fps) for n, frame in enumerate(clip) if n >= done)
        for batch in batches(new, MOST_AT_A_TIME):
            memory.watch([picture for picture, _ in batch], [time for _, time in batch])
            tick(len(batch))
        return memory.frames, memory.bytes()


def ask(
    model: Any,
    processor: Any,
    store: str,
    question: str,
    *,
    retrieve: int,
    max_new_tokens: int,
    say: Callable[[str], Any],
) -> Answer:
    """Answer from a store; `say` is called with pieces of the text as they come."""
    with stream(model, processor, store=store, retrieve=retrieve, mode="read") as memory:
        reply = memory.ask(question, max_new_tokens=max_new_tokens)
        for piece in reply:
            say(piece)
        return reply.answer()
