"""LLaVA 1.5."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter, features
from mmkv.models.llava_onevision import with_newlines
from mmkv.models.tower import Tower, encoder_tower


class Llava(Adapter):
    """One square image, one token a patch; the CLS token is left out, or comes first (select strategy "full")."""

    families = ("llava",)

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, -1

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple]]:
        images = features(inputs, kind)
        count = (
            len(images)
            if images is not None
            else len(pixels)
            if (pixels := inputs.get("pixel_values")) is not None
            else 0
        )
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        cls = self.model.config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
        return [[(1, 0, 0)] * cls + [(1, side, side)]] * count if kind == IMAGE else []

    def vision_tower(self) -> Tower:
        return encoder_tower(self.model.model.vision_tower)

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        if len(values) != len(media):
            return None
        return [with_newlines(layout, part) for layout, part in zip(media, values)]
