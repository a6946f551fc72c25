"""Prompts in chunks against prompts in one piece: the peak of the cache, and what it does to the answers.

The bundled model reads a video and a question (which then stands in the last chunk, while a method has already chosen among
the tokens of the chunks before), or the video alone, which is asked about afterwards. Bytes are the report's, for one video.

    python benchmarks/chunks.py                          # writes benchmarks/results/chunks.json
"""

from __future__ import annotations

import argparse

import torch
from asking import answers, frames_of, prefill, prompt, questions_of, score
from common import environment, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmkv
from mmkv.cache import KVMerger, SnapKV, WaterfillKV
from mmkv.models import tiny

CHUNKS = (None, 512, 256, 128)
METHODS = {
    "dense": (),
    "waterfill": (WaterfillKV(),),
    "snapkv 25 %": (SnapKV(budget=0.25),),
    "kvmerger 25 %": (KVMerger(budget=0.25),),
    "snapkv 25 % x waterfill": (SnapKV(budget=0.25), WaterfillKV(residual=32)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8, help="per video")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--out", default="benchmarks/results/chunks.json")
    options = parser.parse_args()

    about = environment()
    model, processor = tiny.load(dtype=torch.bfloat16)
    given: dict[tuple, list[str]] = {}
    sizes: dict[tuple, tuple[int, int, int]] = {}
    truth: list[str] = []
    with Progress() as progress:
        bar = progress.add_task("chunks", total=options.videos * len(METHODS) * len(CHUNKS) * 2)
        for video in range(options.videos):
            frames = frames_of("easy", options.frames, video)
            questions = questions_of("easy", options.frames, video, options.questions)
            truth += [q.answer for q in questions]
            for known in (False, True):
                asked = prompt(model, processor, frames, [q.text for q in questions], known)
                for name, cache in METHODS.items():
                    for chunk in CHUNKS:
                        with mmkv.wrapped(model, cache=cache, prefill_chunk=chunk, positions="trained"):
                            held = prefill(model, asked)
                            report = mmkv.report(model)
                            rows = len(questions) if known else 1
                            key = (known, name, chunk)
                            sizes[key] = tuple(
                                n // rows for n in (report.kv_bytes, report.kv_bytes_peak, report.kv_bytes_dense)
                            )
                            given.setdefault(key, []).extend(answers(model, processor, asked, held))
                        progress.advance(bar)
    rows = []
    for known in (False, True):
        table = Table(
            "method", "chunk", "accuracy", "points lost", "KV bytes", "peak", "peak / dense",
            title=f"question {'known' if known else 'unknown'}: {len(truth)} questions",
        )  # fmt: skip
        dense = given[known, "dense", None]
        for name in METHODS:
            for chunk in CHUNKS:
                key = (known, name, chunk)
                row = score(given[key], dense, truth)
                kv, peak, whole = sizes[key]
                rows.append(dict(known=known, method=name, chunk=chunk, kv_bytes=kv, peak=peak, dense=whole, **row))
                table.add_row(
                    name, "all" if chunk is None else str(chunk), f"{row['accuracy']:.1%}",
                    f"{row['loss_points']:.1f} +- {row['loss_error']:.1f}", f"{kv:,}", f"{peak:,}", f"{peak / whole:.2f}",
                )  # fmt: skip
        Console().print(table)
    save(options.out, dict(environment=about, frames=options.frames, questions=len(truth), rows=rows))


if __name__ == "__main__":
    main()
