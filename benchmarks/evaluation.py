"""Both benchmarks in their official formats on the bundled models: dense and the presets, one table, one plot.

The data are the generated sets of `mmkv eval`: videos of the synthetic world in Video-MME's format, screens in AgentNetBench's.
Goes on where it was stopped.

    python benchmarks/evaluation.py        # writes benchmarks/results/evaluation.json and evaluation.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import environment, save

from mmkv.eval import command, comparison, synthetic_agent, synthetic_video, table
from mmkv.eval.agentnetbench.task import AgentNetBench
from mmkv.eval.cli import PRESETS
from mmkv.eval.frames_cache import FramesCache
from mmkv.eval.methods import methods_of
from mmkv.eval.runner import Plan
from mmkv.eval.sampling import Sampling
from mmkv.eval.task import Task
from mmkv.eval.video_mme.task import VideoMME

RESULTS = Path("benchmarks/results")
BESIDE = {
    "video-mme": "SnapKV(budget=0.25)",
    "agentnetbench": "GUIKV(budget=0.4)",
}  # an evicting method beside the presets
AGENT_TOKENS = 64  # the bundled agent's longest answer


def tasks(videos: int, sessions: int, frames: int) -> list[tuple[Task, str]]:
    """The benchmarks, each with the model that answers it."""
    cache = FramesCache(command.CACHE / "frames")
    films = synthetic_video.bundled(command.CACHE, videos)
    screens = synthetic_agent.bundled(command.CACHE, sessions)
    agent = AgentNetBench(screens, screenshots=synthetic_agent.STEPS, max_new_tokens=AGENT_TOKENS)
    return [(VideoMME(films, Sampling(frames), "likelihood", cache, style="plain"), "tiny"), (agent, "tiny-agent")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--sessions", type=int, default=synthetic_agent.SESSIONS)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--methods", default=PRESETS)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--work", type=Path, default=Path("outputs/eval"), help="where the runs' own folders lie")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    options = parser.parse_args()

    folders = []
    for task, model in tasks(options.videos, options.sessions, options.frames):
        folder = options.work / f"benchmark-{task.name}-{options.videos}-{options.sessions}"
        methods = methods_of(f"{options.methods},{BESIDE[task.name]}")
        command.run_and_show(task, methods, model, Plan(folder, dtype=options.dtype))
        folders.append(folder)
    rows = comparison.gather(folders)
    table.show(comparison.table(rows))
    runs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    save(str(options.out), dict(environment=environment(), runs=runs, rows=[trimmed(row) for row in rows]))
    comparison.plot(rows, options.out.with_suffix(".png"))


def trimmed(row: dict) -> dict:
    """Numbers in as many digits as they are worth."""
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))


if __name__ == "__main__":
    main()
