"""`Encoder`: a chat to ids, spans of its pictures, and the pixels of those that the cache does not hold."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmkv.agents.positions import mrope_positions
from mmkv.agents.prompt import Prompt, content_of, find_spans
from mmkv.models import Adapter


class Encoder:
    """Prepares each picture once and remembers it while it may be asked for again.

    Args:
        adapter: of the model.
        processor: with a tokenizer, an image processor of Qwen's and a chat template.
    """

    def __init__(self, adapter: Adapter, processor):
        self.adapter, self.processor = adapter, processor
        self._prepared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by content: patches, grid [1, 3]

    def forget(self) -> None:
        """Let go of all pictures."""
        self._prepared = {}

    def keep_only(self, contents: set[str]) -> None:
        """Let go of all other pictures."""
        self._prepared = {content: self._prepared[content] for content in contents if content in self._prepared}

    def encode(self, messages: list[dict]) -> tuple[Prompt, Callable[[int], dict[str, torch.Tensor]]]:
        """A prompt, and the keywords of `generate` for a cache that holds its first so many tokens.

        Raises:
            ValueError: the template has no place for a picture, or a text of the chat holds one.
        """
        pictures = [part["image"] for turn in messages for part in turn["content"] if _is_image(part)]
        contents = [content_of(image) for image in pictures]
        prepared = [self._prepare(content, image) for content, image in zip(contents, pictures)]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        grid = torch.cat([grid for _, grid in prepared])
        placeholder = self.adapter.placeholder_ids()[0]
        if ids.count(placeholder) != len(pictures):
            raise ValueError(
                f"{ids.count(placeholder)} places for {len(pictures)} pictures in the prompt; a text of the chat may hold the "
                "token of a picture, or the chat template none"
            )
        ids = self.adapter.expanded_ids(torch.tensor([ids]), grid)[0]
        merge = self.adapter.model.config.vision_config.spatial_merge_size
        cells = [(int(h) // merge, int(w) // merge) for _, h, w in grid.tolist()]
        prompt = Prompt(ids.tolist(), find_spans(ids, placeholder, [r * c for r, c in cells], contents))
        return prompt, lambda held: self._inputs(prompt, prepared, cells, held)

    def _inputs(self, prompt: Prompt, prepared: list, cells: list, held: int) -> dict[str, torch.Tensor]:
        missing = [given for span, given in zip(prompt.spans, prepared) if span.start >= held]
        out = {}
        if missing:
            out["pixel_values"] = torch.cat([patches for patches, _ in missing])
            out["image_grid_thw"] = torch.cat([grid for _, grid in missing])
        if self.adapter.axes > 1:
            out["position_ids"] = mrope_positions(prompt, cells)
        return out

    def _prepare(self, content: str, image) -> tuple[torch.Tensor, torch.Tensor]:
        if content not in self._prepared:
            given = self.processor.image_processor(images=[image], return_tensors="pt")
            if "image_grid_thw" not in given:
                raise ValueError(f"{type(self.processor.image_processor).__name__} gives no grid; possible are Qwen's")
            self._prepared[content] = given["pixel_values"], given["image_grid_thw"]
        return self._prepared[content]


def _is_image(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"
