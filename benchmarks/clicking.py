"""Click accuracy of the bundled GUI agent, bytes and time, with the KV of screenshots compressed.

Held-out sessions of several screenshots; some steps need a screenshot that is gone. Two protocols. Kept: `mmkv.agent` keeps the
KV of earlier steps, each screenshot is compressed once, when it comes, and the history holds the agent's own answers. Whole: the
prompt with all screenshots is read and compressed anew at each step, as in the paper, the history holds the right answers, and
twelve sessions run as one batch, with the padding that this takes. Shares are of the dense cache as measured. Each method plays
the same sessions. The last step of each, "finish", is left out.

    python benchmarks/clicking.py            # writes benchmarks/results/clicking.json and .png
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path

import clicking_plots
import numpy as np
import torch
from common import environment, save
from measuring import Lines, Log
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmkv
from mmkv.cache import GUIKV, H2O, SnapKV, VidKV
from mmkv.models import tiny_agent
from mmkv.models.tiny_agent import answer
from mmkv.models.tiny_agent.sessions import Session, Step, make_session
from mmkv.models.tiny_agent.words import RECALLS

SEED = 2**42  # training seeds are below 2**40, the model's own evaluation uses 2**41
NEW_TOKENS = 24
BATCH = {"kept": 1, "whole": 12}  # sessions at a time
STORED = VidKV(group=32, residual=32)  # prompts are short: a few hundred tokens
POINTS = {
    "dense": (),
    **{f"GUIKV {share} %": (GUIKV(budget=share / 100),) for share in (40, 20, 10, 5)},
    "SnapKV 20 %": (SnapKV(budget=0.2),),
    "H2O 20 %": (H2O(budget=0.2),),
    "VidKV": (STORED,),
    "GUIKV 40 % x VidKV": (GUIKV(budget=0.4), STORED),
}
PARTS = {
    "now": "click, current screen",
    "before": "click, earlier screen needed",
    "digit": "type, earlier screen needed",
    "all": "all steps",
}


def part_of(kind: str) -> str | None:
    """The part of the table that a kind of task counts in beside "all"."""
    if kind in RECALLS:
        return "before" if kind == "recall" else "digit"
    return "now" if kind in ("both", "name", "colour", "fill") else None


def kept(model, processor, session: Session) -> list[dict]:
    """The steps of one session, KV kept from step to step."""
    player, out = mmkv.agent(model, processor, screenshots=len(session.steps), max_new_tokens=NEW_TOKENS), []
    for step in session.steps[:-1]:
        begun = time.perf_counter()
        text = player.step(step.image, session.instruction).text
        out.append(entry(step, text, time.perf_counter() - begun, mmkv.report(model)))
    return out


@torch.no_grad()
def whole(model, processor, sessions: list[Session]) -> list[dict]:
    """The steps of several sessions, one batch for all first steps, one for all second ones ...; bytes and seconds are shared."""
    out = []
    for k in range(len(sessions[0].steps) - 1):
        texts, images = [], []
        for session in sessions:
            chat = answer.turns(session, k, [step.task.response for step in session.steps])
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
            images += [step.image for step in session.steps[: k + 1]]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt").to(model.device)
        begun = time.perf_counter()
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
        seconds = time.perf_counter() - begun
        for session, text in zip(sessions, processor.tokenizer.batch_decode(ids, skip_special_tokens=True)):
            out.append(entry(session.steps[k], text, seconds, mmkv.report(model), len(sessions)))
    return out


def entry(step: Step, text: str, seconds: float, report: mmkv.Report, rows: int = 1) -> dict:
    """What is logged of a step: was it right, did the click hit, bytes, seconds; `rows` of a batch share the latter."""
    speed = report.decode_tokens_per_second
    return dict(
        kind=step.task.kind,
        text=text,
        right=answer.right(step.task, text),
        hit=answer.hits(step.task, text),
        bytes=report.kv_bytes / rows,
        prefill=report.prefill_seconds / rows,
        decode=1 / speed if speed else None,
        seconds=seconds / rows,
    )


def measure(model, processor, sessions: list[Session], protocol: str, cache: tuple) -> list[dict]:
    """Entries of all steps of some sessions but their last ones, which only say that they are over."""
    with mmkv.wrapped(model, cache=cache):
        if protocol == "kept":
            return [found for session in sessions for found in kept(model, processor, session)]
        return whole(model, processor, sessions)


def summary(name: str, steps: list[dict], dense: list[dict]) -> dict:
    """A row: accuracy by part, its standard error, the loss against dense with that of the paired difference; bytes, time."""
    row: dict = dict(method=name, parts={})
    for part in PARTS:
        mine = [i for i, s in enumerate(steps) if part in ("all", part_of(s["kind"]))]
        what = "hit" if part in ("now", "before") else "right"
        ok, base = (np.array([entries[i][what] for i in mine]) for entries in (steps, dense))
        lost, won = int((base & ~ok).sum()), int((~base & ok).sum())
        row["parts"][part] = dict(
            accuracy=float(ok.mean()),
            error=math.sqrt(float(ok.mean() * (1 - ok.mean())) / len(ok)),
            loss_points=100 * float(base.mean() - ok.mean()),
            loss_error=100 * math.sqrt(lost + won) / len(ok),
            n=len(ok),
        )
    row["kv_bytes"] = round(float(np.mean([s["bytes"] for s in steps])))
    row["share"] = float(np.sum([s["bytes"] for s in steps]) / np.sum([s["bytes"] for s in dense]))
    row["prefill_seconds"] = float(np.mean([s["prefill"] for s in steps]))
    row["decode_seconds_per_token"] = float(np.mean([s["decode"] for s in steps if s["decode"]]))
    row["seconds_per_step"] = float(np.median([s["seconds"] for s in steps]))
    return row


def table(protocol: str, rows: list[dict], about: str) -> Table:
    out = Table(
        "method",
        *PARTS.values(),
        "KV bytes",
        "of dense",
        "prefill s",
        "decode ms / token",
        title=f"{protocol}: {about}",
    )
    for r in rows:
        cells = [f"{100 * p['accuracy']:.1f} +- {100 * p['error']:.1f}" for p in r["parts"].values()]
        times = (f"{r['prefill_seconds']:.3f}", f"{1000 * r['decode_seconds_per_token']:.1f}")
        out.add_row(r["method"], *cells, f"{r['kv_bytes']:,}", f"{r['share']:.1%}", *times)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="screenshots of a session")
    parser.add_argument("--only", nargs="*", help="names of methods; dense and GUIKV 20 % always run")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/clicking.json"))
    parser.add_argument("--picture", type=int, default=0, help="which session is drawn")
    parser.add_argument("--log", type=Path, default=Path("/tmp/mmkv-clicking.jsonl"), help="to resume from")
    options = parser.parse_args()

    points = {
        name: cache
        for name, cache in POINTS.items()
        if not options.only or name in ("dense", "GUIKV 20 %", *options.only)
    }
    model, processor = tiny_agent.load(dtype=getattr(torch, options.dtype))
    weights = hashlib.sha1((Path(tiny_agent.path()) / "model.safetensors").read_bytes()).hexdigest()[:8]
    log = Log(options.log)
    result: dict = dict(environment=environment(), dtype=options.dtype, sessions=options.sessions, steps=options.steps)
    result |= dict(weights=weights, protocols={})
    for protocol in ("kept", "whole"):
        found: dict[str, list[dict]] = {name: [] for name in points}
        with Progress() as progress:
            bar = progress.add_task(protocol, total=options.sessions * len(points))
            lines, count = Lines(progress, bar), BATCH[protocol]
            for first in range(0, options.sessions, count):
                seeds = range(SEED + first, SEED + min(first + count, options.sessions))
                sessions = [make_session(seed, options.steps) for seed in seeds]
                for name, cache in points.items():
                    key = f"{protocol} {cache!r} {seeds} {options.steps} {options.dtype} {weights}"
                    if key not in log.rows:
                        log.add(dict(key=key, steps=measure(model, processor, sessions, protocol, cache)))
                    found[name] += log.rows[key]["steps"]
                    progress.advance(bar, len(sessions))
                    lines.tell()
        rows = [summary(name, steps, found["dense"]) for name, steps in found.items()]
        result["protocols"][protocol] = rows
        Console(width=200).print(
            table(protocol, rows, f"{options.sessions} sessions of {options.steps - 1} screenshots")
        )
    save(str(options.out), result)
    clicking_plots.draw(result, options.out.with_suffix(".png"))
    shown = make_session(SEED + options.picture, options.steps)
    names = ("dense", "GUIKV 20 %")
    texts = {n: [e["text"] for e in measure(model, processor, [shown], "kept", points[n])] for n in names}
    clicking_plots.draw_session(shown, texts, options.out.with_name("clicking-session.png"))


if __name__ == "__main__":
    main()
