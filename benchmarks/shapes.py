"""Random-weight video-language models of given shapes, and prompts of so many vision tokens; for timing only."""

from __future__ import annotations

import inspect

import torch
import transformers as tf

SMALL = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2
)
LARGE = dict(  # Qwen2.5 7B
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
)
VOCAB, IMAGE, VIDEO, START, END, WORD = 1000, 10, 11, 12, 13, 20
SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
FRAME = 64  # vision tokens of a frame, 8 x 8
BEFORE, BEHIND = 16, 48  # tokens of text
TOWER = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2)  # small, so that the decoder takes the time


def qwen2_5_vl(shape: dict) -> tf.PreTrainedModel:
    """Qwen2.5-VL with a decoder of this shape and a very small tower."""
    channels = shape["hidden_size"] // shape["num_attention_heads"]
    section = [channels // 8, channels // 16 * 3, channels // 16 * 3]
    text = dict(
        vocab_size=VOCAB, max_position_embeddings=1 << 17, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=section), **SPECIAL,
    ) | shape  # fmt: skip
    vision = dict(
        patch_size=4, spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1],
        out_hidden_size=shape["hidden_size"], tokens_per_second=2,
    ) | TOWER  # fmt: skip
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def llava_onevision(shape: dict) -> tf.PreTrainedModel:
    """LLaVA-OneVision with a decoder of this shape and a very small tower."""
    text = dict(
        model_type="qwen2", vocab_size=VOCAB, max_position_embeddings=1 << 17, tie_word_embeddings=False, **SPECIAL
    )
    vision = dict(
        model_type="siglip_vision_model", image_size=128, patch_size=8, hidden_size=TOWER["hidden_size"],
        intermediate_size=TOWER["intermediate_size"], num_hidden_layers=TOWER["depth"], num_attention_heads=2,
    )  # fmt: skip
    config = tf.LlavaOnevisionConfig(
        text_config=text | shape, vision_config=vision, image_grid_pinpoints=[[128, 128]], tie_word_embeddings=False,
        image_token_index=IMAGE, video_token_index=VIDEO, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config)


MODELS = {"Qwen2.5-VL": qwen2_5_vl, "LLaVA-OneVision": llava_onevision}


def make(name: str, shape: dict, device: str, dtype: torch.dtype) -> tf.PreTrainedModel:
    """A model in evaluation mode; the same weights each time."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MODELS[name](shape).eval()
    finally:
        torch.set_default_dtype(default)


def tower_of(model) -> torch.nn.Module:
    """The module that reads the pixels."""
    inner = model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


def video(model, tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of a prompt: text, a video of about so many vision tokens (a multiple of `FRAME`), text."""
    frames = max(tokens // FRAME, 1)
    generator = torch.Generator().manual_seed(1)
    if hasattr(model.model, "visual"):
        grid = (frames, 16, 16)
        media = dict(
            pixel_values_videos=torch.randn(frames * 256, 3 * 2 * 4 * 4, generator=generator),
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=torch.tensor([1.0]),
        )
        row = [START] + [VIDEO] * (frames * FRAME) + [END]
    else:
        media = dict(pixel_values_videos=torch.randn(1, frames, 3, 128, 128, generator=generator))
        row = [VIDEO] * (frames * FRAME + 1)  # a newline token at the end
    words = torch.randint(WORD, VOCAB, (BEFORE + BEHIND,), generator=generator).tolist()
    ids = torch.tensor([words[:BEFORE] + row + words[BEFORE:]])
    out = dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | media
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        out["mm_token_type_ids"] = (ids == VIDEO).long() * 2
    out["pixel_values_videos"] = out["pixel_values_videos"].to(model.dtype)
    return {name: value.to(model.device) for name, value in out.items()}
