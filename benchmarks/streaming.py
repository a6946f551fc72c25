"""Hours of video, asked about at the end: what each way of remembering finds, and what it costs.

A stream of empty scenes with a few events: an object of a shape that comes once, at a known time. Each is asked for its colour
("what colour is the star?", one of eight). Recall is the share of an event's frames that a layer brought back, mean over the
layers. The bundled model, so nothing here is about quality on real video.

    python benchmarks/streaming.py                 # 512, 1,800 (an hour at 0.5 frames a second) and 10,000 frames
    python benchmarks/streaming.py --plot          # draws the committed result again
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import environment, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmkv
from mmkv.models import tiny
from mmkv.models.tiny import world
from mmkv.models.tiny.words import EASY_COLOURS, EASY_SHAPES

RESULT = Path("benchmarks/results/streaming.json")
SIZES = (512, 1800, 10_000)
PIECE = 16  # pictures of one scene
WINDOW, RETRIEVE = 512, 16  # tokens, frames
# one memory is watched once and asked in several ways
MEMORIES = {
    "dense": (
        dict(),
        {
            "retrieval, cosine": dict(by="cosine"),
            "retrieval, dot": dict(by="dot"),
            "retrieval, groups of 4": dict(by="cosine", group=4),
            "uniform": dict(by="uniform"),
            "window (StreamingLLM)": dict(by="recent"),
        },
    ),
    "int4": (dict(packed="int4"), {"retrieval, int4": dict(by="cosine")}),
    "int2": (dict(packed="int2"), {"retrieval, int2": dict(by="cosine")}),
}
FULL = 512  # frames up to which everything is attended to


class Story:
    """Pictures of a long stream, made as they are wanted, and its events.

    Args:
        seed: of the scenes.
        frames: of the decoder, two pictures each.
    """

    def __init__(self, seed: int, frames: int):
        rng = np.random.default_rng([seed, frames])
        self.seed, self.pieces = seed, frames * 2 // PIECE
        shapes, colours = rng.permutation(EASY_SHAPES), rng.permutation(list(EASY_COLOURS))
        places = np.sort(rng.choice(self.pieces - 1, min(len(shapes), self.pieces - 1), replace=False))
        self.events = {int(p): (str(s), str(c)) for p, s, c in zip(places, shapes, colours)}

    def __iter__(self):
        for piece in range(self.pieces):
            yield world.render(self._scene(piece))

    def _scene(self, piece: int) -> world.Scene:
        things: tuple[world.Thing, ...] = ()
        if piece in self.events:
            shape, colour = self.events[piece]
            rng = np.random.default_rng([self.seed, piece])
            x, y = rng.choice(world.CENTRES, 2).tolist()
            rgb = tuple(map(float, EASY_COLOURS[colour]))
            things = (world.Thing(shape, colour, "large", 8.5, rgb, "still", 2, 14, float(x), float(y), 0.0, 0.0),)
        return world.Scene(self.seed * 100_003 + piece, "easy", PIECE, things)

    def frames_of(self, piece: int) -> set[int]:
        """Frames of the decoder in which a piece's object is seen."""
        first = piece * PIECE // 2
        return set(range(first + 1, first + 7))


def run(model, processor, story: Story, options: dict, ways: dict, tick) -> dict[str, dict]:
    """Watch a story and ask about each of its events, in each way."""
    with mmkv.stream(model, processor, **{"window": WINDOW, "retrieve": RETRIEVE, "fps": 2.0, **options}) as stream:
        spent, windows = 0.0, []
        for pictures in story:
            begun = time.perf_counter()
            stream.watch(pictures)
            spent += time.perf_counter() - begun
            windows.append(stream.bytes()["window"])
            tick(len(pictures) // 2)
        held = stream.bytes()
        facts = dict(
            frames=stream.frames,
            pictures_per_second=2 * stream.frames / spent,
            window_bytes=windows[-1],
            window_flat=len(set(windows[WINDOW // 128 + 1 :])) == 1,
            archive_bytes=held["ram"] + held["device"],
            archive_per_frame=(held["ram"] + held["device"]) / stream.frames,
        )
        out = {}
        for name, settings in ways.items():
            stream.by, stream.group = settings["by"], settings.get("group", 1)
            out[name] = facts | ask(stream, story)
        return out


def ask(stream, story: Story) -> dict:
    """Answers to a question about each event, and the frames that they came from."""
    right, recall, first = [], [], []
    for piece, (shape, colour) in story.events.items():
        found = stream.answer(f"what colour is the {shape}?", max_new_tokens=2)
        wanted = story.frames_of(piece)
        got = sum(f.layers for f in found.frames if f.frame in wanted)
        right.append(found.text == colour)
        recall.append(got / stream.store.layers / min(len(wanted), stream.retrieve))
        first.append(found.seconds["first_token"])
    return dict(
        questions=len(right), right=sum(right), recall=statistics.mean(recall), first_token=statistics.median(first)
    )


def measure(options) -> dict:
    model, processor = tiny.load()
    rows = []
    with Progress() as progress:
        for size in options.sizes:
            memories = dict(MEMORIES)
            if size <= FULL:
                whole = dict(window=size * 16 + 64, retrieve=size)
                memories["full"] = whole, {"full attention": dict(by="cosine")}
            seeds = options.seeds if size < max(SIZES) else max(options.seeds // 4, 1)
            for name, (settings, ways) in memories.items():
                task = progress.add_task(f"{size:,} frames, {name}", total=size * seeds)
                tick = partial(progress.advance, task)
                parts = [run(model, processor, Story(seed, size), settings, ways, tick) for seed in range(seeds)]
                rows += [summary(way, size, [part[way] for part in parts]) for way in ways]
    return dict(environment=environment(), window=WINDOW, retrieve=RETRIEVE, seeds=options.seeds, rows=rows)


def summary(way: str, size: int, parts: list[dict]) -> dict:
    """One row of the table, over all streams of a size."""
    total = sum(p["questions"] for p in parts)
    accuracy = sum(p["right"] for p in parts) / total
    row = dict(way=way, stream=size, questions=total, accuracy=accuracy)
    row["error"] = (accuracy * (1 - accuracy) / total) ** 0.5
    for key in (
        "recall",
        "pictures_per_second",
        "first_token",
        "window_bytes",
        "archive_bytes",
        "archive_per_frame",
    ):
        row[key] = statistics.mean(p[key] for p in parts)
    row["window_flat"] = all(p["window_flat"] for p in parts)
    return row


def show(result: dict) -> None:
    table = Table(
        "frames", "way", "accuracy", "recall", "pictures/s", "first token", "window", "archive/frame", title="streams"
    )
    for row in result["rows"]:
        flat = "" if row["window_flat"] else " (grows)"
        table.add_row(
            f"{row['stream']:,}", row["way"], f"{row['accuracy']:.0%} ± {row['error']:.0%}", f"{row['recall']:.0%}",
            f"{row['pictures_per_second']:.0f}", f"{row['first_token'] * 1000:.0f} ms", f"{row['window_bytes']:,.0f}{flat}",
            f"{row['archive_per_frame']:,.0f} B",
        )  # fmt: skip
    Console(width=140).print(table)


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["way"] == way]
        sizes = [row["stream"] for row in rows]
        left.errorbar(
            sizes, [r["accuracy"] for r in rows], [r["error"] for r in rows], marker="o", capsize=3, label=way
        )
        right.plot(sizes, [r["first_token"] * 1000 for r in rows], marker="o", label=way)
    left.axhline(1 / 8, color="grey", linestyle=":", label="guessing")
    left.set(xscale="log", xlabel="frames watched", ylabel="accuracy", ylim=(0, 1.02), title="events found again")
    right.set(xscale="log", xlabel="frames watched", ylabel="ms to the first token", title="a question")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(Path(path).with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=4, help="streams of each size; a quarter of them of the longest")
    parser.add_argument("--out", default=str(RESULT))
    parser.add_argument("--plot", action="store_true", help="only draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(Path(options.out).read_text()) if options.plot else measure(options)
    show(result)
    if not options.plot:
        save(options.out, result)
    plot(result, options.out)


if __name__ == "__main__":
    main()
