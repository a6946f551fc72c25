"""Multiply-adds of a forward, counted from the tokens that each block really sees. Papers call them FLOPs."""

from __future__ import annotations

from collections.abc import Sequence


def vit_macs(
    tokens: int,
    behind: Sequence[int],
    dim: int,
    patch: int | tuple[int, int],
    classes: int = 1000,
    mlp_ratio: float = 4.0,
    channels: int = 3,
) -> float:
    """Multiply-adds of one image in a vision transformer that shortens its tokens between attention and MLP.

    The patch embedding counts `tokens` (CLS included, as DiffRate's code does); norms, activations and choosing count nothing.

    Args:
        tokens: tokens that enter the first block.
        behind: for each block, tokens that its MLP and the next block's attention see; `TowerHooks.state.tokens_per_block`.
        dim: hidden channels C.
        patch: side of a patch in pixels, or its height and width.
        classes: outputs of the classifier, 0 for none.
        mlp_ratio: hidden channels of the MLP over C.
        channels: of the image.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    total = tokens * dim * channels * height * width + dim * classes
    for left in behind:
        total += 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * mlp_ratio * left * dim**2
        tokens = left
    return total


def decoder_macs(
    tokens: Sequence[int],
    dim: int,
    mlp: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = False,
) -> float:
    """Multiply-adds of prefill in a decoder with a gated MLP (three matrices), its embeddings and head left out.

    Args:
        tokens: tokens that each layer sees.
        dim: hidden channels.
        mlp: hidden channels of the MLP.
        heads, kv_heads, head_dim: of the attention; None for as many KV heads as heads, and dim / heads channels.
        causal: count only the half of the attention that is not masked. Papers count it whole.
    """
    head_dim = dim // heads if head_dim is None else head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    total = 0.0
    for n in tokens:
        pairs = n * (n + 1) / 2 if causal else n**2
        total += n * dim * head_dim * (2 * heads + 2 * kv_heads) + 2 * pairs * heads * head_dim + 3 * n * dim * mlp
    return total
