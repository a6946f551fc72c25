"""Options that the eval commands share, and how their errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

PRESETS = "kivi-4,kivi-2,vidkv,vidkv-stp,waterfill,waterfill-1"  # that run where no method is named


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """What a person can put right ends the command with one line, without a traceback unless they debug."""
    from mmkv._inputs import UserError

    try:
        yield
    except (UserError, ValueError, TypeError, NotImplementedError, FileNotFoundError, ModuleNotFoundError) as error:
        if debug:
            raise
        Console(stderr=True).print(Text(f"mmkv: {error}"), soft_wrap=True)
        raise typer.Exit(2) from error


Model = Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny model.")]
Methods = Annotated[str, typer.Option("--method", help="Presets, or methods such as SnapKV(budget=0.25), with commas.")]
Dense = Annotated[bool, typer.Option("--dense/--no-dense", help="Run the dense baseline as well.")]
Out = Annotated[Path | None, typer.Option("--out", help="Result folder [outputs/eval/..., the same for the same run].")]
Limit = Annotated[int | None, typer.Option(help="Only the first samples.")]
Workers = Annotated[int, typer.Option(help="Processes, or Ray actors, with a model each.")]
Engine = Annotated[str, typer.Option(help="local, or ray (pip install 'mmkv[ray]').")]
Address = Annotated[str | None, typer.Option("--ray-address", help="Running Ray cluster [a local one is started].")]
Retry = Annotated[bool, typer.Option("--retry-skipped", help="Try again what an earlier run had to skip.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of each worker.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [as stored].")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Data = Annotated[str, typer.Option(help="Folder of the data; `bundled` makes a small set of the synthetic world.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video, evenly spaced [128 bundled, else 32].")]
Fps = Annotated[float | None, typer.Option(help="Frames a second, instead of --frames.")]
MaxPixels = Annotated[int | None, typer.Option(help="Shrink larger frames to this area before all else.")]
Sampler = Annotated[str, typer.Option(help="linspace (first and last frame included) or vlmeval.")]
Answer = Annotated[str | None, typer.Option(help="generate, or likelihood of the options [likelihood if bundled].")]
FramesCacheGiB = Annotated[
    float, typer.Option("--frames-cache", help="GiB of decoded frames kept on disk; 0 for none.")
]


def quiet() -> None:
    """Keep the libraries' advice off a person's screen; errors still show."""
    from mmkv.cli import _quiet

    _quiet()
