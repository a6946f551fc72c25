"""A batched training forward on the parameters of the Hugging Face model (same logits, see the test).

The tower takes many screens of one size at once. The language model takes packed rows: sessions one after another, and at
each step several instructions as branches of the session's trunk; which tokens see each other is a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmkv.models.tiny.fast import DIM, HEADS, KV, linear, norm, rotate, split_heads, text_angles, text_weights
from mmkv.models.tiny.fast import vision_weights as weights_of

WIDTH = 256  # hidden size of the language model
GROUP = HEADS // KV


def vision_angles(rows: int, columns: int):
    """cos and sin `[P, 64]` of patches in merge-block order; rows and columns count 16 px blocks."""
    row = torch.arange(rows)[:, None, None, None] * 2 + torch.arange(2)[:, None]
    column = torch.arange(columns)[None, :, None, None] * 2 + torch.arange(2)
    row, column = (t.expand(rows, columns, 2, 2).reshape(-1, 1) for t in (row, column))
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 32, 2).float() / 32))
    angle = torch.cat((row * inverse, column * inverse), -1)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def see(visual, screens: torch.Tensor) -> torch.Tensor:
    """Tower on float `[N, H, W, 3]` in -1..1, sides multiples of 32 -> float32 `[N, H * W / 256, 256]` in raster order."""
    n, height, width, _ = screens.shape
    rows, columns = height // 16, width // 16
    x = screens.reshape(n, rows, 2, 8, columns, 2, 8, 3).permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, -1, 192)
    kernel = visual.patch_embed.proj.weight.view(128, 3, 2, 64).sum(2).view(128, 192)  # a picture is two equal frames
    x = linear(x, kernel).float()
    cos, sin = vision_angles(rows, columns)
    for i, layer in enumerate(visual.blocks):
        x = vision_block(x, cos, sin, (rows // 2, columns // 2) if i == 0 else None, weights_of(layer))
    m = visual.merger
    x = norm(x, m.ln_q.weight).reshape(n, rows * columns, 512)
    return linear(F.gelu(linear(x, m.mlp[0].weight, m.mlp[0].bias)), m.mlp[2].weight, m.mlp[2].bias).float()


def vision_block(x, cos, sin, windows: tuple[int, int] | None, p):
    """One tower block on `[N, P, 128]`; windows: how many of 32 px lie below and beside each other, None for all patches."""
    n1, qkv_w, qkv_b, proj_w, proj_b, n2, gw, gb, uw, ub, dw, db = p
    n, count = x.shape[:2]
    q, k, v = linear(norm(x, n1), qkv_w, qkv_b).view(n, count, 3, 2, 64).unbind(2)
    q, k = (rotate(t, cos[:, None], sin[:, None]) for t in (q, k))
    q, k, v = (_windowed(t, windows) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    x = x + linear(_joined(out, windows, n, count), proj_w, proj_b)
    y = norm(x, n2)
    return x + linear(F.silu(linear(y, gw, gb)) * linear(y, uw, ub), dw, db)


def _windowed(t, windows):
    """`[N, P, 2, 64]` -> `[N, 2, P, 64]`, or `[N * windows, 2, 16, 64]`."""
    if windows is None:
        return t.transpose(1, 2)
    below, beside = windows
    return t.view(-1, below, 2, beside, 2, 4, 2, 64).permute(0, 1, 3, 6, 2, 4, 5, 7).reshape(-1, 2, 16, 64)


def _joined(t, windows, n, count):
    """`_windowed` undone, heads joined: `[N, P, 128]`."""
    if windows is None:
        return t.transpose(1, 2).reshape(n, count, 128)
    below, beside = windows
    return t.view(n, below, beside, 2, 2, 2, 4, 64).permute(0, 1, 4, 2, 5, 6, 3, 7).reshape(n, count, 128)


def text_block(x, cos, sin, bias, p):
    """One decoder layer. x `[B, L, C]`, cos and sin `[B, L, D]`, bias `[B, 1, L, L]`: 0 where a token may look, else -1e9."""
    n1, qw, qb, kw, kb, vw, vb, ow, n2, gw, uw, dw = p
    b, length, c = x.shape
    y = norm(x, n1)
    q = rotate(split_heads(y, qw, qb, HEADS), cos[:, :, None], sin[:, :, None]) * DIM**-0.5
    k = rotate(split_heads(y, kw, kb, KV), cos[:, :, None], sin[:, :, None])
    v = split_heads(y, vw, vb, KV)
    q = q.view(b, length, KV, GROUP, DIM).permute(0, 2, 3, 1, 4).reshape(b * KV, GROUP * length, DIM)
    k, v = (t.transpose(1, 2).reshape(b * KV, length, DIM) for t in (k, v))
    s = torch.bmm(q, k.transpose(1, 2)).view(b, KV * GROUP, length, length).float() + bias
    weights = torch.softmax(s, -1).to(v.dtype).view(b * KV, GROUP * length, length)
    out = torch.bmm(weights, v).view(b, KV, GROUP, length, DIM).permute(0, 3, 1, 2, 4).reshape(b, length, c)
    x = x + linear(out, ow)
    y = norm(x, n2)
    return x + linear(F.silu(linear(y, gw)) * linear(y, uw), dw)


def read(language, ids, features, places, positions, bias, block=text_block):
    """Hidden states `[B, L, C]`: the last, normed, and those after layer 4.

    ids `[B, L]`; features `[V, C]` of all screens and places `[V]`, their indices into the flattened rows; positions
    `[3, B, L]`; bias as in `text_block`.
    """
    x = language.embed_tokens.weight[ids]
    x = x.reshape(-1, WIDTH).index_copy(0, places, features).view(*ids.shape, WIDTH)
    cos, sin = text_angles(positions)
    middle = x
    for i, layer in enumerate(language.layers):
        x = block(x, cos, sin, bias, text_weights(layer))
        middle = x if i == 3 else middle
    return norm(x, language.norm.weight), middle
