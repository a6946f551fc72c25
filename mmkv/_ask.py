"""What `mmkv ask` does: a video and a question in, an answer and measured numbers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkv.video import Video, open_video

if TYPE_CHECKING:
    from mmkv._report import Report

TINY = "tiny"  # the bundled model's name on the command line
DEFAULT_FPS = 2.0  # frames a second read from a video where neither fps nor frames is given
DEFAULT_FRAMES = 128  # the most frames read then
WARM_FRAMES = 2


class UserError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


@dataclass(frozen=True)
class Answer:
    """One answer: the text, and the numbers measured while it was made."""

    text: str
    report: Report


def check_preset(name: str) -> str:
    """The preset's name as given; before any model is loaded, ValueError with the nearest name where there is none."""
    from mmkv._presets import preset

    return preset(name).name


def sample(path: str, fps: float | None = None, frames: int | None = None) -> Video:
    """Open a video at `fps` or as `frames`; by default at 2 frames a second or its own rate, at most 128 frames."""
    if fps is not None or frames is not None:
        return open_video(path, fps, frames)
    video = open_video(path)
    if video.fps > DEFAULT_FPS * 1.01:
        video = open_video(path, fps=DEFAULT_FPS)
    return video if len(video) <= DEFAULT_FRAMES else open_video(path, frames=DEFAULT_FRAMES)


def read(video: Video, tick: Callable[[], Any] = lambda: None) -> np.ndarray:
    """All frames `[T, H, W, 3]`; `tick` is called after each."""
    out = np.empty((len(video), video.height, video.width, 3), np.uint8)
    for t, frame in enumerate(video):
        out[t] = frame.image
        tick()
    return out


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, processor): the bundled tiny model for "tiny", else a checkpoint by hub name or folder."""
    import torch

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"no device {device!r}; for example cpu, cuda, cuda:1") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: torch sees no CUDA device here")
    kind = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise UserError(f"no dtype {dtype!r}; for example float32, bfloat16, float16")

    if name == TINY:
        from mmkv.models import tiny

        return tiny.load(place, kind or torch.bfloat16)  # as it is stored
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=kind or "auto")
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model {name!r}: {first}") from error
    return model.to(place).eval(), processor


def check_words(processor: Any, question: str) -> None:
    """Raise UserError where a question for the bundled model holds words that it was never taught."""
    from mmkv.models.tiny import answer as known

    unknown = known.unknown_words(processor, question)
    if unknown:
        raise UserError(
            f"the bundled model knows a small synthetic world and not the word{'s' * (len(unknown) > 1)} "
            f"{', '.join(map(repr, unknown))}; it answers questions such as:\n  " + "\n  ".join(known.question_forms())
        )


def prepare(model: Any, processor: Any, frames: np.ndarray, fps: float, question: str) -> dict[str, Any]:
    """Model inputs for one video and one question, on the model's device.

    The frames are passed as they are (no second sampling), with metadata that says `fps` of exactly these frames:
    Qwen2.5-VL takes its time positions from it, Qwen3-VL its timestamps, LLaVA-OneVision needs none.
    """
    from transformers.video_utils import VideoMetadata

    if not hasattr(processor, "video_token") or getattr(processor, "video_processor", None) is None:
        raise UserError(f"{type(processor).__name__} takes no video; choose a model that does")
    count, height, width = frames.shape[:3]
    about = VideoMetadata(
        total_num_frames=count,
        fps=fps,
        width=width,
        height=height,
        duration=count / fps,
        frames_indices=list(range(count)),
    )
    content = [{"type": "video"}, {"type": "text", "text": question}]
    if getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{processor.video_token}\n{question}"
    inputs = processor(
        text=[text], videos=[frames], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
    ).to(model.device)
    if "pixel_values_videos" in inputs:
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    return dict(inputs)


def answer(model: Any, processor: Any, inputs: dict[str, Any], method: str | None, max_new_tokens: int) -> Answer:
    """Greedy answer with one preset (None: the stock cache), the model left as it was found."""
    import mmkv

    with mmkv.wrapped(model, method) as wrapped:
        out = wrapped.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        numbers = mmkv.report(wrapped)
    new = out[:, inputs["input_ids"].shape[1] :]
    return Answer(processor.batch_decode(new, skip_special_tokens=True)[0].strip(), numbers)


def warm_up(
    model: Any, processor: Any, frames: np.ndarray, fps: float, question: str, methods: list[str | None]
) -> None:
    """Answer once about the first frames, so that start-up costs of the process are in nobody's times."""
    inputs = prepare(model, processor, frames[:WARM_FRAMES], fps, question)
    for method in methods:
        answer(model, processor, inputs, method, 2)
