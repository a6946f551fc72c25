"""Video-MME's files: one parquet file of questions, `data/*.mp4`, `subtitle/*.srt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkv.eval.task import Sample

DURATIONS = ("short", "medium", "long")
COLUMNS = (
    "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type", "question", "options",
    "answer",
)  # fmt: skip
FACTS = ("video_id", "duration", "domain", "sub_category", "task_type", "question", "options")
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")


def read_rows(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, Any]]:
    """The rows of a parquet file, as they are.

    Args:
        path: the file.
        columns: those it must have.

    Raises:
        ValueError: not a parquet file, or a column is missing.
        ModuleNotFoundError: pyarrow is not installed; the message says how to get it.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading .parquet files needs pyarrow; install it with: pip install 'mmkv[eval]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    missing = [name for name in columns if rows and name not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; needed are {', '.join(columns)}")
    return rows


def fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, None where it can be asked."""
    for name in ("video_id", "videoID", "question_id", "duration", "question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"corrupt row: {name} is {row.get(name)!r}"
    options = row.get("options")
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) and o.strip() for o in options):
        return f"corrupt row: options are {options!r}, not four texts"
    if row["duration"] not in DURATIONS:
        return f"corrupt row: duration is {row['duration']!r}, possible are {', '.join(DURATIONS)}"
    if row["answer"] not in ("A", "B", "C", "D"):
        return f"corrupt row: answer is {row['answer']!r}, possible are A, B, C, D"
    return None


def find_video(root: Path, name: str) -> Path | None:
    """The media file of a video, in `data/` or the folder itself."""
    places = [folder / f"{name}{suffix}" for folder in (root / "data", root) for suffix in VIDEO_SUFFIXES]
    return next((path for path in places if path.is_file()), None)


def samples(rows: list[dict[str, Any]], media: Path, durations: tuple[str, ...] = DURATIONS) -> list[Sample]:
    """A sample for each row, those of a video next to each other; corrupt rows and missing videos with the reason.

    Args:
        rows: as `read_rows` gives them.
        media: the folder with `data/` and `subtitle/`.
        durations: which to take; rows that do not tell theirs are taken.
    """
    taken: set[str] = set()
    out: dict[str, list[Sample]] = {}
    for number, row in enumerate(rows):
        if row.get("duration") in DURATIONS and row["duration"] not in durations:
            continue
        wrong = fault(row)
        name = row.get("question_id")
        if not isinstance(name, str) or not name.strip():
            name = f"row {number}"
        if name in taken:
            wrong, name = wrong or f"corrupt row: question_id {name!r} is there twice", f"{name} (row {number})"
        taken.add(name)
        out.setdefault(str(row.get("videoID")), []).append(_sample(row, name, wrong, media))
    return [sample for found in out.values() for sample in found]


def _sample(row: dict[str, Any], name: str, wrong: str | None, media: Path) -> Sample:
    group = str(row.get("videoID"))
    video = None if wrong else find_video(media, group)
    if wrong is None and video is None:
        wrong = f"missing video: {group}.mp4"
    return Sample(
        id=name,
        group=group,
        facts={key: row.get(key) for key in FACTS} | {"videoID": row.get("videoID")},
        target=row.get("answer"),
        data=dict(row=row, video=video, subtitle=media / "subtitle" / f"{group}.srt"),
        skipped=wrong,
    )
