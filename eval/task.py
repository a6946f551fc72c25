"""The interface of a benchmark: its samples, what each shows and asks, and how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkv.eval.media import Media

ANSWER_MODES = ("generate", "likelihood")


@dataclass(frozen=True)
class Sample:
    """One question, or one step of a trajectory.

    Args:
        id: unique within the benchmark; rows of a result are known by it.
        group: samples of one group share their media, or what it costs to load it (a video's id, a trajectory's): they are run
            one after the other, and statistics resample whole groups.
        facts: what the row of a result keeps of the sample and summaries split by (duration, domain, task type ...); JSON values.
        target: the right answer, in whatever form `Task.score` wants; JSON values.
        data: what the task itself needs (paths, question, options ...); never written to a result.
        skipped: why it cannot be run, where that is known before anything is loaded (missing file, corrupt row); None otherwise.
    """

    id: str
    group: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What is put before the model.

    Args:
        messages: a chat in the form of transformers' chat templates: `{"role": ..., "content": [...]}`, the content a list of
            `{"type": "video"}`, `{"type": "image"}` (both placeholders: the media come from `Task.media`, in this order) and
            `{"type": "text", "text": ...}`.
        prefix: text with which the assistant's turn begins, for example "Best option: ("; the response is what follows it.
        choices: for the answer mode "likelihood": response -> the text whose likelihood decides; None where the sample has none.
    """

    messages: Sequence[Mapping[str, Any]]
    prefix: str = ""
    choices: Mapping[str, str] | None = None


class SkipSample(Exception):
    """Raised by `Task.media` or `Task.prompt`: this sample cannot be run; the message says why and stands in its row."""


class Task(ABC):
    """A benchmark. Instances are pickled to worker processes, so they hold paths and settings, no open files or models.

    Whatever is wrong with a sample becomes a row with a `skipped` reason: a `Sample.skipped` known at the start, a `SkipSample`,
    or a FileNotFoundError or ValueError (`VideoError` is one) from `media` or `prompt`. Other errors end the run.
    """

    name: ClassVar[str]
    """As on the command line, for example "video-mme"."""
    scorer: ClassVar[str]
    """Version of the scoring rules; changes whenever a score could."""
    max_new_tokens: int = 16
    answer_mode: str = "generate"
    """"generate" (greedy text) or "likelihood" (the most likely of `Prompt.choices`, mean log-probability per token)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that could change a score: data, prompt style, frames, pixels, parser ...; JSON values, no secrets.

        A run is resumed only where these are the same. File paths belong here as names or digests, not as places.
        """

    @abstractmethod
    def samples(self) -> list[Sample]:
        """All samples, those of a group next to each other, broken ones included with `skipped`. The order never changes."""

    @abstractmethod
    def media(self, sample: Sample) -> Media:
        """What the sample shows. Called once for consecutive samples of a group where `shares_media`, else for each."""

    @abstractmethod
    def prompt(self, sample: Sample, media: Media) -> Prompt:
        """What the model is asked."""

    @abstractmethod
    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        """The scored part of a row; JSON values.

        Must hold `score`: a float from 0 to 1, the number that accuracy, intervals and tests are made of; None where there is
        no label, or a judge has yet to read the response. Usual others: `answer` (what was extracted from the response, "" for
        nothing) and `correct`.
        """

    @abstractmethod
    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The benchmark's own numbers for the rows of one method (skipped ones are left out by the caller).

        Must hold `headline`: {label: number}, the first of them what a table shows; and `by`:
        {facet: {value: {"n": count, "score": mean}}}. More is free.
        """

    def exports(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Files in others' formats for the rows of one method, skipped ones included: name -> JSON value; by default none."""
        return {}

    @property
    def shares_media(self) -> bool:
        """Whether all samples of a group show the same media; its video is then decoded once, and encoded once per method
        where that may be."""
        return False

    @property
    def follows(self) -> bool:
        """Whether a prompt holds the same method's responses to the group's earlier samples: they run in order then, and find
        those in their `data["past"]`, by id."""
        return False

    def begin(self, model: Any, processor: Any) -> None:  # noqa: B027  (optional)
        """Called once in each worker, before its first sample; by default nothing."""

    def template(self) -> str:
        """The prompt with the sample's parts as placeholders: its digest stands in the result as `prompt_hash`."""
        return ""


def by_facet(rows: Sequence[Mapping[str, Any]], facets: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """{facet: {value: {"n", "score"}}} with mean scores, values in the order in which they appear; for `Task.summary`.

    Args:
        rows: scored rows; a row's facts stand in it as `facts`.
        facets: keys of the facts. A row without one is left out of that facet.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for facet in facets:
        scores: dict[str, list[float]] = {}
        for row in rows:
            if row["facts"].get(facet) is not None and row["score"] is not None:
                scores.setdefault(str(row["facts"][facet]), []).append(row["score"])
        out[facet] = {value: {"n": len(found), "score": sum(found) / len(found)} for value, found in scores.items()}
    return out
