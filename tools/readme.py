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


def main() -> int:
    path = ROOT / "README.md"
    text = old = path.read_text()
    for mark, make in (("figures:accuracy", accuracy), ("figures:perplexity", perplexity), ("methods", methods)):
        before, rest = re.split(rf"<!-- {mark}[^>]*-->", text, maxsplit=1)
        after = rest.split(f"<!-- /{mark} -->", 1)[1]
        text = f"{before}<!-- {mark} -->\n{make()}\n<!-- /{mark} -->{after}"
    if "--check" in sys.argv:
        return int(text != old)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
