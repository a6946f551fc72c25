"""`LongVAProcessor`: text, images and videos to what LongVA's `generate` takes."""

from __future__ import annotations

import re

import torch
from PIL import Image
from transformers import BatchFeature

from mmkv.models.longva.configuration import LongVAConfig
from mmkv.models.longva.pictures import LongVAImages, LongVAVideos
from mmkv.models.longva.splicing import SENTINEL, expanded

SYSTEM = "You are a helpful assistant."
# conversation template `qwen_1_5` of the public code
CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LongVAProcessor:
    """Call it as a processor of transformers: text with `<image>` and `<video>` in it, images, videos.

    Args:
        tokenizer: Qwen2's.
        config: of the model.
    """

    image_token, video_token = "<image>", "<video>"
    chat_template = CHAT_TEMPLATE

    def __init__(self, tokenizer, config: LongVAConfig):
        self.tokenizer, self.config = tokenizer, config
        self.image_processor, self.video_processor = LongVAImages(config), LongVAVideos(config)

    def __call__(
        self, text=None, images=None, videos=None, *, do_sample_frames=False, num_frames=32, pad_to=0, video_metadata=None,
        return_tensors="pt", padding=True,
    ) -> BatchFeature:  # fmt: skip
        """`input_ids` and `attention_mask` int64 `[B, T]`, padded on the left, and the pixels of all images and videos.

        Args:
            text: a prompt or several. `<image>` and `<video>` say where images and videos belong, in order through the batch;
                where there are videos and no images, `<image>` may stand for a video, as in the public code.
            images: pictures (`PIL.Image` or uint8 arrays).
            videos: each a list of pictures or an array of them.
            do_sample_frames, num_frames: as for `LongVAVideos`.
            pad_to: at least so many tokens.
            video_metadata: accepted as other processors do; LongVA's frames carry no time.
            return_tensors: "pt".
            padding: accepted as other processors do; a batch is always padded.

        Raises:
            ValueError: no text, other numbers of places than of images or videos, another kind of tensor.
        """
        if text is None:
            raise ValueError("a prompt is needed: text=processor.prompt('What is this?', 'image')")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}; possible is 'pt'")
        images = _several(images)
        videos = [] if videos is None else list(videos)
        out: dict[str, torch.Tensor] = {}
        if images:
            out |= self.image_processor(images)
        if videos:
            out |= self.video_processor(videos, do_sample_frames, num_frames)
        texts = [text] if isinstance(text, str) else list(text)
        kinds = self._kinds(texts, len(images), len(videos))
        rows = self._rows(texts, kinds, out)
        longest = max(pad_to, *map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return BatchFeature(dict(input_ids=ids, attention_mask=mask, **out))

    def _kinds(self, texts: list[str], images: int, videos: int) -> list[str]:
        """ "image" or "video" for each place, in order through the batch."""
        found = [kind for text in texts for kind in re.findall(r"<(image|video)>", text)]
        if videos and not images:
            found = ["video"] * len(found)
        if (found.count("image"), found.count("video")) != (images, videos):
            raise ValueError(
                f"places for {found.count('image')} images and {found.count('video')} videos, given are {images} and {videos};"
                " write <image> or <video> where each belongs"
            )
        return found

    def _rows(self, texts: list[str], kinds: list[str], pixels: dict) -> list[list[int]]:
        """Token ids of each prompt, placeholders expanded."""
        config = self.config
        blocks = {
            "image": iter(
                (config.image_token_id, int(n) * config.image_side**2) for n in pixels.get("image_tiles", ())
            ),
            "video": iter(
                (config.video_token_id, int(n) * config.video_side**2) for n in pixels.get("video_frames", ())
            ),
        }
        rest = iter(kinds)
        rows = []
        for text in texts:
            ids = self.sentinel_ids(text)
            rows.append(expanded(ids, [next(blocks[next(rest)]) for _ in range(ids.count(SENTINEL))]))
        return rows

    def sentinel_ids(self, text: str) -> list[int]:
        """Token ids with one `SENTINEL` for each `<image>` and `<video>`; the text between is tokenized by itself."""
        out: list[int] = []
        for i, piece in enumerate(re.split(r"<(?:image|video)>", text)):
            out += [SENTINEL] * bool(i) + self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return out

    def prompt(self, question: str, kind: str = "video") -> str:
        """The prompt that shows one "image" or "video" and asks."""
        parts = [{"type": kind}, {"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    def apply_chat_template(self, conversation, add_generation_prompt=False, tokenize=False, **more):
        """A conversation as the prompt that LongVA was trained with.

        Args:
            conversation: messages with "role" and "content": text, or parts of type "text", "image" and "video".
            add_generation_prompt: end with the cue to answer.
            tokenize: return what calling the processor with the prompt and the parts' own "image" and "video" gives.
            more: for that call.
        """
        text = self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if not tokenize:
            return text
        parts = [p for m in conversation if not isinstance(m["content"], str) for p in m["content"]]
        media = {kind: [p[kind] for p in parts if p["type"] == kind] for kind in ("image", "video")}
        more.pop("return_dict", None)
        return self(text=text, images=media["image"] or None, videos=media["video"] or None, **more)

    def decode(self, *args, **options) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args, **options) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)


def _several(images) -> list:
    """The images as a list; one alone is a list of one."""
    if images is None:
        return []
    alone = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
    return [images] if alone else list(images)
