"""EgoSchema (arXiv 2308.09126): five options about three minutes of first-person video, as lmms-eval runs it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmkv.eval.media import Media
from mmkv.eval.task import Prompt, Sample
from mmkv.eval.video_mme.data import read_rows
from mmkv.eval.video_mme.score import percent
from mmkv.eval.video_mme.task import choices
from mmkv.eval.video_mme.video_task import VideoTask, ask, find_file, find_video, missing

LETTERS = "ABCDE"
COLUMNS = ("video_idx", "question", "option", "answer")
POST_PROMPT = "\nAnswer with the option's letter from the given choices directly."


def extract(response: str, options: Mapping[str, str]) -> str:
    """The letter in a response, "" where none is found (spec: MMMU's parser, in lmms-eval's egoschema, less its random guess).

    "(A)", "A " and "A." count alike, and where several letters stand the one whose last occurrence comes first wins. Without
    any, a response of more than five words is searched for the options' texts in the same way.

    Args:
        response: of the model.
        options: letter -> text.
    """
    text = response
    for sign in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(sign)
    text = f" {text} "
    found = [form.format(c) for form in ("({})", "{} ", "{}.") for c in options if form.format(c) in text]
    if found:
        return min(found, key=text.rfind).strip("(). ")
    if len(text.split()) > 5:
        small = text.lower()
        named = [letter for letter, words in options.items() if words.lower() in small]
        if named:
            return min(named, key=lambda letter: small.rfind(options[letter].lower()))
    return ""


@dataclass
class EgoSchema(VideoTask):
    """EgoSchema from a folder with a parquet file (video_idx, question, option, answer) and `videos/`.

    A response without a letter is replaced by a seeded random one, as its public code does unseeded; `guessed` says how many.
    Rows without an answer (the 5,031 of the test set) are run and left unscored: `submission` makes the file to hand in.

    Args:
        seed: of the guesses.
        max_new_tokens: longest answer.
    """

    seed: int = 0
    max_new_tokens: int = 16

    name: ClassVar[str] = "egoschema"
    scorer: ClassVar[str] = "egoschema-1"

    def find_questions(self) -> Path:
        return find_file(self.root, "*.parquet", "Subset/*.parquet", "*/*.parquet")

    def settings(self) -> dict[str, Any]:
        return super().settings() | dict(seed=self.seed)

    def samples(self) -> list[Sample]:
        folder = self.questions.parent if self.root.is_file() else self.root
        out = []
        for number, row in enumerate(read_rows(self.questions, COLUMNS)):
            wrong = _fault(row)
            name = str(row["video_idx"])
            video = None if wrong else find_video(folder, name)
            out.append(
                Sample(
                    id=f"{number:05d}",
                    group=name,
                    facts=dict(question=row["question"], video_idx=name),
                    target=LETTERS[int(row["answer"])] if wrong is None and row["answer"] not in (None, "") else None,
                    data=dict(video=video, row=row),
                    skipped=missing(f"{name}.mp4", video, wrong),
                )
            )
        return out

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        row = sample.data["row"]
        return ask("\n".join([row["question"], *row["option"]]) + POST_PROMPT, choices=choices(row["option"]))

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        options = {letter: text.strip() for letter, text in zip(LETTERS, sample.data["row"]["option"])}
        letter = extract(response, options)
        guessed = letter == ""
        if guessed:
            letter = random.Random(f"{self.seed} {sample.id}").choice(LETTERS)
        right = None if sample.target is None else letter == sample.target
        return dict(answer=letter, guessed=guessed, correct=right, score=None if right is None else float(right))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        labelled = [row for row in rows if row["correct"] is not None]
        accuracy = percent(sum(row["correct"] for row in labelled), len(labelled))
        guessed = percent(sum(row["guessed"] for row in rows), len(rows))
        return dict(headline=dict(accuracy=accuracy, guessed=guessed), by={}, labelled=len(labelled))

    def exports(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return dict(submission=submission(rows))

    def template(self) -> str:
        return "{question}\n{options}" + POST_PROMPT


def _fault(row: Mapping[str, Any]) -> str | None:
    for name in ("video_idx", "question"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"corrupt row: {name} is {row[name]!r}"
    if not isinstance(row["option"], list) or len(row["option"]) != 5:
        return f"corrupt row: option is {row['option']!r}, not five texts"
    if row["answer"] not in (None, "", *"01234", *range(5)):
        return f"corrupt row: answer is {row['answer']!r}, possible are 0 to 4"
    return None


def submission(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{video_idx: option 0 to 4} of one method's rows, as EgoSchema's server takes it; skipped ones are absent."""
    return {row["facts"]["video_idx"]: LETTERS.index(row["answer"]) for row in rows if not row.get("skipped")}
