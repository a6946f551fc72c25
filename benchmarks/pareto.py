"""Accuracy over true bytes: every cache method of mmkv at several sizes, and mixes, on the bundled video model.

Two protocols. "Question unknown": the video is prefilled and compressed, then asked about. "Question known": the question
stands in the prompt when the cache is compressed, as in most papers; methods whose probe rows are the question choose
for it there. Bytes are those of the report right after the prefill.

What was measured is kept in outputs/pareto.jsonl, one line for each setting, protocol and video; a second run goes on
from there, and measures anew only where a setting, the code of its methods or the questions changed. Delete the file after
a change to what methods share.

    python benchmarks/pareto.py                          # benchmarks/results/accuracy-pareto.json and .png
    python benchmarks/pareto.py --plot                   # table and plot of the result file alone
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import measuring
import torch
from asking import Replay, answers, frames_of, prefill, prompt, questions_of, score
from common import environment, save
from measuring import Lines, Log, code_of
from points import DENSE, Point, alone, points
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import mmkv
from mmkv.cache import CacheMethod
from mmkv.models import tiny

PROTOCOLS = ("unknown", "known")
WITHIN = 2.0  # points that a mix may lose
TRIES = 4  # mixes of one family whose eviction is measured alone at their size
EFFORT = dict(unknown=1, known=4)  # of a setting on a video: a cache for the video, or one for each question
RESULT = "benchmarks/results/accuracy-pareto.json"


class Ground(measuring.Ground):
    """On what is measured, and what a measurement is called."""

    def key(self, point: Point, protocol: str, video: int) -> str:
        code = [code_of(type(method), CacheMethod) for method in point.cache]
        return f"{self.where(protocol, video)}: {list(point.cache)} {code}"


class Bench:
    """Measures points on videos, and reads rows off the log."""

    def __init__(self, ground: Ground, log: Log):
        self.ground, self.log = ground, log
        self.model, self.processor = tiny.load(dtype=getattr(torch, ground.dtype))
        self.commit = environment()["commit"]

    def missing(self, which: list[Point], protocol: str, video: int) -> list[Point]:
        return [p for p in which if self.ground.key(p, protocol, video) not in self.log.rows]

    def measure(self, which: list[Point], protocols, videos: range) -> None:
        """Whatever the log does not hold yet."""
        jobs = [(protocol, video) for protocol in protocols for video in videos]
        jobs = [(protocol, video, self.missing(which, protocol, video)) for protocol, video in jobs]
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, speed_estimate_period=300) as progress:
            bar = progress.add_task("", total=sum(EFFORT[protocol] * len(todo) for protocol, _, todo in jobs))
            lines = Lines(progress, bar)
            for protocol, video, todo in jobs:
                if todo:
                    progress.update(bar, description=f"question {protocol}, video {video + 1} of {videos.stop}")
                    for _ in self._video(todo, protocol, video):
                        progress.advance(bar, EFFORT[protocol])
                    lines.tell()

    def _video(self, todo: list[Point], protocol: str, video: int):
        g = self.ground
        asked = questions_of(g.split, g.frames, video, g.questions)
        frames = frames_of(g.split, g.frames, video)
        ready = prompt(self.model, self.processor, frames, [q.text for q in asked], protocol == "known")
        replay = Replay(self.model)
        replay.record(ready)
        for point in todo:
            begun = time.perf_counter()
            row = self._ask(point, ready, replay) | dict(seconds=time.perf_counter() - begun, commit=self.commit)
            self.log.add(dict(key=g.key(point, protocol, video)) | row)
            yield

    def _ask(self, point: Point, ready, replay: Replay) -> dict:
        # the trained positions go on behind the video, whichever of the two prefills a question
        with mmkv.wrapped(self.model, cache=point.cache, positions="trained"):
            if replay.allowed(point.cache):
                with replay.playing():
                    held = prefill(self.model, ready)
            else:
                held = prefill(self.model, ready)
            report = mmkv.report(self.model)
            given = answers(self.model, self.processor, ready, held)
        return dict(
            answers=given,
            kv_bytes=report.kv_bytes,
            kv_bytes_dense=report.kv_bytes_dense,
            kv_bits=report.kv_bits,
            packed_bits=report.packed_bits,
            tokens_held=report.tokens_held,
            tokens_seen=report.tokens_seen,
        )

    def row(self, point: Point, protocol: str, videos: range) -> dict:
        """What one point came to under one protocol."""
        g = self.ground
        found = [self.log.rows[g.key(point, protocol, video)] for video in videos]
        dense = [self.log.rows[g.key(DENSE, protocol, video)] for video in videos]
        truth = [q.answer for video in videos for q in questions_of(g.split, g.frames, video, g.questions)]
        total = {name: sum(row[name] for row in found) for name in found[0] if isinstance(found[0][name], int | float)}
        given, before = (sum((row["answers"] for row in rows), []) for rows in (found, dense))
        packed = [row["packed_bits"] for row in found if row["packed_bits"] is not None]
        return score(given, before, truth) | dict(
            questions=len(truth),
            videos=len(videos),
            kv_bytes=round(total["kv_bytes"] / len(found)),
            kv_bytes_dense=round(total["kv_bytes_dense"] / len(found)),
            share=total["kv_bytes"] / total["kv_bytes_dense"],
            kv_bits=total["kv_bits"] / len(found),
            packed_bits=sum(packed) / len(packed) if packed else None,
            tokens=total["tokens_held"] / total["tokens_seen"],
            seconds_per_question=total["seconds"] / len(truth),
            commits=sorted({row["commit"] for row in found}),
        )

    def rows(self, which: list[Point], protocols, videos: range) -> list[dict]:
        out = []
        for point in which:
            about = dict(method=point.family, setting=point.setting, kind=kind_of(point), cache=repr(list(point.cache)))
            out.append(about | {protocol: self.row(point, protocol, videos) for protocol in protocols})
        return out


def kind_of(point: Point) -> str:
    """ "dense", "evicts", "stores" or "mix"."""
    if not point.cache:
        return "dense"
    return "mix" if point.mix else "stores" if point.cache[0].formats() else "evicts"


def compose(bench: Bench, which: list[Point], protocol: str, videos: range, fresh: range) -> list[dict]:
    """For each family of mixes: the smallest that loses at most `WITHIN` points where neither part alone does.

    The evicting part alone has a budget that takes the mix's bytes. The storing part alone is its smallest setting that
    takes at least as many, or its smallest of all where none is so small. To be chosen, a mix and its parts have to be on
    their sides of the limit by a standard error; they are then measured once more on fresh videos, on which nothing was
    chosen. Where no mix of a family is, its smallest one within the limit is reported.
    """
    measured = {point: bench.row(point, protocol, videos) for point in which}
    out = []
    for family in dict.fromkeys(point.family for point in which if point.mix):
        good = [p for p in which if p.family == family and _loses(measured[p], 1) <= WITHIN]
        good.sort(key=lambda p: measured[p]["share"])
        found: tuple = ()
        for point in good[:TRIES]:
            size = measured[point]["share"]
            stores = [p for p in which if len(p.cache) == 1 and type(p.cache[0]) is type(point.cache[1])]
            fitting = [p for p in stores if measured[p]["share"] >= size]
            quantizes = min(fitting or stores, key=lambda p: measured[p]["share"])
            fails = _loses(measured[quantizes], -1) > WITHIN
            if found and not fails:
                continue
            evicts = alone(point, size)
            bench.measure([evicts], [protocol], videos)
            holds = fails and _loses(bench.row(evicts, protocol, videos), -1) > WITHIN
            if holds or not found:
                found = (point, evicts, quantizes)
            if holds:
                break
        about = dict(mix=family, protocol=protocol)
        if not found:
            out.append(about | dict(holds=False, why=f"none is within {WITHIN:g} points by a standard error"))
            continue
        parts = [dict(method=p.family, setting=p.setting, chosen_on=bench.row(p, protocol, videos)) for p in found]
        if holds:
            bench.measure([DENSE, *found], [protocol], fresh)
            again = [bench.row(p, protocol, fresh) for p in found]
            parts = [part | dict(fresh=row) for part, row in zip(parts, again)]
            losses = [row["loss_points"] for row in again]
            about["holds_on_fresh_videos"] = losses[0] <= WITHIN and min(losses[1:]) > WITHIN
        out.append(about | dict(holds=holds, parts=parts))
    return out


def _loses(row: dict, errors: float) -> float:
    """Points lost, and so many standard errors more."""
    return row["loss_points"] + errors * row["loss_error"]


def table(result: dict) -> Table:
    """All points, one line each."""
    first = result["rows"][0]["unknown"]
    out = Table(
        "method", "setting", "KV bytes", "tokens", "bits", "accuracy", "points lost", "agrees",
        "KV bytes", "accuracy", "points lost", "agrees",
        title=f"{result['split']}: {first['questions']} questions on {first['videos']} videos; "
        "first the question unknown, then known, when the cache is compressed",
    )  # fmt: skip
    for row in result["rows"]:
        a, b = row["unknown"], row["known"]
        cells = [f"{a['share']:.1%}", f"{a['tokens']:.0%}", f"{a['kv_bits']:.2f}", *_scores(a), f"{b['share']:.1%}"]
        out.add_row(row["method"], row["setting"], *cells, *_scores(b))
    return out


def _scores(row: dict) -> list[str]:
    return [f"{row['accuracy']:.1%}", f"{row['loss_points']:.1f} ± {row['loss_error']:.1f}", f"{row['agreement']:.1%}"]


def composition_table(result: dict) -> Table:
    out = Table(
        "mix", "question", "part", "KV bytes", "points lost", "on fresh videos", "verdict",
        title=f"mixes that lose at most {WITHIN:g} points at a size where neither part alone does",
    )  # fmt: skip
    for found in result["composition"]:
        if "parts" not in found:
            out.add_row(found["mix"], found["protocol"], "", "", "", "", found["why"])
            continue
        verdict = "no"
        if found["holds"]:
            verdict = "yes, and on fresh videos" if found["holds_on_fresh_videos"] else "yes, not on fresh videos"
        for i, part in enumerate(found["parts"]):
            head = (found["mix"], found["protocol"]) if i == 0 else ("", "")
            old, new = (_scores(part[where])[1] if where in part else "-" for where in ("chosen_on", "fresh"))
            name = f"{part['method']}, {part['setting']}"
            out.add_row(*head, name, f"{part['chosen_on']['share']:.1%}", old, new, verdict if i == 0 else "")
    return out


NOTE = """
Bytes are resident bytes after the prefill as a share of the dense cache: codes, scales, tables, the dense tail.
The newest 32 tokens (3 %) and 4 sinks are dense in every row that stores, and count in every budget.
Question unknown: the video is compressed before anybody asked. Methods that choose by attention then only have
the video's own last rows to choose by. Question known: those rows are the question's words, which is the papers'
setting and the one such methods are made for. But by then these words have read the whole video, and they stay among
the newest tokens: StreamingLLM, which looks at nothing, shows in that column how much of the answer stands there.
"""


def show(result: dict) -> None:
    console = Console(width=190)
    console.print(table(result))
    console.print(composition_table(result))
    console.print(NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=38)
    parser.add_argument("--fresh", type=int, default=60, help="further videos, for the mixes that were found")
    Ground.arguments(parser)
    parser.add_argument("--plot", action="store_true", help="table and plot of the result file, nothing is measured")
    parser.add_argument("--log", type=Path, default=Path("outputs/pareto.jsonl"))
    parser.add_argument("--out", default=RESULT)
    options = parser.parse_args()
    if not options.plot:
        result = run(options)
        save(options.out, result)
    result = json.loads(Path(options.out).read_text())
    show(result)
    from plots import pareto

    picture = Path(options.out).with_suffix(".png")
    pareto(result, picture)
    print(f"written to {picture}")


def run(options) -> dict:
    ground = Ground.of(options)
    bench = Bench(ground, Log(options.log))
    which, videos = points(bench.model), range(options.videos)
    bench.measure(which, PROTOCOLS, videos)
    fresh = range(options.videos, options.videos + options.fresh)
    found = sum((compose(bench, which, protocol, videos, fresh) for protocol in PROTOCOLS), [])
    about = dict(split=ground.split, frames=ground.frames, dtype=ground.dtype, note=NOTE.strip())
    return dict(environment=environment()) | about | dict(rows=bench.rows(which, PROTOCOLS, videos), composition=found)


if __name__ == "__main__":
    main()
