"""`Tower`: where a plain vision transformer can be listened to, the same for timm and for Hugging Face."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

# config.model_type of the towers with absolute positions
ENCODERS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


@dataclass(eq=False)
class Tap:
    """One block: attention, residual, norm, MLP, residual.

    Args:
        block: the block itself; its first argument and its output are the hidden states `[B, N, C]`.
        attention: its attention module.
        mask: name of the attention's keyword for an additive mask `[B, 1, 1, N]`.
        query, key: modules whose outputs are the attention's queries and keys.
        split: whether these outputs are `[B, H, N, D]` already; if not, they are `[B, N, H * D]`.
        norm: the norm in front of the MLP; its input is the hidden state with the attention's output added.
        branch: the last module of the MLP's branch; its output is added to that same hidden state.
        gain: `[C]`, a factor on that output where the block has one (layer scale).
    """

    block: torch.nn.Module
    attention: torch.nn.Module
    mask: str
    query: torch.nn.Module
    key: torch.nn.Module
    split: bool
    norm: torch.nn.Module
    branch: torch.nn.Module
    gain: torch.nn.Parameter | None = None


@dataclass(eq=False)
class Tower:
    """A vision tower whose tokens have absolute positions, one image a batch element.

    Args:
        module: what a user or a VLM calls.
        taps: its blocks in order.
        heads: attention heads.
        scale: factor on q.k.
        prefix: tokens in front that are no patches.
        has_cls: whether the first of them is a CLS token.
        patches: the module that is given the pixels `[B, 3, height, width]`.
        patch_size: height and width of a patch in pixels.
        pooled: the module whose output is averaged over patches to classify; None where nothing is averaged.
    """

    module: torch.nn.Module
    taps: list[Tap]
    heads: int
    scale: float
    prefix: int
    has_cls: bool
    patches: torch.nn.Module
    patch_size: tuple[int, int]
    pooled: torch.nn.Module | None = None

    def __len__(self) -> int:
        return len(self.taps)

    def grid(self, height: int, width: int, tokens: int) -> tuple[int, int] | None:
        """Rows and columns of patches of an image of that many pixels; None if they are not the tower's `tokens`."""
        rows, cols = -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        for grid in ((height // self.patch_size[0], width // self.patch_size[1]), (rows, cols)):
            if grid[0] * grid[1] == tokens - self.prefix:
                return grid
        return None

    def watched(self, kwargs: dict) -> bool:
        """Whether a call of the module with these keywords hands out hidden states between blocks."""
        wanted = kwargs.get("output_hidden_states", getattr(self._config, "output_hidden_states", False))
        return wanted is not None and wanted is not False

    @property
    def additive_masks(self) -> bool:
        """Whether its attention function adds a float mask (flash attention does not)."""
        return getattr(self._config, "_attn_implementation", None) in (None, "sdpa", "eager")

    @property
    def checkpointed(self) -> bool:
        """Whether a training forward runs its blocks a second time in the backward pass."""
        holders = [self.module, *(tap.block for tap in self.taps)]
        return any(
            getattr(m, name, False) for m in holders for name in ("grad_checkpointing", "gradient_checkpointing")
        )

    @property
    def _config(self):
        return getattr(self.module, "config", None)


def encoder_tower(model: torch.nn.Module) -> Tower:
    """The tower of a Hugging Face `CLIPVisionModel` or `SiglipVisionModel` (with or without its projection), or of InternVL.

    Raises:
        ValueError: another kind of tower.
    """
    inner = getattr(model, "vision_model", model)
    kind = getattr(getattr(inner, "config", None), "model_type", type(model).__name__)
    if kind not in ENCODERS:
        raise ValueError(f"vision tower {kind!r}: tokens can be merged in {', '.join(ENCODERS)}; leave the tower whole")
    embeddings, intern = inner.embeddings, kind == "internvl_vision"
    taps = [_intern_tap(layer) for layer in inner.encoder.layer] if intern else [_tap(x) for x in inner.encoder.layers]
    has_cls = intern or hasattr(embeddings, "class_embedding")
    patch = inner.config.patch_size
    return Tower(
        module=model,
        taps=taps,
        heads=inner.config.num_attention_heads,
        scale=taps[0].attention.scale,
        prefix=int(has_cls),
        has_cls=has_cls,
        patches=embeddings.patch_embeddings.projection if intern else embeddings.patch_embedding,
        patch_size=(patch, patch) if isinstance(patch, int) else tuple(patch),
    )


def _tap(layer: torch.nn.Module) -> Tap:
    """A block of CLIP or SigLIP."""
    return Tap(
        block=layer,
        attention=layer.self_attn,
        mask="attention_mask",
        query=layer.self_attn.q_proj,
        key=layer.self_attn.k_proj,
        split=False,
        norm=layer.layer_norm2,
        branch=layer.mlp,
    )


def _intern_tap(layer: torch.nn.Module) -> Tap:
    """A block of InternVL's tower."""
    return Tap(
        block=layer,
        attention=layer.attention,
        mask="attention_mask",
        query=layer.attention.q_norm,
        key=layer.attention.k_norm,
        split=False,
        norm=layer.layernorm_after,
        branch=layer.dropout,
        gain=layer.lambda_2,
    )


def timm_tower(model: torch.nn.Module) -> Tower:
    """The tower of a timm `VisionTransformer` (ViT, DeiT, DeiT distilled, DINOv2, CLIP, with or without registers).

    Raises:
        ValueError: another kind of model or block.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{name}: tokens can be merged in timm's VisionTransformer; in windows, rotary or relative positions"
            " a merged token has no place"
        )
    for block in model.blocks:
        parts = (type(block), type(block.attn)) if hasattr(block, "attn") else (type(block), None)
        if parts != (Block, Attention):
            kinds = " with ".join(part.__name__ for part in parts if part)
            raise ValueError(f"{name} of {kinds}: tokens can be merged in plain blocks (Block with Attention) only")
        if "attn_mask" not in inspect.signature(block.attn.forward).parameters:
            raise ValueError("this timm's attention takes no mask; update it: pip install --upgrade timm")
    taps = [
        Tap(
            block=block,
            attention=block.attn,
            mask="attn_mask",
            query=block.attn.q_norm,
            key=block.attn.k_norm,
            split=True,
            norm=block.norm2,
            branch=block.drop_path2,
        )
        for block in model.blocks
    ]
    return Tower(
        module=model,
        taps=taps,
        heads=model.blocks[0].attn.num_heads,
        scale=model.blocks[0].attn.scale,
        prefix=model.num_prefix_tokens,
        has_cls=model.cls_token is not None,
        patches=model.patch_embed,
        patch_size=tuple(model.patch_embed.patch_size),
        pooled=model.norm if model.global_pool in ("avg", "avgmax") else None,
    )
