"""LongVA: where its parts are, and what its tokens are."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter, features
from mmkv.models.frames import FramesReader, LongVAFrames
from mmkv.models.tower import Tower, encoder_tower


class LongVA(Adapter):
    """CLIP frames pooled to half their side, nothing between them; an image is its tiles, one behind the other."""

    families = ("longva",)

    def frames_reader(self, processor) -> FramesReader:
        return LongVAFrames(self.model, processor)

    def vision_tower(self) -> Tower:
        return encoder_tower(self.model.model.vision_tower)

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        counts = [int(layout.frame.max()) + 1 for layout in media]
        if sum(counts) != len(values):
            return None
        side = self.model.config.patches_per_side
        stride = 2 if kind == IMAGE else self.model.config.mm_spatial_pool_stride
        pooled = torch.nn.functional.avg_pool2d(values.float().view(-1, 1, side, side), stride)
        return [part.flatten() for part in pooled.split(counts)]

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple]]:
        side = self.model.config.image_side if kind == IMAGE else self.model.config.video_side
        ready = features(inputs, kind)
        if ready is not None:
            return [[(len(medium) // side**2, side, side)] for medium in ready]
        pixels = inputs.get("pixel_values" if kind == IMAGE else "pixel_values_videos")
        if pixels is None:
            return []
        counts = inputs.get("image_tiles" if kind == IMAGE else "video_frames")
        return [[(int(n), side, side)] for n in ([len(pixels)] if counts is None else counts)]
