"""Subtitles of a video: reading an .srt file, and the lines that cover the frames a model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
_TAG = re.compile(r"<[^<>]*>")
_WHITE = re.compile(r'<font color="white" size=".72c">(.*?)</font>')  # as lmms-eval's expression, its dot included


@dataclass(frozen=True)
class Line:
    """One subtitle.

    Args:
        start, end: seconds between which it is shown.
        text: as in the file, tags included, its lines joined by spaces.
    """

    start: float
    end: float
    text: str

    @property
    def plain(self) -> str:
        """Without tags."""
        return " ".join(_TAG.sub("", self.text).split())


def read_srt(path: Path) -> list[Line]:
    """All subtitles of a file, in its order; entries without a line of times are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a text file, or nothing in it is a subtitle.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a subtitle file: it is not UTF-8 text") from error
    lines = []
    for block in re.split(r"\n\s*\n", content.replace("\r\n", "\n")):
        rows = [row for row in block.strip().split("\n") if row.strip()]
        at = next((i for i, row in enumerate(rows) if _TIMES.search(row)), None)
        if at is None:
            continue
        found = [int(number) for number in _TIMES.search(rows[at]).groups()]  # type: ignore[union-attr]
        start, end = (_seconds(found[:4]), _seconds(found[4:]))
        lines.append(Line(start, end, " ".join(rows[at + 1 :])))
    if content.strip() and not lines:
        raise ValueError(f"{path} is not a subtitle file: no line of it gives times")
    return lines


def _seconds(clock: Sequence[int]) -> float:
    hours, minutes, seconds, thousandths = clock
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000


def at_frames(lines: Sequence[Line], timestamps: Sequence[float]) -> list[str]:
    """Texts of the subtitles shown at these times, in the file's order, each once: n frames give at most n lines.

    The official rule. Where several lines are shown at one time, the last one that began is taken.
    """
    chosen = set()
    for time in timestamps:
        shown = [i for i, line in enumerate(lines) if line.start <= time < line.end]
        if shown:
            chosen.add(max(shown, key=lambda i: (lines[i].start, i)))
    return [lines[i].plain for i in sorted(chosen) if lines[i].plain]


def at_frames_lmms(lines: Sequence[Line], count: int, fps: float, frames: int = 32) -> list[str]:
    """The texts that lmms-eval puts into its prompt: of every line shown at one of `frames` frames spread over the file, those
    in its white `<font>` tags; lines without such a tag yield nothing there.

    Args:
        lines: all subtitles.
        count: frames in the file.
        fps: frames a second of the file.
        frames: how many, evenly spaced, whatever the model sees.
    """
    import numpy as np

    spread = np.linspace(0, count - 1, frames, dtype=int).tolist()
    chosen = {
        i for frame in spread for i, line in enumerate(lines) if int(line.start * fps) <= frame < int(line.end * fps)
    }
    found = [_WHITE.findall(lines[i].text) for i in sorted(chosen)]
    return [texts[0] for texts in found if texts]
