"""LLaVA-OneVision."""

from __future__ import annotations

from transformers.image_processing_utils import select_best_resolution

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter, features


class LlavaOnevision(Adapter):
    """SigLIP frames pooled to half their side; one newline token ends a video, one ends each row of an image's tiles."""

    families = ("llava_onevision",)

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple[int, int, int]]]:
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        if kind == IMAGE:
            sizes = inputs.get("image_sizes")
            images = features(inputs, kind)
            if images is not None:
                return [self._image_from_features(side, image) for image in images]
            counts = inputs.get("batch_num_images")
            if sizes is None:
                return []
            counts = [1] * len(sizes) if counts is None else [int(n) for n in counts for _ in range(int(n))]
            return [self._image(side, *map(int, size), tiled=n == 1) for size, n in zip(sizes, counts)]
        pooled = -(-side // 2)
        if (tokens := features(inputs, kind)) is not None:
            return [[((len(video) - 1) // pooled**2, pooled, pooled), (1, 0, 0)] for video in tokens]
        videos = inputs.get("pixel_values_videos")
        if videos is None:
            return []
        return [[(videos.shape[1], pooled, pooled), (1, 0, 0)]] * videos.shape[0]

    def _image(self, side: int, height: int, width: int, tiled: bool) -> list[tuple[int, int, int]]:
        """A base tile, then the unpadded tiles as one grid whose last column is the newline of each row."""
        if not tiled:
            return [(1, side, side), (1, 0, 0)]
        tile = self.model.config.vision_config.image_size
        best_h, best_w = select_best_resolution((height, width), self.model.config.image_grid_pinpoints)
        rows, cols = best_h // tile * side, best_w // tile * side
        if width / height > cols / rows:
            rows -= 2 * ((rows - int(round(height * (cols / width), 7))) // 2)
        else:
            cols -= 2 * ((cols - int(round(width * (rows / height), 7))) // 2)
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        shrink = (rows * cols / (most * side**2)) ** 0.5
        if shrink > 1.1:
            rows, cols = int(rows // shrink), int(cols // shrink)
        return [(1, side, side)] + ([(1, rows, cols + 1)] if rows > 0 and cols >= 0 else [])

    def _image_from_features(self, side: int, image) -> list[tuple[int, int, int]]:
        """The same, read off an image's features `[n, C]`: every row of tiles ends in the newline vector."""
        rest = image[side * side :]
        ends = (rest == self.model.model.image_newline.to(rest)).all(-1).nonzero()[:, 0]
        if len(rest) <= 1 or not len(ends):
            return [(1, side, side)] + [(len(rest), 0, 0)] * bool(len(rest))
        width = int(ends[0]) + 1
        return [(1, side, side), (1, len(rest) // width, width)]
