"""Tiny random-weight models with explicit configs, and prompts for them, made without any code of the project.

A prompt is a list of parts: an int (a text token), `Image(...)` or `Video(...)`. `inputs(model, prompts)` turns a batch of
prompts into what `generate` takes, left-padded. Weights are drawn wide (std 0.15) so that attention is far from uniform
and a mistake in it shows.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import transformers as tf

VOCAB, PAD, BOS, EOS = 160, 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 10, 11, 12, 13
FIRST_TEXT = 20  # ids below have a meaning


@dataclass(frozen=True)
class Image:
    """Qwen: grid (1, h, w) in patches. Others: height and width in pixels, for LongVA and InternVL in tiles of 32."""

    height: int
    width: int


@dataclass(frozen=True)
class Video:
    """Qwen: grid (frames, h, w) in patches. LLaVA: frames, the same in a whole batch. Others: frames. The rest is ignored."""

    frames: int
    height: int = 8
    width: int = 8


def _text(head_dim=16, layers=3, heads=4, kv_heads=2, **more):
    hidden = head_dim * heads
    return dict(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=65536, initializer_range=0.15,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    ) | more  # fmt: skip


def _mrope(head_dim):
    return dict(
        rope_type="default", rope_theta=1e4, mrope_section=[head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3]
    )


_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)


def qwen2_5_vl(head_dim=16, **more):
    text = _text(head_dim, rope_parameters=_mrope(head_dim), **more)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=text["hidden_size"], window_size=16, fullatt_block_indexes=[1], tokens_per_second=2,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IDS))


def qwen2_vl(head_dim=16, **more):
    text = _text(head_dim, rope_parameters=_mrope(head_dim), **more)
    vision = dict(
        depth=2, embed_dim=32, hidden_size=text["hidden_size"], num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **_IDS))


def qwen3_vl(head_dim=16, **more):
    rope = _mrope(head_dim) | dict(mrope_interleaved=True, mrope_section=[4, 2, 2])
    text = _text(head_dim, rope_parameters=rope, **more)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=text["hidden_size"], deepstack_visual_indexes=[0, 1], num_position_embeddings=64,
    )  # fmt: skip
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS))


def llava_onevision(head_dim=16, **more):
    vision = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(head_dim, model_type="qwen2", **more),
        image_token_index=IMAGE, video_token_index=VIDEO, image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32], [96, 96]],
        tie_word_embeddings=False,
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config)


def llava(head_dim=16, **more):
    """CLIP's CLS token, 36 patches, features of the last block but one; images alone."""
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=48, patch_size=8,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=_text(head_dim, model_type="llama", **more), image_token_id=IMAGE,
        image_token_index=IMAGE, image_seq_length=36, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


def longva(head_dim=16, **more):
    """CLIP tiles of 4x4 patches, 4 tokens each; features of the last block but one; images of tiles, and videos."""
    from mmkv.models.longva import LongVAConfig, LongVAForConditionalGeneration

    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
    )  # fmt: skip
    config = LongVAConfig(
        vision_config=vision, text_config=_text(head_dim, **more), image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip
    return LongVAForConditionalGeneration(config)


def opencua(head_dim=16, **more):
    """Qwen2.5-VL's tower before one-axis positions; images alone, a video is a row of them."""
    from mmkv.models.opencua import OpenCUA, OpenCUAConfig

    text = _text(head_dim, rope_parameters=dict(rope_type="default", rope_theta=1e4), **more)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=text["hidden_size"], window_size=16, fullatt_block_indexes=[1], tokens_per_second=2,
    )  # fmt: skip
    return OpenCUA(OpenCUAConfig(vision_config=vision, text_config=text, media_placeholder_token_id=IMAGE))


def internvl(head_dim=16, **more):
    """A tower with layer scale and a CLS token, 4x4 patches folded to 4 tokens; a video is a row of pictures."""
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=[32, 32],
        patch_size=[8, 8], layer_scale_init_value=0.7,
    )  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision, text_config=_text(head_dim, model_type="qwen2", **more), image_token_id=IMAGE,
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.InternVLForConditionalGeneration(config)


def qwen2(**more):
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**_text(**more)))


def qwen3(**more):
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_text(**more)))


def llama(**more):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_text(**more)))


def mistral(**more):
    return tf.MistralForCausalLM(tf.MistralConfig(**_text(**{"sliding_window": None} | more)))


def gemma2(**more):
    """Softcap on scores, a sliding window of 24 in every second layer. Eager: sdpa would leave the softcap out."""
    more = (
        dict(sliding_window=24, attn_logit_softcapping=3.0, final_logit_softcapping=None, query_pre_attn_scalar=16)
        | more
    )
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**_text(**more), attn_implementation="eager"))


def gemma3_text(**more):
    more = (
        dict(
            sliding_window=24,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )
        | more
    )
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_text(**more)))


def gpt_oss(**more):
    """Sink logits in every layer, a sliding window of 24 in every second one."""
    more = (
        dict(
            sliding_window=24,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"] * 2,
            layers=4,
        )
        | more
    )
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**_text(**more)))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=1.0)
    return model


VLMS = {f.__name__: f for f in (qwen2_5_vl, llava_onevision, qwen2_vl, qwen3_vl, llava, longva, internvl, opencua)}
TEXTS = {f.__name__: f for f in (qwen2, llama, mistral, qwen3, gemma2, gemma3_text, gpt_oss)}
FAMILIES = VLMS | TEXTS
WINDOWED = ("gemma2", "gemma3_text", "gpt_oss")


def make(family: str, seed: int = 0, attn: str | None = None, **more):
    """A model of a family, evaluation mode, fp32, the same weights for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**more).eval()
    if attn is not None:
        model.set_attn_implementation(attn)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = VOCAB  # never produced: lengths are set by the tests
    return model


def words(count: int, seed: int = 0) -> list[int]:
    """Text tokens."""
    return torch.randint(FIRST_TEXT, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def is_vlm(model) -> bool:
    return hasattr(model.config, "vision_config")


def inputs(model, prompts: list[list], seed: int = 3, pad_to: int = 0) -> dict:
    """Keywords for `model.generate` and `model.forward` for a batch of prompts, padded on the left."""
    rows_of = {
        "llava_onevision": _llava,
        "llava": _llava_1_5,
        "longva": _longva,
        "internvl": _internvl,
        "opencua": _opencua,
    }
    make_row = rows_of.get(model.config.model_type, _qwen)
    generator = torch.Generator().manual_seed(seed)
    rows, media = [], {}
    for prompt in prompts:
        row = []
        for part in prompt:
            row += [part] if isinstance(part, int) else make_row(model, part, media, generator)
        rows.append(row)
    length = max(pad_to, *map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    out = dict(input_ids=ids, attention_mask=mask)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        out["mm_token_type_ids"] = (ids == IMAGE) + 2 * (ids == VIDEO)
    for name, values in media.items():
        out[name] = (
            torch.stack(values) if name in ("image_grid_thw", "video_grid_thw", "image_sizes") else torch.cat(values)
        )
    return out


def _qwen(model, part, media, generator) -> list[int]:
    kind = model.config.model_type
    grid = (1, part.height, part.width) if isinstance(part, Image) else (part.frames, part.height, part.width)
    t, h, w = grid
    pixels = torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=generator)
    name = "" if isinstance(part, Image) else "_videos"
    media.setdefault(f"pixel_values{name}", []).append(pixels)
    media.setdefault("image_grid_thw" if isinstance(part, Image) else "video_grid_thw", []).append(torch.tensor(grid))
    if isinstance(part, Image):
        return [VISION_START] + [IMAGE] * (h * w // 4) + [VISION_END]
    if kind == "qwen2_5_vl":
        media.setdefault("second_per_grid_ts", []).append(torch.tensor([1.0]))
    if kind == "qwen3_vl":  # a time stamp and a block for each temporal patch
        return [x for i in range(t) for x in [FIRST_TEXT + i, VISION_START] + [VIDEO] * (h * w // 4) + [VISION_END]]
    return [VISION_START] + [VIDEO] * (t * h * w // 4) + [VISION_END]


def _llava(model, part, media, generator) -> list[int]:
    if isinstance(part, Video):
        pixels = torch.randn(1, part.frames, 3, 32, 32, generator=generator)
        media.setdefault("pixel_values_videos", []).append(pixels)
        return [VIDEO] * (part.frames * 4 + 1)
    size = torch.tensor([part.height, part.width])
    tiles = _llava_tiles(model, part)
    pixels = torch.randn(1, tiles + 1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        count = llava_image_tokens(model, pixels, size[None])
    full = torch.zeros(1, 10, 3, 32, 32)  # up to 9 tiles and the base; the model cuts what is padding
    full[:, : tiles + 1] = pixels
    media.setdefault("pixel_values", []).append(full)
    media.setdefault("image_sizes", []).append(size)
    return [IMAGE] * count


def _llava_1_5(model, part, media, generator) -> list[int]:
    media.setdefault("pixel_values", []).append(torch.randn(1, 3, 48, 48, generator=generator))
    return [IMAGE] * 36


def _tiles(part) -> int:
    """Tiles of 32 pixels of an image, frames of a video."""
    return part.frames if isinstance(part, Video) else -(-part.height // 32) * -(-part.width // 32)


def _longva(model, part, media, generator) -> list[int]:
    count = _tiles(part)
    video = isinstance(part, Video)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    media.setdefault("pixel_values_videos" if video else "pixel_values", []).append(pixels)
    media.setdefault("video_frames" if video else "image_tiles", []).append(torch.tensor([count]))
    return [VIDEO if video else IMAGE] * (4 * count)


def _internvl(model, part, media, generator) -> list[int]:
    count = _tiles(part)
    media.setdefault("pixel_values", []).append(torch.randn(count, 3, 32, 32, generator=generator))
    if isinstance(part, Image):
        return [VISION_START] + [IMAGE] * (4 * count) + [VISION_END]
    return [x for i in range(count) for x in [FIRST_TEXT + i % 9, VISION_START] + [IMAGE] * 4 + [VISION_END]]


def _opencua(model, part, media, generator) -> list[int]:
    """Expanded already, as processors of other families do it."""
    row = []
    for i in range(part.frames if isinstance(part, Video) else 1):
        row += [FIRST_TEXT + i % 9] + _qwen(model, Image(part.height, part.width), media, generator)
    return row


def _llava_tiles(model, part) -> int:
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    return image_size_to_num_patches([part.height, part.width], model.config.image_grid_pinpoints, 32) - 1


def llava_image_tokens(model, pixels, sizes) -> int:
    """Tokens of one image, counted by running the model's own tower and packing."""
    features = model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    return sum(f.shape[0] for f in features)


def second_prompt(model, media_tokens: int = 96) -> list:
    """Another prompt: for a VLM an image of another size, and a video."""
    if not is_vlm(model):
        return words(31, 5)
    if model.config.model_type == "llava":
        return words(3, 3) + [Image(48, 48)] + words(9, 4)
    if model.config.model_type == "llava_onevision":
        return words(3, 3) + [Image(50, 20), FIRST_TEXT, Video(media_tokens // 4)] + words(4, 4)
    if model.config.model_type in ("longva", "internvl"):
        return words(3, 3) + [Image(64, 64), FIRST_TEXT, Video(3)] + words(4, 4)
    return words(9, 3) + [Image(8, 4), FIRST_TEXT, Video(3, 4, 8)] + words(4, 4)


def default_prompt(model, media_tokens: int = 96) -> list:
    """Text, a video (for a VLM), text: about `media_tokens` + 12 tokens."""
    if not is_vlm(model):
        return words(media_tokens + 12)
    if model.config.model_type == "llava":
        return words(5, 1) + [Image(48, 48), FIRST_TEXT] * max(media_tokens // 36, 1) + words(7, 2)
    if model.config.model_type in ("llava_onevision", "longva"):
        video = Video(max(media_tokens // 4, 1))
    elif model.config.model_type == "internvl":
        video = Video(max(media_tokens // 8, 1))  # three tokens of text go with each frame of four
    else:
        video = Video(max(media_tokens // 16, 1), 8, 8)
    return words(5, 1) + [video] + words(7, 2)


MODES = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "sample": dict(do_sample=True, top_k=20),
    "lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "returns": dict(do_sample=True, num_return_sequences=2, top_k=20),
}


def generate(model, given: dict, mode: str = "greedy", new: int = 8, **more):
    """Tokens (and whatever `more` asks for) of a run with a fixed seed."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=new, **MODES[mode], **more)
