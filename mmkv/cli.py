"""The command `mmkv`: ask a video a question, watch one, list the methods, look at the installation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mmkv import _paint_commands as painting
from mmkv.eval import cli as evaluation

app = typer.Typer(
    help="Long video in a fraction of the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def _fail(message: str) -> typer.Exit:
    """Print `mmkv: message` on stderr; raise what this returns to end with exit code 2."""
    err.print(Text(f"mmkv: {message}"), soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    """What a person can put right ends the command with one line, without a traceback unless they debug."""
    from mmkv._inputs import UserError

    try:
        yield
    except (UserError, ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        if debug:
            raise
        raise _fail(str(error)) from error


def _version(wanted: bool) -> None:
    if wanted:
        from mmkv import __version__

        typer.echo(f"mmkv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def ask(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video file; left out with --store.")],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="One question or several.", show_default=False)
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="disk:FOLDER that `mmkv watch` has filled, in place of a video.")
    ] = None,
    retrieve: Annotated[int, typer.Option(min=1, help="With --store: frames that each layer brings back.")] = 64,
    model: Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny model.")] = "tiny",
    method: Annotated[str, typer.Option(help="Preset of the cache; `mmkv methods` lists them.")] = "vidkv",
    compare: Annotated[bool, typer.Option("--compare", help="Stock cache and preset side by side.")] = False,
    fps: Annotated[float | None, typer.Option(help="Frames a second to read [2, at most 128 frames].")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to read, evenly spaced (instead of --fps).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [as stored].")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Answer questions about a video, and say what the KV cache cost."""
    from mmkv import _ask, _inputs

    if store is not None:
        _ask_store(store, [video, *(questions or [])], model, retrieve, max_new_tokens, device, dtype, debug)
        return
    with _one_line(debug):
        if not questions:
            raise ValueError('a question is missing; for example: mmkv ask video.mp4 "where is the circle?"')
        _ask.check_preset(method)
        if not debug:
            _quiet()
        clip = _inputs.sample(video, fps, frames)
        if not all(question.strip() for question in questions):
            raise ValueError("an empty question; ask something in words")
        vlm, processor = _load(model, device, dtype)
        if model == _inputs.TINY:
            for question in questions:
                _inputs.check_words(processor, question)
        pictures = _read(clip)
        methods: list[str | None] = [None, method] if compare else [method]
        if compare:
            _ask.warm_up(vlm, processor, pictures, clip.sample_fps, questions[0], methods)
        answers = []
        for question in questions:
            inputs = _inputs.prepare(vlm, processor, pictures, clip.sample_fps, question)
            answers.append([_ask.answer(vlm, processor, inputs, m, max_new_tokens) for m in methods])
            if not compare:
                _show(answers[-1][0])
        if compare:
            _compare(questions, ["stock cache", method], answers)


def _ask_store(
    store: str, questions: list[str], model: str, retrieve: int, most: int, device, dtype, debug: bool
) -> None:
    from mmkv import _inputs, _watch

    with _one_line(debug):
        if not debug:
            _quiet()
        vlm, processor = _load(model, device, dtype)
        if model == _inputs.TINY:
            for question in questions:
                _inputs.check_words(processor, question)
        for question in questions:
            found = _watch.ask(
                vlm, processor, store, question, retrieve=retrieve, max_new_tokens=most,
                say=lambda piece: out.print(piece, end="", highlight=False, markup=False),
            )  # fmt: skip
            out.print()
            voted = sorted(found.frames, key=lambda f: (-f.layers, f.time))[:8]
            moments = ", ".join(f"{f.time:.1f}" for f in sorted(voted, key=lambda f: f.time))
            err.print(
                f"from {len(found.frames)} frames, most of all those at {moments} s; first word after "
                f"{found.seconds['first_token']:.2f} s",
                highlight=False,
            )


@app.command()
def watch(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video file.")],
    store: Annotated[str, typer.Option(help="disk:FOLDER to remember it in.")],
    model: Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny model.")] = "tiny",
    fps: Annotated[float | None, typer.Option(help="Pictures a second [2].")] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens that a frame sees while it is encoded.")] = 15000,
    packed: Annotated[str | None, typer.Option(help="int8, int4, int2 or vidkv [as they are].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [as stored].")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Encode a video once into a folder; `mmkv ask --store` answers from it. Goes on where it was stopped."""
    from mmkv import _inputs, _watch

    with _one_line(debug):
        if not debug:
            _quiet()
        if not store.startswith("disk:"):
            raise ValueError(f"--store {store}: possible is disk:FOLDER")
        clip = _inputs.clip(video, fps)
        vlm, processor = _load(model, device, dtype)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task(f"watching {clip.path.name}", total=len(clip))
            frames, held = _watch.watch(
                vlm, processor, clip, store, window=window, packed=packed, tick=lambda n: progress.advance(task, n)
            )
        out.print(
            f"{frames} frames remembered, {held['disk']:,} bytes in {store.removeprefix('disk:')}", highlight=False
        )


def _quiet() -> None:
    """Keep transformers' advice, its progress bars and decord's chatter off a person's screen; errors still show.

    PyAV is silent by itself. Its own logging must stay off: it calls Python from decoder threads and can deadlock.
    """
    from transformers.utils import logging

    from mmkv.video import decord_module

    with suppress(ImportError, OSError):
        decord = decord_module()
        decord.logging.set_level(decord.logging.QUIET)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read(clip: Any) -> Any:
    from mmkv import _inputs

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"decoding {clip.path.name}", total=len(clip))
        pictures = _inputs.read(clip, lambda: progress.advance(task))
    err.print(
        f"{clip.path.name}: {clip.duration:.1f} s, {clip.width}x{clip.height}; read {len(clip)} of {clip.frame_count} "
        f"frames ({clip.sample_fps:.3g} a second) by {clip.reader}",
        highlight=False,
    )
    return pictures


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    from mmkv import _inputs

    if not err.is_terminal:
        return _inputs.load(model, device, dtype)
    with err.status("loading the model"):
        return _inputs.load(model, device, dtype)


def _show(answer: Any) -> None:
    out.print(Text(answer.text or "(empty answer)", style="bold"))
    out.print(answer.report)


def _compare(questions: list[str], caches: list[str], answers: list[list[Any]]) -> None:
    """One table: a column for each cache; a row for each question, then the numbers of the last one."""
    from mmkv._report import size

    table = Table("", *caches)
    for question, row in zip(questions, answers):
        table.add_row(Text(question), *[Text(a.text or "(empty)", style="bold") for a in row])
    table.add_section()
    reports = [a.report for a in answers[-1]]
    rows = {
        "KV cache, resident": lambda r: size(r.kv_bytes) + (f" ({r.ratio:.1f}x smaller)" if r.ratio > 1.05 else ""),
        "KV cache, if dense": lambda r: size(r.kv_bytes_dense),
        "bits, whole cache": lambda r: f"{r.kv_bits:.2f} per element",
        "bits, packed tokens": lambda r: _number(r.packed_bits, "{:.2f} per element"),
        "tokens held / seen": lambda r: f"{r.tokens_held:,.0f} / {r.tokens_seen:,}",
        "prefill": lambda r: _number(r.prefill_seconds, "{:.3f} s"),
        "decode": lambda r: _number(r.decode_tokens_per_second, "{:.1f} tokens/s"),
        "tokens decoded": lambda r: f"{r.decode_tokens:,}",
    }
    for label, value in rows.items():
        table.add_row(label, *map(value, reports))
    if len(questions) > 1:
        table.caption = "numbers: those of the last question"
    out.print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


@app.command()
def look(
    path: Annotated[str, typer.Argument(metavar="VIDEO|IMAGE", help="A video or an image file.")],
    method: Annotated[str, typer.Option(help="Token method, or several with commas between.")] = "visionzip",
    keep: Annotated[
        float | None, typer.Option(help="Share of vision tokens to keep [0.25 where a method can be told].")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--out", help="FILE.png, .mp4 or .html [a PNG named after file and method].")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Question behind the video, which some methods read.")] = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Most frames in a PNG.")] = 8,
    model: Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny model.")] = "tiny",
    fps: Annotated[float | None, typer.Option(help="Frames a second to read [2, at most 128 frames].")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to read, evenly spaced (instead of --fps).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [as stored].")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw which vision tokens a method keeps, merges and drops: a picture, a film or a page."""
    from mmkv import _inputs
    from mmkv._look import run

    with _one_line(debug):
        chosen = run.methods_of(method, keep)
        target = run.check_out(to, path, method)
        if not debug:
            _quiet()
        image = run.is_image(path)
        if image and (fps is not None or frames is not None):
            raise ValueError(f"{path} is an image; --fps and --frames are for videos")
        pictures = run.open_image(path) if image else None
        clip = None if image else _inputs.sample(path, fps, frames)
        vlm, processor = _load(model, device, dtype)
        text = run.question_for(model, processor, question)
        pictures = _read(clip) if pictures is None else pictures
        seen = run.Look(vlm, processor, pictures, clip.sample_fps if clip else None, text)
        stages = []
        for one in chosen:
            mine = seen.stages(one)
            for stage in mine:
                out.print(f"{stage.method}, {stage.place}: {stage.counts}", highlight=False)
            if note := run.remark(one, mine, image):
                err.print(note, highlight=False, soft_wrap=True)
            stages += mine
        scene = seen.scene(f"Vision tokens of {Path(path).name}", f'{model}, asked "{text}"')
        seen.write(target, scene, stages, columns)
        out.print(f"written: {target}", highlight=False, soft_wrap=True)


@app.command()
def methods() -> None:
    """List the methods and the presets made of them."""
    import mmkv

    table = Table("method", "kind", "what it does", "paper", title="Methods", title_justify="left")
    for entry in mmkv.methods():
        table.add_row(*map(Text, (entry.name, entry.kind, entry.summary, entry.paper)))
    out.print(table)
    table = Table("preset", "what it does", title="Presets", title_justify="left")
    for name, summary in mmkv.presets().items():
        table.add_row(Text(name), Text(summary))
    out.print(table)


@app.command("train-rates")
def train_rates(
    images: Annotated[str, typer.Argument(metavar="FOLDER|digits", help="Images, or scikit-learn's digits.")],
    model: Annotated[str, typer.Option(help="Name of a vision transformer in timm.")],
    target: Annotated[float, typer.Option(help="GFLOPs that an image may cost (multiply-adds, as papers count).")],
    out_path: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the rates go, as JSON.")] = "rates.json",
    checkpoint: Annotated[str | None, typer.Option(help="File with the model's weights [timm's own].")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for the model: img_size=64 ...")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the rates.")] = 0.01,
    granularity: Annotated[int, typer.Option(min=1, help="Step between the numbers of tokens to choose from.")] = 4,
    loss: Annotated[
        str, typer.Option(help="distillation (any images), or labels (folders are classes).")
    ] = "distillation",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Learn how many tokens DiffRate prunes and merges in each block of a vision transformer."""
    with _one_line(debug):
        import torch

        from mmkv._vision import train_data
        from mmkv._vision import train_rates as rating

        # what can be told before the model is loaded
        if not Path(out_path).absolute().parent.is_dir():
            raise ValueError(f"--out {out_path}: no such folder; make it first")
        if target <= 0:
            raise ValueError(f"--target {target:g}: possible are GFLOPs above 0, below what the whole model costs")
        if images != "digits" and not any(path.is_file() for path in Path(images).rglob("*")):
            raise ValueError(f"{images} is no folder, or there are no images in it; give one, or digits")
        vit = train_data.load_model(model, checkpoint, setting or [])
        vit.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loader = train_data.loader(images, vit, batch)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("learning rates", total=epochs * len(loader))

            def step(facts: dict) -> None:
                told = f"loss {facts['loss']:.4f}, {facts['gflops']:.4g} GFLOPs"
                progress.update(task, completed=facts["step"], description=told)

            rates = rating.train_rates(
                vit, loader, target, epochs, lr, granularity=granularity, loss=loss, progress=step
            )
        cost, whole = rating.costs(vit, rates)
        rates.save(out_path, model=model, gflops=cost, gflops_dense=whole, images=images)
    table = Table("block", "kept behind pruning", "behind merging")
    for block, (pruned, merged) in enumerate(rates.kept(rates.tokens or 0)):
        table.add_row(str(block), str(pruned), str(merged))
    out.print(table)
    out.print(f"{cost:.4g} of {whole:.4g} GFLOPs; written to {out_path}", highlight=False)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Hub name or folder; by default the bundled tiny model.")] = "tiny",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port [the first free one from 7860].")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public tunnel through Gradio's servers.")] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens a frame sees while written [512 bundled, else 15000].")
    ] = None,
    retrieve: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Frames brought back per layer [48 bundled, else 64].")
    ] = None,
    store: Annotated[str, typer.Option(help="Where memories are kept first: ram or disk:PATH.")] = "ram",
    fps: Annotated[float, typer.Option(help="Pictures a second that are watched.")] = 2.0,
    max_minutes: Annotated[float, typer.Option(help="Longest video, or time of a webcam.")] = 30.0,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest upload.")] = 200,
    max_users: Annotated[int, typer.Option(min=1, help="Videos held at once.")] = 8,
    max_gib: Annotated[float, typer.Option(help="Most memory of one video, all tiers together.")] = 4.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [bundled: cpu, else cuda if any].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 [bundled: float32, else as stored].")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """A page in the browser: watch a video, a sample or the webcam, and ask about it at any time."""
    from mmkv import _inputs
    from mmkv.demos.page.options import Limits
    from mmkv.demos.page.serve import check_installed, served, wait

    with _one_line(debug):
        check_installed()
        bundled = model == _inputs.TINY
        limits = Limits(
            minutes=max_minutes, megabytes=max_mb, users=max_users, gibibytes=max_gib, fps=fps, store=store,
            window=window or (512 if bundled else 15000), retrieve=retrieve or (48 if bundled else 64),
        )  # fmt: skip
        if not debug:
            _quiet()
        vlm, processor = _load(model, device or ("cpu" if bundled else None), dtype or ("float32" if bundled else None))
        with served(vlm, processor, model, limits, bundled, host, port, share) as (address, _):
            out.print(f"the page is at {address} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
            wait()


@app.command()
def doctor() -> None:
    """Versions, device, kernels, video readers; what is missing and how to get it. Exit code 1 if mmkv cannot run."""
    from mmkv import __version__, _doctor
    from mmkv.video import readers

    python = sys.version.split()[0]
    table = Table("package", "installed", "supported", "", title=f"mmkv {__version__}", title_justify="left")
    table.add_row("python", python, ">=3.11", _tick(sys.version_info >= (3, 11)))
    found = _doctor.packages()
    for package in found:
        table.add_row(package.name, package.version or "-", package.wants or "any", _tick(package.ok))
    out.print(table)
    out.print(f"device    {_doctor.device()}", highlight=False)
    kernels = ", ".join(f"{name} ({what})" for name, what in sorted(_doctor.kernels().items()))
    out.print(f"kernels   {kernels}", highlight=False)
    seen = ", ".join(f"{name} {version}" if version else f"{name} missing" for name, version in readers().items())
    out.print(f"video     {seen}", highlight=False)
    for extra, missing in _doctor.extras().items():
        if missing:
            command = f"pip install 'mmkv[{extra}]'"
            out.print(Text(f"extra     {extra}: {', '.join(missing)} missing: {command}"), soft_wrap=True)
        else:
            out.print(f"extra     {extra}: complete", highlight=False)
    bad = [p for p in found if not p.ok]
    if bad:
        wanted = " ".join(f"'{p.name}{p.wants}'" for p in bad)
        out.print(Text(f"to repair: pip install --upgrade {wanted}"), soft_wrap=True)
        raise typer.Exit(1)


def _tick(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("not supported", style="red")


app.add_typer(evaluation.app, name="eval")
app.command("compare")(evaluation.compare)
app.command("paint")(painting.paint)
app.command("calibrate")(painting.calibrate)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mmkv")


if __name__ == "__main__":
    main()
