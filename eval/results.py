"""The folder of one run: `config.json` (what was asked), `predictions*.jsonl` (a line per answer), `summary.json`.

Each writer appends to a file of its own and flushes every line to the disk, so that a kill loses at most the line being
written; such a torn line is cut off when the file is opened again. A folder belongs to one configuration.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG, SUMMARY, MERGED = "config.json", "summary.json", "predictions.jsonl"
APART = (
    "command",
    "started",
    "commit",
)  # in the configuration, yet no reason to refuse a resume: `resumed` lists theirs
Key = tuple[str, str]  # method, id


class ResultError(ValueError):
    """A result folder that cannot be used as asked; the message is one line."""


class Results:
    """One writer of a result folder.

    Args:
        folder: made where it is not there.
        config: what the run is; a folder that holds another one is refused.
        rank, ranks: which of several writers this is; each has a file of its own.

    Raises:
        ResultError: the folder belongs to another configuration or writer, or a line before the last is damaged.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], rank: int = 0, ranks: int = 1):
        self.folder, self.config = Path(folder), json.loads(json.dumps(config))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / (MERGED if ranks == 1 else f"predictions.rank{rank}of{ranks}.jsonl")
        self._file = open(self.path, "a+b")  # noqa: SIM115  (open for as long as the run)
        try:
            self._lock()
            self._settle()
            _cut_torn_line(self._file, self.path)
            self.rows = read(self.folder)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResultError(
                f"{self.path} is being written by another run; wait for it, or choose another --out"
            ) from error

    def _settle(self) -> None:
        """Write the configuration, or compare it with the one that is there."""
        path = self.folder / CONFIG
        with open(self.folder / ".lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not path.exists():
                if any(p.stat().st_size for p in self.folder.glob("predictions*.jsonl")):
                    raise ResultError(f"{self.folder} holds predictions without {CONFIG}; choose another --out")
                write_json(path, self.config)
                return
            there = json.loads(path.read_text())
            changed = differences({k: v for k, v in there.items() if k != "resumed"}, self.config)
            if not changed:
                told = {key: self.config[key] for key in APART if key in self.config}
                write_json(path, there | dict(resumed=[*there.get("resumed", []), told]))
        if changed:
            raise ResultError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed[:4])}); choose another --out, or delete it"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, to the disk.

        Raises:
            ResultError: there is a row of this method and sample already.
        """
        key = key_of(row)
        if key in self.rows:
            raise ResultError(f"{self.path}: {key[0]}, {key[1]} is there already")
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[key] = json.loads(line)

    def drop_skipped(self) -> int:
        """Forget the rows that were skipped, so that they are tried again; returns how many."""
        gone = [key for key, row in self.rows.items() if row.get("skipped")]
        if gone:
            self.rows = {key: row for key, row in self.rows.items() if key not in gone}
            self._replace(list(self.rows.values()))
        return len(gone)

    def _replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put these rows in place of all files."""
        beside = self.folder / f".{MERGED}.{os.getpid()}"
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        os.replace(beside, self.folder / MERGED)
        for path in self.folder.glob("predictions.rank*.jsonl"):
            path.unlink()
        if self.path.name == MERGED:
            self._file.close()
            self._file = open(self.path, "a+b")  # noqa: SIM115
            self._lock()

    def merge(self, order: Iterable[Key]) -> dict[Key, dict] | None:
        """Once all rows of `order` are there, by whichever writers: one file, in this order; None while some are missing.

        Call it when this writer is done; the last one to be done does the work.
        """
        with open(self.folder / ".lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            rows = read(self.folder)
            wanted = list(order)
            if not all(key in rows for key in wanted):
                return None
            self._replace([rows[key] for key in wanted])
            self.rows = {key: rows[key] for key in wanted}
            return self.rows

    def close(self) -> None:
        """Let others write here."""
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is known by."""
    return row["method"], row["id"]


def read(folder: Path) -> dict[Key, dict]:
    """All rows of a folder, whoever wrote them; a torn last line is no row.

    Raises:
        ResultError: a damaged line before the last, or two different rows of one method and sample.
    """
    rows: dict[Key, dict] = {}
    for path in sorted(Path(folder).glob("predictions*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # behind the last newline there is nothing, or a torn line
            try:
                row = json.loads(line)
                key = key_of(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ResultError(f"{path}, line {number} is damaged: {line[:60]!r}") from error
            if rows.setdefault(key, row) != row:
                raise ResultError(f"{path}, line {number}: {key[0]}, {key[1]} has another row already")
    return rows


def _cut_torn_line(file, path: Path) -> None:
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def differences(there: Mapping[str, Any], given: Mapping[str, Any], below: str = "") -> list[str]:
    """What differs between two configurations, as "key: there, now given"."""
    out = []
    for key in dict.fromkeys([*there, *given]):
        if not below and key in APART:
            continue
        old, new = there.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += differences(old, new, f"{below}{key}.")
        elif old != new:
            out.append(f"{below}{key}: {old!r} there, {new!r} now")
    return out
