"""A ViT backbone of timm blocks with window and global attention, dense or with ToC3D's router."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from timm.layers import (
    LayerNorm,
    PatchEmbed,
    build_rotary_pos_embed,
    resample_abs_pos_embed,
    resample_patch_embed,
    trunc_normal_,
)
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn

from mmkv.tokens.toc3d import ToC3D, dense, mlp_tokens, route
from mmkv.tokens.toc3d_selector import History, Selector

BLOCKS = ("eva02", "eva02-small", "vit")
REFERENCE = 16  # side of the grid on which EVA-02's rotary frequencies are laid out


@dataclass(eq=False)
class Features:
    """What a backbone returns for `B * V` images.

    Args:
        grid: `[B * V, C, H, W]`.
        scores: per scoring block `[B * V, H, W]`, log-probability to be kept.
        masks: per scoring block `[B * V, H * W]`, for `selection_loss`.
        salient: per block bool `[B * V, H, W]`, tokens that it ran; None where it ran all.
    """

    grid: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    salient: list[torch.Tensor | None] = field(default_factory=list)


class Backbone(nn.Module):
    """EVA-02 or plain ViT blocks on the patches of each image; ViT-L of the paper by default.

    Every block attends inside windows; nothing is padded: windows cut by the border are smaller.

    Args:
        image: height, width in px; other sizes resample the position embedding.
        patch: side, px.
        dim, depth, heads: of the blocks.
        block: "eva02" (B and L: separate q, k, v, normed SwiGLU), "eva02-small" (Ti and S: fused) or "vit".
        window: side of the windows in tokens.
        global_window: the same in global blocks; None for the whole grid.
        global_blocks: their indices; by default every third.
        toc3d: settings, None for dense.
        query_dim: channels of the detector's queries.
        pc_range: x, y, z from and to, m.
    """

    def __init__(
        self,
        image: tuple[int, int] = (320, 800),
        patch: int = 16,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        block: str = "eva02",
        window: int = 16,
        global_window: int | None = 20,
        global_blocks: tuple[int, ...] | None = None,
        toc3d: ToC3D | None = None,
        query_dim: int = 256,
        pc_range: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    ):
        super().__init__()
        for name, value in (("window", window), ("global_window", 1 if global_window is None else global_window)):
            if value < 1:
                raise ValueError(f"{name} {value}; must be a number of tokens from 1 on")
        if dim % heads or (block != "vit" and dim // heads % 4):
            raise ValueError(
                f"dim {dim} over {heads} heads; each needs a whole number of channels, a multiple of 4 to rotate"
            )
        self.patch, self.dim, self.window, self.global_window = patch, dim, window, global_window
        self.head_dim = dim // heads
        self.rotary = block != "vit"
        self.global_blocks = tuple(range(2, depth, 3)) if global_blocks is None else global_blocks
        self.patch_embed = PatchEmbed(image, patch, 3, dim, strict_img_size=False, output_fmt="NHWC")
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, dim))
        trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(make_block(block, dim, heads) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.toc3d = toc3d
        self.selectors = nn.ModuleList()
        if toc3d is not None:
            toc3d.check(depth, self.global_blocks)
            self.selectors.extend(Selector(toc3d, dim, query_dim, pc_range) for _ in toc3d.scoring)
        self._tables: dict[tuple, torch.Tensor] = {}

    def forward(self, images: torch.Tensor, history: History | None = None, time=None, pose=None) -> Features:
        """Images `[B * V, 3, h, w]`, the views of a sample side by side; with ToC3D also what `Selector` is told."""
        x = self.embed(images)
        batch, height, width, _ = x.shape
        out, mask = Features(x), None
        for i, block in enumerate(self.blocks):
            if self.toc3d is not None and i in self.toc3d.scoring:
                selector = self.selectors[self.toc3d.scoring.index(i)]
                score, mask = selector(x.flatten(1, 2), mask, history, time, pose)
                out.scores.append(score.view(batch, height, width))
                out.masks.append(mask)
            side = self.side(i, height, width)
            run = partial(self._run, block, side)
            if out.scores:
                x, salient = route(run, x, out.scores[-1], side, self.toc3d.ratio(i), self.toc3d)
            else:
                x, salient = dense(run, x, side), None
            out.salient.append(salient)
        out.grid = self.norm(x).permute(0, 3, 1, 2)
        return out

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """`[B * V, H, W, C]`: patches with their position embedding."""
        x = self.patch_embed(images)
        size = x.shape[1:3]
        place = resample_abs_pos_embed(self.pos_embed, size, self.patch_embed.grid_size, num_prefix_tokens=0)
        return x + place.view(1, *size, -1).to(x.dtype)

    def side(self, block: int, height: int, width: int) -> int:
        """Window of a block, tokens."""
        if block not in self.global_blocks:
            return self.window
        return self.global_window or max(height, width)

    def mlp_tokens(self, height: int, width: int) -> list[tuple[int, int]]:
        """Per block `mlp_tokens` of one image of height x width patches."""
        count = [None if self.toc3d is None else self.toc3d.ratio(i) for i in range(len(self.blocks))]
        select = "real" if self.toc3d is None else self.toc3d.select
        return [mlp_tokens(height, width, self.side(i, height, width), r, select) for i, r in enumerate(count)]

    def _run(self, block: nn.Module, side: int, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if not self.rotary:
            return block(tokens)
        key = side, tokens.device, tokens.dtype
        if key not in self._tables:
            tables = build_rotary_pos_embed(
                [side, side], dim=self.head_dim, in_pixels=False, ref_feat_shape=[REFERENCE, REFERENCE]
            )
            self._tables[key] = torch.cat(tables, -1).to(tokens.device, tokens.dtype)
        return block(tokens, rope=self._tables[key][places][:, None])  # [W, 1, n, 2 D]

    @torch.no_grad()
    def load_timm(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """Copy a timm EVA-02 or ViT checkpoint's weights where shapes fit; returns this backbone's names left as they were.

        Patches and positions are resampled, class and register tokens left out.

        Raises:
            ValueError: not one block weight fits.
        """
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("selectors.")}
        found = {k: v for k, v in weights.items() if k in own}
        kernel = found.get("patch_embed.proj.weight")
        if kernel is not None and kernel.shape[:2] == own["patch_embed.proj.weight"].shape[:2]:
            found["patch_embed.proj.weight"] = resample_patch_embed(kernel, [self.patch, self.patch])
        places = found.get("pos_embed")
        if places is not None and places.shape[-1] == self.dim:
            side = int(places.shape[1] ** 0.5)  # of a square pretraining; what is left over are prefix tokens
            grid = self.patch_embed.grid_size
            found["pos_embed"] = resample_abs_pos_embed(places[:, -side * side :], grid, (side, side), 0)
        fits = {k: v for k, v in found.items() if v.shape == own[k].shape}
        if not any(k.startswith("blocks.") for k in fits):
            raise ValueError(
                f"no block weight fits: dim {self.dim}, {len(self.blocks)} blocks; possible block={BLOCKS}"
            )
        for name, value in fits.items():
            own[name].copy_(value)
        return sorted(own.keys() - fits.keys())


def make_block(kind: str, dim: int, heads: int) -> nn.Module:
    """A timm block without prefix tokens; see `Backbone` for the kinds."""
    if kind == "vit":
        return ViTBlock(dim, heads, qkv_bias=True)
    if kind not in BLOCKS:
        raise ValueError(f"block {kind!r}; possible are {', '.join(map(repr, BLOCKS))}")
    small = kind == "eva02-small"
    block = EvaBlock(
        dim, heads, qkv_fused=small, mlp_ratio=4 * 2 / 3, swiglu_mlp=True, scale_mlp=not small, num_prefix_tokens=0
    )
    for module in block.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return block
