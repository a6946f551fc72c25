"""Accuracy over vision tokens: every token method of mmkv at several shares, and tokens x cache, on the bundled video model.

Three protocols. "Question known": video and question in one prompt, as in the papers. "Question unknown": the video is read
alone and asked about afterwards; only for methods that never look at the text. "Held": as known, but the last token of the
prompt runs over the compressed cache, so that no word of the answer comes from a dense prefill; for tokens x cache.

Shares of vision tokens are measured, mean over the decoder layers and of the last one; bytes are those of the report.
What was measured is kept in outputs/token-accuracy.jsonl, one line for each setting, protocol and video; a second run goes
on from there, and measures anew only where a setting, the code of its methods or the questions changed. Delete the file after
a change to what methods share.

    python benchmarks/token_accuracy.py                  # benchmarks/results/token-accuracy.json and .png
    python benchmarks/token_accuracy.py --plot           # tables and plot of the result file alone
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measuring
import torch
from asking import NEW_TOKENS, Prompt, answers, frames_of, prefill, prompt, questions_of, score
from common import environment, save
from measuring import Lines, Log, code_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from token_points import DENSE, TokenPoint, mixes, settings

import mmkv
from mmkv.cache import CacheMethod
from mmkv.models import tiny
from mmkv.tokens.method import TokenMethod

PROTOCOLS = ("known", "unknown")
HELD = "held"
RESULT = "benchmarks/results/token-accuracy.json"


class Ground(measuring.Ground):
    """On what is measured, and what a measurement is called."""

    def key(self, point: TokenPoint, protocol: str, video: int) -> str:
        code = [code_of(type(m), TokenMethod) for m in point.tokens]
        code += [code_of(type(m), CacheMethod) for m in point.cache]
        return f"{self.where(protocol, video)}: {list(point.tokens)} {list(point.cache)} {code}"


@contextmanager
def one_video(model, rows: int) -> Iterator[None]:
    """Within the block the vision tower reads the video once for all rows of a batch, which are questions about it."""
    inner = model.model
    stock = inner.get_video_features

    def once(pixel_values_videos, video_grid_thw, **options):
        found = stock(pixel_values_videos[: len(pixel_values_videos) // rows], video_grid_thw[:1], **options)
        found.pooler_output = found.pooler_output * rows
        return found

    inner.get_video_features = once
    try:
        yield
    finally:
        del inner.get_video_features  # the class's own again


@torch.no_grad()
def one_prompt(model, processor, asked: Prompt) -> list[str]:
    """Greedy answers to prompts that hold video and question, read in one piece."""
    rows, length = asked.ids.shape
    pixels = {k: v.repeat(rows, *[1] * (v.dim() - 1)) for k, v in asked.video.items() if "pixel" in k}
    out = model.generate(**asked.inputs(rows, length), **pixels, do_sample=False, max_new_tokens=NEW_TOKENS)
    return [text.strip() for text in processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]


class Bench:
    """Measures settings on videos, and reads rows off the log."""

    def __init__(self, ground: Ground, log: Log):
        self.ground, self.log = ground, log
        self.model, self.processor = tiny.load(dtype=getattr(torch, ground.dtype))
        self.commit = environment()["commit"]

    def measure(self, jobs: list[tuple[TokenPoint, str]], videos: range) -> None:
        """Whatever the log does not hold yet, video by video."""
        todo = [(v, p, how) for v in videos for p, how in jobs if self.ground.key(p, how, v) not in self.log.rows]
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, speed_estimate_period=300) as progress:
            seen = (-1, "")
            bar = progress.add_task("", total=len(todo))
            lines = Lines(progress, bar)
            for video, point, protocol in sorted(todo, key=lambda job: (job[0], job[2])):
                if (video, protocol) != seen:
                    seen, ready = (video, protocol), self._prompt(video, protocol)
                    progress.update(bar, description=f"video {video + 1} of {videos.stop}, question {protocol}")
                begun = time.perf_counter()
                row = self._ask(point, protocol, ready)
                row |= dict(seconds=time.perf_counter() - begun, commit=self.commit)
                self.log.add(dict(key=self.ground.key(point, protocol, video)) | row)
                progress.advance(bar)
                lines.tell()

    def _prompt(self, video: int, protocol: str) -> Prompt:
        g = self.ground
        asked = questions_of(g.split, g.frames, video, g.questions)
        frames = frames_of(g.split, g.frames, video)
        return prompt(self.model, self.processor, frames, [q.text for q in asked], protocol != "unknown")

    def _ask(self, point: TokenPoint, protocol: str, ready: Prompt) -> dict:
        rows = len(ready.ids) if ready.known else 1
        read = ready.mask[:rows] if protocol == "known" else ready.mask[:rows, : ready.cut]
        vision = rows * int((ready.ids[0] == self.model.config.video_token_id).sum())
        # the trained positions go on behind the video, whoever prefills a question
        methods = dict(tokens=point.tokens, cache=point.cache)
        with mmkv.wrapped(self.model, **methods, positions="trained"), one_video(self.model, rows):
            if protocol == "known":
                given = one_prompt(self.model, self.processor, ready)
                report = mmkv.report(self.model)
            else:
                held = prefill(self.model, ready)
                report = mmkv.report(self.model)
                given = answers(self.model, self.processor, ready, held)
        text = int(read.sum()) - vision  # which always stays
        layers = report.tokens_per_layer or (text + vision,) * self.model.config.text_config.num_hidden_layers
        return dict(
            answers=given,
            layers=[(tokens - text) / vision for tokens in layers],
            kv_bytes=report.kv_bytes / rows,
            kv_bytes_dense=report.kv_bytes_dense / rows,
        )

    def found(self, point: TokenPoint, protocol: str, videos: range) -> list[dict]:
        return [self.log.rows[self.ground.key(point, protocol, video)] for video in videos]

    def compare(self, point: TokenPoint, before: TokenPoint, protocol: str, videos: range) -> dict:
        """Accuracy of one setting and its loss against another, paired."""
        g = self.ground
        truth = [q.answer for video in videos for q in questions_of(g.split, g.frames, video, g.questions)]
        given, other = (sum((row["answers"] for row in self.found(p, protocol, videos)), []) for p in (point, before))
        return score(given, other, truth)

    def row(self, point: TokenPoint, protocol: str, videos: range) -> dict:
        """What one setting came to under one protocol."""
        rows = self.found(point, protocol, videos)
        layers = [sum(shares) / len(rows) for shares in zip(*(row["layers"] for row in rows))]
        held, dense = (sum(row[name] for row in rows) for name in ("kv_bytes", "kv_bytes_dense"))
        return self.compare(point, DENSE, protocol, videos) | dict(
            questions=sum(len(row["answers"]) for row in rows),
            videos=len(rows),
            tokens_mean=sum(layers) / len(layers),
            tokens_final=layers[-1],
            layers=layers,
            kv_bytes=round(held / len(rows)),
            kv_bytes_dense=round(dense / len(rows)),
            kv_share=held / dense,
            commits=sorted({row["commit"] for row in rows}),
        )

    def rows(self, videos: range) -> list[dict]:
        """The settings under both protocols."""
        out = []
        for point in settings():
            about = dict(method=point.family, setting=point.setting, place=point.place, tokens=repr(list(point.tokens)))
            about["variant_of"] = point.against
            out.append(about | {how: self.row(point, how, videos) for how in protocols(point)})
        return out

    def variants(self, videos: range) -> list[dict]:
        """Each variant against its default, paired."""
        points = settings()
        out = []
        for point in points:
            if point.against is not None:
                default = next(p for p in points if (p.family, p.setting) == (point.family, point.against))
                found = {how: self.compare(point, default, how, videos) for how in protocols(point)}
                out.append(dict(method=point.family, default=point.against, setting=point.setting) | found)
        return out

    def mixed(self, videos: range) -> list[dict]:
        """Tokens x cache."""
        return [
            dict(tokens=p.family, cache=p.setting, methods=repr([*p.tokens, *p.cache])) | self.row(p, HELD, videos)
            for p in mixes()
        ]


def protocols(point: TokenPoint) -> tuple[str, ...]:
    """Those under which a setting is measured."""
    return PROTOCOLS if point.blind else PROTOCOLS[:1]


def run(options) -> dict:
    ground = Ground.of(options)
    bench, videos = Bench(ground, Log(options.log)), range(options.videos)
    jobs = [(point, how) for point in settings() for how in protocols(point)]
    bench.measure(jobs + [(point, HELD) for point in mixes()], videos)
    about = dict(split=ground.split, frames=ground.frames, dtype=ground.dtype, note=NOTE.strip())
    found = dict(rows=bench.rows(videos), variants=bench.variants(videos), mixes=bench.mixed(videos))
    return dict(environment=environment()) | about | found


NOTE = """
Tokens are vision tokens that a decoder layer computed, as a share of all, mean over the layers and in the last one.
Question known: bytes of the cache after the answer; unknown and tokens x cache: after the prefill; as a share of the dense
cache of the same prompts without padding. Methods between layers let the first layers read everything, and two layers are a
third of this model. A frame has 16 tokens here, so small shares round. ToMe and DiffRate merge inside towers with absolute
positions, which this model's is not: benchmarks/tokens.py.
"""


def table(result: dict) -> Table:
    """All settings, one line each."""
    first = result["rows"][0]["known"]
    out = Table(
        "method", "setting", "acts", "tokens", "last layer", "KV bytes", "accuracy", "points lost",
        "KV bytes", "accuracy", "points lost",
        title=f"{result['split']}: {first['questions']} questions on {first['videos']} videos; "
        "first the question known, then unknown, when tokens are dropped",
    )  # fmt: skip
    for row in result["rows"]:
        a, b = row["known"], row.get("unknown")
        cells = [f"{a['tokens_mean']:.1%}", f"{a['tokens_final']:.1%}", *_scores(a), *(_scores(b) if b else "---")]
        out.add_row(row["method"], row["setting"], row["place"], *cells)
    return out


def variants_table(result: dict) -> Table:
    out = Table(
        "method", "variant", "known: points lost against the default", "unknown",
        title="options: each variant against its default (negative: the variant is better)",
    )  # fmt: skip
    for row in result["variants"]:
        out.add_row(row["method"], row["setting"], *(_scores(row[p])[2] if p in row else "-" for p in PROTOCOLS))
    return out


def mixes_table(result: dict) -> Table:
    out = Table(
        "tokens", "cache", "tokens, mean", "KV bytes", "of dense", "accuracy", "points lost", title="tokens x cache"
    )
    for row in result["mixes"]:
        out.add_row(
            row["tokens"], row["cache"], f"{row['tokens_mean']:.1%}", f"{row['kv_bytes']:,}", *_scores(row)
        )  # fmt: skip
    return out


def _scores(row: dict) -> list[str]:
    share = f"{row['kv_share']:.1%}" if "kv_share" in row else ""
    return [share, f"{row['accuracy']:.1%}", f"{row['loss_points']:.1f} ± {row['loss_error']:.1f}"]


def show(result: dict) -> None:
    console = Console(width=170)
    for made in (table(result), variants_table(result), mixes_table(result), NOTE):
        console.print(made)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=38)
    Ground.arguments(parser)
    parser.add_argument("--plot", action="store_true", help="tables and plot of the result file, nothing is measured")
    parser.add_argument("--log", type=Path, default=Path("outputs/token-accuracy.jsonl"))
    parser.add_argument("--out", default=RESULT)
    options = parser.parse_args(arguments)
    if not options.plot:
        save(options.out, run(options))
    result = json.loads(Path(options.out).read_text())
    show(result)
    from plots import tokens

    picture = Path(options.out).with_suffix(".png")
    tokens(result, picture)
    print(f"written to {picture}")


if __name__ == "__main__":
    main()
