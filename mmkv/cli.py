"""The command `mmkv`: ask a video a question, list the methods, look at the installation."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One question or several.")],
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
    from mmkv import _ask

    try:
        _ask.check_preset(method)
        if not debug:
            _quiet()
        clip = _ask.sample(video, fps, frames)
        if not all(question.strip() for question in questions):
            raise ValueError("an empty question; ask something in words")
        vlm, processor = _load(model, device, dtype)
        if model == _ask.TINY:
            for question in questions:
                _ask.check_words(processor, question)
        pictures = _read(clip)
        methods: list[str | None] = [None, method] if compare else [method]
        if compare:
            _ask.warm_up(vlm, processor, pictures, clip.sample_fps, questions[0], methods)
        answers = []
        for question in questions:
            inputs = _ask.prepare(vlm, processor, pictures, clip.sample_fps, question)
            answers.append([_ask.answer(vlm, processor, inputs, m, max_new_tokens) for m in methods])
            if not compare:
                _show(answers[-1][0])
        if compare:
            _compare(questions, ["stock cache", method], answers)
    except (_ask.UserError, ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        if debug:
            raise
        raise _fail(str(error)) from error


def _quiet() -> None:
    """Keep transformers' advice, its progress bars and decord's chatter off a person's screen; errors still show.

    PyAV is silent by itself. Its own logging must stay off: it calls Python from decoder threads and can deadlock.
    """
    from transformers.utils import logging

    with suppress(ImportError):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read(clip: Any) -> Any:
    from mmkv import _ask

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"decoding {clip.path.name}", total=len(clip))
        pictures = _ask.read(clip, lambda: progress.advance(task))
    err.print(
        f"{clip.path.name}: {clip.duration:.1f} s, {clip.width}x{clip.height}; read {len(clip)} of {clip.frame_count} "
        f"frames ({clip.sample_fps:.3g} a second) by {clip.reader}",
        highlight=False,
    )
    return pictures


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    from mmkv import _ask

    if not err.is_terminal:
        return _ask.load(model, device, dtype)
    with err.status("loading the model"):
        return _ask.load(model, device, dtype)


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


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mmkv")


if __name__ == "__main__":
    main()
