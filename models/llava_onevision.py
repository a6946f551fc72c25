"""LLaVA-OneVision."""

from __future__ import annotations

import torch
from transformers.image_processing_utils import select_best_resolution

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter, features
from mmkv.models.frames import FramesReader, LlavaOnevisionFrames
from mmkv.models.tower import Tower, encoder_tower


class LlavaOnevision(Adapter):
    """SigLIP frames pooled to half their side; one newline token ends a video, one ends each row of an image's tiles."""

    families = ("llava_onevision",)

    def frames_reader(self, processor) -> FramesReader:
        return LlavaOnevisionFrames(self.model, processor)

    def vision_tower(self) -> Tower:
        return encoder_tower(self.model.model.vision_tower)

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        side = int(values.shape[1] ** 0.5)
        tiles = values.view(-1, side, side)
        if kind != IMAGE:
            frames = [int(layout.frame.max()) + 1 for layout in media]
            if sum(frames) != len(tiles):
                return None
            pooled = resized(tiles, -(-side // 2), -(-side // 2)).flatten(1)
            return [with_newlines(layout, part.flatten()) for layout, part in zip(media, pooled.split(frames))]
        counts = with_sum([self._tiles(layout, side) for layout in media], len(tiles) - len(media))
        if counts is None:
            return None
        parts = tiles.split([1 + h * w for h, w in counts])
        return [self._image_notes(layout, part, *count, side) for layout, part, count in zip(media, parts, counts)]

    def _tiles(self, layout: TokenLayout, side: int) -> list[tuple[int, int]]:
        """Rows and columns that the tiles behind an image's base tile may have, by its grid; fewest tiles first."""
        rows, cols = self._unpadded(layout)
        if not rows:
            return [(0, 0), *self._pinpoints()]
        fits = [
            (h, w)
            for h, w in self._pinpoints()
            if (rows == h * side and cols <= w * side) or (cols == w * side and rows <= h * side)
        ]
        # else shrunk to the most tokens allowed: tiles of the nearest shape first
        return fits or sorted(self._pinpoints(), key=lambda hw: abs(hw[0] / hw[1] - rows / cols))

    def _pinpoints(self) -> list[tuple[int, int]]:
        """Rows and columns of tiles that there are, fewest tiles first."""
        tile = self.model.config.vision_config.image_size
        known = {(h // tile, w // tile) for h, w in self.model.config.image_grid_pinpoints}
        return sorted(known, key=lambda hw: (hw[0] * hw[1], hw))

    def _unpadded(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of an image's grid of tiles, newlines left out; 0, 0 where it has the base tile alone."""
        grid = layout.frame[0] == 1
        return (int(layout.row[0, grid].max()) + 1, int(layout.col[0, grid].max()) + 1) if bool(grid.any()) else (0, 0)

    def _image_notes(self, layout: TokenLayout, tiles: torch.Tensor, high: int, wide: int, side: int) -> torch.Tensor:
        """Values of the base tile, then of the unpadded grid of tiles, 0 for newlines; `[n]`."""
        rows, cols = self._unpadded(layout)
        base = with_newlines(layout.take(layout.frame[0] == 0), tiles[0].flatten())
        if not rows:
            return base
        whole = tiles[1:].view(high, wide, side, side).transpose(1, 2).reshape(high * side, wide * side)
        if cols * whole.shape[0] < rows * whole.shape[1]:  # narrower than the tiles: cut left and right
            cut = (whole.shape[1] - round(cols * whole.shape[0] / rows)) // 2
            whole = whole[:, cut : whole.shape[1] - cut]
        else:
            cut = (whole.shape[0] - round(rows * whole.shape[1] / cols)) // 2
            whole = whole[cut : whole.shape[0] - cut]
        grid = resized(whole[None], rows, cols)[0]
        return torch.cat([base, torch.nn.functional.pad(grid, (0, 1)).flatten()])

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple]]:
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

    def _image(self, side: int, height: int, width: int, tiled: bool) -> list[tuple]:
        """A base tile, then the unpadded tiles as one grid, a newline behind each row."""
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
        return [(1, side, side)] + ([(1, rows, cols, True)] if rows > 0 and cols >= 0 else [])

    def _image_from_features(self, side: int, image) -> list[tuple]:
        """The same, read off an image's features `[n, C]`: every row of tiles ends in the newline vector."""
        rest = image[side * side :]
        ends = (rest == self.model.model.image_newline.to(rest)).all(-1).nonzero()[:, 0]
        if len(rest) <= 1 or not len(ends):
            return [(1, side, side)] + [(len(rest), 0, 0)] * bool(len(rest))
        width = int(ends[0]) + 1
        return [(1, side, side), (1, len(rest) // width, width - 1, True)]


def with_sum(choices: list[list[tuple[int, int]]], total: int) -> list[tuple[int, int]] | None:
    """One (rows, columns) of each list so that rows * columns add up to a total: the first such, None without."""
    ways: dict[int, list[tuple[int, int]]] = {0: []}  # by sum so far
    for some in choices:
        longer: dict[int, list[tuple[int, int]]] = {}
        for before, taken in ways.items():
            for rows, cols in some:
                if before + rows * cols <= total:
                    longer.setdefault(before + rows * cols, [*taken, (rows, cols)])
        ways = longer
    return ways.get(total)


def resized(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """`[B, h, w]` to `[B, rows, cols]`, bilinear as the model pools its features; the same where they fit."""
    if values.shape[1:] == (rows, cols):
        return values
    return torch.nn.functional.interpolate(values[:, None], size=(rows, cols), mode="bilinear")[:, 0]


def with_newlines(layout: TokenLayout, values: torch.Tensor) -> torch.Tensor:
    """Values of the tokens that lie on a grid, and 0 for the others: fp32 `[n]`."""
    out = torch.zeros(len(layout), device=values.device)
    out[(layout.row[0] >= 0).to(values.device)] = values.float()
    return out
