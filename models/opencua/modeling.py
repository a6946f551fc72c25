"""OpenCUA (arXiv 2508.09123): Qwen2.5-VL's vision tower before a Qwen2 decoder with one-axis rotary positions."""

from __future__ import annotations

import torch
from transformers import Qwen2Model
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLPreTrainedModel,
)

from mmkv.models.expansion import expand, image_tokens, images_of_rows
from mmkv.models.opencua.configuration import OpenCUAConfig


class OpenCUAPreTrainedModel(Qwen2_5_VLPreTrainedModel):
    """What the two classes below share: how weights are made, and how ids are expanded."""

    config: OpenCUAConfig
    config_class = OpenCUAConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Qwen2DecoderLayer", "Qwen2_5_VLVisionBlock"]  # noqa: RUF012

    def expanded(self, ids: torch.Tensor, mask: torch.Tensor | None, grid: torch.Tensor | None):
        """Ids and mask with a placeholder for each token of each image: see `mmkv.models.expansion.expand`.

        Args:
            ids: int64 `[B, T]`.
            mask: `[B, S]`, or None.
            grid: int64 `[images, 3]`, or None without images.
        """
        if grid is None:
            return ids, mask
        counts = image_tokens(grid, self.config.vision_config.spatial_merge_size)
        return expand(
            ids, mask, counts, self.config.media_placeholder_token_id, self.config.text_config.pad_token_id or 0
        )


class OpenCUAModel(OpenCUAPreTrainedModel):
    """The tower and the decoder, without the head.

    Args:
        config: an `OpenCUAConfig`.
    """

    def __init__(self, config: OpenCUAConfig):
        super().__init__(config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = Qwen2Model._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Features `[t h w / 4, C]` of each image.

        Args:
            pixel_values: `[sum of t h w, 1176]`, patches.
            image_grid_thw: int64 `[images, 3]`, frames, rows and columns of patches.
        """
        rows = self.visual(pixel_values.to(self.visual.dtype), grid_thw=image_grid_thw).pooler_output
        return list(rows.split(image_tokens(image_grid_thw, self.config.vision_config.spatial_merge_size)))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As `OpenCUA.forward`, without logits."""
        grid = _grid(image_grid_thw, grid_thws)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if inputs_embeds is None:
            if pixel_values is not None:
                if grid is None:
                    raise ValueError("pixel_values without grid_thws; the image processor gives both")
                given = input_ids.shape[1]
                input_ids, attention_mask = self.expanded(input_ids, attention_mask, grid)
                if position_ids is not None and position_ids.shape[-1] == given != input_ids.shape[1]:
                    raise ValueError(
                        f"position_ids for {given} tokens, which images make {input_ids.shape[1]}; leave position_ids out"
                    )
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                inputs_embeds = self._spliced(input_ids, inputs_embeds, pixel_values, grid)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _spliced(self, ids, embeds, pixels, grid) -> torch.Tensor:
        """Embeddings `[B, T, C]` with image features in place of the placeholders'."""
        rows = torch.cat(self.get_image_features(pixels, grid)).to(embeds)
        places = (ids == self.config.media_placeholder_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(places, rows)


class OpenCUA(OpenCUAPreTrainedModel, GenerationMixin):
    """OpenCUA with its language-modelling head: one placeholder stands for an image; inside, one for each of its tokens.

    Spec: xlangai/OpenCUA-7B (its README and vLLM's port); positions are 0, 1, 2 ... over the expanded sequence, images included.

    Where we differ from the published remote code: ids may be expanded already, and rows of a batch that images leave shorter
    than others are padded on the left.

    Args:
        config: an `OpenCUAConfig`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OpenCUAConfig):
        super().__init__(config)
        self.model = OpenCUAModel(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T', V]` of the expanded sequence.

        Args:
            input_ids: int64 `[B, T]`, one placeholder for each image, or one for each of its tokens.
            attention_mask: `[B, past + T]`; expanded like the ids.
            position_ids: `[B, T']`; 0 ... T' - 1 behind the past by default, images and text alike.
            past_key_values: a cache.
            inputs_embeds: `[B, T', C]` instead of ids, images in place.
            labels: int64 `[B, T']`, -100 where nothing is learned.
            use_cache: whether a cache is filled.
            pixel_values: `[sum of t h w, 1176]`, patches of all images in order through the batch.
            image_grid_thw: int64 `[images, 3]`, frames, rows and columns of patches; or by its official name:
            grid_thws: the same.
            logits_to_keep: logits of that many last tokens alone; 0 for all.

        Raises:
            ValueError: placeholders that fit neither the images nor their tokens; both names of the grid.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, pixel_values=pixel_values, image_grid_thw=image_grid_thw,
            grid_thws=grid_thws, **kwargs,
        )  # fmt: skip
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            attentions=out.attentions,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """As transformers' `generate`; the prompt in what is returned is the one that was given, its images not expanded.

        Args:
            inputs: int64 `[B, T]`, the prompts' ids; or `input_ids`.
            args, kwargs: of `generate`, with pixel_values and grid_thws (or image_grid_thw) of the forward. `max_length` counts
                every token of an image. With a cache in `past_key_values`, ids are those of the whole sequence, expanded, and
                pixels those of the images behind the cached tokens.

        Returns:
            ids `[B, T + new]`, or what `return_dict_in_generate` asks for, with `sequences` so.
        """
        given = kwargs.pop("input_ids", None) if inputs is None else inputs
        grid = _grid(kwargs.pop("image_grid_thw", None), kwargs.pop("grid_thws", None))
        if given is None or kwargs.get("pixel_values") is None:
            more = {} if grid is None else {"image_grid_thw": grid}
            return super().generate(given, *args, **more, **kwargs)
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        new, mask = self.expanded(given[:, seen:], kwargs.pop("attention_mask", None), grid)
        ids = torch.cat([given[:, :seen], new], dim=1)
        out = super().generate(ids, *args, attention_mask=mask, image_grid_thw=grid, **kwargs)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        prompt = given.repeat_interleave(len(sequences) // len(given), dim=0)
        shortened = torch.cat([prompt, sequences[:, ids.shape[1] :]], dim=1)
        if isinstance(out, torch.Tensor):
            return shortened
        out.sequences = shortened
        return out

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Pixels go in once; without a cache, each time."""
        out = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            out["pixel_values"] = None
        return out

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat prompts for beams or several answers, and with them their images, which are flat in the batch."""
        pixels, grid = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        if expand_size == 1 or grid is None:
            return super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
            )
        counts = image_tokens(grid, self.config.vision_config.spatial_merge_size)
        images = images_of_rows(input_ids, counts, self.config.media_placeholder_token_id)
        grids = grid.split(images)
        kwargs["image_grid_thw"] = torch.cat([g for of_row in grids for g in [of_row] * expand_size])
        if pixels is not None:
            patches = pixels.split([int(g.prod(-1).sum()) for g in grids])
            kwargs["pixel_values"] = torch.cat([p for of_row in patches for p in [of_row] * expand_size])
        flat = {name: kwargs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in kwargs}
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, {**kwargs, **flat}


def _grid(one, other) -> torch.Tensor | None:
    """The grid by whichever of its two names it was given."""
    if one is not None and other is not None:
        raise ValueError("image_grid_thw and grid_thws are two names of one thing; give one")
    grid = other if one is None else one
    return None if grid is None else torch.as_tensor(grid)
