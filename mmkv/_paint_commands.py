"""The commands `mmkv paint` and `mmkv calibrate`: images from text by Infinity, and what is measured on it once."""

from __future__ import annotations

from typing import Annotated

import typer

Painter = Annotated[str, typer.Option(help="Folder, official checkpoint, or tiny for the bundled one.")]
Settings = Annotated[str | None, typer.Option(help="Of an official checkpoint: 2b, 8b, 8b-512, 125m.")]
Vae = Annotated[str | None, typer.Option(help="File of an official checkpoint's autoencoder.")]
TextEncoder = Annotated[str | None, typer.Option(help="Hub name or folder of the T5 encoder [google/flan-t5-xl].")]
Pixels = Annotated[str | None, typer.Option(help="0.06M, 0.25M, 0.60M or 1M [as the model was trained].")]
Guidance = Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 is none.")]
Temperature = Annotated[float, typer.Option(help="Of sampling.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [cuda where there is one].")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [as stored].")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def paint(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint.")],
    to: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the image goes.")] = "image.png",
    method: Annotated[str, typer.Option(help="hack, scalekv, snapkv, h2o, a preset, or dense.")] = "hack",
    keep: Annotated[float | None, typer.Option(help="Share of the tokens that stays [the method's own].")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Dense cache and method side by side.")] = False,
    ratio: Annotated[float, typer.Option(help="Height over width, 0.333 to 3.")] = 1.0,
    pixels: Pixels = None,
    seed: Annotated[int, typer.Option(help="Of the randomness.")] = 0,
    guidance: Guidance = 3.0,
    temperature: Temperature = 0.5,
    model: Painter = "tiny",
    settings: Settings = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Paint an image with Infinity, and say what the KV cache cost."""
    from rich.table import Table

    from mmkv import _paint, cli
    from mmkv._report import size

    with cli._one_line(debug):
        target, chosen = _paint.check_out(to), _paint.method_of(method, keep)
        if compare and chosen is None:
            raise ValueError(
                "--compare with dense, which is one of the two already; choose a method to compare it with"
            )
        if not debug:
            cli._quiet()
        painter = _paint.load_painter(model, settings, vae, text_encoder, device, dtype)
        options = dict(ratio=ratio, pixels=pixels, seed=seed, guidance=guidance, temperature=temperature)
        names = {"dense": None, method: chosen} if compare else {method: chosen}
        pictures = [_paint.paint(painter, prompt, name, one, **options) for name, one in names.items()]
        _paint.side_by_side(pictures).save(target)
        table = Table("", *[picture.method for picture in pictures])
        reports = [picture.report for picture in pictures]
        table.add_row("KV cache before the last scale", *[size(r.kv_bytes) for r in reports])
        table.add_row("at its peak", *[size(r.kv_bytes_peak) for r in reports])
        table.add_row("tokens held / seen", *[f"{r.tokens_held:,.0f} / {r.tokens_seen:,}" for r in reports])
        table.add_row("seconds", *[cli._number(r.prefill_seconds, "{:.2f}") for r in reports])
        cli.out.print(table)
        if (psnr := _paint.difference(pictures)) is not None:
            cli.out.print(f"PSNR of the second against the first: {psnr:.1f} dB", highlight=False)
        cli.out.print(f"written: {target}", highlight=False, soft_wrap=True)


def calibrate(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As --model of `mmkv paint`.")] = "tiny",
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt on each line [the bundled model's own].")
    ] = None,
    heads: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Head classes for HACK [in the model's folder].")
    ] = None,
    roles: Annotated[str | None, typer.Option(metavar="FILE", help="Layer roles for ScaleKV [beside them].")] = None,
    contextual: Annotated[float, typer.Option(help="Share of the heads that become contextual.")] = 0.5,
    drafters: Annotated[int | None, typer.Option(help="(layer, scale) pairs that draft [6 % of all].")] = None,
    share: Annotated[float, typer.Option(help="What ScaleKV is to keep on average.")] = 0.1,
    ratio: Annotated[float, typer.Option(help="Height over width, 0.333 to 3.")] = 1.0,
    pixels: Pixels = None,
    guidance: Guidance = 3.0,
    temperature: Temperature = 0.5,
    settings: Settings = None,
    text_encoder: TextEncoder = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Measure which heads of a painting model are structural (HACK) and which layers draft (ScaleKV), once for each model."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from mmkv import _calibrate, _inputs, _paint, cli

    with cli._one_line(debug):
        if prompts is None and model != _inputs.TINY:
            raise ValueError("--prompts is missing: give a file with a prompt on each line; 10 to 50 are enough")
        texts = None if prompts is None else _calibrate.read_prompts(prompts)
        if not debug:
            cli._quiet()
        painter = _paint.load_painter(model, settings, None, text_encoder, device, dtype)
        files = _calibrate.targets(painter, heads, roles)
        if texts is None:
            from mmkv.models import tiny_infinity

            texts = list(tiny_infinity.PROMPTS)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=cli.err, transient=True, disable=not cli.err.is_terminal) as progress:
            task = progress.add_task("painting", total=len(texts))
            options = dict(ratio=ratio, pixels=pixels, guidance=guidance, temperature=temperature)
            found = _calibrate.calibrate(
                painter, texts, contextual, drafters, share, lambda: progress.advance(task), **options
            )
        found.heads.save(files[0])
        found.roles.save(files[1])
        table = Table("layer", "structural heads", "drafts while scales are made")
        for layer, structural in enumerate(found.heads.structural):
            scales = [str(scale) for scale, layers in enumerate(found.roles.drafters) if layer in layers]
            table.add_row(str(layer), ", ".join(map(str, structural)) or "-", ", ".join(scales) or "-")
        cli.out.print(table)
        cli.out.print(
            f"the first image alone gives the same class for {found.agreement:.0%} of the heads", highlight=False
        )
        cli.out.print(f"written: {files[0]}, {files[1]}", highlight=False, soft_wrap=True)
