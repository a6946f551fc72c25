"""Hours of video, asked about at the end: what each way of remembering finds, and what it costs.

A stream of the synthetic world with eight events: an object of a shape and a colour that come once, at a known time. Each is
asked for its colour ("what colour is the star?") and for its shape: one of eight. In the quiet world nothing else is ever
seen; in the busy one every other scene shows a digit or a word. Recall is the share of an event's frames (in a cache: of its
tokens) that a layer could see, mean over the layers. The bundled model, so nothing here is about quality on real video.

    python benchmarks/streaming.py                 # 512, 1,800 (an hour at 0.5 frames a second) and 10,000 frames
    python benchmarks/streaming.py --plot          # draws the committed result again

Each video that was watched is a line of outputs/streaming.jsonl; a stopped run goes on from there. `--stop MINUTES` stops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import environment, save
from measuring import Log
from memories import MEMORIES, MOST, RETRIEVE, STUDY, TRAINED, WAYS, WINDOW
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stories import WORLDS, Story

from mmkv.models import tiny

RESULT = Path("benchmarks/results/streaming.json")
LOG = Path("outputs/streaming.jsonl")
SIZES = (512, 1800, 10_000)
MEANS = ("recall", "device_bytes", "archive_bytes")
DRAWN = [*WAYS, "InfiniPot-V", "InfiniPot-V, time squeezed", "full attention", "full attention, time squeezed"]


def measure(options) -> dict:
    """Watch what the log lacks, the first seed of everything first; returns the rows of all there is."""
    model, processor = tiny.load()
    log, until = Log(Path(options.log)), time.monotonic() + 60 * options.stop
    wanted = [
        (world, size, seed, memory)
        for seed in range(options.seeds)
        for size in options.sizes
        for world in options.worlds
        for memory in options.memories
        if size <= MOST.get(memory, size)
    ]
    with Progress() as progress:
        for world, size, seed, memory in wanted:
            key = f"{world} {size} {seed} {memory}"
            if key in log.rows or time.monotonic() > until:
                continue
            task = progress.add_task(key, total=size)
            ways = MEMORIES[memory](
                model, processor, Story(world, seed, size), lambda n, t=task: progress.advance(t, n)
            )
            log.add(
                dict(key=key, world=world, size=size, seed=seed, ways={name or memory: w for name, w in ways.items()})
            )
            print(
                key, *(f"{n or memory}: {w['right']}/{w['questions']}" for n, w in list(ways.items())[:2]), flush=True
            )
    found = [log.rows[key] for key in (" ".join(map(str, w)) for w in wanted) if key in log.rows]
    about = dict(window=WINDOW, retrieve=RETRIEVE, trained_frames=TRAINED, full_attention_up_to=min(MOST.values()))
    return dict(environment=environment(), **about, rows=rows_of(found))


def rows_of(found: list[dict]) -> list[dict]:
    """A row for each world, size and way, over all seeds."""
    parts: dict[tuple, list[dict]] = {}
    for row in found:
        for way, numbers in row["ways"].items():
            parts.setdefault((row["world"], row["size"], way), []).append(numbers)
    return [summary(*key, some) for key, some in parts.items()]


def summary(world: str, size: int, way: str, parts: list[dict]) -> dict:
    """Over all videos of a kind."""
    total = sum(p["questions"] for p in parts)
    accuracy = sum(p["right"] for p in parts) / total
    row = dict(world=world, frames=size, way=way, videos=len(parts), questions=total, accuracy=accuracy)
    row["error"] = (accuracy * (1 - accuracy) / total) ** 0.5
    row |= {key: statistics.mean(p[key] for p in parts) for key in MEANS}
    # the fastest of the videos: other work on the machine only ever slows down
    row["pictures_per_second"] = max(p["pictures_per_second"] for p in parts)
    row["first_token"] = min(p["first_token"] for p in parts)
    row["device_flat"] = all(p["device_flat"] for p in parts)
    return row


def show(result: dict) -> None:
    table = Table(
        "world", "frames", "way", "accuracy", "recall", "pictures/s", "first token", "device", "archive/frame"
    )
    study = [f"{count} frames, groups of {group}" for count, group in STUDY]
    for row in result["rows"]:
        if row["way"] in study:
            continue
        flat = "" if row["device_flat"] else " (grows)"
        table.add_row(
            row["world"], f"{row['frames']:,}", row["way"], f"{row['accuracy']:.0%} ± {row['error']:.0%}",
            f"{row['recall']:.0%}", f"{row['pictures_per_second']:.0f}", f"{row['first_token'] * 1000:.0f} ms",
            f"{row['device_bytes']:,.0f}{flat}", f"{row['archive_bytes'] / row['frames']:,.0f} B",
        )  # fmt: skip
    Console(width=150).print(table)
    groups = sorted({group for _, group in STUDY})
    table = Table("world", "frames", "brought back", *(f"groups of {g}" for g in groups), title="accuracy and recall")
    by = {(row["world"], row["frames"], row["way"]): row for row in result["rows"]}
    for world, size in dict.fromkeys((row["world"], row["frames"]) for row in result["rows"]):
        for count in sorted({count for count, _ in STUDY}):
            cells = [by.get((world, size, f"{count} frames, groups of {g}")) for g in groups]
            told = ("" if c is None else f"{c['accuracy']:.0%} ({c['recall']:.0%})" for c in cells)
            table.add_row(world, f"{size:,}", str(count), *told)
    Console(width=110).print(table)


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for i, way in enumerate(DRAWN):
        rows = [row for row in result["rows"] if row["way"] == way]
        look = dict(marker="o", color=f"C{i}", label=way, linestyle="--" if "squeezed" in way else "-")
        for axis, world in zip(axes, WORLDS):
            mine = [row for row in rows if row["world"] == world]
            sizes = [row["frames"] * 1.02 ** (i - len(DRAWN) / 2) for row in mine]  # side by side where they are equal
            axis.errorbar(sizes, [r["accuracy"] for r in mine], [r["error"] for r in mine], capsize=3, **look)
        mine = [row for row in rows if row["world"] == WORLDS[0]]
        axes[2].plot([r["frames"] for r in mine], [r["first_token"] * 1000 for r in mine], **look)
    sizes = [row["frames"] for row in result["rows"]]
    for axis in axes:
        axis.set_xlim(0.8 * min(sizes), 1.25 * max(sizes))
    for axis, world in zip(axes, WORLDS):
        axis.axhline(1 / 8, color="grey", linestyle=":", label="guessing")
        axis.set(
            xscale="log", xlabel="frames watched", ylabel="accuracy", ylim=(0, 1.03), title=f"events, {world} world"
        )
    axes[2].set(xscale="log", yscale="log", xlabel="frames watched", ylabel="ms to the first token", title="a question")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(Path(path).with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=WORLDS)
    parser.add_argument("--memories", nargs="*", default=list(MEMORIES), choices=MEMORIES)
    parser.add_argument("--seeds", type=int, default=4, help="videos of each size and world")
    parser.add_argument("--stop", type=float, default=10_000, help="minutes after which no further video is begun")
    parser.add_argument("--out", default=str(RESULT))
    parser.add_argument("--log", default=str(LOG))
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
