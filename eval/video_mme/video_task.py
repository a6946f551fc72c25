"""What the benchmarks of questions about videos share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkv.eval.frames_cache import FramesCache
from mmkv.eval.media import Media
from mmkv.eval.sampling import Sampling
from mmkv.eval.task import ANSWER_MODES, Prompt, Sample, Task


@dataclass
class VideoTask(Task):
    """A benchmark whose samples show the frames of a video file, `Sample.data["video"]`.

    Args:
        root: folder of the data, or the file of questions in it.
        sampling: which frames of a video are shown.
        answer_mode: "generate", or "likelihood" of the options' texts where the data has them apart.
        cache: where decoded frames are kept.
    """

    root: Path
    sampling: Sampling
    answer_mode: str = "generate"
    cache: FramesCache = field(default_factory=lambda: FramesCache(None))

    def __post_init__(self) -> None:
        if self.answer_mode not in ANSWER_MODES:
            raise ValueError(f"answer mode {self.answer_mode!r}: possible are {', '.join(ANSWER_MODES)}")
        self.root = Path(self.root)
        self.questions = self.find_questions()

    def find_questions(self) -> Path:
        """The file of questions."""
        raise FileNotFoundError(f"{self.name} has no file of questions")

    @property
    def shares_media(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return dict(data=hashlib.sha256(self.questions.read_bytes()).hexdigest()[:16], **self.sampling.settings())

    def media(self, sample: Sample) -> Media:
        return Media(self.cache.read(sample.data["video"], sample.data.get("sampling", self.sampling)))


def ask(text: str, prefix: str = "", choices: dict[str, str] | None = None) -> Prompt:
    """One user turn: the video, then the text."""
    parts = [{"type": "video"}, {"type": "text", "text": text}]
    return Prompt([{"role": "user", "content": parts}], prefix, choices)


def find_video(root: Path, name: str) -> Path | None:
    """A video named as in the data: a path below the folder, or its last part there, in `videos/` or in `data/`."""
    last = Path(name).name
    for place in (root / name.removeprefix("./"), root / last, root / "videos" / last, root / "data" / last):
        for path in (place, *(place.with_name(place.name + suffix) for suffix in (".mp4", ".MP4", ".mkv"))):
            if path.is_file():
                return path
    return None


def read_list(path: Path) -> list[Any]:
    """A JSON file that holds a list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no list.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a list of videos")
    return found


def find_file(root: Path, *patterns: str) -> Path:
    """The one file below a folder that fits a pattern, the first pattern that has one; or the file itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"no such data folder: {root}")
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{root} holds {len(found)} files {pattern}; name one: {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{root} holds no file {' or '.join(patterns)}")


def missing(name: str, video: Path | None, wrong: str | None) -> str | None:
    """Why a sample is skipped: what is wrong with its row, or that its video is not there."""
    return wrong or (f"missing video: {name}" if video is None else None)
