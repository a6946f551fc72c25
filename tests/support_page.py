"""docs/models.md from what tests have shown, and read back."""

from __future__ import annotations

import re
from collections import Counter

import random_models as rm
import support
from support import Cell

HEAD = """# Models, methods, ways of generating

Written by `make support` from the tests that it ran: every ✓ is a test that passed, every "no" a test of the refusal. Tests run
models of a family's own classes at tiny size, with random weights. Another model of the same classes works alike; for one
of a family that is not here, `mmkv.wrap` raises.

"""
LABELS = {"sample": "sampling", "returns": "several answers", "lookup": "assisted", "beam": "beams"}
STOCK = """Wrapped with nothing, a model is stock, token for token, in each of these. Prompts come in a padded batch of two
(assisted ones, by prompt lookup, alone); turns are three on one cache; streaming is `mmkv.stream`, agent `mmkv.agent`, painting
`mmkv paint`. An empty place has no test.
"""
IDLE = """Idle: the method is for video, and the family's tokens are all of images, which it leaves alone. Methods run with their
defaults or with settings made for tiny prompts; how much one drops of real pictures is in docs/tokens.md and the README.

"""


def page(cells: list[Cell]) -> str:
    """The whole page."""
    notes: list[str] = []
    eyes, texts = list(rm.VLMS), list(rm.TEXTS)
    apart = {kind: [f for k, f in support.APART if k == kind and f not in rm.FAMILIES] for kind in ("cache", "tokens")}
    methods = sorted({*support.CACHE, *support.NEXT_SCALE})
    tables = [
        "## Families\n\n" + STOCK + "\n" + _families(cells, notes),
        "## Cache methods on models that see or paint\n\n"
        + _table(cells, "cache", methods, eyes + apart["cache"], notes),
        "## Cache methods on language models\n\n" + _table(cells, "cache", methods, texts, notes),
        "## Token methods\n\n" + IDLE + _table(cells, "tokens", sorted(support.TOKENS), eyes + apart["tokens"], notes),
    ]
    said = "".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1))
    return HEAD + "\n".join(tables) + "\n## Why not\n\n" + said


def read_back(text: str) -> dict[tuple[str, str, str], bool]:
    """(kind, family, name): whether it works, of all cells of a page that are not empty."""
    out = {}
    for section in text.split("\n## ")[1:]:
        kind = {"Families": "modes", "Cache": "cache", "Token": "tokens"}.get(section.split()[0])
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
        ]
        for row in rows[2:]:
            for column, cell in zip(rows[0][1:], row[1:]):
                family, name = (row[0], _mode(column)) if kind == "modes" else (column, row[0])
                if cell.startswith(("✓", "no")):
                    out[kind, family.strip("`"), name.strip("`")] = cell.startswith("✓")
    return out


def _mode(label: str) -> str:
    return next((mode for mode, known in LABELS.items() if known == label), label)


def _families(cells: list[Cell], notes: list[str]) -> str:
    """One row a family: class, loader, ways of generating."""
    ways = [*support.MODES, "streaming", "agent", "painting"]
    found = {(c.family, c.name): c for c in cells if c.kind == "modes"}
    rows = []
    for family in dict.fromkeys([*rm.FAMILIES, *(c.family for c in cells if c.kind == "modes")]):
        name, loader = support.CLASSES.get(family) or _class_and_loader(family)
        marks = [_mark(found.get((family, way)), (), notes) for way in ways]
        rows.append([f"`{family}`", f"`{name}`", f"`{loader}`", *marks])
    return _lines(["family", "class", "loaded by", *(LABELS.get(way, way) for way in ways)], rows)


def _class_and_loader(family: str) -> tuple[str, str]:
    kind = type(rm.make(family))
    own = kind.__module__.startswith("mmkv.models.")
    return kind.__name__, f"{kind.__module__.rpartition('.')[0]}.load" if own else "from_pretrained"


def _table(cells: list[Cell], kind: str, names: list[str], families: list[str], notes: list[str]) -> str:
    """One row a method, one column a family; modes that a cell lacks or has beyond the others' are listed in it."""
    mine = [c for c in cells if c.kind == kind and c.family in families]
    usual = Counter(c.modes for c in mine if not c.refused).most_common(1)[0][0]
    found = {(c.family, c.name): c for c in mine}
    rows = [[f"`{name}`", *(_mark(found.get((f, name)), usual, notes) for f in families)] for name in names]
    said = f"✓: {', '.join(LABELS.get(mode, mode) for mode in usual)}.\n\n"
    return said + _lines(["method", *(f"`{family}`" for family in families)], rows)


def _mark(cell: Cell | None, usual: tuple[str, ...], notes: list[str]) -> str:
    if cell is None:
        return ""
    if (cell.name, cell.family) in support.IDLE:
        return "✓ (idle)"
    if not cell.refused:
        same = set(cell.modes) == set(usual) or not usual
        return "✓" if same else f"✓ ({', '.join(LABELS.get(m, m) for m in cell.modes)})"
    names = [type(rm.make(cell.family)).__name__] if cell.family in rm.FAMILIES else []
    said = re.sub("|".join(names) or "$^", "this model", cell.refused)
    if said not in notes:
        notes.append(said)
    return f"no ({notes.index(said) + 1})"


def _lines(head: list[str], rows: list[list[str]]) -> str:
    body = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in body)
