"""A small set in Video-MME's own format, made of the synthetic world: real .mp4 files, a parquet file, .srt files.

Its videos are held out from the bundled model's training. Every question has four options and one right answer, so chance
is 25 %. The format's fixed words are used as they come nearest: "short", "medium" and "long" are 32, 64 and 128 frames at 2 a
second, the domain tells the split of the world (easy: Knowledge, stress: Life Record), task types are those that the questions
resemble.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmkv.eval.bundled import made_once
from mmkv.models.tiny import world
from mmkv.models.tiny.questions import Question, spoken

VERSION = "1"  # changes whenever the set does
SEED = 2**43  # training seeds are below 2**40, the model's own evaluation uses 2**41, the benchmarks 2**42
FRAMES = {"short": 32, "medium": 64, "long": 128}
DOMAINS = {"easy": ("Knowledge", "Technology"), "stress": ("Life Record", "Daily Life")}
TASK_TYPES = {
    "colour": "Attribute Perception", "shape": "Object Recognition", "where": "Spatial Perception",
    "way": "Action Recognition", "first": "Temporal Perception", "last": "Temporal Perception",
    "after": "Temporal Reasoning", "before": "Temporal Reasoning", "count": "Counting Problem", "read": "OCR Problems",
}  # fmt: skip
PER_VIDEO = 3  # questions, as in Video-MME


def write(folder: Path, videos: int, splits: tuple[str, ...] = ("easy", "stress"), seed: int = SEED) -> Path:
    """Write a set of `videos` videos and return its folder: `data/`, `subtitle/` and `videomme/test-00000-of-00001.parquet`.

    Args:
        folder: made where it is not there.
        videos: how many, durations and splits in turn.
        splits: of the world.
        seed: of the first video.
    """
    import pyarrow as pa
    from pyarrow import parquet

    folder = Path(folder)
    for name in ("data", "subtitle", "videomme"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    number = 0
    while len(rows) < PER_VIDEO * videos:
        place = len(rows) // PER_VIDEO
        duration = list(FRAMES)[place % len(FRAMES)]
        video = world.make_video(seed + number, FRAMES[duration], splits[place // len(FRAMES) % len(splits)])
        number += 1
        chosen = _chosen(video)
        if len(chosen) < PER_VIDEO:  # too few questions with four options
            continue
        name = f"{place + 1:03d}"
        world.write_mp4(video.frames, folder / "data" / f"world{name}.mp4")
        (folder / "subtitle" / f"world{name}.srt").write_text(_subtitles(video.scene), encoding="utf-8")
        rows += [_row(name, duration, video.scene.split, k, question) for k, question in enumerate(chosen, 1)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "videomme" / "test-00000-of-00001.parquet")
    return folder


def _chosen(video: world.Video) -> list[Question]:
    """Three questions of different tasks with four options, the same for a seed."""
    order = np.random.default_rng([video.scene.seed, 5]).permutation(len(video.questions))
    found: dict[str, Question] = {}
    for question in (video.questions[i] for i in order):
        if question.task in TASK_TYPES and len(set(question.options)) == 4:
            found.setdefault(question.task, question)
    return list(found.values())[:PER_VIDEO]


def _row(name: str, duration: str, split: str, number: int, question: Question) -> dict[str, Any]:
    domain, sub_category = DOMAINS[split]
    letters = "ABCD"
    return dict(
        video_id=name,
        duration=duration,
        domain=domain,
        sub_category=sub_category,
        url="",
        videoID=f"world{name}",
        question_id=f"{name}-{number}",
        task_type=TASK_TYPES[question.task],
        question=question.text,
        options=[f"{letter}. {option}." for letter, option in zip(letters, question.options)],
        answer=letters[question.options.index(question.answer)],
    )


def _subtitles(scene: world.Scene) -> str:
    """What is in view, from when to when, tagged as in Video-MME's files."""
    blocks = []
    for number, thing in enumerate(scene.things, 1):
        start, end = (_clock(t / world.FPS) for t in (thing.start, thing.end))
        text = f'<font color="white" size=".72c">a {thing.colour} {spoken(thing.name)}</font>'
        blocks.append(f"{number}\n{start} --> {end}\n{text}\n")
    return "\n".join(blocks)


def _clock(seconds: float) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{thousandths:03d}"


def bundled(folder: Path, videos: int = 60) -> Path:
    """The set in a cache folder, made there the first time (some seconds).

    Args:
        folder: the cache.
        videos: how many.
    """
    return made_once(Path(folder) / f"video-mme-world-{VERSION}-{videos}", lambda empty: write(empty, videos))
