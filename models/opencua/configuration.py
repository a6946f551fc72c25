"""What OpenCUA is made of."""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen2Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=3584, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
)  # fmt: skip
TEXT = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=128000, rms_norm_eps=1e-6, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip


class OpenCUAConfig(PretrainedConfig):
    """Configuration of `OpenCUA`; the defaults are those of OpenCUA-7B.

    Args:
        vision_config: of Qwen2.5-VL's vision tower, its merger included: an object or keywords.
        text_config: of the Qwen2 decoder: an object or keywords.
        media_placeholder_token_id: the id that stands for an image, once for each.
        tie_word_embeddings: whether the head is the embedding.
    """

    model_type = "opencua"
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": Qwen2Config}  # noqa: RUF012

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        media_placeholder_token_id: int = 151664,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vision_config = _made(Qwen2_5_VLVisionConfig, VISION, vision_config)
        self.text_config = _made(Qwen2Config, TEXT, text_config)
        self.media_placeholder_token_id = media_placeholder_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def _made(cls, defaults: dict, given):
    """A configuration of a class: the given one, or the defaults with the given keywords."""
    if given is not None and not isinstance(given, dict):
        return given
    given = {k: v for k, v in (given or {}).items() if k != "model_type"}
    if "rope_theta" in given or "rope_scaling" in given:  # as files before transformers 5 have it
        defaults = {k: v for k, v in defaults.items() if k != "rope_parameters"}
    return cls(**{**defaults, **given})
