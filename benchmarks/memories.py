"""What benchmarks/streaming.py measures: ways to remember one long video, each of which is watched once and then asked.

`MEMORIES[name](model, processor, story, tick)` gives, for each way to ask that memory, what was found and what it cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

from fixed_budget import FixedBudget
from stories import Story

import mmkv
from mmkv.cache import InfiniPotV
from mmkv.streaming.store import Chunk, Key, Store, open_store

WINDOW, RETRIEVE = 512, 16  # tokens, frames
TRAINED = 64  # frames of the longest videos that the bundled model was trained on
WAYS = {
    "retrieval, cosine": dict(by="cosine"),
    "retrieval, dot": dict(by="dot"),
    "uniform": dict(by="uniform"),
    "window (StreamingLLM)": dict(by="recent"),
}
STUDY = tuple(product((4, 8, 16, 32, 64, 128), (1, 2, 4, 8)))  # frames brought back, and the size of their groups
PACKED = ("int4", "int2")
NEW = 2  # tokens of an answer: a word, and the end


def retrieval(model, processor, story: Story, tick: Callable) -> dict[str, dict]:
    """A stream: every frame is stored, dense and packed, and a question brings some back."""
    with mmkv.stream(model, processor, window=WINDOW, retrieve=RETRIEVE, fps=2.0) as stream:
        spent, windows = 0.0, []
        for pictures in story:
            begun = time.perf_counter()
            stream.watch(pictures)
            spent += time.perf_counter() - begun
            windows.append(stream.bytes()["window"])
            tick(len(pictures) // 2)
        flat = len(set(windows[WINDOW // 128 + 1 :])) == 1
        facts = dict(device_bytes=windows[-1], device_flat=flat)
        told = partial(_told, stream, story, facts)
        out = {name: told(spent, **options) for name, options in WAYS.items()}
        for count, group in STUDY:
            if group <= count:
                out[f"{count} frames, groups of {group}"] = told(spent, retrieve=count, group=group)
        dense = stream.store
        for packed in PACKED:
            begun = time.perf_counter()
            stream.store = repacked(dense, packed)
            out[f"retrieval, {packed}"] = told(spent + time.perf_counter() - begun)
            stream.store.close()
        stream.store = dense
        return out


def _told(stream, story: Story, facts: dict, spent: float, **options) -> dict:
    """Answers to all questions in one way, and the frames that they came from."""
    right, recall, first = [], [], []
    count = options.get("retrieve", RETRIEVE)
    for question, answer, wanted in story.questions():
        found = stream.answer(question, max_new_tokens=NEW, **options)
        got = sum(f.layers for f in found.frames if f.frame in wanted)
        right.append(found.text == answer)
        recall.append(got / stream.store.layers / min(len(wanted), count))
        first.append(found.seconds["first_token"])
    held = stream.bytes()
    archive = held["ram"] + held["device"]
    return _row(right, recall, first, 2 * stream.frames / spent, archive_bytes=archive, **facts)


def repacked(store: Store, packed: str) -> Store:
    """The same frames in another format: what a stream that packs would have stored."""
    shape = store.shape
    keys, _ = store.fetch(0, [0])
    out = open_store(
        "ram", Key("benchmark", "none"), layers=shape.layers, heads=shape.heads, dim=shape.dim, value_dim=shape.value_dim,
        tokens_per_frame=shape.tokens, dtype=keys.dtype, device="cpu", packed=packed,
    )  # fmt: skip
    for first in range(0, store.frames, 64):
        some = range(first, min(first + 64, store.frames))
        pairs = [store.fetch(layer, some) for layer in range(shape.layers)]
        index = store.index[:, some.start : some.stop].clone()
        out.append(Chunk([k for k, _ in pairs], [v for _, v in pairs], index, [store.times[f] for f in some]))
    return out


def in_cache(
    methods: list, chunk: int, squeezed: bool, model, processor, story: Story, tick: Callable
) -> dict[str, dict]:
    """A wrapped model reads the video in chunks.

    Args:
        methods: cache methods; none for full attention.
        chunk: tokens that are read at a time.
        squeezed: frames stand so close on the time axis that all lie within the positions the model was trained on. Who
            watches a stream cannot know that rate beforehand.
    """
    frames = story.pieces * 8
    fps = 2.0 * max(frames / TRAINED, 1.0) if squeezed else 2.0
    memory = FixedBudget(model, processor, methods, fps=fps, chunk=chunk)
    memory.watch(story, tick)
    right, recall, first = [], [], []
    for question, answer, wanted in story.questions():
        found, seconds = memory.answer(question, NEW)
        right.append(found == answer)
        recall.append(memory.kept(wanted))
        first.append(seconds)
    held = memory.bytes()
    return {"": _row(right, recall, first, 2 * frames / memory.seconds, 0, held, bool(methods))}


def _row(right, recall, first, speed, archive_bytes, device_bytes, device_flat) -> dict:
    return dict(
        questions=len(right), right=sum(right), recall=statistics.mean(recall), first_token=statistics.median(first),
        pictures_per_second=speed, archive_bytes=archive_bytes, device_bytes=device_bytes, device_flat=device_flat,
    )  # fmt: skip


POT = [InfiniPotV(budget={"video": WINDOW})]
MEMORIES: dict[str, Callable] = {
    "stream": retrieval,
    "InfiniPot-V": partial(in_cache, POT, 256, False),
    "InfiniPot-V, time squeezed": partial(in_cache, POT, 256, True),
    "full attention": partial(in_cache, [], 1024, False),
    "full attention, time squeezed": partial(in_cache, [], 1024, True),
}
MOST = {"full attention": 1800, "full attention, time squeezed": 1800}  # frames; the work grows with their square
