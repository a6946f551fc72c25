"""Held-out accuracy of the checkpoint: `python -m mmkv.models.tiny.evaluate` rewrites accuracy.json.

Every video is written as .mp4, decoded, and given to the plain Hugging Face processor and model; greedy answers must
match exactly. Multiple choice is scored by option likelihood. `blank` is the same with black frames.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import tempfile
import time

import numpy as np

from mmkv.models.tiny import answer, data, load, world

HELD_OUT = 2**41  # training seeds are below 2**40


def measure(model, processor, split, frames, videos, per_video, choices, blank=False, seed=HELD_OUT):
    """Accuracy over `videos` files, `per_video` open and `choices` multiple-choice questions each."""
    right, total, chosen, asked = collections.Counter(), collections.Counter(), 0, 0
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(videos):
            video = world.make_video(seed + i, frames, split)
            file = pathlib.Path(folder) / "video.mp4"
            world.write_mp4(video.frames, file)
            seen = world.read_mp4(file)
            if len(seen) != frames:
                raise RuntimeError(f"{len(seen)} frames decoded, {frames} written")
            seen = np.zeros_like(seen) if blank else seen
            for k, q in enumerate(data.pick(video.questions, per_video, rng)):
                inputs = answer.prepare(processor, seen, q.text, world.FPS)
                right[q.task] += answer.reply(model, processor, inputs) == q.answer
                total[q.task] += 1
                if k < choices:
                    chosen += answer.choose(model, processor, inputs, q.options)[0] == q.answer
                    asked += 1
    result = {
        "videos": videos,
        "video_tokens": frames * 8,
        "n": total.total(),
        "accuracy": round(right.total() / total.total(), 4),
        "tasks": {t: {"n": total[t], "accuracy": round(right[t] / total[t], 4)} for t in sorted(total)},
    }
    if asked:
        result["choice_by_likelihood"] = {"n": asked, "accuracy": round(chosen / asked, 4)}
    return result


def main():
    import av
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=30, help="per split and length")
    parser.add_argument("--questions", type=int, default=12, help="per video")
    parser.add_argument("--choices", type=int, default=4, help="of these also as multiple choice")
    parser.add_argument("--split", nargs="+", default=["easy", "stress"], help="splits to measure; others are kept")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "accuracy.json")
    args = parser.parse_args()
    model, processor = load()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, av)}
    report = {"versions": versions, "held_out_seed": HELD_OUT, "split": {}}
    if args.out.exists():
        report["split"] = json.loads(args.out.read_text())["split"]
    for split in args.split:
        report["split"].pop(split, None)
        for frames in args.frames:
            start = time.time()
            row = measure(model, processor, split, frames, args.videos, args.questions, args.choices)
            report["split"].setdefault(split, {})[str(frames)] = row
            print(split, frames, json.dumps(row), f"{time.time() - start:.0f} s", flush=True)
        row = measure(model, processor, split, args.frames[-1], max(4, args.videos // 6), args.questions, 0, blank=True)
        report["split"][split]["blank"] = row
        print(split, "blank", row["accuracy"], flush=True)
        if args.out.exists():  # two runs may share the file
            report["split"] = json.loads(args.out.read_text())["split"] | {split: report["split"][split]}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
