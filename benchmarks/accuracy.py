"""Accuracy of the bundled model over a compressed cache: the video is prefilled, compressed, and only then asked about.

Held-out videos are written as .mp4 and decoded. Each method sees the same questions, each on its own copy of the
compressed video, so that answers pair with those of the dense cache. Two splits of the synthetic world: easy, where the
dense model is right nearly always, and stress, which is made to be hard.

    python benchmarks/accuracy.py                              # writes benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --videos 8 --study           # variants of VidKV beside the presets
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from asking import answers, frames_of, prefill, prompt, questions_of, score
from common import environment, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmkv
from mmkv._presets import PRESETS
from mmkv.cache import KIVI, VidKV, WaterfillKV
from mmkv.models import tiny

STUDY = {
    "kivi-2, groups of 32": KIVI(group=32, channel_group=32),
    "vidkv, paper's groups of 32": VidKV(codebook="minmax", value_basis="channel", group=32),
    "vidkv official, groups of 32": VidKV(official=True, group=32),
    "vidkv, min-max": VidKV(codebook="minmax"),
    "vidkv, gaussian": VidKV(codebook="gaussian"),
    "vidkv, no fft": VidKV(fft=False),
    "vidkv, values per channel": VidKV(value_basis="channel"),
    "vidkv, order per head": VidKV(order="head"),
    "vidkv, groups of 64": VidKV(group=64, residual=32),
    "vidkv, 8-bit scales": VidKV(scale_bits=8),
    "vidkv, key bits 1": VidKV(key_bits=1),
    "vidkv, key bits 2": VidKV(key_bits=2),
    "vidkv, 2-bit values": VidKV(value_bits=2),
    "vidkv, no sinks": VidKV(sinks=0),
    "waterfill, levels 0 1 2 4": WaterfillKV(levels=(0, 1, 2, 4)),
    "waterfill, key bits 1": WaterfillKV(key_bits=1),
    "waterfill, key bits 0.75, value bits 1": WaterfillKV(key_bits=0.75, value_bits=1),
}


def run(model, processor, methods: dict, split: str, frames: int, videos: int, per_video: int) -> list[dict]:
    """One row per method: accuracy, agreement with dense, bits, bytes, seconds."""
    given: dict[str, list[str]] = {name: [] for name in methods}
    truth, tasks, seconds = [], [], dict.fromkeys(methods, 0.0)
    reports: dict[str, list] = {name: [] for name in methods}
    tokens = 0
    with Progress() as progress:
        bar = progress.add_task(split, total=videos * len(methods))
        for i in range(videos):
            seen, asked = frames_of(split, frames, i), questions_of(split, frames, i, per_video)
            ready = prompt(model, processor, seen, [q.text for q in asked])
            tokens = int((ready.ids[0] == model.config.video_token_id).sum())
            truth += [q.answer for q in asked]
            tasks += [q.task for q in asked]
            for name, cache in methods.items():
                with mmkv.wrapped(model, cache=cache):
                    held = prefill(model, ready)
                    reports[name].append(mmkv.report(model))
                    begun = time.perf_counter()
                    given[name] += answers(model, processor, ready, held)
                    seconds[name] += time.perf_counter() - begun
                progress.advance(bar)
    return [_row(name, given, truth, tasks, reports[name], seconds[name], tokens, videos) for name in methods]


def _row(name, given, truth, tasks, reports, seconds, tokens, videos) -> dict:
    return dict(
        method=name,
        **score(given[name], given["dense"], truth),
        questions=len(truth),
        videos=videos,
        video_tokens=tokens,
        packed_bits=_mean(r.packed_bits for r in reports),
        kv_bits=_mean(r.kv_bits for r in reports),
        kv_bytes=round(_mean(r.kv_bytes for r in reports)),
        kv_bytes_dense=round(_mean(r.kv_bytes_dense for r in reports)),
        seconds_per_question=seconds / len(truth),
        tasks={
            t: float(np.mean([a == b for a, b, x in zip(given[name], truth, tasks) if x == t]))
            for t in sorted(set(tasks))
        },
    )


def _mean(numbers) -> float | None:
    """Mean over the videos; None where nothing was packed."""
    held = [n for n in numbers if n is not None]
    return sum(held) / len(held) if held else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=70, help="per split")
    parser.add_argument("--questions", type=int, default=30, help="per video, at most")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--splits", nargs="+", default=["easy", "stress"])
    parser.add_argument("--study", action="store_true", help="variants of the methods beside the presets")
    parser.add_argument("--only", nargs="*", help="names of methods, dense is always run")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()

    methods = {"dense": ()} | {name: preset.cache for name, preset in PRESETS.items() if not preset.next_scale}
    if options.study:
        methods |= {name: (method,) for name, method in STUDY.items()}
    if options.only:
        methods = {name: cache for name, cache in methods.items() if name in ("dense", *options.only)}
    model, processor = tiny.load(dtype=getattr(torch, options.dtype))
    result: dict = dict(environment=environment(), dtype=options.dtype, frames=options.frames, splits={})
    for split in options.splits:
        rows = run(model, processor, methods, split, options.frames, options.videos, options.questions)
        result["splits"][split] = rows
        Console().print(table(split, rows))
        print(json.dumps(rows), flush=True)
    save(options.out or f"benchmarks/results/accuracy{'-study' if options.study else ''}.json", result)


def table(split: str, rows: list[dict]) -> Table:
    out = Table(
        "method", "accuracy", "points lost", "agrees with dense", "packed bits", "whole cache bits", "KV bytes", "s / question",
        title=f"{split}: {rows[0]['questions']} questions on {rows[0]['videos']} videos of {rows[0]['video_tokens']} tokens",
    )  # fmt: skip
    for r in rows:
        packed = "-" if r["packed_bits"] is None else f"{r['packed_bits']:.2f}"
        out.add_row(
            r["method"], f"{r['accuracy']:.1%}", f"{r['loss_points']:.1f} +- {r['loss_error']:.1f}", f"{r['agreement']:.1%}",
            packed, f"{r['kv_bits']:.2f}", f"{r['kv_bytes']:,}", f"{r['seconds_per_question']:.3f}",
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
