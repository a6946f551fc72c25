"""What a bit buys: WaterfillKV and its neighbours on real models, from real storage, with equal dense tails in every row.

Four parts, any of which can be left out:

- `language`: perplexity and divergence from the dense model of Gemma 3 270M (head size 256) and SmolLM2 135M (64).
- `heads`: error of the attention's output on keys, values and queries of those models; for head size 128, where no small
  model is to be had from a package, Gemma's heads are cut in two. A proxy: no model was trained with such heads.
- `sizes`: the squared error that reverse water-filling expects, when class sizes are shared by a layer's heads (as stored),
  are each head's own, or bits move freely between heads.
- `video`: the bundled model's answers, with text and sinks protected or not.

    python benchmarks/low_bit.py
    python benchmarks/low_bit.py --parts language --models smollm2-135m
    python benchmarks/low_bit.py --write                 # the tables of docs/low-bit.md, from the result files
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from common import environment, save
from perplexity import MODELS, listen, load, loss, restored, scored, size_of, texts
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmkv
from mmkv.cache import KIVI, CacheMethod, PackedSegment, Packer, VidKV, WaterfillKV
from mmkv.cache.waterfill import DISTORTION, waterfill
from mmkv.kernels import attend_dense

ROOT = Path(__file__).resolve().parent.parent
TAIL, SINKS = 64, 4
PREFILL, SCORE = SINKS + 1024 + TAIL, 256  # 1024 tokens are whole groups of every size, so every row has the same tail
PARTS = ("language", "heads", "sizes", "video")


def water(**options) -> WaterfillKV:
    return WaterfillKV(**dict(residual=TAIL, sinks=SINKS) | options)


def rows() -> dict[str, CacheMethod]:
    """Name and method; all with the same residual window and sinks, unless the name says otherwise."""
    base = dict(residual=TAIL, sinks=SINKS)
    found: dict[str, CacheMethod] = {
        f"kivi-2, groups of {group}": KIVI(group=group, channel_group=min(group, 64), **base) for group in (32, 64, 128)
    }
    found["vidkv"] = VidKV(**base)
    for values in (2, 1.58, 1):
        for keys in (2, 1.5, 1.25, 1, 0.75):
            found[f"waterfill {keys:g}/{values:g}"] = water(key_bits=keys, value_bits=values)
    for keys in (2, 1.5, 1):
        found[f"waterfill {keys:g}/1.58, by variance alone"] = water(key_bits=keys, aim="keys")
    found["waterfill 1.5/1.58, gaussian"] = water(codebook="gaussian")
    found["waterfill 1.5/1.58, levels 0 1 4"] = water(levels=(0, 1, 4))
    for keys in (1.5, 1.25, 1):
        found[f"waterfill {keys:g}/1.58, levels 0 1 2 4"] = water(key_bits=keys, levels=(0, 1, 2, 4))
    for keys in (1.5, 1.25):
        found[f"waterfill {keys:g}/1.58, 8-bit scales"] = water(key_bits=keys, scale_bits=8)
    found["waterfill 1.25/1, 8-bit scales"] = water(key_bits=1.25, value_bits=1, scale_bits=8)
    found["waterfill 1.5/1.58, groups of 256"] = water(group=256)
    for keys in (1.5, 1.25, 1):
        found[f"waterfill {keys:g}/1.58, both"] = water(key_bits=keys, group=256, scale_bits=8)
    found["waterfill 1/1, both"] = water(key_bits=1, value_bits=1, group=256, scale_bits=8)
    found["waterfill 0.75/1, both"] = water(key_bits=0.75, value_bits=1, group=256, scale_bits=8)
    found["waterfill 1.5/1.58, no sinks"] = water(sinks=0)
    found["vidkv, no sinks"] = VidKV(residual=TAIL, sinks=0)
    found["kivi-2, groups of 64, no sinks"] = KIVI(residual=TAIL, channel_group=64)
    return found


@torch.no_grad()
def language(name: str, keep: str | None, only: list[str] | None) -> dict:
    """One row a method: perplexity, what it adds to the loss, divergence from dense, and true bits."""
    model, tokenizer = load(name, keep)
    ids = texts(tokenizer, PREFILL + SCORE)
    dense = [listen(model, text[:, :PREFILL]) for text in ids]
    with mmkv.wrapped(model):
        right = [scored(model, restored(model, d), text, PREFILL).bfloat16() for text, d in zip(ids, dense)]
        sizes = size_of(restored(model, dense[0]))
    sure = torch.cat([loss(logits.float(), text, PREFILL) for logits, text in zip(right, ids)])
    results = [dict(method="dense", perplexity=sure.mean().exp().item(), **sizes)]
    chosen = {k: m for k, m in rows().items() if not only or k in only}
    for about, method in track(chosen.items(), description=name, transient=True):
        losses, divergence = [], 0.0
        with mmkv.wrapped(model, cache=(method,)):
            for text, held, truth in zip(ids, dense, right):
                cache = restored(model, held)
                logits = scored(model, cache, text, PREFILL)
                losses.append(loss(logits, text, PREFILL))
                divergence += _divergence(truth, logits) / len(ids)
            cache = restored(model, dense[0])
        results.append(_row(about, torch.cat(losses), sure, divergence, cache))
        print(json.dumps(results[-1]), flush=True)
    return dict(head_dim=model.config.head_dim, texts=len(ids), rows=results)


def _row(name: str, losses: torch.Tensor, sure: torch.Tensor, divergence: float, cache) -> dict:
    specs = [(s.packer.key_spec.bits, s.packer.value_spec.bits) for layer in cache.layers for s in layer.packed]
    keys, values = (sum(bits) / len(bits) for bits in zip(*specs))
    added = losses - sure
    return dict(
        method=name,
        perplexity=losses.mean().exp().item(),
        loss_added=added.mean().item(),
        loss_error=(added.std() / math.sqrt(added.numel())).item(),  # standard error of the paired difference
        divergence=divergence,
        key_bits=keys,
        value_bits=values,
        **size_of(cache),
    )


def _divergence(truth: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence (nats) of predictions `[n, vocabulary]` from the dense model's."""
    total = 0.0
    for t, x in zip(truth.split(64), logits.split(64)):
        t, x = t.float().log_softmax(-1), x.float().log_softmax(-1)
        total += float((t.exp() * (t - x)).sum())
    return total / len(logits)


def calls_of(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys, values `[Hkv, T, D]` and queries `[Hq, T, D]` of each layer that attends to everything."""
    heard = listen(model, ids[:, :PREFILL])
    return [(call.keys[0], call.values[0], call.asked.query[0]) for call in heard if call.window is None]


def in_halves(keys, values, queries):
    """Heads `[H, n, D]` as twice as many of size D / 2: a channel and the one it is rotated with stay apart, as they would
    in no model."""
    cut = lambda x: torch.cat(x[:, None].split(x.shape[-1] // 2, -1), 1)  # noqa: E731 [H, 2, n, D / 2]
    shared = keys.shape[0]
    queries = cut(queries).unflatten(0, (shared, -1)).transpose(1, 2)  # [Hkv, 2, Hq / Hkv, n, D / 2]
    return cut(keys).flatten(0, 1), cut(values).flatten(0, 1), queries.flatten(0, 2)


def output_error(method: CacheMethod, keys, values, queries) -> tuple[float, float, float]:
    """Relative squared error of attention over 1024 packed tokens, and true bits of keys and of values."""
    keys, values = keys[:, SINKS : SINKS + 1024], values[:, SINKS : SINKS + 1024]
    form = method.adapt(method.formats()[0], keys, queries)
    packer = Packer(form, 1, keys.shape[0], keys.shape[-1], values.shape[-1], keys.device)
    packer.fit(0, keys, values, queries)
    segment = PackedSegment(packer, 0, 1, keys.device)
    segment.append(0, keys, values, torch.arange(1024))
    scale = keys.shape[-1] ** -0.5
    asked = queries[None, :, -TAIL:].float()
    got, _ = segment.attend(asked, scale=scale)
    want, _ = attend_dense(asked, keys[None].float(), values[None].float(), scale=scale)
    error = float((got - want).square().sum() / want.square().sum())
    return error, packer.key_spec.bits, packer.value_spec.bits


@torch.no_grad()
def heads(calls: dict[str, list]) -> dict[str, list[dict]]:
    """Error of the attention's output by head size, averaged over layers and texts."""
    sources = {
        "64 (smollm2-135m)": calls["smollm2-135m"],
        "128 (gemma3-270m, heads cut in two)": [in_halves(*call) for call in calls["gemma3-270m"]],
        "256 (gemma3-270m)": calls["gemma3-270m"],
    }
    chosen = {k: m for k, m in rows().items() if "sinks" not in k}
    out: dict[str, list[dict]] = {}
    for name, source in sources.items():
        out[name] = []
        for about, method in track(chosen.items(), description=name, transient=True):
            errors, keys, values = zip(*(output_error(method, *call) for call in source))
            mean = lambda x: sum(x) / len(x)  # noqa: E731
            out[name].append(dict(method=about, error=mean(errors), key_bits=mean(keys), value_bits=mean(values)))
    return out


def sizes(calls: list, levels=(0, 2, 4)) -> list[dict]:
    """Expected squared error of keys, relative to class sizes shared by a layer's heads."""
    results = []
    for average in (2, 1.5, 1.25, 1, 0.75):
        shared = own = free = 0.0
        for keys, _, _ in calls:
            variance = keys[:, SINKS : SINKS + 1024].float().unflatten(1, (-1, 128)).var(2, unbiased=False).mean(1)
            ranked = variance.sort(-1, descending=True).values  # [Hkv, D]
            bits = waterfill(ranked.mean(0), average, levels, 8)
            shared += sum(_expected(head, bits) for head in ranked)
            own += sum(_expected(head, waterfill(head, average, levels, 8)) for head in ranked)
            pooled = ranked.flatten().sort(descending=True).values
            free += _expected(pooled, waterfill(pooled, average, levels, 8))
        results.append(dict(key_bits=average, shared=1.0, own=own / shared, free=free / shared))
    return results


def _expected(variance: torch.Tensor, bits: list[int]) -> float:
    return float((variance * torch.tensor([DISTORTION[b] for b in bits])).sum())


@dataclass(frozen=True)
class TextDense(WaterfillKV):
    """WaterfillKV that keeps every text token of the prompt dense."""

    @property
    def reads_embeddings(self) -> bool:
        return True

    def mark(self, embeds, chunk):
        return torch.where(chunk.visual, 0, -1).to(torch.int8)


def video(videos: int) -> dict[str, list[dict]]:
    """The bundled model's accuracy on both splits."""
    import accuracy

    from mmkv.models import tiny

    model, processor = tiny.load(dtype=torch.bfloat16)
    methods: dict = {"dense": ()}
    for bits, values in ((1.5, 1.58), (1, 1)):
        name = f"waterfill {bits:g}/{values:g}"
        options = dict(key_bits=bits, value_bits=values, residual=TAIL)
        methods[name] = (WaterfillKV(**options),)
        methods[f"{name}, no sinks"] = (WaterfillKV(sinks=0, **options),)
        methods[f"{name}, text dense"] = (TextDense(**options),)
        methods[f"{name}, by variance alone"] = (WaterfillKV(aim="keys", **options),)
    return {
        split: accuracy.run(model, processor, methods, split, frames=128, videos=videos, per_video=30)
        for split in ("easy", "stress")
    }


def show(result: dict) -> None:
    for name, part in result.get("language", {}).items():
        table = Table(
            "method", "perplexity", "loss added", "divergence", "key bits", "value bits", "packed bits", title=name
        )
        for r in part["rows"]:
            added = f"{r['loss_added']:.3f} ± {r['loss_error']:.3f}" if "loss_added" in r else "-"
            bits = [f"{r[k]:.2f}" if r.get(k) is not None else "-" for k in ("key_bits", "value_bits", "packed_bits")]
            table.add_row(r["method"], f"{r['perplexity']:.3f}", added, f"{r.get('divergence', 0):.4f}", *bits)
        Console().print(table)
    for name, part in result.get("heads", {}).items():
        table = Table("method", "output error", "key bits", "value bits", title=f"head size {name}")
        for r in part:
            table.add_row(r["method"], f"{r['error']:.4f}", f"{r['key_bits']:.2f}", f"{r['value_bits']:.2f}")
        Console().print(table)
    for name, part in result.get("sizes", {}).items():
        table = Table("key bits", "own sizes", "bits move between heads", title=f"{name}: error, shared sizes = 1")
        for r in part:
            table.add_row(f"{r['key_bits']:g}", f"{r['own']:.3f}", f"{r['free']:.3f}")
        Console().print(table)


def tables() -> dict[str, str]:
    """The tables of docs/low-bit.md by their mark."""
    result = json.loads((ROOT / "benchmarks/results/low-bit.json").read_text())
    others = json.loads((ROOT / "benchmarks/results/perplexity.json").read_text())
    language, out = result["language"], {}
    by_name = {name: {r["method"]: r for r in part["rows"]} for name, part in language.items()}
    lines = [
        _line("cache", *(f"{n}: {k}" for n in language for k in ("bits", "perplexity", "loss added", "divergence")))
    ]
    for method in next(iter(by_name.values())):
        cells = [method]
        for found in by_name.values():
            r = found[method]
            added = f"{r['loss_added']:.3f} ± {r['loss_error']:.3f}" if "loss_added" in r else "-"
            bits = f"{r['packed_bits']:.2f}" if r["packed_bits"] else "-"
            cells += [bits, f"{r['perplexity']:.2f}", added, f"{r.get('divergence', 0):.3f}"]
        lines.append(_line(*cells))
    out["language"] = _table(lines, [result["environments"][f"language {name}"] for name in language])
    lines = [_line("cache", *(f"head size {n}: {k}" for n in result["heads"] for k in ("error", "K / V bits")))]
    for rows_of in zip(*result["heads"].values()):
        cells = [[f"{r['error']:.3f}", f"{r['key_bits']:.2f} / {r['value_bits']:.2f}"] for r in rows_of]
        lines.append(_line(rows_of[0]["method"], *sum(cells, [])))
    out["heads"] = _table(lines, [result["environments"]["heads"]])
    lines = [_line("key bits", "shared sizes", "own sizes", "bits move between heads")]
    for r in next(iter(result["sizes"].values())):
        lines.append(_line(f"{r['key_bits']:g}", "1", f"{r['own']:.3f}", f"{r['free']:.3f}"))
    out["sizes"] = _table(lines, [result["environments"]["sizes"]])
    lines = [
        _line("cache", *(f"{split}: {k}" for split in result["video"] for k in ("accuracy", "points lost", "bits")))
    ]
    for rows_of in zip(*result["video"].values()):
        cells = []
        for r in rows_of:
            bits = f"{r['packed_bits']:.2f}" if r["packed_bits"] else "-"
            cells += [f"{r['accuracy']:.1%}", f"{r['loss_points']:.1f} ± {r['loss_error']:.1f}", bits]
        lines.append(_line(rows_of[0]["method"], *cells))
    out["video"] = _table(lines, [result["environments"]["video"]])
    models = others["models"]
    lines = [_line("cache", *(f"{n}: {k}" for n in models for k in ("bits", "bytes", "perplexity", "recall")))]
    for rows_of in zip(*(part["rows"] for part in models.values())):
        cells = []
        for r in rows_of:
            bits = f"{r['packed_bits']:.2f}" if r["packed_bits"] else "-"
            cells += [bits, f"{r['kv_share']:.0%}", f"{r['perplexity']:.2f}", f"{r['recall']:.0%}"]
        lines.append(_line(rows_of[0]["method"], *cells))
    out["others"] = _table(lines, [others["environment"]])
    return out


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(lines: list[str], environments: list[dict]) -> str:
    rule = "|" + "---|" * (lines[0].count("|") - 1)
    e = environments[0]
    commits = ", ".join(sorted({e["commit"] for e in environments}))
    about = f"Commit {commits}, torch {e['torch']}, transformers {e['transformers']}, {e['device']}."
    return "\n".join([lines[0], rule, *lines[1:], "", about])


def document() -> str:
    """docs/low-bit.md with the tables of the result files in it."""
    text = (ROOT / "docs/low-bit.md").read_text()
    for mark, made in tables().items():
        before, rest = text.split(f"<!-- figures:{mark} -->", 1)
        text = (
            f"{before}<!-- figures:{mark} -->\n{made}\n<!-- /figures:{mark} -->"
            + rest.split(f"<!-- /figures:{mark} -->", 1)[1]
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="*", help="names of rows, for the part `language`")
    parser.add_argument("--videos", type=int, default=8, help="per split")
    parser.add_argument("--keep", default=None, help="folder for converted models")
    parser.add_argument("--out", default="benchmarks/results/low-bit.json", help="parts that are there already stay")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the tables of docs/low-bit.md")
    options = parser.parse_args()

    if options.write:
        page = document()
        (ROOT / "docs/low-bit.md").write_text(page)
        return
    about = environment()
    path = Path(options.out)
    result = json.loads(path.read_text()) if path.exists() else {}
    new: dict = {}
    if "language" in options.parts:
        new["language"] = {name: language(name, options.keep, options.only) for name in options.models}
    if {"heads", "sizes"} & set(options.parts):
        calls = {}
        for name in MODELS:
            model, tokenizer = load(name, options.keep)
            calls[name] = sum((calls_of(model, text) for text in texts(tokenizer, PREFILL + SCORE)[:1]), [])
        if "heads" in options.parts:
            new["heads"] = heads(calls)
        if "sizes" in options.parts:
            new["sizes"] = {"smollm2-135m": sizes(calls["smollm2-135m"])}
    if "video" in options.parts:
        new["video"] = video(options.videos)
    show(new)
    for part in new:
        names = [f"language {name}" for name in new["language"]] if part == "language" else [part]
        result.setdefault("environments", {}).update(dict.fromkeys(names, about))
    if "language" in new:
        new["language"] = result.get("language", {}) | new["language"]
    save(options.out, result | dict(tail=TAIL, sinks=SINKS, packed=PREFILL - TAIL - SINKS, scored=SCORE) | new)


if __name__ == "__main__":
    main()
