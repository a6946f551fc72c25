"""`ImageTextRetriever`: frames chosen by a model of images and text beside the one that answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmkv.streaming.choosing import best


class ImageTextRetriever:
    """ReKV's external retrieval (arXiv 2503.00540): the same frames for all layers, by CLIP's or SigLIP's cosine similarity.

    Give it to a stream as `by=`. It sees the first picture of each frame and keeps one vector of each, in memory only: a
    stream that goes on with a folder has to be watched again for it.

    Args:
        model: a Hugging Face `CLIPModel`, `SiglipModel` or one with the same `get_image_features` and `get_text_features`.
        processor: its processor.
        group: consecutive frames that are chosen together.
    """

    def __init__(self, model, processor, group: int = 1):
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"{type(model).__name__} has no image and text features; give a CLIP or SigLIP model")
        self.model, self.processor, self.group = model, processor, group
        self._seen: list[torch.Tensor] = []

    @torch.no_grad()
    def see(self, pictures: np.ndarray, times: Sequence[float]) -> None:
        """Take in the pictures uint8 `[F * p, H, W, 3]` of F frames."""
        first = list(pictures[:: len(pictures) // len(times)])
        given = self.processor(images=first, return_tensors="pt").to(self.model.device)
        self._seen.append(_unit(self.model.get_image_features(**given)))

    @torch.no_grad()
    def choose(self, question: str, count: int) -> list[int]:
        """The `count` frames most like a question, in order of time."""
        given = self.processor(text=[question], padding="max_length", truncation=True, return_tensors="pt")
        text = _unit(self.model.get_text_features(**given.to(self.model.device)))[0]
        return best(torch.cat(self._seen) @ text, count, self.group)


def _unit(found) -> torch.Tensor:
    """fp32 rows of length 1, from a tensor or from a model output that holds one."""
    vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
