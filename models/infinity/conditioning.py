"""What the text says to the decoder: a start token, a modulation of every layer, and a memory to attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkv.models.infinity.configuration import InfinityConfig


@dataclass(frozen=True)
class Text:
    """Features of a batch of prompts, padded to the longest.

    Args:
        features: `[B, n, text_channels]` of the text encoder.
        mask: bool `[B, n]`, False for padding; None where there is none.
    """

    features: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, prompts: Sequence[Tensor]) -> Text:
        """From the features `[n, text_channels]` of each prompt.

        Raises:
            ValueError: there is no prompt, or one without tokens.
        """
        if not prompts:
            raise ValueError("no prompts: give one or more")
        if not min(len(features) for features in prompts):
            raise ValueError("a prompt without tokens: give features of one token or more")
        lengths = torch.tensor([len(features) for features in prompts])
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        if int(lengths.min()) == int(lengths.max()):
            return cls(padded)
        return cls(padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(padded.device))

    def cat(self, other: Text) -> Text:
        """This batch followed by another."""
        return Text.of([*self.split(), *other.split()])

    def to(self, device) -> Text:
        """The same on a device."""
        return Text(self.features.to(device), None if self.mask is None else self.mask.to(device))

    def split(self) -> list[Tensor]:
        """Features of each prompt, without padding."""
        if self.mask is None:
            return list(self.features)
        return [features[mask] for features, mask in zip(self.features, self.mask)]


@dataclass(frozen=True)
class Conditioning:
    """What the decoder is given of the text, the same for all scales.

    Args:
        start: `[B, 1, C]`, the first token.
        condition: fp32 `[B, C]`, the pooled text.
        modulation: fp32 `[B, 1, 6, C]`, for all layers alike.
        memory: `[B, n, C]`, what cross-attention attends to.
        mask: bool `[B, 1, 1, n]` or None, as attention functions take it.
        memories: keys and values `[B, H, n, D]` of the memory for each layer; empty where each forward makes them anew.
    """

    start: Tensor
    condition: Tensor
    modulation: Tensor
    memory: Tensor
    mask: Tensor | None = None
    memories: tuple[tuple[Tensor, Tensor], ...] = ()

    def holding(self, memories: tuple[tuple[Tensor, Tensor], ...]) -> Conditioning:
        """With the keys and values of all layers."""
        return replace(self, memories=memories)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


class TextPool(nn.Module):
    """One learned query per head that attends to the text."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        channels, self.heads = config.hidden_size, config.pool_heads
        self.query = nn.Parameter(torch.zeros(1, self.heads, channels // self.heads))
        self.kv_proj = nn.Linear(config.text_channels, 2 * channels, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, C]` of text `[B, n, text_channels]`."""
        keys, values = keys_values(self.kv_proj, self.v_bias, text, self.heads)
        query = self.query[:, :, None].to(keys.dtype).expand(len(text), -1, -1, -1)
        pooled = text_attention(query, keys, values, mask)
        return self.proj(pooled.flatten(1))


def keys_values(layer: nn.Linear, v_bias: Tensor, memory: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, heads, n, D]` of a memory `[B, n, C]`; keys have no bias."""
    bias = torch.cat([torch.zeros_like(v_bias), v_bias])
    both = F.linear(memory.to(layer.weight.dtype), layer.weight, bias).unflatten(-1, (2, heads, -1))
    keys, values = both.permute(2, 0, 3, 1, 4)
    return keys, values


def text_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, H, T, D]` of queries `[B, H, T, D]` over the text; the mask is bool `[B, 1, 1, n]` or None.

    The released code rounds fp32 to bfloat16 here, for its flash attention kernels; we keep the dtype of the weights.
    """
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


class TextConditioner(nn.Module):
    """Makes of text features all that the decoder is given of them."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        channels, self.eps = config.hidden_size, config.norm_eps
        self.unconditional = nn.Parameter(torch.zeros(config.text_max_length, config.text_channels))
        self.norm = nn.Parameter(torch.ones(config.text_channels))
        self.pool = TextPool(config)
        self.memory_in = nn.Linear(config.text_channels, channels)
        self.memory_out = nn.Linear(channels, channels)
        self.start = nn.Parameter(torch.zeros(1, 1, channels))
        self.modulation = nn.Linear(channels, 6 * channels)

    def forward(self, text: Text) -> Conditioning:
        """Shapes as in `Conditioning`."""
        mask = None if text.mask is None else text.mask[:, None, None]
        features = text.features.float()
        features = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + self.eps) * self.norm.float()
        features = features.to(self.memory_in.weight.dtype)
        pooled = self.pool(features, mask)
        memory = self.memory_out(F.gelu(self.memory_in(features), approximate="tanh"))
        modulation = linear_fp32(self.modulation, F.silu(pooled.float())).unflatten(-1, (1, 6, -1))
        return Conditioning(pooled[:, None] + self.start, pooled.float(), modulation, memory, mask)

    def without_prompt(self, lengths: Sequence[int]) -> Text:
        """The text that stands for none, as long as each prompt.

        Raises:
            ValueError: a prompt longer than the model has rows for.
        """
        rows = len(self.unconditional)
        for length in lengths:
            if length > rows:
                raise ValueError(f"a prompt of {length} tokens: this model takes {rows} at most; shorten it")
        return Text.of([self.unconditional[:length] for length in lengths])
