"""Held-out accuracy of the checkpoint: `python -m mmkv.models.tiny_agent.evaluate` rewrites accuracy.json.

Sessions are played with the plain Hugging Face processor and `generate`, the whole chat read again at every step; the history
holds the agent's own answers. Played twice: as they are, and with all screens but the current one black.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import time

import numpy as np

from mmkv.models.tiny_agent import answer, load
from mmkv.models.tiny_agent.sessions import HELD_OUT, make_session
from mmkv.models.tiny_agent.words import RECALLS


def measure(model, processor, sessions: int, steps: int, blind: bool, seed: int = HELD_OUT) -> dict:
    """Shares of right answers by kind of task; `blind`: earlier screens are black."""
    right, total = collections.Counter(), collections.Counter()
    for i in range(sessions):
        session = make_session(seed + i, steps)
        past: list[str] = []
        for k, step in enumerate(session.steps):
            images = [np.zeros_like(s.image) if blind else s.image for s in session.steps[:k]] + [step.image]
            past.append(
                answer.reply(model, processor, answer.prepare(processor, answer.turns(session, k, past), images))
            )
            right[step.task.kind] += answer.right(step.task, past[-1])
            total[step.task.kind] += 1
    return dict(
        sessions=sessions,
        steps=steps,
        all=share(right, total, list(total)),
        current_screen=share(right, total, [kind for kind in total if kind not in RECALLS]),
        earlier_screens=share(right, total, [kind for kind in total if kind in RECALLS]),
        kinds={kind: share(right, total, [kind]) for kind in sorted(total)},
    )


def share(right, total, kinds: list[str]) -> dict:
    """Accuracy over some kinds of task, its standard error, and of how many."""
    n = sum(total[kind] for kind in kinds)
    p = sum(right[kind] for kind in kinds) / max(n, 1)
    return dict(accuracy=round(p, 4), error=round(math.sqrt(p * (1 - p) / max(n, 1)), 4), n=n)


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[5])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "accuracy.json")
    args = parser.parse_args()
    model, processor = load()
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    report: dict = {"versions": versions, "held_out_seed": HELD_OUT, "rows": []}
    for steps in args.steps:
        for blind in (False, True):
            start = time.time()
            row = measure(model, processor, args.sessions, steps, blind)
            report["rows"].append(dict(earlier_screens_black=blind) | row)
            print(json.dumps(report["rows"][-1]), f"{time.time() - start:.0f} s", flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
