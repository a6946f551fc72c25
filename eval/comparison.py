"""Result folders side by side: one table, and a Pareto plot of accuracy over bytes and over time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmkv.eval.methods import DENSE
from mmkv.eval.results import CONFIG, SUMMARY, differences
from mmkv.eval.table import HEADS, cells, drawn, html, markdown

TOLD = ("task", "model", "weights", "dtype", "device", "commit", "scorer", "prompt_hash", "answer_mode")
PAGE = """<!doctype html>
<meta charset=utf-8>
<title>mmkv compare</title>
<style>
body { font: 14px sans-serif }
td, th { padding: 2px 10px; text-align: right }
td:nth-child(-n+3) { text-align: left }
</style>"""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, summary) of a result folder.

    Raises:
        FileNotFoundError: no such folder, or it is no result.
        ValueError: its run has not been finished.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no result folder: it has no {CONFIG}")
    if not (folder / SUMMARY).is_file():
        raise ValueError(
            f"{folder} is not finished: it has no {SUMMARY}; run its command again, it goes on where it stopped"
        )
    return json.loads((folder / CONFIG).read_text()), json.loads((folder / SUMMARY).read_text())


def gather(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each method of each result: task, model, method and its part of the summary."""
    rows = []
    for folder in folders:
        config, summary = read(folder)
        for name, found in summary["methods"].items():
            rows.append(dict(task=config["task"], model=Path(config["model"]).name, method=name, found=found))
    return rows


def remarks(folders: Sequence[Path]) -> list[str]:
    """What a reader must know: where results of one task were made differently, and what each of them skipped."""
    out: list[str] = []
    first: dict[str, tuple[Path, dict]] = {}
    for folder in folders:
        config, summary = read(folder)
        known = first.setdefault(config["task"], (folder, config))
        told, before = ({k: v for k, v in c.items() if k not in ("methods", "resumed")} for c in (config, known[1]))
        apart = differences(before, told)
        if apart:
            out.append(f"{folder} and {known[0]} differ: {'; '.join(apart)}")
        if summary["skipped"]["samples"]:
            reasons = "; ".join(f"{n} x {why}" for why, n in summary["skipped"]["reasons"].items())
            out.append(f"{folder} skipped {summary['skipped']['samples']} of {summary['samples']} samples: {reasons}")
    return out


def _lines(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return ["benchmark", "model", *HEADS], [[r["task"], r["model"], *cells(r["method"], r["found"])] for r in rows]


def table(rows: Sequence[dict[str, Any]]):
    """A rich table."""
    return drawn(*_lines(rows))


def check_out(path: Path) -> None:
    """Raise ValueError where `write` could not write to a path."""
    if path.suffix not in (".md", ".html", ".png"):
        raise ValueError(f"--out {path}: possible are files that end in .md, .html, .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")


def write(rows: Sequence[dict[str, Any]], folders: Sequence[Path], path: Path) -> list[Path]:
    """Write what the suffix says: .md or .html (with the plot beside, as .png), or .png; returns the files.

    Raises:
        ValueError: another suffix, or no such folder.
    """
    check_out(path)
    picture = path.with_suffix(".png")
    plot(rows, picture)
    if path.suffix == ".png":
        return [picture]
    heads, lines = _lines(rows)
    about = [_about(folder) for folder in folders]
    if path.suffix == ".md":
        notes = [f"- {line}" for line in [*about, *remarks(folders)]]
        path.write_text(
            f"{markdown(heads, lines)}\n\n![accuracy over bytes and time]({picture.name})\n\n" + "\n".join(notes) + "\n"
        )
    else:
        notes = [f"<li>{escape(line)}</li>" for line in [*about, *remarks(folders)]]
        image = f"<p><img src={escape(picture.name)!r} alt='accuracy over bytes and time'></p>"
        path.write_text("\n".join([PAGE, html(heads, lines), image, "<ul>", *notes, "</ul>", ""]))
    return [path, picture]


def _about(folder: Path) -> str:
    config, _ = read(folder)
    commits = dict.fromkeys(run.get("commit") for run in (config, *config.get("resumed", [])))
    config = config | dict(commit=" and ".join(map(str, commits)))
    told = ", ".join(f"{key} {config[key]}" for key in TOLD)
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items() if version)
    return f"{folder.name}: {told}; settings {json.dumps(config['settings'])}; {versions}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Score over KV bytes and over seconds of an answer, a row of panels for each benchmark; the frontier is drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib; install it with: pip install 'mmkv[eval]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(len(tasks), 2, figsize=(11, 4.2 * len(tasks)), squeeze=False)
        for line, (task, model) in zip(panels, tasks):
            mine = [r for r in rows if (r["task"], r["model"]) == (task, model) and r["found"].get("interval")]
            for panel, (label, value) in zip(line, AXES.items()):
                _panel(panel, mine, value)
                panel.set_xlabel(label)
                panel.set_title(f"{task}, {model}", fontsize=10)
            line[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
            line[0].set_ylabel("score, %")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


MARKERS = "osD^vP*X<>"
AXES = {
    "resident bytes of the KV cache, KiB (log scale)": lambda f: f["kv_bytes"] / 1024,
    "seconds of a prefill and an answer": lambda f: (f["prefill_seconds"] or 0) + (f["decode_seconds"] or 0),
}


def _panel(panel, rows: Sequence[dict[str, Any]], value) -> None:
    points = [(value(row["found"]), next(iter(row["found"]["headline"].values())), row) for row in rows]
    for i, (x, y, row) in enumerate(points):
        low, high = (100 * bound for bound in row["found"]["interval"])
        colour = "black" if row["method"] == DENSE else f"C{i % 10}"
        bars = [[max(y - low, 0)], [max(high - y, 0)]]
        panel.errorbar(
            x, y, yerr=bars, fmt=MARKERS[i % len(MARKERS)], color=colour, elinewidth=0.7, capsize=2, label=row["method"]
        )
    best = frontier([(x, y) for x, y, _ in points])
    panel.plot(*zip(*best), color="0.6", linewidth=1, zorder=0)
    if value is next(iter(AXES.values())):
        panel.set_xscale("log")
    panel.grid(color="0.92")


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: none has as little of the first and more of the second; from left to right."""
    out: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not out or y > out[-1][1]:
            out.append((x, y))
    return out
