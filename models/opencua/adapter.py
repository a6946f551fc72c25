"""OpenCUA for `mmkv.wrap`."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter
from mmkv.models.frames import FramesReader
from mmkv.models.qwen_vl import QwenVL


class OpenCUAAdapter(QwenVL):
    """Qwen2.5-VL's tower, one-axis positions, one placeholder for each image; no video."""

    families = ("opencua",)
    axes = 1

    def frames_reader(self, processor) -> FramesReader:
        return Adapter.frames_reader(self, processor)  # which says that it cannot be streamed

    def placeholder_ids(self) -> tuple[int, int]:
        return self.model.config.media_placeholder_token_id, -1

    def modality(self, inputs: dict, batch: int, length: int) -> torch.Tensor:
        ids, grid = inputs.get("input_ids"), _grid(inputs)
        if ids is not None and grid is not None and inputs.get("pixel_values") is not None:
            inputs = {**inputs, "input_ids": self.expanded_ids(ids, grid)}
        return super().modality(inputs, batch, length)

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple[int, int, int]]]:
        grid = _grid(inputs)
        if kind != IMAGE or grid is None or inputs.get("pixel_values") is None:
            return []
        return super().grids({"image_grid_thw": grid}, kind, chunk)

    def trained_positions(self, chunk: TokenLayout, start: torch.Tensor, inputs: dict) -> torch.Tensor | None:
        return None  # one axis: there is one rule


def _grid(inputs: dict) -> torch.Tensor | None:
    found = inputs.get("image_grid_thw")
    return inputs.get("grid_thws") if found is None else found
