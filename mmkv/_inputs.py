"""What the commands share that put a video or an image before a model: open it, load the model, prepare its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmkv.video import Video, open_video

TINY = "tiny"  # the bundled model's name on the command line
TINY_AGENT = "tiny-agent"  # the bundled GUI agent's
DEFAULT_FPS = 2.0  # frames a second read from a video where neither fps nor frames is given
DEFAULT_FRAMES = 128  # the most frames read then


class UserError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


def clip(path: str, fps: float | None = None) -> Video:
    """Open a video at `fps`; by default at 2 frames a second, or at its own rate where that is less."""
    if fps is not None:
        return open_video(path, fps)
    video = open_video(path)
    return open_video(path, fps=DEFAULT_FPS) if video.fps > DEFAULT_FPS * 1.01 else video


def sample(path: str, fps: float | None = None, frames: int | None = None) -> Video:
    """Open a video at `fps` or as `frames`; by default as `clip`, at most 128 frames."""
    if fps is not None or frames is not None:
        return open_video(path, fps, frames)
    video = clip(path)
    return video if len(video) <= DEFAULT_FRAMES else open_video(path, frames=DEFAULT_FRAMES)


def read(video: Video, tick: Callable[[], Any] = lambda: None) -> np.ndarray:
    """All frames `[T, H, W, 3]`; `tick` is called after each."""
    out = np.empty((len(video), video.height, video.width, 3), np.uint8)
    for t, frame in enumerate(video):
        out[t] = frame.image
        tick()
    return out


def place_and_dtype(device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """What --device and --dtype mean to torch: a GPU where there is one and none is named, None for no dtype.

    Raises:
        UserError: there is no such device or dtype.
    """
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
    return place, kind


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, processor): the bundled models for "tiny" and "tiny-agent", else a checkpoint by hub name or folder."""
    import torch

    place, kind = place_and_dtype(device, dtype)
    if name == TINY:
        from mmkv.models import tiny

        return tiny.load(place, kind or torch.bfloat16)  # as it is stored
    if name == TINY_AGENT:
        from mmkv.models import tiny_agent

        return tiny_agent.load(place, kind)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmkv.models.own import own_loader

    try:
        if (own := own_loader(name)) is not None:
            return own(name, dtype=kind, device=place)
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
    text = _prompt(processor, "video", question)
    inputs = processor(
        text=[text], videos=[frames], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
    )
    return _on_device(model, inputs)


def prepare_image(model: Any, processor: Any, image: np.ndarray, question: str) -> dict[str, Any]:
    """Model inputs for one image, uint8 `[H, W, 3]`, and one question, on the model's device."""
    if not hasattr(processor, "image_token") or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{type(processor).__name__} takes no image; choose a model that does")
    text = _prompt(processor, "image", question)
    return _on_device(model, processor(text=[text], images=[image], return_tensors="pt"))


def _prompt(processor: Any, kind: str, question: str) -> str:
    """The prompt that shows one "image" or "video" and then asks."""
    if getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
        return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return f"{getattr(processor, f'{kind}_token')}\n{question}"


def _on_device(model: Any, inputs: Any) -> dict[str, Any]:
    inputs = dict(inputs.to(model.device))
    return {name: x.to(model.dtype) if name.startswith("pixel_values") else x for name, x in inputs.items()}
