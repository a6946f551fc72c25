"""Tables of results: for the terminal, in Markdown and in HTML, all from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mmkv._report import size

HEADS = (
    "method", "score", "95 % interval", "against dense", "p", "agrees", "vision tokens", "KV bytes", "of dense", "prefill, s",
    "decode, s", "peak", "n",
)  # fmt: skip
CAPTION = (
    "against dense: points, with the 95 % interval of a paired bootstrap over groups; p: McNemar's exact test; "
    "vision tokens: kept / shown; KV bytes: resident when the answer is there; peak: device or process"
)
WIDTH = 180  # columns; a narrower window wraps the lines, cells are never cut


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """One row of text for a method's part of a summary."""
    if not found["n"]:
        return [name, "all skipped", *["-"] * (len(HEADS) - 3), "0"]
    against = found.get("against_dense") or {}
    paired = bool(against.get("n"))
    gained = "-"
    if paired:
        gained = f"{against['points']:+.1f} [{against['interval'][0]:+.1f}, {against['interval'][1]:+.1f}]"
    kept = "-"
    if found["vision_tokens"]:
        kept = f"{found['vision_tokens_held']:,.0f} / {found['vision_tokens']:,.0f}"
    return [
        name,
        headline(found),
        "-" if found["interval"] is None else "{:.1f} - {:.1f}".format(*(100 * bound for bound in found["interval"])),
        gained,
        f"{against['mcnemar']:.3f}" if paired else "-",
        f"{against['agreement']:.1%}" if paired else "-",
        kept,
        size(found["kv_bytes"]),
        f"{found['kv_bytes'] / found['kv_bytes_dense']:.1%}",
        _seconds(found["prefill_seconds"]),
        _seconds(found["decode_seconds"]),
        "-" if found["peak_memory"] is None else size(found["peak_memory"]),
        f"{found['n']:,}",
    ]


def headline(found: dict[str, Any]) -> str:
    """The benchmark's first number, in percent."""
    if found["interval"] is None:
        return "unscored"
    return f"{next(iter(found['headline'].values())):.1f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def summary_table(summary: dict[str, Any]):
    """A rich table of one run."""
    first: dict[str, Any] = next((m for m in summary["methods"].values() if m["n"]), {})
    label = next(iter(first.get("headline", {"score": 0})))
    title = f"{summary['task']}: {label}, {summary['samples']:,} samples in {summary['groups']:,} groups"
    return drawn(HEADS, [cells(name, found) for name, found in summary["methods"].items()], title)


def drawn(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None):
    """A rich table with the caption that explains it."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", caption=CAPTION)
    for head in heads:
        table.add_column(head, no_wrap=True, justify="left" if head in ("benchmark", "model", "method") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def show(table) -> None:
    """Print a table in full width on stdout."""
    from rich.console import Console

    console = Console()
    Console(width=max(console.width, WIDTH)).print(table, crop=False, soft_wrap=False)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def html(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"
