"""What the benchmarks on the bundled model's questions share: on what they measure, and a log that they resume from."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from asking import SEED
from rich.progress import Progress, TaskID

QUIET = 30  # seconds between lines of progress where there is no terminal


@dataclass(frozen=True)
class Ground:
    """On what is measured: which videos and questions, and the arithmetic."""

    split: str = "easy"
    frames: int = 128
    questions: int = 8  # per video, at most
    dtype: str = "bfloat16"

    @classmethod
    def arguments(cls, parser) -> None:
        """Its options on the command line."""
        parser.add_argument("--questions", type=int, default=cls.questions, help="per video, at most")
        parser.add_argument("--split", default=cls.split)
        parser.add_argument("--frames", type=int, default=cls.frames)
        parser.add_argument("--dtype", default=cls.dtype)

    @classmethod
    def of(cls, options):
        """What the command line says."""
        return cls(options.split, options.frames, options.questions, options.dtype)

    def where(self, protocol: str, video: int) -> str:
        """The part of a log's key that no setting changes."""
        return f"{protocol} {self.split} {SEED} {self.frames} {self.questions} {self.dtype} video {video}"


@cache
def code_of(kind: type, root: type) -> str:
    """Digest of the code of a method and of those it inherits from, below `root`; comments and docstrings left out."""
    found = hashlib.sha1()
    for base in kind.__mro__:
        if issubclass(base, root) and base is not root:
            tree = ast.parse(inspect.getsource(inspect.getmodule(base)))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(node):
                    node.body = node.body[1:]
            found.update(ast.dump(tree).encode())
    return found.hexdigest()[:8]


class Log:
    """Measurements by key, in a file that only grows."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, row: dict) -> None:
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Lines:
    """Says now and then how far a bar is, where no terminal shows it."""

    def __init__(self, progress: Progress, bar: TaskID):
        self.progress, self.bar, self.printed = progress, bar, time.monotonic()

    def tell(self) -> None:
        if self.progress.console.is_terminal or time.monotonic() - self.printed <= QUIET:
            return
        self.printed, task = time.monotonic(), self.progress.tasks[self.bar]
        left = "?" if task.time_remaining is None else f"{task.time_remaining / 60:.0f} min left"
        print(f"{task.description}: {task.percentage:.0f} %, {left}", flush=True)
