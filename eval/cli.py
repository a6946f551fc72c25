"""The commands `mmkv eval ...` and `mmkv compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mmkv.eval import cli_agents
from mmkv.eval.options import (
    PRESETS,
    Address,
    Answer,
    Data,
    Debug,
    Dense,
    Device,
    Dtype,
    Engine,
    Fps,
    Frames,
    FramesCacheGiB,
    Limit,
    MaxPixels,
    Methods,
    Model,
    Out,
    Retry,
    Sampler,
    Threads,
    Workers,
    one_line,
    quiet,
)

app = typer.Typer(help="Run a benchmark with several methods beside the dense baseline.", no_args_is_help=True)
cli_agents.add_to(app)


@app.command("video-mme")
def video_mme(
    model: Model = "tiny",
    method: Methods = PRESETS,
    data: Data = "bundled",
    frames: Frames = None,
    fps: Fps = None,
    max_pixels: MaxPixels = None,
    sampler: Sampler = "linspace",
    subtitles: Annotated[
        bool, typer.Option("--subtitles", help="Put subtitles of the frames into the prompt.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help="official, lmms, vlmeval or plain [plain with likelihood].")
    ] = None,
    extractor: Annotated[str, typer.Option(help="How the letter is found: official or lmms.")] = "official",
    duration: Annotated[str, typer.Option(help="Which videos: short,medium,long.")] = "short,medium,long",
    answer: Answer = None,
    videos: Annotated[int, typer.Option(min=1, help="Videos of the bundled set.")] = 60,
    dense: Dense = True,
    limit: Limit = None,
    workers: Workers = 1,
    engine: Engine = "local",
    ray_address: Address = None,
    out: Out = None,
    retry_skipped: Retry = False,
    frames_cache: FramesCacheGiB = 20.0,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Video-MME: 2,700 multiple-choice questions about 900 videos of 11 seconds to an hour."""
    from mmkv.eval import command
    from mmkv.eval.frames_cache import FramesCache
    from mmkv.eval.methods import methods_of
    from mmkv.eval.runner import Plan
    from mmkv.eval.sampling import Sampling
    from mmkv.eval.video_mme.task import VideoMME

    with one_line(debug):
        methods = methods_of(method, dense)
        plan = Plan(out, engine, workers, limit, retry_skipped, device, dtype, threads, ray_address)
        count = frames if frames is not None or fps is not None else (128 if data == "bundled" else 32)
        sampling = Sampling(count, fps, sampler, max_pixels)
        mode = answer or ("likelihood" if model == "tiny" else "generate")
        style = prompt or ("plain" if mode == "likelihood" and not subtitles else "official")
        cache = FramesCache(command.CACHE / "frames" if frames_cache else None, int(frames_cache * 2**30))
        durations = tuple(duration.split(","))
        task = VideoMME(_bundled(data, videos), sampling, mode, cache, style, extractor, subtitles, durations)
        if not debug:
            quiet()
        command.run_and_show(task, methods, model, plan)


def _bundled(data: str, videos: int) -> Path:
    if data != "bundled":
        return Path(data)
    from mmkv.eval import command, synthetic_video

    return synthetic_video.bundled(command.CACHE, videos)


def compare(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Result folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="FILE.md, FILE.html or FILE.png; a .png lies beside .md and .html.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Results side by side: a table, and accuracy over bytes and over time."""
    from mmkv.eval import comparison
    from mmkv.eval.table import show

    with one_line(debug):
        if out is not None:
            comparison.check_out(out)
        rows = comparison.gather(results)
        show(comparison.table(rows))
        for line in comparison.remarks(results):
            Console(stderr=True).print(Text(line), soft_wrap=True)
        if out is not None:
            for path in comparison.write(rows, results, out):
                Console().print(f"written: {path}", highlight=False, soft_wrap=True)
