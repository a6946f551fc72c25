"""Write the README's figures from the committed results, and its list of methods from the registry.

python tools/readme.py           # rewrite the marked parts of README.md
python tools/readme.py --check   # exit 1 if they are not up to date (a test does this)
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mmkv
from mmkv._presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent


def accuracy() -> str:
    """The table of benchmarks/results/accuracy.json."""
    result = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())
    lines = []
    for split, rows in result["splits"].items():
        first = rows[0]
        size = f"{first['videos']} held-out videos of {first['video_tokens']:,} video tokens"
        lines += [
            f"**{split}**: {first['questions']:,} questions on {size}",
            "",
            "| cache | accuracy | points lost | agrees with dense | bits, packed part | bits, whole cache | KV bytes |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            packed = "-" if r["packed_bits"] is None else f"{r['packed_bits']:.2f}"
            lost = "-" if r["method"] == "dense" else f"{r['loss_points']:.1f} ± {r['loss_error']:.1f}"
            cells = (r["method"], f"{r['accuracy']:.1%}", lost, f"{r['agreement']:.1%}", packed, f"{r['kv_bits']:.2f}")
            lines.append(f"| {' | '.join(cells)} | {r['kv_bytes']:,} |")
        lines.append("")
    e = result["environment"]
    lines += [
        f"Head size 64, {result['dtype']}, torch {e['torch']}, transformers {e['transformers']}, {e['device']},",
        f"commit {e['commit']}.",
        "± is the standard error of the paired difference. A prompt of 1k tokens is to a good part dense tail;",
        "as it grows, the bits of the whole cache fall towards those of the packed part.",
    ]
    return "\n".join(lines)


def perplexity() -> str:
    """The presets of benchmarks/results/perplexity-study.json."""
    result = json.loads((ROOT / "benchmarks/results/perplexity-study.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    lines = ["| cache | perplexity | bits, packed part |", "|---|---|---|"]
    for name in ("dense", *PRESETS):
        packed = rows[name]["packed_bits"]
        lines.append(f"| {name} | {rows[name]['perplexity']:.2f} | {'-' if packed is None else f'{packed:.2f}'} |")
    e = result["environment"]
    lines += [
        "",
        f"{result['texts']} texts, {result['prefill']} tokens prefilled, the next {result['score']} scored, torch {e['torch']},",
        f"transformers {e['transformers']}, {e['device']}, commit {e['commit']}.",
        "Residual windows differ between the methods, and text has nothing for vidkv-stp to protect:",
        "a check on real weights, not a ranking.",
    ]
    return "\n".join(lines)


def methods() -> str:
    """Tables of methods and presets, with the true bits of each preset at head size 128."""
    lines = ["| method | kind | what it does | paper |", "|---|---|---|---|"]
    lines += [f"| `{m.name}` | {m.kind} | {m.summary} | {m.paper} |" for m in mmkv.methods()]
    lines += ["", "| preset | what it does | true bits per key / value element at head size 128 |", "|---|---|---|"]
    for preset in PRESETS.values():
        bits = " / ".join(f"{b:.2f}" for b in preset.cache[0].formats()[0].bits(128))
        lines.append(f"| `{preset.name}` | {preset.summary} | {bits} |")
    return "\n".join(lines)


def tokens() -> str:
    """The tables of benchmarks/results/token-accuracy.json."""
    result = json.loads((ROOT / "benchmarks/results/token-accuracy.json").read_text())
    first = result["rows"][0]["known"]
    lines = [
        f"The bundled video model, {first['questions']} questions on {first['videos']} held-out videos, video and question in",
        "one prompt. Tokens are vision tokens that a decoder layer computed, mean over the layers and in the last one.",
        "",
        "| method | setting | acts | tokens | last layer | KV bytes | accuracy | points lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["variant_of"] is None:
            found = row["known"]
            cells = (
                row["method"],
                row["setting"],
                row["place"],
                f"{found['tokens_mean']:.0%}",
                f"{found['tokens_final']:.0%}",
            )
            lines.append(
                f"| {' | '.join(cells)} | {found['kv_share']:.1%} | {found['accuracy']:.1%} | {_lost(found)} |"
            )
    lines += [
        "",
        "Tokens and cache together, the last token of the prompt read over the compressed cache:",
        "",
        "| tokens | cache | KV bytes | of dense | accuracy | points lost |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["mixes"]:
        cells = (
            row["tokens"],
            row["cache"],
            f"{row['kv_bytes']:,}",
            f"{row['kv_share']:.1%}",
            f"{row['accuracy']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} | {_lost(row)} |")
    lines += [
        "",
        "Options against the same setting without them, paired (negative: the option is better):",
        "",
        "| method | setting and option | points lost |",
        "|---|---|---|",
    ]
    lines += [f"| {row['method']} | {row['setting']} | {_lost(row['known'])} |" for row in result["variants"]]
    return "\n".join([*lines, "", f"{_where(result)} ± is the standard error of the paired difference."])


def token_speed() -> str:
    """The tables of benchmarks/results/tokens-cpu.json; empty before it was measured."""
    path = ROOT / "benchmarks/results/tokens-cpu.json"
    if not path.exists():
        return "`python benchmarks/tokens.py` measures it."
    result = json.loads(path.read_text())
    lines = []
    for model in dict.fromkeys(row["model"] for row in result["decoders"]):
        rows = [row for row in result["decoders"] if row["model"] == model]
        sizes = sorted({row["vision_tokens"] for row in rows})
        by = {(row["method"], row["vision_tokens"]): row for row in rows}
        dense = (f"{by['dense', size]['seconds']:.2f}" for size in sizes)
        layers = len(rows[0]["tokens_per_layer"])
        lines += [
            f"Prefill of a random {model} of {layers} layers at half of the vision tokens, as a share of the plain",
            "model's seconds (PruMerge at what it chose), by vision tokens:",
            "",
            f"| method | {' | '.join(f'{size:,}' for size in sizes)} | faster from |",
            f"|---|{'---|' * len(sizes)}---|",
            f"| dense, seconds | {' | '.join(dense)} | |",
        ]
        for found in result["break_even"]:
            if found["model"] == model:
                even = found["break_even"]
                even = "nowhere" if even is None else f"{'at most ' * (even == sizes[0])}{even:,.0f}"
                shares = (f"{by[found['method'], size]['ratio']:.2f}" for size in sizes)
                lines.append(f"| {found['method']} | {' | '.join(shares)} | {even} |")
        lines.append("")
    lines += [
        f"Vision towers, batches of {result['batch']}:",
        "",
        "| tower | pixels | method | tokens | images/s | faster | by multiply-adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["towers"]:
        tokens = f"{row['entered']} to {row['tokens_per_block'][-1]}"
        cells = (row["tower"], str(row["pixels"]), row["method"], tokens, f"{row['images_per_second']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {row['speedup']:.2f}x | {row['promised']:.2f}x |")
    return "\n".join([*lines, "", _where(result)])


def _lost(row: dict) -> str:
    return f"{row['loss_points']:.1f} ± {row['loss_error']:.1f}"


def _where(result: dict) -> str:
    e = result["environment"]
    return (
        f"{result['dtype']}, torch {e['torch']}, transformers {e['transformers']}, {e['device']}, commit {e['commit']}."
    )


PAGES = {
    "README.md": {"figures:accuracy": accuracy, "figures:perplexity": perplexity, "methods": methods},
    "docs/tokens.md": {"figures:tokens": tokens, "figures:token-speed": token_speed},
}


def main() -> int:
    stale = False
    for page, marks in PAGES.items():
        path = ROOT / page
        text = old = path.read_text()
        for mark, make in marks.items():
            before, rest = re.split(rf"<!-- {mark}[^>]*-->", text, maxsplit=1)
            after = rest.split(f"<!-- /{mark} -->", 1)[1]
            text = f"{before}<!-- {mark} -->\n{make()}\n<!-- /{mark} -->{after}"
        stale |= text != old
        if "--check" not in sys.argv:
            path.write_text(text)
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
