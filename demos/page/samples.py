"""Videos of the bundled model's synthetic world, and what may be asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SEED = 2**42  # training draws seeds below 2**40, the evaluation uses 2**41 and the next few thousand
LENGTHS = (64, 128, 256)  # frames at two a second
TASKS = ("first", "colour", "where", "count", "last", "way", "exist")  # kinds of question, one of each
OPEN = (
    "What happens in the video?",
    "What is shown at the beginning?",
    "What is shown now?",
    "Who or what can be seen?",
)


@dataclass(frozen=True)
class Sample:
    """A video file, its name on the page, and questions about it with their answers."""

    path: Path
    name: str
    questions: tuple[tuple[str, str], ...]


def write_samples(folder: Path) -> list[Sample]:
    """Write the sample videos."""
    from mmkv.models.tiny import world

    made = []
    for k, frames in enumerate(LENGTHS):
        video = world.make_video(SEED + k, frames=frames)
        path = folder / f"sample-{k + 1}.mp4"
        world.write_mp4(video.frames, path)
        asked = [next((q for q in video.questions if q.task == task), None) for task in TASKS]
        pairs = tuple((q.text, q.answer) for q in asked if q is not None)
        seconds = int(frames / world.FPS)
        made.append(Sample(path, f"Sample {k + 1} ({seconds // 60}:{seconds % 60:02d})", pairs))
    return made


def suggestions(bundled: bool) -> list[str]:
    """Questions that suit any video of the model."""
    if not bundled:
        return list(OPEN)
    from mmkv.models.tiny import answer

    return [form for form in answer.question_forms() if len(form) < 40][:8]
