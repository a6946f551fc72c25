"""The Infinity decoder: layers over the tokens of one scale, or of all scales at once in training.

Spec: key layout and arithmetic of FoundationVision/Infinity (infinity/models); paper arXiv 2412.04431.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmkv.models.infinity.attention import CrossAttention, SelfAttention
from mmkv.models.infinity.conditioning import Conditioning, Text, TextConditioner, TextPool
from mmkv.models.infinity.configuration import InfinityConfig
from mmkv.models.infinity.rotary import rotary_table
from mmkv.models.infinity.schedules import Schedule


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh)."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


class InfinityLayer(nn.Module):
    """One decoder layer: self-attention and feed-forward modulated by the text, and cross-attention to it between.

    Args:
        config: of the model.
        layer_idx: its index.
    """

    def __init__(self, config: InfinityConfig, layer_idx: int):
        super().__init__()
        channels, self.eps = config.hidden_size, config.norm_eps
        self.self_attn = SelfAttention(config, layer_idx)
        self.cross_attn = CrossAttention(config)
        self.cross_norm = nn.LayerNorm(channels, eps=config.norm_eps)
        self.mlp = FeedForward(config)
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, channels))

    def forward(self, x: Tensor, text: Conditioning, remembered: tuple[Tensor, Tensor], **attention) -> Tensor:
        """fp32 `[B, T, C]` of hidden states `x`, fp32 `[B, T, C]`; `attention` as `SelfAttention` takes it."""
        gains = (self.modulation.float() + text.modulation).unbind(2)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = gains
        x = x + self.self_attn(modulated(x, scale1, shift1, self.eps), **attention) * gamma1
        norm = self.cross_norm
        normed = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), self.eps)
        x = x + self.cross_attn(normed, remembered, text.mask).float()
        return x + self.mlp(modulated(x, scale2, shift2, self.eps)) * gamma2


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then `* (1 + scale) + shift`; fp32."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (scale + 1) + shift


class InfinityPreTrainedModel(PreTrainedModel):
    """What the models of the family share: initial weights, and what transformers asks of a model."""

    config_class = InfinityConfig
    base_model_prefix = "model"
    _no_split_modules = ["InfinityLayer"]  # noqa: RUF012  (transformers' own convention)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TextPool):
            nn.init.trunc_normal_(module.query, std=std)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, TextConditioner):
            nn.init.trunc_normal_(module.unconditional, std=1.2 / self.config.text_channels**0.5)
            nn.init.trunc_normal_(module.start, std=std)
            nn.init.ones_(module.norm)
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
            nn.init.constant_(module.log_scale, torch.tensor(4.0).log().item())
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, InfinityLayer):
            nn.init.normal_(module.modulation, std=self.config.hidden_size**-0.5)


class InfinityModel(InfinityPreTrainedModel):
    """The decoder stack, with the conditioning that its layers share.

    Args:
        config: of the model.
    """

    def __init__(self, config: InfinityConfig):
        super().__init__(config)
        self.conditioner = TextConditioner(config)
        self.level_embed = nn.Embedding(config.max_scales, config.hidden_size)
        self.layers = nn.ModuleList(InfinityLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def condition(self, text: Text) -> Conditioning:
        """What the layers are given of a text, with the keys and values of all of them: made once for all scales."""
        made = self.conditioner(text)
        return made.holding(tuple(layer.cross_attn.remember(made.memory) for layer in self.layers))

    def forward(
        self,
        inputs_embeds: Tensor,
        text: Conditioning,
        schedule: Schedule,
        scale: int | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        last: bool = False,
        guidance: tuple[float, tuple[int, ...]] | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states fp32 `[B, T, C]` of the tokens of one scale, or of all.

        Args:
            inputs_embeds: `[B, T, C]`, the embedded running sum (of the first scale: `text.start`).
            text: of the batch.
            schedule: of the image.
            scale: index of the scale whose tokens these are; None for those of all, of which none sees a later scale.
            past_key_values: transformers' cache of the scales before.
            use_cache: keep keys and values; the config's where None.
            last: these are the last scale's, whose keys and values nobody will ask for: they are not kept.
            guidance: (strength, layers) of classifier-free guidance on hidden states behind these layers; the batch is then the
                conditional rows, followed by the unconditional ones.
        """
        scales = range(len(schedule)) if scale is None else range(scale, scale + 1)
        self._check(inputs_embeds, schedule, scales)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and scale is not None:
            past_key_values = DynamicCache(config=self.config)
        tokens = torch.tensor(schedule.tokens[scales.start : scales.stop])
        level = torch.arange(scales.start, scales.stop).repeat_interleave(tokens).to(inputs_embeds.device)
        attention = dict(
            table=rotary_table(schedule, scales, self.config.head_dim, inputs_embeds.device),
            past_key_values=past_key_values,
            mask=level[:, None] >= level if scale is None else None,
            last=last,
        )
        if attention["mask"] is not None:
            attention["mask"] = attention["mask"][None, None]
        hidden = inputs_embeds.float() + self.level_embed(level).float()
        for index, layer in enumerate(self.layers):
            remembered = text.memories[index] if text.memories else layer.cross_attn.remember(text.memory)
            hidden = layer(hidden, text, remembered, **attention)
            if guidance is not None and index in guidance[1]:
                hidden = guided(hidden, guidance[0]).repeat(2, 1, 1)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _check(self, embeds: Tensor, schedule: Schedule, scales: range) -> None:
        if len(schedule) > self.config.max_scales or scales.stop > len(schedule):
            raise ValueError(
                f"scale {scales.stop - 1} of {len(schedule)}: this model has levels for {self.config.max_scales} scales"
            )
        expected = sum(schedule.tokens[scales.start : scales.stop])
        if embeds.shape[1] != expected:
            raise ValueError(
                f"{embeds.shape[1]} tokens for scales {scales.start}-{scales.stop - 1}, which have {expected}"
            )


def guided(both: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: the conditional half of `[2 * B, ...]`, away from the unconditional by `strength` (1: none)."""
    conditional, unconditional = both.chunk(2)
    return strength * conditional + (1 - strength) * unconditional
