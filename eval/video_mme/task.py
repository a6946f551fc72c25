"""Video-MME as a benchmark: 900 videos, three multiple-choice questions each (arXiv 2405.21075)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmkv.eval.media import Media
from mmkv.eval.task import Prompt, Sample
from mmkv.eval.video_mme import data, score
from mmkv.eval.video_mme.answers import EXTRACTORS
from mmkv.eval.video_mme.prompts import STYLES, build
from mmkv.eval.video_mme.subtitles import at_frames, at_frames_lmms, read_srt
from mmkv.eval.video_mme.video_task import VideoTask, ask, find_file


@dataclass
class VideoMME(VideoTask):
    """Video-MME from a folder with its parquet file, `data/*.mp4` and `subtitle/*.srt`.

    Args:
        style: of the prompt: "official", "lmms", "vlmeval" or "plain".
        extractor: "official" or "lmms": how the letter is found in a response.
        subtitles: put the subtitles into the prompt, those that cover the frames shown.
        durations: which videos: any of "short", "medium", "long".
        max_new_tokens: longest answer.
    """

    style: str = "official"
    extractor: str = "official"
    subtitles: bool = False
    durations: tuple[str, ...] = data.DURATIONS
    max_new_tokens: int = 16

    name: ClassVar[str] = "video-mme"
    scorer: ClassVar[str] = "video-mme-1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, value, known in (
            ("prompt style", self.style, STYLES),
            ("extractor", self.extractor, tuple(EXTRACTORS)),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r}: possible are {', '.join(known)}")
        unknown = [d for d in self.durations if d not in data.DURATIONS]
        if unknown or not self.durations:
            raise ValueError(f"durations {', '.join(unknown) or '(none)'}: possible are {', '.join(data.DURATIONS)}")
        build(self.style, "", ["", "", "", ""], [] if self.subtitles else None)  # refuses what cannot be combined
        folder = self.questions.parent
        self.media_root = folder.parent if folder.name == "videomme" and not (folder / "data").is_dir() else folder

    def find_questions(self) -> Path:
        return find_file(self.root, "*.parquet", "videomme/*.parquet")

    def settings(self) -> dict[str, Any]:
        return super().settings() | dict(
            style=self.style, extractor=self.extractor, subtitles=self.subtitles, durations=list(self.durations)
        )

    def samples(self) -> list[Sample]:
        return data.samples(data.read_rows(self.questions), self.media_root, self.durations)

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        row = sample.data["row"]
        said = self._subtitles(sample, media) if self.subtitles else None
        text = build(self.style, row["question"], row["options"], said)
        return ask(text, choices=choices(row["options"]))

    def _subtitles(self, sample: Sample, media: Media) -> list[str]:
        """Lines for the prompt; none where the video has no file of them (lmms-eval has a line that says so)."""
        clip, path = media.clip, sample.data["subtitle"]
        if clip is None or not path.is_file():
            return ["No subtitles available"] if self.style == "lmms" else []
        lines = read_srt(path)
        if self.style == "lmms":
            return at_frames_lmms(lines, clip.frame_count, clip.frame_count / clip.duration)
        return at_frames(lines, clip.timestamps)

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        letter = response if self.answer_mode == "likelihood" else EXTRACTORS[self.extractor](response)
        return dict(answer=letter, correct=letter == sample.target, score=float(letter == sample.target))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return score.summary(rows)

    def exports(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return dict(official=score.official_json(rows))

    def template(self) -> str:
        options = [f"{letter}. {{{letter}}}" for letter in "ABCD"]
        return build(self.style, "{question}", options, ["{subtitles}"] if self.subtitles else None)


def choices(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text of the option, without the letter in front and the full stop behind."""
    texts = [option.removeprefix(f"{letter}. ") for letter, option in zip("ABCDE", options)]
    return {letter: text.strip().removesuffix(".").strip() for letter, text in zip("ABCDE", texts)}
