"""The commands of GUI agents: `mmkv eval agentnetbench`, `screenspot-v2` and `screenspot-pro`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkv.eval.options import (
    PRESETS,
    Address,
    Debug,
    Dense,
    Device,
    Dtype,
    Engine,
    Limit,
    Methods,
    Out,
    Retry,
    Threads,
    Workers,
    one_line,
    quiet,
)

METHODS = f"GUIKV(budget=0.4),{PRESETS}"  # one that knows of screenshots beside the presets
BUNDLED = "bundled"

Model = Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny agent.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the screenshots [beside the data].")]
Agent = Annotated[
    str | None, typer.Option(help="How the model is asked and read: opencua, ui_tars ... [by the model].")
]


def add_to(app: typer.Typer) -> None:
    """Give `mmkv eval` these commands."""
    app.command("agentnetbench")(agentnetbench)
    app.command("screenspot-v2")(screenspot_v2)
    app.command("screenspot-pro")(screenspot_pro)


def agentnetbench(
    model: Model = "tiny-agent",
    method: Methods = METHODS,
    data: Annotated[str, typer.Option(help="Folder of *.json; `bundled` makes a small synthetic set.")] = BUNDLED,
    images: Images = None,
    scorer: Annotated[str, typer.Option(help="corrected, official, official-2026 or gui_kv.")] = "corrected",
    history: Annotated[
        str | None, typer.Option(help="truth, or own: the model's own answers [own with gui_kv].")
    ] = None,
    screenshots: Annotated[
        int | None, typer.Option(help="In a prompt, the current one included [3; bundled, gui_kv 5].")
    ] = None,
    agent: Agent = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer [1000; bundled 64].")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Trajectories of the bundled set.")] = 24,
    dense: Dense = True,
    limit: Limit = None,
    workers: Workers = 1,
    engine: Engine = "local",
    ray_address: Address = None,
    out: Out = None,
    retry_skipped: Retry = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """AgentNetBench: steps of GUI agents on screenshots of Windows and macOS, scored without a machine."""
    from mmkv.eval import command, synthetic_agent
    from mmkv.eval.agentnetbench.task import AgentNetBench
    from mmkv.eval.methods import methods_of
    from mmkv.eval.runner import Plan

    with one_line(debug):
        own = data == BUNDLED
        methods = methods_of(method, dense)
        plan = Plan(out, engine, workers, limit, retry_skipped, device, dtype, threads, ray_address)
        folder = synthetic_agent.bundled(command.CACHE, sessions) if own else Path(data)
        # the bundled sessions ask about screenshots that are up to four steps old
        shown = screenshots if screenshots is not None or not own else synthetic_agent.STEPS
        longest = max_new_tokens or (64 if own else 1000)
        task = AgentNetBench(folder, images, scorer, history, shown, agent, longest)
        if not debug:
            quiet()
        command.run_and_show(task, methods, model, plan)


def screenspot_v2(
    data: Annotated[Path, typer.Option(help="Folder of screenspot_{mobile,desktop,web}_v2.json.")],
    model: Model = "tiny-agent",
    method: Methods = METHODS,
    images: Images = None,
    agent: Agent = None,
    dense: Dense = True,
    limit: Limit = None,
    workers: Workers = 1,
    engine: Engine = "local",
    ray_address: Address = None,
    out: Out = None,
    retry_skipped: Retry = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """ScreenSpot-v2: find an element on a mobile, desktop or web screen."""
    plan = (out, engine, workers, limit, retry_skipped, device, dtype, threads, ray_address)
    _spot("ScreenSpotV2", data, images, agent, method, dense, model, plan, debug)


def screenspot_pro(
    data: Annotated[Path, typer.Option(help="Folder of the annotations, a *.json per application.")],
    model: Model = "tiny-agent",
    method: Methods = METHODS,
    images: Images = None,
    agent: Agent = None,
    dense: Dense = True,
    limit: Limit = None,
    workers: Workers = 1,
    engine: Engine = "local",
    ray_address: Address = None,
    out: Out = None,
    retry_skipped: Retry = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """ScreenSpot-Pro: find a small element on a large screen of professional software."""
    plan = (out, engine, workers, limit, retry_skipped, device, dtype, threads, ray_address)
    _spot("ScreenSpotPro", data, images, agent, method, dense, model, plan, debug)


def _spot(name: str, data, images, agent, method: str, dense: bool, model: str, plan: tuple, debug: bool) -> None:
    from mmkv.eval import command
    from mmkv.eval.methods import methods_of
    from mmkv.eval.runner import Plan
    from mmkv.eval.screenspot import task as tasks

    with one_line(debug):
        methods, how = methods_of(method, dense), Plan(*plan)
        task = getattr(tasks, name)(data, images, agent)
        if not debug:
            quiet()
        command.run_and_show(task, methods, model, how)
