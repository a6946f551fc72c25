"""InternVL 2.5, 3 and 3.5, as transformers has them (`internvl`)."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter
from mmkv.models.tower import Tower, encoder_tower


class InternVL(Adapter):
    """Tiles whose patches are folded two by two; an image is a run of tiles, its thumbnail last.

    A video reaches the model as pictures with "Frame1:", "Frame2:" ... between them and nothing tells its frames from other
    pictures, so in the layout each is an image: methods for video (EVS, DyCoke, VidCom2) leave them alone or act within each.
    """

    families = ("internvl",)

    def vision_tower(self) -> Tower:
        return encoder_tower(self.model.model.vision_tower)

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        counts = [int(layout.frame.max()) + 1 for layout in media]
        if sum(counts) != len(values):
            return None
        rows, cols = self._patches()
        folded = torch.nn.functional.avg_pool2d(values.float().view(-1, 1, rows, cols), self._fold())
        return [part.flatten() for part in folded.split(counts)]

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, -1

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple]]:
        rows, cols = (n // self._fold() for n in self._patches())
        runs = [n for row in (chunk.modality == kind) for n in _runs(row)]
        if any(n % (rows * cols) for n in runs):
            return []  # a piece of a prompt that ends within a tile
        return [[(n // (rows * cols), rows, cols)] for n in runs] if kind == IMAGE else []

    def _patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        vision = self.model.config.vision_config
        return vision.image_size[0] // vision.patch_size[0], vision.image_size[1] // vision.patch_size[1]

    def _fold(self) -> int:
        """Patches on a side of what becomes one token."""
        return round(1 / self.model.config.downsample_ratio)


def _runs(there: torch.Tensor) -> list[int]:
    """Lengths of the runs of True in bool `[T]`."""
    edges = torch.nn.functional.pad(there.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [b - a for a, b in zip(edges[::2], edges[1::2])]
