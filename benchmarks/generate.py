"""Whole models with random weights: prefill, decode, resident and peak bytes, dense against each preset.

Per setting all variants run in turn in one process, each round a prefill and, apart from it, greedy decoding by `generate`; the
fastest round counts. The vision tower is a very small one and its time is left out, so these are times of the decoder. Peaks are
the allocator's own figures above the weights, from a round that is not timed. On a GPU each row also says how near decoding comes
to what the copy bandwidth allows, at the bytes of weights and cache that a step has to read.

    python benchmarks/generate.py                               # CPU: a small model, a few minutes
    python benchmarks/generate.py --device cuda --graphs        # H100: shapes of Qwen2.5-VL 7B and 3B, with CUDA graphs beside
    python benchmarks/generate.py --profile traces --lengths 2048 --batches 1     # and a Chrome trace of each variant
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import shapes
import torch
from common import environment, save
from generating import STOCK, Setting, Variant, fitting, variants
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import copy_bandwidth

from mmkv.parts.storage import storage_bytes

# decoders, as their configurations have them
MODELS = {
    "small": dict(shapes.SMALL, num_hidden_layers=4),
    "7B": dict(shapes.LARGE, vocab_size=152064),
    "3B": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip
SETTINGS = {  # (model, tokens of the prompt, batch), the most telling first
    "cpu": (("small", 8192, 1), ("small", 2048, 1), ("small", 2048, 4)),
    "cuda": tuple(
        (model, length, batch)
        for model in ("7B", "3B")
        for length, batch in ((32768, 8), (32768, 1), (8192, 1), (8192, 8), (2048, 1), (2048, 8), (131072, 1))
    ),
}


def weights_read(model) -> int:
    """Bytes of the decoder's weights that one token reads: all but the table of embeddings, where it is not the head too."""
    text = model.get_decoder()
    counted = [p for name, p in text.named_parameters() if "embed_tokens" not in name] + list(
        model.lm_head.parameters()
    )
    return storage_bytes(counted)


def row_of(variant: Variant, batch: int, times: dict, held: dict, weights: int, copy: float | None) -> dict:
    """One row: the fastest round, against the stock model's fastest, and what the copy bandwidth explains.

    A round can be slow for what else the machine does, and cannot be too fast.

    Args:
        times: of each variant's name, what it took in each round; empty where it did not run.
        held: the variant's bytes.
        weights: bytes of weights that a step reads.
        copy: bytes a second of a large copy, None where that says nothing.
    """
    fastest = lambda name, part: min(one[part] for one in times[name])  # noqa: E731
    prefill, step = (fastest(variant.name, part) for part in ("prefill", "step"))
    row = dict(
        variant=variant.name,
        prefill_seconds=prefill,
        prefill_ratio=prefill / fastest(STOCK, "prefill") if times[STOCK] else None,
        decode_tokens_per_second=batch / step,
        decode_ratio=fastest(STOCK, "step") / step if times[STOCK] else None,
        **held,
    )
    if copy is not None:
        row["floor_tokens_per_second"] = batch * copy / (weights + held["kv_bytes"])
        row["share_of_floor"] = row["decode_tokens_per_second"] / row["floor_tokens_per_second"]
    return row


def measure(setting: Setting, chosen: list[Variant], batch: int, rounds: int, copy: float | None, step: Callable):
    """Rows of a setting.

    Args:
        step: called after each run.
    """
    times: dict[str, list[dict]] = {variant.name: [] for variant in chosen}
    held: dict[str, dict] = {}
    for i in range(1 + rounds):  # the first round warms up, and is where bytes are counted
        for variant in chosen:
            found = setting.run(variant, setting.times if i else setting.bytes)
            if found is not None and i:
                times[variant.name].append(found)
            elif found is not None:
                held[variant.name] = found
            step()
    weights = weights_read(setting.model)
    ran = [variant for variant in chosen if times[variant.name]]
    return [row_of(variant, batch, times, held[variant.name], weights, copy) for variant in ran]


def prompt(model, length: int, batch: int) -> dict:
    """Inputs of about so many tokens (a little fewer), most of them of a video; all rows of the batch alike."""
    one = shapes.video(
        model, max(length - shapes.BEFORE - shapes.BEHIND - 2, shapes.FRAME) // shapes.FRAME * shapes.FRAME
    )
    return {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in one.items()}


def show(rows: list[dict], skipped: list[dict]) -> None:
    table = Table(title="whole models, against the stock model in the same process", header_style="bold")
    for name in ("model", "prompt", "batch", "cache", "prefill s", "x stock", "tokens/s", "x stock", "KV", "peak, prefill",
                 "peak, decode", "of floor"):  # fmt: skip
        table.add_column(name, justify="left" if name == "cache" else "right")
    last = None
    for row in rows:
        key = (row["model"], row["length"], row["batch"])
        if last not in (None, key):
            table.add_section()
        last = key
        ratios = ("-" if r is None else f"{r:.2f}" for r in (row["prefill_ratio"], row["decode_ratio"]))
        sizes = (f"{row[part] / 2**20:,.1f} MiB" for part in ("kv_bytes", "prefill_peak_bytes", "decode_peak_bytes"))
        share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "-"
        table.add_row(
            key[0], f"{key[1]:,}", str(key[2]), row["variant"], f"{row['prefill_seconds']:.2f}", next(ratios),
            f"{row['decode_tokens_per_second']:,.1f}", next(ratios), *sizes, share,
        )  # fmt: skip
    console = Console()
    console = console if console.is_terminal else Console(width=160)  # wide enough for the table
    console.print(table)
    for one in skipped:
        console.print(f"left out: {', '.join(f'{name} {value}' for name, value in one.items())}", markup=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", choices=MODELS, help="leave out the others")
    parser.add_argument(
        "--lengths", nargs="+", type=int, help="tokens of the prompt; with --batches and --models all of each"
    )
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--layers", type=int, help="decoder layers, to look at a part of a model")
    parser.add_argument("--presets", nargs="+", default=fitting())
    parser.add_argument("--graphs", action="store_true", help="also under CUDA graphs, the stock model too")
    parser.add_argument("--tokens", type=int, help="to decode while time is taken (64)")
    parser.add_argument("--rounds", type=int, help="(3 on a CPU, 1 on a GPU)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no other setting begins")
    parser.add_argument(
        "--profile", type=Path, help="a folder for Chrome traces of each variant, with no figures written"
    )
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    if options.graphs and options.device == "cpu":
        parser.error("--graphs needs --device cuda")
    cuda = options.device == "cuda"
    options.tokens, options.rounds = options.tokens or 64, options.rounds or (1 if cuda else 3)
    return options


def settings(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(model, length, batch), the most telling first, those of a model together."""
    usual = SETTINGS[options.device]
    models = options.models or list(dict.fromkeys(model for model, _, _ in usual))
    if options.lengths or options.batches:
        lengths, batches = options.lengths or [2048, 8192], options.batches or [1]
        return [(model, length, batch) for model in models for length in lengths for batch in batches]
    return [setting for setting in usual if setting[0] in models]


def made(name: str, options: argparse.Namespace):
    """A model with random weights."""
    shape = MODELS[name] | (dict(num_hidden_layers=options.layers) if options.layers else {})
    model = shapes.make("Qwen2.5-VL", shape, options.device, torch.bfloat16)
    model.generation_config.eos_token_id = None  # answers of random weights end nowhere
    return model


def traced(setting: Setting, chosen: list[Variant], folder: Path, stem: str) -> None:
    """Traces of a setting in place of figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant in chosen:
        name = re.sub(r"[^\w-]+", "-", f"{stem}-{variant.name}").strip("-")
        setting.run(variant, partial(setting.trace, stem=name, folder=folder))


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    chosen, wanted = variants(options.presets, options.graphs), settings(options)
    result = dict(
        environment=environment(), dtype="bfloat16", threads=torch.get_num_threads(), tokens=options.tokens,
        rounds=options.rounds, load_average=dict(before=os.getloadavg(), cores=os.cpu_count()), rows=[], skipped=[],
    )  # fmt: skip
    copy = None
    if options.device == "cuda":
        copy = copy_bandwidth("cuda")
        result["copy_gb_per_s"] = copy / 1e9
    begun, model = time.perf_counter(), None
    with Progress() as progress:
        bar = progress.add_task("generating", total=len(wanted) * len(chosen) * (1 + options.rounds))
        for name, mine in groupby(wanted, key=lambda setting: setting[0]):
            model = None  # two do not fit
            gc.collect()
            model = made(name, options)
            for _, length, batch in mine:
                if time.perf_counter() - begun > options.limit:
                    result["skipped"].append(dict(model=name, length=length, batch=batch, why="no time left"))
                    continue
                inputs = prompt(model, length, batch)
                setting = Setting(model, inputs, options.tokens, options.device)
                if options.profile is not None:
                    traced(setting, chosen, options.profile, f"{name}-{length}x{batch}")
                    continue
                here = dict(model=name, length=inputs["input_ids"].shape[1], batch=batch)
                found = measure(setting, chosen, batch, options.rounds, copy, lambda: progress.advance(bar))
                result["rows"] += [here | row for row in found]
                result["skipped"] += [here | dict(variant=v, why=why) for v, why in setting.refused.items()]
                result["load_average"]["after"] = os.getloadavg()
                out = options.out or f"benchmarks/results/generate-{options.device}.json"
                save(out, result)  # after each setting, so that a run that is cut off is not lost
    if options.profile is not None:
        print(f"traces are in {options.profile}; https://ui.perfetto.dev opens them")
    else:
        show(result["rows"], result["skipped"])


if __name__ == "__main__":
    main()
