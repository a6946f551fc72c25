"""Write the README's figures from the committed results, and its list of methods from the registry.

python tools/readme.py           # rewrite the marked parts of README.md
python tools/readme.py --check   # exit 1 if they are not up to date (a test does this)
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

from speed_tables import kernels, launches, registers, speed, speed_of_all, versions

import mmkv
from mmkv._presets import PRESETS
from mmkv.eval import table

ROOT = Path(__file__).resolve().parent.parent
HOUR = 1800  # frames at 0.5 a second


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
    for name in ("dense", *(name for name, preset in PRESETS.items() if not preset.next_scale)):
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
        forms = preset.cache[0].formats()
        bits = " / ".join(f"{b:.2f}" for b in forms[0].bits(128)) if forms else "evicts"
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


def evaluation() -> str:
    """The tables of benchmarks/results/evaluation.json; a line before it was measured."""
    path = ROOT / "benchmarks/results/evaluation.json"
    if not path.exists():
        return "`make eval` measures it."
    result = json.loads(path.read_text())
    lines = []
    for run in result["runs"]:
        rows = [row for row in result["rows"] if row["task"] == run["task"]]
        first = rows[0]["found"]
        lines += [
            f"**{run['task']}**, {next(iter(first['headline']))} of the bundled model `{run['model']}`, {first['n']} samples",
            "",
            "| method | score | 95 % interval | against dense | p | agrees | vision tokens | KV bytes | prefill, s | decode, s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            found = dict(zip(table.HEADS, table.cells(row["method"], row["found"])))
            kept = (found[head] for head in ("95 % interval", "against dense", "p", "agrees", "vision tokens"))
            size = f"{found['KV bytes']} ({found['of dense']})"
            cells = (f"`{row['method']}`", found["score"], *kept, size, found["prefill, s"], found["decode, s"])
            lines.append(f"| {' | '.join(cells)} |")
        told = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        lines += [
            "",
            f"{told}, {run['device']}, commit {run['commit']}, prompt {run['prompt_hash']}, {run['scorer']}.",
            "",
        ]
    return "\n".join(lines).rstrip()


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


def streaming() -> str:
    """The table of benchmarks/results/streaming.json, all ways but those of the study."""
    result = json.loads((ROOT / "benchmarks/results/streaming.json").read_text())
    e = result
    lines = [
        f"Eight events, each asked for its colour and its shape (guessing: 12 %). Window and cache hold {e['window']}",
        f"tokens, a question brings back {e['retrieve']} frames. Quiet: nothing else is ever seen; busy: every other scene",
        "shows a digit or a word. Squeezed: time runs so slowly that the video lies within the",
        f"{e['trained_frames']} frames that the bundled model was trained on, which a live stream cannot know. Full attention",
        f"up to {e['full_attention_up_to']:,} frames: its work grows with their square. Recall: share of an event's frames, or",
        "tokens, that a layer could see.",
        "",
        "| world | frames | way | questions | accuracy | recall | pictures/s | first token, ms | device bytes | archive/frame |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "groups of" in row["way"]:
            continue
        cells = (
            row["world"],
            f"{row['frames']:,}",
            row["way"],
            str(row["questions"]),
            f"{row['accuracy']:.0%} ± {row['error']:.0%}",
            f"{row['recall']:.0%}",
            f"{row['pictures_per_second']:.0f}",
            f"{row['first_token'] * 1000:.0f}",
            f"{row['device_bytes']:,.0f}{'' if row['device_flat'] else ', grows'}",
            f"{row['archive_bytes'] / row['frames']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"± is the standard error; speeds are the fastest of the videos. {versions(result)}"])


def streaming_study() -> str:
    """Accuracy and recall by frames brought back and size of their groups, of benchmarks/results/streaming.json."""
    result = json.loads((ROOT / "benchmarks/results/streaming.json").read_text())
    found, groups = {}, set()
    for row in result["rows"]:
        named = re.fullmatch(r"(\d+) frames, groups of (\d+)", row["way"])
        if named and row["frames"] >= HOUR:
            count, group = map(int, named.groups())
            groups.add(group)
            found[row["world"], row["frames"], count, group] = f"{row['accuracy']:.0%} ({row['recall']:.0%})"
    lines = [
        "Accuracy and recall, by cosine:",
        "",
        f"| world | frames | brought back | {' | '.join(f'groups of {g}' for g in sorted(groups))} |",
        f"|---|---|---|{'---|' * len(groups)}",
    ]
    for world, frames, count in dict.fromkeys(key[:3] for key in found):
        cells = (found.get((world, frames, count, group), "") for group in sorted(groups))
        lines.append(f"| {world} | {frames:,} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def clicking() -> str:
    """The tables of benchmarks/results/clicking.json."""
    result = json.loads((ROOT / "benchmarks/results/clicking.json").read_text())
    titles = {"kept": "KV of earlier steps kept, as `mmkv.agent` does", "whole": "The whole prompt read at each step"}
    lines = []
    for protocol, rows in result["protocols"].items():
        lines += [
            f"{titles[protocol]}:",
            "",
            "| cache | KV bytes of dense | clicks, current screen | clicks that need an earlier one | prefill, ms | ms a token |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            parts = (row["parts"][part] for part in ("now", "before"))
            cells = (f"{part['accuracy']:.0%} ± {part['error']:.0%}" for part in parts)
            times = f"{1e3 * row['prefill_seconds']:.0f} | {1e3 * row['decode_seconds_per_token']:.0f}"
            lines.append(f"| {row['method']} | {row['share']:.0%} | {' | '.join(cells)} | {times} |")
        lines.append("")
    about = f"{result['sessions']} sessions of {result['steps']} steps, ± is the standard error."
    return "\n".join([*lines, about, "Whole prompts run in batches of 12.", versions(result)])


def painting() -> str:
    """The table of benchmarks/results/painting.json."""
    result = json.loads((ROOT / "benchmarks/results/painting.json").read_text())
    lines = [
        "| cache | KV bytes a picture | of full | PSNR, dB | distance | caption met |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = row["method"] + (f", {row['compression']:.0%} dropped" if row["compression"] else "")
        quality = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        cells = (
            f"{row['kv_bytes_per_picture']:,.0f}",
            f"{row['share_of_dense']:.0%}",
            quality,
            f"{row['perceptual']:.3f}",
            f"{row['caption_match']['all']:.0%}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    met = result["rows"][0]["caption_match"]["all"]
    error = 100 * (met * (1 - met) / result["captions"]) ** 0.5
    stable = ", ".join(f"{c['samples']}: {c['heads_of_the_same_class']:.0%}" for c in result["calibration"])
    return "\n".join([
        *lines,
        "",
        f"{result['captions']} captions, guidance {result['sampling']['guidance']}, temperature",
        f"{result['sampling']['temperature']} (the share met has a standard error of {error:.0f} points).",
        f"Distance: {result['distance']}.",
        f"Heads of the same class after calibrating on so many pictures: {stable}. {versions(result)}",
    ])  # fmt: skip


def instructions() -> str:
    """The table of benchmarks/results/instructions.json."""
    result = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    by = {(row["format"], row["kernel"]): row for row in result["rows"]}
    lines = ["| preset | bits | general kernel | planes | registers | shared memory |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["format"] for row in result["rows"]):
        old, new = by[name, "general"], by[name, "planes"]
        cells = (f"{new['bits']:.2f}", f"{old['per_number']:.1f}", f"{new['per_number']:.1f}", str(new["registers"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {new['shared'] / 1024:.0f} KiB |")
    e = result  # the versions stand beside the rows
    about = f"sm_{result['capability']}, 28/4 heads of 128, Triton {result['triton']}, torch {e['torch']}, commit {e['commit']}."
    return "\n".join([*lines, "", about])


def attention_cpu() -> str:
    """The table of benchmarks/results/decode-attention-cpu.json."""
    result = json.loads((ROOT / "benchmarks/results/decode-attention-cpu.json").read_text())
    lines = ["| heads | KV | attention | ms | against the fastest dense one |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        heads = f"{row['query_heads']}/{row['kv_heads']} of {row['head_size']}"
        name = row["name"] + (" (baseline)" if row["name"] == row["baseline"] else "")
        cells = (heads, f"{row['length']:,}", name, f"{row['us'] / 1e3:.1f}", f"{row['times_baseline']:.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", versions(dict(environment=result))])


def _lost(row: dict) -> str:
    return f"{row['loss_points']:.1f} ± {row['loss_error']:.1f}"


def _where(result: dict) -> str:
    return f"{result['dtype']}, {versions(result)}"


PAGES = {
    "docs/agents.md": {"figures:clicking": clicking},
    "README.md": {
        "figures:accuracy": accuracy,
        "figures:perplexity": perplexity,
        "figures:evaluation": evaluation,
        "figures:speed": speed,
        "methods": methods,
    },
    "docs/tokens.md": {"figures:tokens": tokens, "figures:token-speed": token_speed},
    "docs/kernels.md": {
        "figures:instructions": instructions,
        "figures:registers-tokens": partial(registers, "tokens"),
        "figures:launches": launches,
        "figures:registers-attention": partial(registers, "attention"),
        "figures:registers-masses": partial(registers, "masses"),
        "figures:attention-cpu": attention_cpu,
        "figures:speed-of-all": speed_of_all,
        "figures:kernels": kernels,
    },
    "docs/painting.md": {"figures:painting": painting},
    "docs/streams.md": {"figures:streaming": streaming, "figures:streaming-study": streaming_study},
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
