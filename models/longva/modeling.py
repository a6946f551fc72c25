"""`LongVAForConditionalGeneration`: CLIP, two linear layers, 2x2 pooling, Qwen2."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin, PreTrainedModel, Qwen2Model
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from mmkv.models.longva.configuration import LongVAConfig
from mmkv.models.longva.splicing import check_ids, repeated, spliced

MEDIA = ("pixel_values", "image_tiles", "pixel_values_videos", "video_frames", "mm_encoder_outputs")


class LongVAProjector(nn.Module):
    """Patches of the tower to vectors of the decoder: linear, GELU, linear (spec: `mlp2x_gelu` of the public code)."""

    def __init__(self, config: LongVAConfig):
        super().__init__()
        wide = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, wide)
        self.linear_2 = nn.Linear(wide, wide)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(hidden)))


class LongVAPreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes."""

    config_class = LongVAConfig
    config: LongVAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("CLIPEncoderLayer", "Qwen2DecoderLayer")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class LongVAModel(LongVAPreTrainedModel):
    """LongVA without its head."""

    def __init__(self, config: LongVAConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LongVAProjector(config)
        self.language_model = Qwen2Model(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, image_tiles=None, **_) -> BaseModelOutputWithPooling:
        """The tower's output; `pooler_output` is a list of `[144 tiles, C]`, one for each image.

        Args:
            pixel_values: `[sum of tiles, 3, S, S]`.
            image_tiles: int64 `[images]`, tiles of each; None for one image.
        """
        return self._features(pixel_values, image_tiles, "image_tiles", 2, "average")

    def get_video_features(self, pixel_values_videos, video_frames=None, **_) -> BaseModelOutputWithPooling:
        """The tower's output; `pooler_output` is a list of `[144 frames, C]`, one for each video.

        Args:
            pixel_values_videos: `[sum of frames, 3, S, S]`.
            video_frames: int64 `[videos]`, frames of each; None for one video.
        """
        config = self.config
        pool = config.mm_spatial_pool_stride, config.mm_spatial_pool_mode
        return self._features(pixel_values_videos, video_frames, "video_frames", *pool)

    def _features(self, pixels, counts, name: str, stride: int, mode: str) -> BaseModelOutputWithPooling:
        counts = [len(pixels)] if counts is None else [int(n) for n in counts]
        if sum(counts) != len(pixels):
            raise ValueError(f"{name}={counts} says {sum(counts)} pictures, the pixels are {len(pixels)}")
        out = self.vision_tower(pixels.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True)
        patches = out.hidden_states[self.config.vision_feature_layer][:, 1:]  # without CLS
        pooled = pool(self.multi_modal_projector(patches), stride, mode)
        out.pooler_output = [part.flatten(0, 1) for part in pooled.split(counts)]
        return out

    def forward(
        self, input_ids=None, pixel_values=None, image_tiles=None, pixel_values_videos=None, video_frames=None,
        attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, mm_encoder_outputs=None, **more
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Last hidden states `[B, T, C]`; keywords as for `LongVAForConditionalGeneration`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            check_ids(input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        ready = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            ready["image"] = self.get_image_features(pixel_values, image_tiles)
        if pixel_values_videos is not None:
            ready["video"] = self.get_video_features(pixel_values_videos, video_frames)
        for kind, features in ready.items():
            placeholder = getattr(self.config, f"{kind}_token_id")
            inputs_embeds = spliced(inputs_embeds, input_ids, placeholder, features.pooler_output, kind)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **more,
        )


class LongVAForConditionalGeneration(LongVAPreTrainedModel, GenerationMixin):
    """LongVA (arXiv 2406.16852), our own container around transformers' CLIP and Qwen2.

    Args:
        config: its sizes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongVAConfig):
        super().__init__(config)
        self.model = LongVAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids=None, pixel_values=None, image_tiles=None, pixel_values_videos=None, video_frames=None,
        attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, mm_encoder_outputs=None,
        labels=None, logits_to_keep=0, **more,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits `[B, T, V]` of a prompt whose placeholders stand for features, one placeholder a token.

        Args:
            input_ids: int64 `[B, T]`, placeholders expanded (the processor does it).
            pixel_values, image_tiles: tiles of all images `[n, 3, S, S]`, and how many each image has.
            pixel_values_videos, video_frames: frames of all videos `[n, 3, S, S]`, and how many each video has.
            attention_mask, position_ids, past_key_values, inputs_embeds, labels: as in transformers.
            mm_encoder_outputs: features in place of pixels: what `get_image_features` gives by "image", `get_video_features` by
                "video".
            logits_to_keep: of how many last tokens logits are computed, 0 for all; or int64 indices.

        Raises:
            ValueError: a sentinel such as -200 in `input_ids`, or placeholders and features that differ in number.
        """
        out = self.model(
            input_ids=input_ids, pixel_values=pixel_values, image_tiles=image_tiles, pixel_values_videos=pixel_values_videos,
            video_frames=video_frames, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **more,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Pixels enter with the prompt alone. `generate` looks for the name `kwargs` before it lets `forward`'s own pass."""
        media = {name: kwargs.pop(name) for name in MEDIA if name in kwargs}
        out = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return out | media if is_first_iteration or not kwargs.get("use_cache", True) else out

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **more):
        """Beams and several answers repeat all images of a prompt in order, where transformers would repeat each tile."""
        media = {name: more.pop(name) for name in MEDIA[:4] if more.get(name) is not None}
        before = input_ids
        ids, more = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **more)
        if expand_size > 1 and media:
            media = repeated(media, before, self.config, expand_size)
        return ids, more | media


def pool(patches: torch.Tensor, stride: int, mode: str) -> torch.Tensor:
    """Projected patches `[n, side * side, C]` to `[n, tokens, C]`: squares of stride x stride averaged, or their maximum."""
    side = int(patches.shape[1] ** 0.5)
    raster = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    kind = nn.functional.avg_pool2d if mode == "average" else nn.functional.max_pool2d
    return kind(raster, stride).flatten(2).transpose(1, 2)
