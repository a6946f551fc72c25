"""`Prompt`: the ids of a chat and the identity of its pictures, and how far two of them agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image

from mmkv.agents.coordinates import check_size


@dataclass(frozen=True)
class Span:
    """Where a picture's tokens stand.

    Args:
        start, end: from the first token to the one behind the last.
        content: hash of the picture, its size included.
    """

    start: int
    end: int
    content: str


@dataclass(frozen=True)
class Prompt:
    """Ids `[T]`, one for each token that the decoder sees, and the spans of pictures in them."""

    ids: list[int]
    spans: tuple[Span, ...] = ()

    def agrees(self, other: Prompt) -> int:
        """How many of the first tokens are the same; never a part of a picture."""
        same = min(len(self.ids), len(other.ids))
        same = next((i for i in range(same) if self.ids[i] != other.ids[i]), same)
        for mine, theirs in zip(self.spans, other.spans):
            if mine != theirs:
                same = min(same, mine.start, theirs.start)
        for span in (*self.spans, *other.spans):
            if span.start < same < span.end:
                same = span.start
        return same

    def first(self, length: int) -> Prompt:
        """The first tokens."""
        return Prompt(self.ids[:length], tuple(span for span in self.spans if span.end <= length))


def find_spans(ids: torch.Tensor, placeholder: int, counts: list[int], contents: list[str]) -> tuple[Span, ...]:
    """Spans of the pictures of a prompt, by their numbers of tokens: two may stand side by side.

    Args:
        ids: int64 `[T]`.
        placeholder: the id of a picture's tokens.
        counts, contents: tokens and hash of each picture, in order.

    Raises:
        ValueError: the prompt has other placeholders than the pictures need.
    """
    places = (ids == placeholder).nonzero()[:, 0].tolist()
    if len(places) != sum(counts):
        raise ValueError(
            f"{len(places)} placeholders (id {placeholder}) for pictures of {sum(counts)} tokens in the prompt"
        )
    spans, at = [], 0
    for count, content in zip(counts, contents):
        spans.append(Span(places[at], places[at + count - 1] + 1, content))
        at += count
    return tuple(spans)


def picture(screenshot) -> Image.Image:
    """A screenshot as an RGB picture.

    Args:
        screenshot: a PIL image, a path, or uint8 `[H, W, 3]`.

    Raises:
        ValueError: an empty or broken picture, or another shape.
        FileNotFoundError: no such file.
    """
    if isinstance(screenshot, Image.Image):
        found = screenshot
    elif isinstance(screenshot, str) or hasattr(screenshot, "__fspath__"):
        try:
            found = Image.open(screenshot)
            found.load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{screenshot}: there is no such screenshot") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{screenshot}: not a picture that can be read ({error})") from error
    else:
        found = _from_array(screenshot)
    check_size(found.size)
    try:
        return found.convert("RGB")
    except OSError as error:  # opened by the caller, and cut off
        raise ValueError(f"the screenshot cannot be read ({error})") from error


def _from_array(pixels) -> Image.Image:
    array = pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels
    shape, kind = getattr(array, "shape", None), str(getattr(array, "dtype", type(pixels).__name__))
    if shape is None or len(shape) != 3 or shape[2] != 3 or kind != "uint8":
        raise ValueError(
            f"a screenshot of {kind} {list(shape or [])}; possible are a PIL image, a path, or uint8 [H, W, 3]"
        )
    check_size((int(shape[1]), int(shape[0])))
    return Image.fromarray(array)


def content_of(image: Image.Image) -> str:
    """Hash of a picture's size and pixels."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
