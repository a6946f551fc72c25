"""Attention of the Infinity decoder: to the scales so far, and to the text."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmkv.kernels import rotate
from mmkv.models.infinity.conditioning import keys_values, text_attention
from mmkv.models.infinity.configuration import InfinityConfig

SHARPEST = math.log(100)  # of the learned factor on queries


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention written out, with its weights; the signature is that of transformers' attention functions."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~attention_mask, least)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = F.dropout(weights, p=dropout, training=module.training) @ value
    return out.transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Cosine attention of a scale's tokens to all scales so far: unit queries and keys, a learned factor per head.

    Args:
        config: of the model.
        layer_idx: index of its layer, under which the cache keeps its keys and values.
    """

    is_causal = False

    def __init__(self, config: InfinityConfig, layer_idx: int):
        super().__init__()
        channels = config.hidden_size
        self.config, self.layer_idx, self.heads = config, layer_idx, config.num_attention_heads
        self.qkv_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.o_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], past_key_values=None, mask=None, last=False) -> Tensor:
        """`[B, T, C]` of the normalised `x` `[B, T, C]`.

        Args:
            x: hidden states.
            table: `rotary_table` of the T tokens.
            past_key_values: transformers' cache, None to attend among the T tokens alone.
            mask: bool `[1, 1, T, T]`, who sees whom; None where all see all.
            last: nobody will ask for these keys and values again, so do not keep them.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x.to(self.qkv_proj.weight.dtype), self.qkv_proj.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        factor = self.log_scale.float().clamp_max(SHARPEST).exp()
        query = rotate(F.normalize(query.float(), dim=-1, eps=1e-12) * factor, *table, interleaved=True).to(value.dtype)
        key = rotate(F.normalize(key.float(), dim=-1, eps=1e-12), *table, interleaved=True).to(value.dtype)
        if past_key_values is not None:
            key, value = _with_past(past_key_values, key, value, self.layer_idx, last)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, mask, scaling=1.0, dropout=0.0, is_causal=False)
        return self.o_proj(out.flatten(2))


def _with_past(cache, key: Tensor, value: Tensor, index: int, last: bool) -> tuple[Tensor, Tensor]:
    """Keys and values of all scales so far, these included; the cache keeps them unless they are of the last scale."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    held = (layer.keys, layer.values) if last and type(layer) is DynamicLayer and layer.is_initialized else None
    both = cache.update(key, value, index)
    if held is not None:
        layer.keys, layer.values = held
    return both


class CrossAttention(nn.Module):
    """Attention of a scale's tokens to the text.

    Args:
        config: of the model.
    """

    def __init__(self, config: InfinityConfig):
        super().__init__()
        channels, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(channels, channels)
        self.kv_proj = nn.Linear(channels, 2 * channels, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.o_proj = nn.Linear(channels, channels)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, n, D]` of the text's memory `[B, n, C]`, the same for all scales."""
        return keys_values(self.kv_proj, self.v_bias, memory, self.heads)

    def forward(self, x: Tensor, remembered: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """`[B, T, C]` of hidden states `x` `[B, T, C]`, and what `remember` gave; the mask is bool `[B, 1, 1, n]` or None."""
        query = self.q_proj(x.to(self.q_proj.weight.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = text_attention(query, *remembered, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))
