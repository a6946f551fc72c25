"""Qwen's vision towers: images of all sizes packed into one row, patches in blocks of four, windows made contiguous."""

from __future__ import annotations

import sys

import torch


class PackedTower:
    """Where to listen in the tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, and how its patches become the decoder's tokens.

    Nothing is merged inside it: windows, rotary positions and blocks of four patches hold on to every patch.

    Args:
        module: the tower.
        config: its configuration.
    """

    has_cls, prefix = False, 0

    def __init__(self, module: torch.nn.Module, config):
        self.module, self.config = module, config
        self.blocks = list(module.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def queries_keys(self, block: int, qkv: torch.Tensor, positions) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Rotated queries and keys `[1, H, N, D]` of a block, and the factor on their product.

        Args:
            qkv: `[N, 3 H D]`, what the block's projection gave.
            positions: cos and sin `[N, D]` that the block was given.
        """
        attention = self.blocks[block].attn
        queries, keys, _ = qkv.view(qkv.shape[0], 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        queries, keys = rotate(queries, keys, *positions)
        return queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], queries.shape[-1] ** -0.5

    def to_tokens(self, values: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """Values fp32 `[N]` of the patches in the tower's order, mean of each four: `[n]` of each image or video, raster order.

        Args:
            grid: int64 `[media, 3]`, frames, rows and columns of patches.
        """
        merge = self.config.spatial_merge_size
        tokens = values.view(-1, merge**2).mean(1)
        sizes = [t * (h // merge) * (w // merge) for t, h, w in grid.tolist()]
        out = []
        for part, (t, h, w) in zip(tokens.split(sizes), grid.tolist()):
            order = self._order(t, h // merge, w // merge)
            raster = torch.empty_like(part)
            raster[order.to(part.device)] = part
            out.append(raster)
        return out

    def _order(self, frames: int, rows: int, cols: int) -> torch.Tensor:
        """int64 `[n]`: raster index of each token in the tower's order, window by window where there are windows."""
        raster = torch.arange(frames * rows * cols)
        side = getattr(self.config, "window_size", None)
        if side is None or not hasattr(self.config, "fullatt_block_indexes"):
            return raster
        side = side // self.config.spatial_merge_size // self.config.patch_size
        frame, row, col = raster // (rows * cols), raster // cols % rows, raster % cols
        window = (frame * -(-rows // side) + row // side) * -(-cols // side) + col // side
        return window.argsort(stable=True)
