"""`LongVAConfig`."""

from __future__ import annotations

from transformers import CLIPVisionConfig, PreTrainedConfig, Qwen2Config

from mmkv.models.longva.unires import PINPOINTS

POOLS = ("average", "max")


class LongVAConfig(PreTrainedConfig):
    """Sizes of LongVA: a CLIP tower, a projector of two layers, a Qwen2 decoder.

    Args:
        vision_config: of the tower, a `CLIPVisionConfig` or its dict; default CLIP ViT-L/14 at 336 pixels.
        text_config: of the decoder, a `Qwen2Config` or its dict.
        image_token_id, video_token_id: placeholders for features in `input_ids`. The checkpoint's vocabulary has none, so these
            are rows of its embedding that no token of its tokenizer uses: by default the last two.
        vision_feature_layer: which hidden state of the tower is projected; -2 leaves out the last block.
        mm_spatial_pool_stride: side in patches of the squares of a video frame that are pooled, behind the projector.
        mm_spatial_pool_mode: "average" or "max" of a square. Tiles of images are averaged 2x2 always, as in the public code.
        image_grid_pinpoints: widths and heights in pixels that an image may be padded to.
        tie_word_embeddings: whether the head shares the embedding.

    Raises:
        ValueError: a stride that does not fit the tower's grid, another mode.
    """

    model_type = "longva"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": Qwen2Config}  # noqa: RUF012 (transformers' own form)

    def __init__(
        self, vision_config=None, text_config=None, image_token_id=None, video_token_id=None, vision_feature_layer=-2,
        mm_spatial_pool_stride=2, mm_spatial_pool_mode="average", image_grid_pinpoints=None, tie_word_embeddings=False, **more
    ):  # fmt: skip
        self.vision_config = _made(CLIPVisionConfig, CLIP_L_336 if vision_config is None else vision_config)
        self.text_config = _made(Qwen2Config, {} if text_config is None else text_config)
        rows = self.text_config.vocab_size
        self.image_token_id = rows - 2 if image_token_id is None else image_token_id
        self.video_token_id = rows - 1 if video_token_id is None else video_token_id
        self.vision_feature_layer = vision_feature_layer
        self.mm_spatial_pool_stride, self.mm_spatial_pool_mode = mm_spatial_pool_stride, mm_spatial_pool_mode
        self.image_grid_pinpoints = [list(p) for p in (image_grid_pinpoints or PINPOINTS)]
        _check_pool(mm_spatial_pool_stride, mm_spatial_pool_mode, self.patches_per_side)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)

    @property
    def patches_per_side(self) -> int:
        """Patches on a side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def image_side(self) -> int:
        """Tokens on a side of an image's tile."""
        return self.patches_per_side // 2

    @property
    def video_side(self) -> int:
        """Tokens on a side of a video's frame."""
        return self.patches_per_side // self.mm_spatial_pool_stride


CLIP_L_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
    hidden_act="quick_gelu", projection_dim=768,
)  # fmt: skip


def _made(kind, given):
    return given if isinstance(given, PreTrainedConfig) else kind(**given)


def _check_pool(stride, mode, side: int) -> None:
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= side:
        raise ValueError(f"mm_spatial_pool_stride={stride!r}; possible are whole numbers from 1 to {side}")
    if mode not in POOLS:
        raise ValueError(f"mm_spatial_pool_mode={mode!r}; possible are {', '.join(map(repr, POOLS))}")


def is_longva(config: dict) -> bool:
    """Whether a config.json is LongVA's: a "qwen2" or "llava_qwen" with a vision tower and UniRes tiles."""
    return (
        config.get("model_type") in ("qwen2", "llava_qwen")
        and "mm_vision_tower" in config
        and config.get("mm_patch_merge_type") == "unires"
    )
