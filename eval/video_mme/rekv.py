"""The JSON files of Becomebright/ReKV: open questions at a moment (RVS-Ego, RVS-Movie), and multiple choice (MLVU ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mmkv.eval.media import Media
from mmkv.eval.task import Prompt, Sample, by_facet
from mmkv.eval.video_mme.score import percent
from mmkv.eval.video_mme.video_task import VideoTask, ask, find_file, find_video, missing, read_list

LETTERS = "ABCDEFGH"
FPS = 0.5  # frames a second that ReKV reads

Judge = Callable[[str, str, str], float]
"""(question, answer, prediction) -> score from 0 to 1."""


@dataclass
class RVS(VideoTask):
    """RVS (arXiv 2406.08085): open questions about a video as far as it has been seen, judged by another model.

    Responses are scored by `judge` where one is given; else they stay unscored and `for_judging` exports them. The paper's
    numbers come from GPT-3.5-turbo-0613: another judge gives other numbers.

    Args:
        judge: (question, answer, prediction) -> score; a function at the top of a module, since workers pickle it.
        max_new_tokens: longest answer.
    """

    judge: Judge | None = None
    max_new_tokens: int = 256

    name: ClassVar[str] = "rvs"
    scorer: ClassVar[str] = "rvs-1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_mode != "generate":
            raise ValueError("RVS has open questions; possible is answer mode 'generate' alone")

    def find_questions(self) -> Path:
        return find_file(self.root, "*_oe.json", "*/*_oe.json")

    @property
    def shares_media(self) -> bool:
        return False  # each question sees the video up to another moment

    def settings(self) -> dict[str, Any]:
        judge = None if self.judge is None else f"{self.judge.__module__}.{self.judge.__qualname__}"
        return super().settings() | dict(judge=judge)

    def samples(self) -> list[Sample]:
        folder, out = folder_of(self), []
        for name, group, path, asked in conversations(self.questions):
            wrong = _fault(asked, ("question", "answer", "end_time"))
            video = None if wrong else find_video(folder, path)
            end = None if wrong else float(asked["end_time"])
            out.append(
                Sample(
                    id=name,
                    group=group,
                    facts=dict(question=asked.get("question")),
                    target=asked.get("answer"),
                    data=dict(video=video, sampling=replace(self.sampling, end=end)),
                    skipped=missing(path, video, wrong),
                )
            )
        return out

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        return ask(sample.facts["question"])

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        told = None if self.judge is None else self.judge(sample.facts["question"], sample.target, response)
        return dict(score=None if told is None else float(told))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        scored = [row["score"] for row in rows if row["score"] is not None]
        mean = 100 * sum(scored) / len(scored) if scored else 0.0
        return dict(headline=dict(judged=mean), by={}, unscored=len(rows) - len(scored))

    def exports(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return dict(judging=for_judging(rows))

    def template(self) -> str:
        return "{question}"


def for_judging(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """{id, question, answer, prediction} of one method's rows, for a judge that reads them later."""
    return [
        dict(id=row["id"], question=row["facts"]["question"], answer=row["target"], prediction=row["response"])
        for row in rows
        if not row.get("skipped")
    ]


@dataclass
class ReKVChoice(VideoTask):
    """ReKV's multiple-choice files, for example `data/mlvu/dev_debug_mc.json`: questions with choices and the answer's text.

    Args:
        max_new_tokens: longest answer.
    """

    max_new_tokens: int = 16

    name: ClassVar[str] = "rekv-mc"
    scorer: ClassVar[str] = "rekv-mc-1"

    def find_questions(self) -> Path:
        return find_file(self.root, "*_mc.json", "*/*_mc.json")

    def samples(self) -> list[Sample]:
        folder, out = folder_of(self), []
        for name, group, path, asked in conversations(self.questions):
            wrong = _fault(asked, ("question", "choices", "answer"))
            if wrong is None and asked["choices"].count(asked["answer"]) != 1:
                wrong = f"corrupt row: answer {asked['answer']!r} is not one of the choices"
            video = None if wrong else find_video(folder, path)
            target = None if wrong else LETTERS[asked["choices"].index(asked["answer"])]
            facts = dict(question=asked.get("question"), task_type=asked.get("question_type"))
            data = dict(video=video, asked=asked)
            out.append(Sample(name, group, facts, target, data, missing(path, video, wrong)))
        return out

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        asked = sample.data["asked"]
        options = dict(zip(LETTERS, asked["choices"]))
        return ask(choice_prompt(asked["question"], asked["choices"]), "Best option: (", options)

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        letter = letter_of(response)
        return dict(answer=letter, correct=letter == sample.target, score=float(letter == sample.target))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        accuracy = percent(sum(row["correct"] for row in rows), len(rows))
        return dict(headline=dict(accuracy=accuracy), by=by_facet(rows, ("task_type",)))

    def template(self) -> str:
        return choice_prompt("{question}", ["{A}", "{B}", "{C}", "{D}"]) + "\nBest option: ("


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The text behind the video; the assistant's turn then begins with "Best option: (" (spec: ReKV's video_qa)."""
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, options))
    return f"Question: {question}\nOptions:\n{listed}\nOnly give the best option."


def letter_of(response: str) -> str:
    """The character before the first closing bracket, else the first character (spec: ReKV)."""
    at = response.find(")")
    return response[at - 1 : at] if at > 0 else response[:1]


def folder_of(task: VideoTask) -> Path:
    """Where the videos of a task lie: beside its file of questions where that was given, else in its folder."""
    return task.questions.parent if task.root.is_file() else task.root


def conversations(questions: Path) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """The questions of a file: id, video id, path of the video, and what was asked."""
    for entry in read_list(questions):
        group = str(entry.get("video_id"))
        path = str(entry.get("video_path") or f"{group}.mp4")
        for number, asked in enumerate(entry.get("conversations", [])):
            yield f"{group}-{number}", group, path, asked


def _fault(asked: Mapping[str, Any], names: Sequence[str]) -> str | None:
    absent = [name for name in names if asked.get(name) in (None, "", [])]
    return f"corrupt row: no {', '.join(absent)}" if absent else None
