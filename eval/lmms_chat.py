"""A request of lmms-eval as our own prompt, media and options; knows lmms-eval's shapes, imports nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmkv.eval.media import Clip, Media, read_image
from mmkv.eval.sampling import Sampling
from mmkv.eval.task import Prompt

PARTS = ("ctx", "doc_to_messages", "gen_kwargs", "doc_id", "task", "split")
MAX_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own models take it
# LLaVA's own and the seed change nothing of a greedy answer; they are taken and not used
UNUSED = ("image_aspect_ratio", "top_p", "top_k", "seed", "do_sample", "temperature", "num_beams")
KNOWN = ("max_new_tokens", "until", *UNUSED)


@dataclass(frozen=True)
class Request:
    """One chat request.

    Args:
        context: the text by which lmms-eval's response cache knows it.
        messages: called with the document; the chat.
        options: gen_kwargs of the task.
        doc_id, task, split: where the document is.
    """

    context: str
    messages: Callable[[Any], Any]
    options: dict[str, Any]
    doc_id: int
    task: str
    split: str

    @classmethod
    def of(cls, args: Sequence[Any]) -> Request:
        """A request from the arguments of lmms-eval's `Instance`.

        Raises:
            ValueError: another shape than a chat model's `generate_until`.
        """
        if len(args) != len(PARTS) or not callable(args[1]) or not isinstance(args[2], Mapping):
            raise ValueError(
                f"a request of {len(args)} parts that is not ({', '.join(PARTS)}); lmms-eval 0.7 gives these"
            )
        return cls(args[0], args[1], dict(args[2]), *args[3:])


def greedy(options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest answer in tokens, and the strings at which it ends, of gen_kwargs.

    Raises:
        ValueError: sampling, beams, or an option that is not known.
    """
    unknown = sorted(set(options) - set(KNOWN))
    if unknown:
        raise ValueError(f"gen_kwargs {', '.join(unknown)}; possible are {', '.join(KNOWN)}")
    temperature = options.get("temperature") or 0
    if temperature > 0 and options.get("do_sample", True):
        raise ValueError(
            f"gen_kwargs temperature={temperature}: mmkv answers greedily; give --gen_kwargs temperature=0"
        )
    if (options.get("num_beams") or 1) > 1:
        raise ValueError(
            f"gen_kwargs num_beams={options['num_beams']}: mmkv answers greedily; give --gen_kwargs num_beams=1"
        )
    until = options.get("until") or ()
    longest = options.get("max_new_tokens")
    return MAX_NEW_TOKENS if longest is None else int(longest), (until,) if isinstance(until, str) else tuple(until)


def cut(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of some strings."""
    return text[: min((text.index(end) for end in ends if end and end in text), default=len(text))]


def prompt_of(messages: Sequence[Any]) -> tuple[Prompt, tuple[Any, ...]]:
    """Our prompt of a chat of lmms-eval's `ChatMessages`, and its media parts in order (`type`, `url`, times).

    Raises:
        ValueError: more than one video, or sound.
    """
    turns, media = [], []
    for message in messages:
        parts = []
        for part in message.content:
            if part.type not in ("text", "image", "video"):
                raise ValueError(f"a message with a part of type {part.type!r}; possible are text, image, video")
            parts.append(dict(type="text", text=part.text) if part.type == "text" else dict(type=part.type))
            media += [] if part.type == "text" else [part]
        turns.append(dict(role=message.role, content=parts))
    videos = [part.url for part in media if part.type == "video"]
    if len(videos) > 1:
        raise ValueError(f"a chat with {len(videos)} videos; possible is one")
    return Prompt(turns), tuple(media)


def media_of(parts: Sequence[Any], sampling: Sampling, read: Callable[[Any, Sampling], Clip]) -> Media:
    """The frames and images of media parts; a video's own start and end are kept to.

    Args:
        parts: as `prompt_of` gives them.
        sampling: which frames of a video.
        read: decodes them, `FramesCache.read` or `read_clip`.
    """
    clip, images = None, []
    for part in parts:
        if part.type == "image":
            images.append(_picture(part.url))
        else:
            start, end = getattr(part, "start_time", None), getattr(part, "end_time", None)
            clip = read(part.url, replace(sampling, start=start or 0.0, end=end))
    return Media(clip, tuple(images))


def same_media(parts: Sequence[Any]) -> tuple[Any, ...] | None:
    """What tells whether two chats show the same: paths and times; None where something is given as pixels."""
    if not all(isinstance(part.url, str) for part in parts):
        return None
    return tuple((p.type, p.url, getattr(p, "start_time", None), getattr(p, "end_time", None)) for p in parts)


def _picture(image: Any) -> np.ndarray:
    return read_image(image) if isinstance(image, str) else np.array(image.convert("RGB"))
