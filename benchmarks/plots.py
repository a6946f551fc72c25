"""Plots of result files; needs matplotlib (`pip install mmkv[bench]`)."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

KINDS = {"evicts": "evict", "stores": "quantize", "mix": "evict, then quantize"}
LINES = {  # and palettes: pale for what evicts, dark for what quantizes, strong for mixes
    "evicts": ("-", mpl.colormaps["tab20"].colors[1::2] + mpl.colormaps["Set2"].colors),
    "stores": ((0, (4, 1.5)), mpl.colormaps["Dark2"].colors),
    "mix": ((0, (1, 1)), ("black", "tab:red", "tab:blue", "tab:green", "tab:purple", "tab:orange")),
}
MARKERS = "osD^vP*X<>ph"
TITLES = {
    "unknown": "question unknown when the cache is compressed",
    "known": "question known when the cache is compressed",
}
SHARES = (0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1)
ACCURACIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 1)
ROOM = 1.02  # the accuracy scale is logarithmic in the errors below this


def pareto(result: dict, path: Path) -> None:
    """Accuracy over resident bytes, one panel for each protocol.

    Args:
        result: what benchmarks/pareto.py writes.
        path: of a .png.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(13, 7.4), sharey=True)
        styles = _styles(result["rows"])
        for panel, protocol in zip(panels, TITLES):
            _panel(panel, result["rows"], protocol, styles)
        panels[0].set_ylabel("accuracy")
        lines = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
        figure.tight_layout(rect=(0, 0.2, 1, 0.96))
        left = 0.04
        for kind, title in KINDS.items():
            names = [name for name, style in styles.items() if style["kind"] == kind]
            if names:
                columns = -(-len(names) // 5)
                legend = figure.legend(
                    [lines[name] for name in names], names, title=title, ncols=columns, frameon=False,
                    loc="upper left", bbox_to_anchor=(left, 0.2), alignment="left",
                )  # fmt: skip
                figure.add_artist(legend)
                left += (0.12 if kind != "mix" else 0.2) * columns + 0.03
        first = result["rows"][0]["unknown"]
        about = f"{first['questions']} questions on {first['videos']} videos, split {result['split']}"
        figure.suptitle(f"Accuracy of the bundled video model over the true bytes of its KV cache ({about})")
        _write(figure, path)


def _write(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    with Image.open(path) as picture:  # a palette makes the file a third as large
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def _styles(rows: list[dict]) -> dict[str, dict]:
    """Colour, marker and line of each family, in the order of the rows."""
    styles: dict[str, dict] = {}
    for kind, (line, palette) in LINES.items():
        names = list(dict.fromkeys(row["method"] for row in rows if row["kind"] == kind))
        for i, name in enumerate(names):
            colour = palette[i % len(palette)]
            styles[name] = dict(
                kind=kind, color=colour, linestyle=line, marker=MARKERS[i % len(MARKERS)],
                markerfacecolor="white" if kind == "mix" else colour, markersize=5.5,
            )  # fmt: skip
    return styles


def _panel(panel, rows: list[dict], protocol: str, styles: dict[str, dict]) -> None:
    for name, style in styles.items():
        mine = sorted((row[protocol]["share"], row[protocol]["accuracy"]) for row in rows if row["method"] == name)
        options = {key: value for key, value in style.items() if key != "kind"}
        panel.plot(*zip(*mine), label=name, linewidth=1, alpha=0.9, **options)
    dense = next(row[protocol]["accuracy"] for row in rows if row["kind"] == "dense")
    panel.axhline(dense, color="black", linestyle="--", linewidth=1)
    panel.annotate(f"dense, {dense:.1%}", (1, dense), xytext=(0, 4), textcoords="offset points", ha="right")
    panel.set_title(TITLES[protocol], fontsize=10)
    panel.set_xlabel("resident bytes of the KV cache, share of dense (log scale)")
    _axes(panel, SHARES)


def _axes(panel, shares: tuple[float, ...]) -> None:
    """Shares on a log scale, accuracies on one that is logarithmic in the errors."""
    panel.set_xscale("log")
    panel.set_xlim(shares[0], shares[-1])
    panel.set_xticks(shares, [f"{share:.0%}" for share in shares])
    panel.set_yscale("function", functions=(lambda a: -np.log10(ROOM - np.minimum(a, 1.01)), lambda y: ROOM - 10**-y))
    panel.set_ylim(0, 1.005)
    panel.set_yticks(ACCURACIES)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda a, _: f"{a:.0%}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)


PLACES = {"before the decoder": "-", "between layers": (0, (4, 1.5)), "both": (0, (1, 1))}
KEPT = (0.06, 0.1, 0.15, 0.25, 0.5, 0.75, 1)
WHEN = {"known": "question known when tokens are dropped", "unknown": "question unknown when tokens are dropped"}


def tokens(result: dict, path: Path) -> None:
    """Accuracy over the share of vision tokens, one panel for each protocol.

    Args:
        result: what benchmarks/token_accuracy.py writes.
        path: of a .png.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["variant_of"] is None]
    names = list(dict.fromkeys(row["method"] for row in rows if row["place"] != "dense"))
    colours = mpl.colormaps["tab10"].colors
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(12, 6.4), sharey=True)
        for panel, protocol in zip(panels, WHEN):
            here = [row for row in rows if protocol in row]
            for i, name in enumerate(names):
                mine = [row for row in here if row["method"] == name]
                found = sorted((row[protocol]["tokens_mean"], row[protocol]["accuracy"]) for row in mine)
                if found:
                    style = dict(linestyle=PLACES[mine[0]["place"]], marker=MARKERS[i], color=colours[i % 10])
                    panel.plot(
                        *zip(*found), label=f"{name} ({mine[0]['place']})", linewidth=1.2, markersize=5.5, **style
                    )
            dense = here[0][protocol]["accuracy"]
            panel.axhline(dense, color="black", linestyle="--", linewidth=1)
            panel.annotate(f"dense, {dense:.1%}", (1, dense), xytext=(0, 4), textcoords="offset points", ha="right")
            panel.set_title(WHEN[protocol], fontsize=10)
            panel.set_xlabel("vision tokens that a decoder layer computes, mean over the layers (log scale)")
            _axes(panel, KEPT)
        panels[0].set_ylabel("accuracy")
        figure.tight_layout(rect=(0, 0.1, 1, 0.96))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=4, frameon=False, loc="lower center")
        first = rows[0]["known"]
        about = f"{first['questions']} questions on {first['videos']} videos, split {result['split']}"
        figure.suptitle(f"Accuracy of the bundled video model over its vision tokens ({about})")
        _write(figure, path)
