"""StreamingBench (arXiv 2411.03628), its multiple-choice parts: a question at a moment, about the video up to there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mmkv.eval.media import Media
from mmkv.eval.task import Prompt, Sample, by_facet
from mmkv.eval.video_mme.score import percent
from mmkv.eval.video_mme.task import choices
from mmkv.eval.video_mme.video_task import VideoTask, ask, find_file, find_video, missing, read_list

LETTERS = "ABCD"
CONTEXT = 60.0  # seconds before the question that offline models are shown
_HEAD = (
    "You are an advanced video question-answering AI assistant. You have been provided with some frames from the video and a "
    "multiple-choice question related to the video. Your task is to carefully analyze the video and provide the best answer to "
    "question, choosing from the four options provided. Respond with only the letter (A, B, C, or D) of the correct option."
)


def build(question: str, options: Sequence[str]) -> str:
    """The text behind the video (spec: src/ of THUNLP-MT/StreamingBench)."""
    listed = "\n".join(lettered(options))
    return f"{_HEAD}\n\nQuestion: {question}\n\nOptions:\n{listed}\n\nThe best option is:"


def lettered(options: Sequence[str]) -> list[str]:
    """Options with "A. " ... in front, where the data leaves it out."""
    return [text if text.startswith(f"{c}.") else f"{c}. {text}" for c, text in zip(LETTERS, options)]


def seconds_of(stamp: str) -> float:
    """Of a time such as 00:00:31.

    Raises:
        ValueError: another form.
    """
    try:
        hours, minutes, seconds = (int(part) for part in stamp.split(":"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"time_stamp {stamp!r}: possible are times as 00:00:31") from error
    return float(3600 * hours + 60 * minutes + seconds)


@dataclass
class StreamingBench(VideoTask):
    """StreamingBench from one of `questions_{real,omni,sqa}.json` and the videos beside it.

    Args:
        context: seconds before the question that are shown; None for all from the beginning.
        max_new_tokens: longest answer.
    """

    context: float | None = CONTEXT
    max_new_tokens: int = 16

    name: ClassVar[str] = "streamingbench"
    scorer: ClassVar[str] = "streamingbench-1"

    def find_questions(self) -> Path:
        return find_file(self.root, "questions_*.json", "src/data/questions_*.json")

    @property
    def shares_media(self) -> bool:
        return False  # each question has a window of its own

    def settings(self) -> dict[str, Any]:
        return super().settings() | dict(context=self.context)

    def samples(self) -> list[Sample]:
        folder = self.questions.parent if self.root.is_file() else self.root
        out = []
        for v, entry in enumerate(_flat(read_list(self.questions))):
            name = str(entry.get("video_path"))
            for q, asked in enumerate(entry.get("questions", [])):
                out.append(self._sample(f"{v:04d}-{q}", name, folder, asked))
        return out

    def _sample(self, name: str, path: str, folder: Path, asked: Mapping[str, Any]) -> Sample:
        wrong, sampling = None, self.sampling
        options = asked.get("options")
        if not isinstance(options, list) or len(options) != 4:
            wrong = f"corrupt row: options are {options!r}, not four texts"
        elif asked.get("answer") not in tuple(LETTERS):
            wrong = f"corrupt row: answer is {asked.get('answer')!r}, possible are A, B, C, D"
        else:
            try:
                start, end = self.window(seconds_of(asked["time_stamp"]))
                sampling = replace(self.sampling, start=start, end=end)
            except (KeyError, ValueError) as error:
                wrong = f"corrupt row: {error}"
        video = None if wrong else find_video(folder, path)
        return Sample(
            id=name,
            group=path,
            facts=dict(task_type=asked.get("task_type"), question=asked.get("question"), options=options),
            target=asked.get("answer"),
            data=dict(video=video, sampling=sampling, asked=asked),
            skipped=missing(path, video, wrong),
        )

    def window(self, at: float) -> tuple[float, float]:
        """Seconds from which and to which the video is shown for a question asked at `at`."""
        return (0.0 if self.context is None else max(0.0, at - self.context)), at

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        asked = sample.data["asked"]
        options = lettered(asked["options"])
        return ask(build(asked["question"], options), choices=choices(options))

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        letter = response[:1]
        return dict(answer=letter, correct=letter == sample.target, score=float(letter == sample.target))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answered = [row for row in rows if row["answer"]]
        return dict(
            headline=dict(
                accuracy_answered=percent(sum(row["correct"] for row in answered), len(answered)),
                accuracy=percent(sum(row["correct"] for row in rows), len(rows)),
            ),
            by=by_facet(answered, ("task_type",)),
        )

    def template(self) -> str:
        return build("{question}", [f"{c}. {{{c}}}" for c in LETTERS])


def _flat(entries: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The sequential part nests one more list per video."""
    return [e for entry in entries for e in (entry if isinstance(entry, list) else [entry])]
