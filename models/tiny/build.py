"""The untrained checkpoint: configuration, word-level tokenizer and processor of the tiny Qwen2.5-VL."""

from __future__ import annotations

from mmkv.models.tiny.words import SPECIAL, vocabulary

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
VOCAB = 128  # rows of the embedding; ids past the vocabulary are unused


def make_config():
    """Qwen2_5_VLConfig: 6 x 256 language model, 3 x 128 vision tower, 64 x 64 frames -> 16 tokens per 2 frames."""
    from transformers import Qwen2_5_VLConfig

    ids = {w: i for i, w in enumerate(vocabulary())}
    text = dict(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]},
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=128, intermediate_size=256, num_heads=2, patch_size=8, spatial_merge_size=2,
        temporal_patch_size=2, tokens_per_second=2, window_size=32, out_hidden_size=256, fullatt_block_indexes=[1, 2],
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def make_processor():
    """Qwen2_5_VLProcessor: lower-cases, splits punctuation, one token per word; frames become 64 x 64."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    words = vocabulary()
    if len(words) > VOCAB:
        raise ValueError(f"{len(words)} words do not fit {VOCAB} rows")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # whitespace, and every punctuation mark by itself
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False, model_max_length=32768,
        padding_side="left",
    )  # fmt: skip
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    pixels = dict(
        patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
    )  # fmt: skip
    frames = dict(fps=2, min_frames=2, max_frames=2048, do_sample_frames=False, cap_pixels_per_frame=False)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels, **frames),
        chat_template=CHAT_TEMPLATE,
    )


def make_model():
    """A freshly initialised Qwen2_5_VLForConditionalGeneration in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(make_config()).float().eval()
