"""`make demo`: a video file, three questions, and the stock cache beside VidKV's, through the command `mmkv ask`.

The video comes from the bundled model's synthetic world, so the right answers are known and nothing is downloaded.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

SEED = 2**42  # training draws seeds below 2**40, the evaluation uses 2**41 and the next few thousand
FRAMES = 128
TASKS = ("first", "colour", "where")  # kinds of question, one of each is asked


def write_sample(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Write `sample.mp4` into `folder`; return it and questions with their right answers."""
    from mmkv.models.tiny import world

    video = world.make_video(SEED, frames=FRAMES, split="easy")
    path = folder / "sample.mp4"
    world.write_mp4(video.frames, path)
    chosen = [next(q for q in video.questions if q.task == task) for task in TASKS]
    return path, [(q.text, q.answer) for q in chosen]


def main() -> None:
    from mmkv import cli

    folder = Path(tempfile.mkdtemp(prefix="mmkv-demo-"))
    path, pairs = write_sample(folder)
    arguments = ["ask", str(path), *(text for text, _ in pairs), "--compare"]
    print(f"$ mmkv {shlex.join(arguments)}", flush=True)
    sys.argv = ["mmkv", *arguments]
    try:
        cli.main()
    finally:
        print("right answers: " + "; ".join(f"{text} {answer}" for text, answer in pairs))


if __name__ == "__main__":
    main()
