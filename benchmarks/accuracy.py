"""Accuracy of the bundled model over a compressed cache: the video is prefilled, compressed, and only then asked about.

Held-out videos are written as .mp4 and decoded. Each method sees the same questions, each on its own copy of the
compressed video, so that answers pair with those of the dense cache. Two splits of the synthetic world: easy, where the
dense model is right nearly always, and stress, which is made to be hard.

    python benchmarks/accuracy.py                              # writes benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --videos 8 --study           # variants of VidKV beside the presets
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import environment, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmkv
from mmkv._presets import PRESETS
from mmkv.cache import KIVI, VidKV, WaterfillKV
from mmkv.models import tiny
from mmkv.models.tiny import answer, world

SEED = 2**42  # training seeds are below 2**40, the model's own evaluation uses 2**41

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


class Asker:
    """Asks the bundled model about one prefilled video at a time."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def watch(self, frames: np.ndarray) -> None:
        """Prefill everything that comes before the question's words."""
        inputs = answer.prepare(self.processor, frames, "", world.FPS)
        ids = inputs["input_ids"]
        end = int((ids[0] == self.model.config.vision_end_token_id).nonzero()[-1]) + 1
        self.inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "attention_mask")}
        known = {k: v[:, :end] if v.dim() == 2 and v.shape == ids.shape else v for k, v in inputs.items()}
        self.cache = mmkv.Cache(self.model)
        self.model(**known, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.video_tokens = int((ids == self.model.config.video_token_id).sum())

    @torch.no_grad()
    def ask(self, questions: list[str]) -> list[str]:
        """Greedy answers, all questions as one batch over copies of the cache; the video itself is not given again."""
        texts = [self._text(question) for question in questions]
        longest = max(t.shape[1] for t in texts)
        pads = [longest - t.shape[1] for t in texts]
        known = self.cache.get_seq_length()
        past = self.inputs["input_ids"][:, :known]
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.cat([torch.cat([past, past.new_full((1, p), pad), t], 1) for p, t in zip(pads, texts)])
        mask = torch.ones_like(ids)
        for row, p in enumerate(pads):
            mask[row, known : known + p] = 0
        inputs = {
            k: v.repeat_interleave(len(texts), 0)
            for k, v in self.inputs.items()
            if v.shape != self.inputs["input_ids"].shape
        }
        inputs |= dict(input_ids=ids, attention_mask=mask)
        if "mm_token_type_ids" in self.inputs:
            inputs["mm_token_type_ids"] = (ids == self.model.config.video_token_id).to(ids) * 2
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(texts))
        out = self.model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=4)
        return [
            a.strip() for a in self.processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        ]

    def _text(self, question: str) -> torch.Tensor:
        """Ids of what follows the video in the chat template."""
        parts = [{"type": "video"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        after = prompt.split("<|vision_end|>")[1]
        return self.processor.tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]


def questions_of(video, count: int, rng) -> list:
    order = rng.permutation(len(video.questions))[:count]
    return [video.questions[i] for i in order]


def run(model, processor, methods: dict, split: str, frames: int, videos: int, per_video: int) -> list[dict]:
    """One row per method: accuracy, agreement with dense, bits, bytes, seconds."""
    answers: dict[str, list[str]] = {name: [] for name in methods}
    truth, tasks, seconds = [], [], dict.fromkeys(methods, 0.0)
    reports: dict[str, list] = {name: [] for name in methods}
    tokens = 0
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        bar = progress.add_task(split, total=videos * len(methods))
        for i in range(videos):
            video = world.make_video(SEED + i, frames, split)
            world.write_mp4(video.frames, Path(folder) / "video.mp4")
            seen = world.read_mp4(Path(folder) / "video.mp4")
            asked = questions_of(video, per_video, np.random.default_rng(SEED + i))
            truth += [q.answer for q in asked]
            tasks += [q.task for q in asked]
            for name, cache in methods.items():
                with mmkv.wrapped(model, cache=cache):
                    asker = Asker(model, processor)
                    asker.watch(seen)
                    reports[name].append(mmkv.report(model))
                    begun = time.perf_counter()
                    answers[name] += asker.ask([q.text for q in asked])
                    seconds[name] += time.perf_counter() - begun
                    tokens = asker.video_tokens
                progress.advance(bar)
    return [_row(name, answers, truth, tasks, reports[name], seconds[name], tokens, videos) for name in methods]


def _row(name, answers, truth, tasks, reports, seconds, tokens, videos) -> dict:
    right = np.array([a == t for a, t in zip(answers[name], truth)])
    dense = np.array([a == t for a, t in zip(answers["dense"], truth)])
    lost, won = int((dense & ~right).sum()), int((~dense & right).sum())
    return dict(
        method=name,
        accuracy=float(right.mean()),
        loss_points=100 * float(dense.mean() - right.mean()),
        loss_error=100 * math.sqrt(lost + won) / len(truth),  # standard error of a paired difference
        agreement=float(np.mean([a == b for a, b in zip(answers[name], answers["dense"])])),
        questions=len(truth),
        videos=videos,
        video_tokens=tokens,
        packed_bits=_mean(r.packed_bits for r in reports),
        kv_bits=_mean(r.kv_bits for r in reports),
        kv_bytes=round(_mean(r.kv_bytes for r in reports)),
        kv_bytes_dense=round(_mean(r.kv_bytes_dense for r in reports)),
        seconds_per_question=seconds / len(truth),
        tasks={t: float(right[[x == t for x in tasks]].mean()) for t in sorted(set(tasks))},
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

    methods = {"dense": ()} | {name: preset.cache for name, preset in PRESETS.items()}
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
