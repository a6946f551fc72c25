"""Pictures and chats to what `OpenCUA` takes."""

from __future__ import annotations

from pathlib import Path

from transformers import BatchFeature, Qwen2VLImageProcessor

from mmkv.models.opencua.tokenizer import MEDIA, load_tokenizer

PIXELS = {"shortest_edge": 3136, "longest_edge": 12845056}  # areas; of the published preprocessor_config.json


class OpenCUAProcessor:
    """Qwen2-VL's image processor and the checkpoint's tokenizer with its Kimi chat template; ids are the tokenizer's.

    Args:
        image_processor: a `Qwen2VLImageProcessor`.
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        ValueError: a tokenizer without the tokens that stand around an image.
    """

    def __init__(self, image_processor, tokenizer):
        lacking = [token for token in MEDIA if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        if lacking:
            raise ValueError(f"the tokenizer has no {', '.join(lacking)}; give the one that the checkpoint ships")
        tokenizer.padding_side = "left"
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token = MEDIA[2]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, folder, tokenizer=None) -> OpenCUAProcessor:
        """The processor of a checkpoint's folder.

        Args:
            folder: with preprocessor_config.json (the published limits of pixels where it is not there) and a tokenizer.
            tokenizer: in place of the folder's.
        """
        folder = Path(folder)
        shipped = (folder / "preprocessor_config.json").is_file()
        images = Qwen2VLImageProcessor.from_pretrained(folder) if shipped else Qwen2VLImageProcessor(size=PIXELS)
        return cls(images, load_tokenizer(folder) if tokenizer is None else tokenizer)

    @property
    def chat_template(self) -> str:
        """The tokenizer's: whoever asks whether there is one finds it where Hugging Face's processors have theirs."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages, *, add_generation_prompt: bool = False, tokenize: bool = False, **options):
        """The chat as text, one placeholder for each image; or as ids."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize, **options
        )

    def __call__(self, text, images=None, *, return_tensors: str = "pt", **options) -> BatchFeature:
        """What `OpenCUA.generate` takes: input_ids and attention_mask `[B, T]`, pixel_values and image_grid_thw.

        Args:
            text: a prompt or several (padded on the left), one placeholder for each image.
            images: pictures in order through the prompts.
            return_tensors: "pt".
            options: of the tokenizer.

        Raises:
            ValueError: placeholders that are not as many as images.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        marks = sum(prompt.count(self.image_token) for prompt in prompts)
        if marks != len(pictures):
            raise ValueError(f"{marks} {self.image_token} for {len(pictures)} images; give one for each image")
        padding = options.pop("padding", len(prompts) > 1)
        given = dict(
            self.tokenizer(prompts, return_tensors=return_tensors, padding=padding, add_special_tokens=False, **options)
        )
        given.pop("token_type_ids", None)
        if pictures:
            given |= dict(self.image_processor(images=pictures, return_tensors=return_tensors))
        return BatchFeature(given)

    def decode(self, ids, **options) -> str:
        """Ids as text."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, ids, **options) -> list[str]:
        """Rows of ids as texts."""
        return self.tokenizer.batch_decode(ids, **options)
