"""Speed of the token methods: images a second of vision towers, and seconds of prefill of video-language models.

Towers: timm ViT-B/16 and ViT-L/16 at 224 and 384 pixels, ToMe and DiffRate, against the tower alone and against what the
multiply-adds promise; and what it costs there to note the attention that methods before the decoder choose by.
Decoders: models of random weights with a very small tower, each method set to half of the vision tokens, against the
unwrapped model, and from how many vision tokens on the method is faster (break-even). Choosing happens inside the forward,
so all of it counts. Everything is run in turn, and ratios are taken within a round, so that a slow moment of the machine hits
both. Nothing here is about quality: benchmarks/token_accuracy.py.

    python benchmarks/tokens.py                      # CPU; writes benchmarks/results/tokens-cpu.json
    python benchmarks/tokens.py --device cuda        # decoders of 7B shape
    python benchmarks/tokens.py --parts decoders --sizes 256 1024
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import timm
import torch
from common import environment, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import LARGE, MODELS, SMALL, make, tower_of, video

import mmkv
from mmkv._vision.tower import TowerHooks
from mmkv.models.timm_vit import TimmViT
from mmkv.parts.flops import decoder_macs, vit_macs
from mmkv.tokens import DiffRate, MustDrop, PruMerge, ToMe, VisionZip
from mmkv.tokens.at_ratio import BY_THRESHOLD, RATED, at_ratio

SIZES = (256, 512, 1024, 2048, 4096, 8192)
ENOUGH = 1000  # vision tokens from which on half of them has to be faster than all
MAX_ROUNDS = 25
RELEASED = {  # rates of the authors, made for 197 tokens
    name: {DiffRate.released(*which): f"DiffRate, {which[0]} {which[1]} GFLOPs" for which in known}
    for name, known in {
        "vit_base_patch16_224": [("deit-b", 11.5), ("mae-b", 11.5)],
        "vit_large_patch16_224": [("mae-l", 42.3)],
    }.items()
}
NOTES = {  # nothing is merged; the received attention is that of all queries
    VisionZip(scores="cls"): "VisionZip, notes CLS attention",
    VisionZip(scores="received"): "VisionZip, notes received attention",
}
TOWERS = {
    "vit_base_patch16_224": {
        224: (ToMe(8), ToMe(13), ToMe(16), ToMe(8, inflect=-1.0), *RELEASED["vit_base_patch16_224"], *NOTES),
        384: (ToMe(23), ToMe(40), *NOTES),
    },
    "vit_large_patch16_224": {
        224: (ToMe(4), ToMe(7), *RELEASED["vit_large_patch16_224"], *NOTES),
        384: (ToMe(12), ToMe(23), *NOTES),
    },
}


NOTE = """
All of it is compared with the plain model in the same process, on random weights. The papers' own code is not measured: it is
made for single models on old versions of transformers, and most of it asks for the attention matrices of whole layers,
for which transformers leaves the fast attention; nothing here ever does.
"""


def halving() -> dict[str, tuple]:
    """Every method that works on a video-language model, set to half of the vision tokens where it can be.

    MustDrop's thresholds say nothing about random weights: here its key set is half of the tokens and its filter drops all
    others behind its first layer; nothing is alike enough to merge, but it is looked for. PruMerge takes what stands out.
    """
    named = {m.name.lower(): m.name for m in mmkv.methods() if m.kind == "tokens"}
    made = {named[name]: (at_ratio(name, 0.5),) for name in RATED if name not in BY_THRESHOLD}
    return made | dict(MustDrop=(MustDrop(tau=1.0, key_rate=0.5, gamma=1.0, alpha=1.0),), PruMerge=(PruMerge(),))


def break_even(sizes: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Tokens from which on a method is faster, between the sizes on a log scale.

    Args:
        sizes: in ascending order.
        ratios: seconds of the method over those of dense at each.

    Returns:
        the first size where it is faster at all of them, None where it is not faster at the last.
    """
    faster = len(sizes)
    while faster and ratios[faster - 1] < 1:
        faster -= 1
    if faster == len(sizes):
        return None
    if faster == 0:
        return float(sizes[0])
    low, high = math.log(sizes[faster - 1]), math.log(sizes[faster])
    above, below = ratios[faster - 1], ratios[faster]
    return math.exp(low + (high - low) * (above - 1) / (above - below))


def verdict(sizes: Sequence[int], ratios: Sequence[float]) -> str:
    """ "yes" or "no": faster at every size from `ENOUGH` tokens on; "-" where none was measured."""
    late = [ratio for size, ratio in zip(sizes, ratios) if size >= ENOUGH]
    return "-" if not late else "yes" if max(late) < 1 else "no"


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    ways: dict[str, Callable[[], AbstractContextManager]], run: Callable, device: str, rounds: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of `run()` within each of the ways, by round; the first round is not counted.

    Args:
        ways: how to set up and take back, by name; the time of that is not counted.
        run: what is timed.
        device: "cpu" or "cuda".
        rounds: at least so many.
        budget: seconds that further rounds may take, up to `MAX_ROUNDS` of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begun, done = time.perf_counter(), 0
    while done <= rounds or (time.perf_counter() - begun < budget and done <= MAX_ROUNDS):
        for name, way in ways.items():
            with way(), torch.no_grad():
                start = clock(device)
                run()
                taken[name].append(clock(device) - start)
        done += 1
    return {name: seconds[1:] for name, seconds in taken.items()}


def against_dense(taken: dict[str, list[float]], name: str) -> float:
    """Seconds over those of dense in the same round, the median."""
    return statistics.median(mine / dense for mine, dense in zip(taken[name], taken["dense"]))


def towers(options, console: Console) -> list[dict]:
    rows = []
    for name, by_size in TOWERS.items():
        for pixels, methods in by_size.items():
            if pixels not in options.pixels:
                continue
            model = timm.create_model(name, img_size=pixels, depth=options.depth or (24 if "large" in name else 12))
            model = model.eval().to(options.device, getattr(torch, options.dtype))
            rows += tower_rows(model, name, pixels, methods, options)
    table = Table(
        "tower", "pixels", "method", "tokens", "images/s", "faster", "multiply-adds promise", "of the promise",
        title=f"vision towers, batches of {options.batch}",
    )  # fmt: skip
    for row in rows:
        tokens = row["tokens_per_block"]
        table.add_row(
            row["tower"], str(row["pixels"]), row["method"], f"{row['entered']} -> {tokens[-1]}",
            f"{row['images_per_second']:.2f}", f"{row['speedup']:.2f}x", f"{row['promised']:.2f}x",
            f"{row['speedup'] / row['promised']:.0%}",
        )  # fmt: skip
    console.print(table)
    return rows


def tower_rows(model, name: str, pixels: int, methods: Sequence, options) -> list[dict]:
    tower = TimmViT(model).tower()
    images = torch.randn(options.batch, 3, pixels, pixels, device=options.device, dtype=next(model.parameters()).dtype)
    depth, entered = len(tower), (pixels // 16) ** 2 + 1
    methods = [m for m in methods if not isinstance(m, DiffRate) or len(m.prune) == depth]
    hooks = {label(method, name): TowerHooks(tower, [method]) for method in methods}
    ways: dict = {"dense": nullcontext} | {key: lambda found=found: found for key, found in hooks.items()}
    taken = in_turn(ways, lambda: model(images), options.device, options.rounds, options.budget)
    counts = {"dense": [entered] * depth} | {key: found.state.tokens_per_block for key, found in hooks.items()}
    macs = {key: vit_macs(entered, behind, model.embed_dim, 16) for key, behind in counts.items()}
    return [
        dict(
            tower=name, pixels=pixels, method=key, entered=entered, tokens_per_block=counts[key],
            images_per_second=options.batch / statistics.median(seconds), speedup=1 / against_dense(taken, key),
            promised=macs["dense"] / macs[key], gmacs=macs[key] / 1e9, rounds=len(seconds),
        )
        for key, seconds in taken.items()
    ]  # fmt: skip


def label(method, tower: str) -> str:
    """A tower method's short name."""
    if isinstance(method, ToMe):
        return f"ToMe, r {method.r}" + (", falling" if method.inflect < 0 else "")
    return (RELEASED[tower] | NOTES)[method]


class TowerClock:
    """Seconds of the vision tower's forwards, by hooks around it."""

    def __init__(self, module: torch.nn.Module, device: str):
        self.device, self.seconds, self._begun = device, 0.0, 0.0
        self._handles = [
            module.register_forward_pre_hook(self._start, prepend=True),
            module.register_forward_hook(self._stop),
        ]

    def _start(self, *_):
        self._begun = clock(self.device)

    def _stop(self, *_):
        self.seconds = clock(self.device) - self._begun

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def decoders(options, console: Console) -> list[dict]:
    shape = (LARGE if options.device == "cuda" else SMALL) | options.shape
    methods = halving()
    methods = {name: methods[name] for name in methods if not options.only or name in options.only}
    rows = []
    with Progress(console=console) as progress:
        bar = progress.add_task("decoders", total=len(options.models) * len(options.sizes))
        for name in options.models:
            model = make(name, shape, options.device, getattr(torch, options.dtype))
            for size in options.sizes:
                progress.update(bar, description=f"{name}, {size:,} vision tokens")
                rows += decoder_rows(model, name, size, methods, shape, options)
                progress.advance(bar)
            del model
    return rows


def decoder_rows(model, name: str, size: int, methods: dict[str, tuple], shape: dict, options) -> list[dict]:
    inputs = video(model, size)
    length = inputs["input_ids"].shape[1]
    counts, tower_seconds = {"dense": (length,) * shape["num_hidden_layers"]}, {}
    watch = None

    class Way(ExitStack):
        """One method on the model; notes at the end what it did."""

        def __init__(self, key: str):
            super().__init__()
            self.key = key

        def __enter__(self):
            nonlocal watch
            super().__enter__()
            if self.key != "dense":
                self.enter_context(mmkv.wrapped(model, tokens=methods[self.key]))
            watch = TowerClock(tower_of(model), options.device)
            return self

        def __exit__(self, *failed):
            watch.close()
            tower_seconds.setdefault(self.key, []).append(watch.seconds)
            if self.key != "dense" and not any(failed):
                counts[self.key] = mmkv.report(model).tokens_per_layer
            return super().__exit__(*failed)

    ways = {key: lambda key=key: Way(key) for key in ("dense", *methods)}
    run = lambda: model(**inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
    taken = in_turn(ways, run, options.device, options.rounds, options.budget)
    sides = [shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")]
    macs = {key: decoder_macs(tokens, *sides) for key, tokens in counts.items()}
    return [
        dict(
            model=name, vision_tokens=size, method=key, setting=repr(list(methods.get(key, ()))),
            seconds=statistics.median(seconds), ratio=against_dense(taken, key),
            tower_seconds=statistics.median(tower_seconds[key][1:]), tokens_per_layer=list(counts[key]),
            macs_ratio=macs[key] / macs["dense"], rounds=len(seconds),
        )
        for key, seconds in taken.items()
    ]  # fmt: skip


def summaries(rows: list[dict]) -> list[dict]:
    """Break-even and verdict of each method on each model."""
    out = []
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows if row["method"] != "dense"):
        mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        mine.sort(key=lambda row: row["vision_tokens"])
        sizes, ratios = [row["vision_tokens"] for row in mine], [row["ratio"] for row in mine]
        found = dict(break_even=break_even(sizes, ratios), faster_from_1k=verdict(sizes, ratios))
        out.append(dict(model=model, method=method) | found)
    return out


def show(rows: list[dict], found: list[dict], console: Console) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {(row["method"], row["vision_tokens"]): row for row in rows if row["model"] == model}
        sizes = sorted({size for _, size in mine})
        table = Table(
            "method", *(f"{size:,}" for size in sizes), "tokens at the last", "multiply-adds", "break-even",
            f"faster from {ENOUGH:,} on", title=f"{model}: prefill seconds by vision tokens, and their share of dense",
        )  # fmt: skip
        for about in [dict(method="dense"), *(s for s in found if s["model"] == model)]:
            name = about["method"]
            cells = [mine[name, size] for size in sizes]
            shares = ["" if name == "dense" else f" ({row['ratio']:.2f})" for row in cells]
            even = about.get("break_even")
            even = "-" if name == "dense" else "none" if even is None else f"{even:,.0f}"
            even = "<= " + even if about.get("break_even") == sizes[0] else even
            table.add_row(
                name, *(f"{row['seconds']:.3f}{share}" for row, share in zip(cells, shares)),
                f"{cells[-1]['tokens_per_layer'][0]:,} to {cells[-1]['tokens_per_layer'][-1]:,}",
                f"{cells[-1]['macs_ratio']:.2f}", even, about.get("faster_from_1k", "-"),
            )  # fmt: skip
        console.print(table)
        dense = [mine["dense", size] for size in sizes]
        towers = ", ".join(f"{row['tower_seconds']:.3f}" for row in dense)
        console.print(f"of these seconds the (very small) tower without methods takes {towers}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", nargs="+", default=["towers", "decoders"], choices=["towers", "decoders"])
    parser.add_argument("--batch", type=int, default=None, help="images of a batch; 4 on a CPU, 64 on a GPU")
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--depth", type=int, default=None, help="blocks of the towers, for a quick look")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="vision tokens, multiples of 64")
    parser.add_argument("--only", nargs="*", help="names of methods, dense is always run")
    parser.add_argument("--hidden", type=int, default=None, help="channels of the decoders")
    parser.add_argument("--layers", type=int, default=None, help="of the decoders")
    parser.add_argument("--rounds", type=int, default=3, help="at least, after one that is not counted")
    parser.add_argument("--budget", type=float, default=20, help="seconds for further rounds of each size")
    parser.add_argument("--out", default=None)
    options = parser.parse_args(arguments)
    options.batch = options.batch or (64 if options.device == "cuda" else 4)
    options.sizes = sorted(options.sizes)
    options.shape = dict(hidden_size=options.hidden, num_hidden_layers=options.layers)
    options.shape = {key: value for key, value in options.shape.items() if value is not None}

    console = Console(width=190)
    result = dict(environment=environment(), dtype=options.dtype, load_before=os.getloadavg()[0], note=NOTE.strip())
    if "towers" in options.parts:
        result |= dict(batch=options.batch, towers=towers(options, console))
    if "decoders" in options.parts:
        rows = decoders(options, console)
        found = summaries(rows)
        show(rows, found, console)
        result |= dict(decoders=rows, break_even=found)
    console.print(NOTE)
    save(options.out or f"benchmarks/results/tokens-{options.device}.json", result)


if __name__ == "__main__":
    main()
