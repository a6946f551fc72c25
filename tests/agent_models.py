"""Tiny random agents: models of `random_models` with processors of their own, and screens to show them.

The tokenizer writes a character as a token. Further ids decode to two characters, which encode to two tokens, so that an answer
of a random model is seldom what its text encodes to: what is kept of it has to end there.
"""

from __future__ import annotations

import random_models as rm
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor

QWEN = {"<|im_start|>": 4, "<|im_end|>": 5, "<|vision_start|>": rm.VISION_START, "<|vision_end|>": rm.VISION_END,
        "<|image_pad|>": rm.IMAGE, "<|video_pad|>": rm.VIDEO}  # fmt: skip
KIMI = {"<|im_system|>": 4, "<|im_user|>": 5, "<|im_assistant|>": 6, "<|im_middle|>": 7, "<|im_end|>": 8,
        "<|media_begin|>": rm.VISION_START, "<|media_end|>": rm.VISION_END, "<|media_content|>": 9,
        "<|media_placeholder|>": rm.IMAGE}  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: dict[str, int], template: str) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **special}
    characters = ["\n", *map(chr, range(32, 127))]
    vocab |= {c: rm.FIRST_TEXT + i for i, c in enumerate(characters)}
    taken = set(vocab.values())
    pairs = (a + b for a in "abcdefgh" for b in "klmnopqr")
    vocab |= {next(pairs): i for i in range(rm.VOCAB) if i not in taken}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<pad>", "<bos>", "<eos>", *special)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
        padding_side="left",
    )


def images(least: int = 8 * 8 * 4, most: int = 8 * 8 * 20) -> Qwen2VLImageProcessor:
    """4 to 20 tokens a picture of the tiny towers, 8 x 8 pixels a token."""
    return Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": least, "longest_edge": most}
    )


class QwenProcessor:
    """Expands placeholders in the text as Qwen's processors do; what an agent is compared with."""

    def __init__(self, **pixels):
        self.tokenizer, self.image_processor = tokenizer(QWEN, QWEN_TEMPLATE), images(**pixels)

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text, images):
        given = dict(self.image_processor(images=images, return_tensors="pt"))
        for h, w in given["image_grid_thw"][:, 1:].tolist():
            text = text.replace("<|image_pad|>", "<|here|>" * (h * w // 4), 1)
        ids = self.tokenizer(text.replace("<|here|>", "<|image_pad|>"), return_tensors="pt")
        given |= dict(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        return given | dict(mm_token_type_ids=(ids["input_ids"] == rm.IMAGE).long())


def make(family: str, **pixels):
    """(model, processor) of "qwen2_5_vl" or "opencua"."""
    model = rm.make(family)
    if family == "opencua":
        from mmkv.models.opencua import OpenCUAProcessor
        from mmkv.models.opencua.tokenizer import TEMPLATE

        return model, OpenCUAProcessor(images(**pixels), tokenizer(KIMI, TEMPLATE))
    return model, QwenProcessor(**pixels)


def screen(seed: int, width: int = 40, height: int = 24) -> Image.Image:
    """A screenshot of coloured noise."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLED = dict(do_sample=True, temperature=2.0)  # a random model's greedy answer is one token again and again


def from_scratch(model, processor, messages, new: int, seed: int | None = None) -> tuple[str, int]:
    """What `generate` answers to a chat without any cache of before, and the tokens of its prompt.

    Args:
        seed: of an answer that is sampled as `SAMPLED` says; None for greedy.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = [
        p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] == "image"
    ]
    given = processor(text=text, images=pictures)
    given = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
             or (k == "mm_token_type_ids" and model.config.model_type != "opencua" and takes(model, k))}  # fmt: skip
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=new, **(dict(do_sample=False) if seed is None else SAMPLED))
    answer = out[0, given["input_ids"].shape[1] :]
    grid = given["image_grid_thw"]
    extra = int((grid.prod(-1) // 4).sum()) - len(grid) if model.config.model_type == "opencua" else 0
    length = given["input_ids"].shape[1] + extra
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip(), length


def takes(model, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters
