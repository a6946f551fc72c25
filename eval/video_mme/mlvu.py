"""MLVU (arXiv 2406.04264), multiple choice: as lmms-eval runs `sy1998/MLVU_dev` and `_test`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmkv.eval.media import Media
from mmkv.eval.task import Prompt, Sample, by_facet
from mmkv.eval.video_mme.answers import lmms
from mmkv.eval.video_mme.data import read_rows
from mmkv.eval.video_mme.score import percent
from mmkv.eval.video_mme.video_task import VideoTask, ask, find_file, find_video, missing

TASKS = {
    "dev": ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"),
    "test": (
        "anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning", "tutorialQA",
    ),
}  # fmt: skip
COLUMNS = ("video_name", "question", "answer", "task_type")
POST_PROMPT = "\nOnly give the best option.\nBest option: ("


@dataclass
class MLVU(VideoTask):
    """MLVU from a folder with a parquet file (video_name, question with its options, answer letter, task_type) and the videos.

    Args:
        split: "dev" (7 tasks) or "test" (9), over which the mean is taken.
        max_new_tokens: longest answer.
    """

    split: str = "dev"
    max_new_tokens: int = 16

    name: ClassVar[str] = "mlvu"
    scorer: ClassVar[str] = "mlvu-1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in TASKS:
            raise ValueError(f"split {self.split!r}: possible are {', '.join(TASKS)}")
        if self.answer_mode != "generate":
            raise ValueError("MLVU's options stand in its questions; possible is answer mode 'generate' alone")

    def find_questions(self) -> Path:
        return find_file(self.root, "*.parquet", "*/*.parquet")

    def settings(self) -> dict[str, Any]:
        return super().settings() | dict(split=self.split)

    def samples(self) -> list[Sample]:
        found: dict[str, list[Sample]] = {}
        folder = self.questions.parent if self.root.is_file() else self.root
        for number, row in enumerate(read_rows(self.questions, COLUMNS)):
            wrong = next((f"corrupt row: {c} is {row[c]!r}" for c in COLUMNS if not isinstance(row[c], str)), None)
            if wrong is None and row["task_type"] not in TASKS[self.split]:
                wrong = f"corrupt row: task_type {row['task_type']!r}, possible are {', '.join(TASKS[self.split])}"
            name = str(row["video_name"])
            video = None if wrong else find_video(folder, name)
            sample = Sample(
                id=f"{number:05d}",
                group=name,
                facts=dict(task_type=row["task_type"], question=row["question"]),
                target=row["answer"],
                data=dict(video=video, question=row["question"]),
                skipped=missing(name, video, wrong),
            )
            found.setdefault(name, []).append(sample)
        return [sample for mine in found.values() for sample in mine]

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        return ask(sample.data["question"] + POST_PROMPT)

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        letter = lmms(response)
        return dict(answer=letter, correct=letter == sample.target, score=float(letter == sample.target))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        by = by_facet(rows, ("task_type",))
        return dict(headline=averages(by["task_type"], TASKS[self.split]) | dict(accuracy=_mean(rows)), by=by)

    def template(self) -> str:
        return "{question}" + POST_PROMPT


def averages(tasks: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> dict[str, float]:
    """M-Avg in percent, the unweighted mean of the tasks' accuracies: over the tasks that are there, and over all known ones,
    absent ones counted as 0 (lmms-eval)."""
    total = 100 * sum(found["score"] for found in tasks.values())
    return dict(m_avg=total / max(len(tasks), 1), m_avg_lmms=total / len(known))


def _mean(rows: Sequence[Mapping[str, Any]]) -> float:
    return percent(sum(row["correct"] for row in rows), len(rows))
