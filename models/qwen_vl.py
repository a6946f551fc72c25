"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, VIDEO, TokenLayout
from mmkv.models.adapter import Adapter, features
from mmkv.models.expansion import expand, image_tokens
from mmkv.models.frames import FramesReader, QwenFrames
from mmkv.models.qwen_tower import PackedTower


class QwenVL(Adapter):
    """Three-axis rotary positions; one placeholder per 2x2 patches; a video grid counts pairs of frames.

    Qwen3-VL puts each temporal patch of a video behind its own timestamp; in the layout it is one medium all the same.
    """

    families = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    axes = 3

    def frames_reader(self, processor) -> FramesReader:
        if self.model.config.model_type == "qwen3_vl":
            raise ValueError(
                f"{type(self.model).__name__} cannot be streamed: a timestamp of 6 to 10 tokens stands before each frame, "
                "and a stream stores frames of one length; possible are Qwen2-VL, Qwen2.5-VL, LLaVA-OneVision, LongVA"
            )
        return QwenFrames(self.model, processor)

    def vision_tower(self) -> PackedTower:
        return PackedTower(self.model.model.visual, self.model.config.vision_config)

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        fits = [len(v) for v in values] == [len(layout) for layout in media]
        return list(values) if fits else None

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id

    def expanded_ids(self, ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        if grid is None:
            return ids
        counts = image_tokens(grid, self.model.config.vision_config.spatial_merge_size)
        return expand(ids, None, counts, self.placeholder_ids()[0])[0]

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple[int, int, int]]]:
        grid = inputs.get("image_grid_thw" if kind == IMAGE else "video_grid_thw")
        if grid is None:
            return self._grids_from_positions(inputs, kind, chunk)
        merge = self.model.config.vision_config.spatial_merge_size
        return [[(t, h // merge, w // merge)] for t, h, w in grid.tolist()]

    def _grids_from_positions(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple[int, int, int]]]:
        """Height and width ids of a medium count its rows and columns from the block's first position on."""
        media, ids = features(inputs, kind), inputs.get("position_ids")
        if media is None or ids is None or ids.dim() != 3:
            return []
        height, width = ids[-2:, chunk.modality.to(ids.device) == kind].cpu()
        grids, at = [], 0
        for medium in media:
            n = len(medium)
            cols = _run(width[at : at + n])
            rows = _run(height[at : at + n : cols])
            grids.append([(n // (rows * cols), rows, cols)])
            at += n
        return grids

    def trained_positions(self, chunk: TokenLayout, start: torch.Tensor, inputs: dict) -> torch.Tensor | None:
        """Text after a vision block continues at 1 + the largest id of the block (transformers before 5.3, and training).

        Args:
            chunk: layout of the new tokens, validity included.
            start: int64 `[B]`, first free position id of each batch element.
            inputs: keywords of the forward; `second_per_grid_ts` spaces the frames of Qwen2.5-VL.

        Returns:
            int64 `[3, B, T]`; padding gets 1, as in transformers.
        """
        if self.model.config.model_type == "qwen3_vl":
            return None  # every temporal patch is a block of its own: the rules agree
        if bool((chunk.visual & (chunk.frame < 0)).any()):
            raise ValueError("positions='trained' needs the grids of images and videos; pass them beside the features")
        batch, length = chunk.modality.shape
        ids = torch.ones(3, batch, length, dtype=torch.int64)
        seconds = self._seconds(chunk, inputs)
        for row in range(batch):
            free = int(start[row])
            valid = chunk.valid[row].nonzero()[:, 0]
            medium = chunk.medium[row, valid]
            edges = [0] + ((medium[1:] != medium[:-1]).nonzero()[:, 0] + 1).tolist() + [valid.numel()]
            for a, b in zip(edges, edges[1:]):
                at = valid[a:b]
                if a == b:
                    continue
                if int(medium[a]) < 0:
                    ids[:, row, at] = torch.arange(free, free + b - a)
                else:
                    step = seconds.get((row, int(medium[a])), 1.0)
                    ids[0, row, at] = free + (chunk.frame[row, at].double() * step).long()
                    ids[1, row, at] = free + chunk.row[row, at].long()
                    ids[2, row, at] = free + chunk.col[row, at].long()
                free = int(ids[:, row, at].max()) + 1
        return ids

    def _seconds(self, chunk: TokenLayout, inputs: dict) -> dict[tuple[int, int], float]:
        """Temporal distance of neighbouring frames in position ids, by (batch element, medium)."""
        per_second = getattr(self.model.config.vision_config, "tokens_per_second", None)
        given = inputs.get("second_per_grid_ts")
        if per_second is None or given is None:
            return {}
        spacing = given.tolist() if isinstance(given, torch.Tensor) else list(given)
        media = []
        for row in range(chunk.batch):
            of_row = chunk.medium[row, chunk.modality[row] == VIDEO]
            media += [(row, int(m)) for m in of_row.unique()]
        return {key: float(s) * per_second for key, s in zip(media, spacing)}


def _run(ids: torch.Tensor) -> int:
    """Length of the run first, first + 1, first + 2 ... at the start of ids `[n]`."""
    broken = (ids != ids[0] + torch.arange(len(ids))).nonzero()
    return int(broken[0]) if len(broken) else len(ids)
