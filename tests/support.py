"""What is supported, by test: which (family, method, mode) the tests run, which they refuse, and the pages that say so.

A test says what it shows by `@pytest.mark.support(kind, ...)`: kind is "modes", "cache" or "tokens"; the family and the name
of the mode or method are its parameters `family` and `name`, or given (`family=`, `name=`, `by=` names another parameter);
`modes=` lists the ways of generating that it runs. A test that expects a refusal hands the message to the fixture `refused`.
`make support` runs these tests and writes docs/models.md; `test_support.py` compares the page with what is declared here.

A new method or family appears by its registry. A family with tests of its own, and no place in `random_models`, is entered
in `APART`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import random_models as rm

import mmkv
import mmkv._presets  # noqa: F401  (methods register themselves)
from mmkv.parts.registry import METHODS

MODES = ("greedy", "beam", "sample", "returns", "lookup", "turns")
CACHE_MODES = ("greedy", "beam", "returns", "lookup", "turns")  # of cache methods; several answers are sampled
TEXT_MODES = ("greedy", "beam", "turns")  # those of cache methods on models without eyes
STREAMED = ("qwen2_5_vl", "llava_onevision", "longva")
NOT_STREAMED = ("qwen3_vl", "llava", "internvl", "opencua")
AGENTS = ("qwen2_5_vl", "opencua")
PACKED = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "opencua")  # families whose towers hold on to every patch
IN_TOWER = ("ToMe", "DiffRate")
# methods for video find none where a family's tokens are all of images: they leave them alone
IDLE = [(name, family) for name in ("EVS", "DyCoke", "VidCom2") for family in ("llava", "internvl", "opencua")]
TOKENS = {e.name: e.method for e in METHODS.values() if e.kind == "tokens" and getattr(e.method, "for_vlm", True)}
CACHE = {e.name: e.method for e in METHODS.values() if e.kind == "cache" and not e.method.next_scale}
NEXT_SCALE = tuple(e.name for e in METHODS.values() if e.kind == "cache" and e.method.next_scale)
PAINTED = (
    "HACK", "ScaleKV", "SnapKV", "H2O", "AdaKV", "PyramidKV", "StreamingLLM", "KIVI", "VidKV", "WaterfillKV", "GEAR",
)  # fmt: skip
# (kind, family): names, for families whose models are made elsewhere than in random_models
APART = {("modes", "infinity"): ("painting",), ("cache", "infinity"): PAINTED}
CLASSES = {
    "infinity": ("InfinityForImageGeneration", "mmkv.models.infinity.loading.load_official")
}  # and their loaders


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Args:
        kind: "modes", "cache" or "tokens".
        family: of the model.
        name: of a mode or method.
        modes: ways of generating that were run.
        refused: the first line of the message, "" where it is not refused.
    """

    kind: str
    family: str
    name: str
    modes: tuple[str, ...] = ()
    refused: str = ""


def token_refusals() -> list[tuple[str, str]]:
    """(name, family) of token methods that a family refuses."""
    return [(name, family) for name in IN_TOWER for family in PACKED]


def token_cases() -> list[tuple[str, str]]:
    """(name, family) of token methods that work."""
    return [(name, family) for family in rm.VLMS for name in TOKENS if (name, family) not in token_refusals()]


def cache_refusals() -> list[tuple[str, str]]:
    """(name, family): methods for images that are painted scale by scale, on language models."""
    return [(name, family) for family in rm.FAMILIES for name in NEXT_SCALE]


def declared() -> dict[tuple[str, str, str], bool]:
    """(kind, family, name): whether it works, for every place that a test has to fill."""
    out = {("modes", family, mode): True for family in rm.FAMILIES for mode in MODES}
    out |= {("modes", family, "streaming"): family in STREAMED for family in STREAMED + NOT_STREAMED}
    out |= {("modes", family, "agent"): True for family in AGENTS}
    out |= {("cache", family, name): True for family in rm.FAMILIES for name in CACHE}
    out |= {("cache", family, name): False for name, family in cache_refusals()}
    out |= {("tokens", family, name): True for name, family in token_cases()}
    out |= {("tokens", family, name): False for name, family in token_refusals()}
    return out | {(*key, name): True for key, names in APART.items() for name in names}


def cells_of(item, refused: str) -> list[Cell]:
    """What a test that passed has shown."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    out = []
    for mark in item.iter_markers("support"):
        more = mark.kwargs
        family = more.get("family", params.get("family"))
        name = more.get("name", params.get(more.get("by", "name")))
        name = name if isinstance(name, str) else type(name).__name__
        modes = more.get("modes", ())
        modes = modes if isinstance(modes, tuple) else modes(family)
        out.append(Cell(mark.args[0], family, name, modes, refused))
    return out


class Recorder:
    """A plugin that writes what the tests have shown.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: str):
        self.path, self.cells = path, {}

    def add(self, cell: Cell) -> None:
        """Modes of several tests of one place add up."""
        key = (cell.kind, cell.family, cell.name)
        modes = self.cells[key].modes if key in self.cells else ()
        self.cells[key] = replace(cell, modes=tuple(dict.fromkeys((*modes, *cell.modes))))

    def pytest_runtest_logreport(self, report) -> None:
        for said in (value for name, value in report.user_properties if name == "support"):
            if report.when == "call" and report.passed:
                for cell in said:
                    self.add(Cell(**{**cell, "modes": tuple(cell["modes"])}))

    def pytest_sessionfinish(self) -> None:
        with open(self.path, "w") as file:
            json.dump([asdict(cell) for cell in self.cells.values()], file)
