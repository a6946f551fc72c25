"""A prompt and its media as the inputs of a model."""

from __future__ import annotations

from typing import Any

import torch

from mmkv._inputs import _on_device
from mmkv.eval.media import Clip, Media
from mmkv.eval.task import Prompt
from mmkv.models import adapter_for


def rendered(processor: Any, prompt: Prompt) -> str:
    """The chat as text, up to where the response begins."""
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    else:
        text = "\n".join(_part(processor, part) for message in prompt.messages for part in message["content"])
    return text + prompt.prefix


def _part(processor: Any, part: dict) -> str:
    return part["text"] if part["type"] == "text" else getattr(processor, f"{part['type']}_token")


def inputs_of(model: Any, processor: Any, prompt: Prompt, media: Media) -> dict[str, Any]:
    """Model inputs for one prompt, on the model's device.

    Raises:
        ValueError: the messages name other media than there are.
    """
    parts = [part["type"] for message in prompt.messages for part in message["content"]]
    if parts.count("video") != (media.clip is not None) or parts.count("image") != len(media.images):
        raise ValueError(
            f"the messages name {parts.count('video')} videos and {parts.count('image')} images, "
            f"given are {int(media.clip is not None)} and {len(media.images)}"
        )
    options: dict[str, Any] = {}
    if media.clip is not None:
        about = metadata(media.clip)
        options = dict(videos=[media.clip.frames], video_metadata=[about], do_sample_frames=False)
    if media.images:
        options["images"] = list(media.images)
    inputs = _on_device(model, processor(text=[rendered(processor, prompt)], return_tensors="pt", **options))
    return _one_id_per_token(model, inputs)


def _one_id_per_token(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Placeholders of images repeated where the model would do it itself (OpenCUA), so that a prompt can be cut anywhere."""
    grid, ids = inputs.get("image_grid_thw"), inputs["input_ids"]
    if grid is None:
        return inputs
    expanded = adapter_for(model).expanded_ids(ids, grid)
    return inputs if expanded is ids else inputs | dict(input_ids=expanded, attention_mask=torch.ones_like(expanded))


def metadata(clip: Clip):
    """What a processor is told of the frames: their own rate, and that they are all of them."""
    from transformers.video_utils import VideoMetadata

    count, height, width = clip.frames.shape[:3]
    return VideoMetadata(
        total_num_frames=count, fps=clip.fps, width=width, height=height, duration=count / clip.fps,
        frames_indices=list(range(count)),
    )  # fmt: skip
