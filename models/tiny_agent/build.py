"""The untrained checkpoint: the bundled tiny model's configuration with the agent's words, its tokenizer and processor."""

from __future__ import annotations

from mmkv.models.tiny import build
from mmkv.models.tiny_agent.screens import SIZES
from mmkv.models.tiny_agent.words import GLUE, SPECIAL, WORD, vocabulary

VOCAB = 128  # rows of the embedding; ids past the vocabulary are unused
CHAT_TEMPLATE = build.CHAT_TEMPLATE


def make_config():
    """Qwen2_5_VLConfig of the tiny model; it says that its agent format is "tiny"."""
    config = build.make_config()
    config.text_config.vocab_size = VOCAB
    config.agent_format = "tiny"
    return config


def make_tokenizer():
    """PreTrainedTokenizerFast: lower-cases, one token per word of `WORD`; decoding gives the agent grammar back."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    if len(words) > VOCAB:
        raise ValueError(f"{len(words)} words do not fit {VOCAB} rows")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.pattern), behavior="removed", invert=True)
    joined = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    core.decoder = decoders.Sequence([*joined, *(decoders.Replace(old, new) for old, new in GLUE)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False, model_max_length=32768,
        padding_side="left",
    )  # fmt: skip
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


def make_processor():
    """Qwen2_5_VLProcessor: screens of `SIZES` stay as they are, a token is 16 x 16 px."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    areas = [width * height for width, height in SIZES]
    pixels = dict(
        patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": min(areas), "longest_edge": max(areas)},
    )  # fmt: skip
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**pixels, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    )


def make_model():
    """A freshly initialised Qwen2_5_VLForConditionalGeneration in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(make_config()).float().eval()
