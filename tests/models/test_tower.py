"""Where towers can be listened to: timm's and Hugging Face's, and which are refused."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmkv.models.timm_vit import TimmViT, is_timm_vit
from mmkv.models.tower import encoder_tower, timm_tower

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)


def vit(name: str = "vit_tiny_patch16_224", **options) -> torch.nn.Module:
    return timm.create_model(name, pretrained=False, **{"img_size": 64, "num_classes": 5, "depth": 2, **options})


@pytest.mark.parametrize(
    ("model", "prefix", "has_cls"),
    [
        (vit(), 1, True),
        (vit("deit_tiny_distilled_patch16_224"), 2, True),
        (vit("vit_small_patch14_reg4_dinov2", img_size=56, patch_size=14), 5, True),
        (vit(class_token=False, global_pool="avg"), 0, False),
    ],
)
def test_timm(model, prefix, has_cls):
    tower = TimmViT(model).tower()
    assert is_timm_vit(model)
    assert (len(tower), tower.prefix, tower.has_cls, tower.heads) == (
        2,
        prefix,
        has_cls,
        model.blocks[0].attn.num_heads,
    )
    assert (tower.pooled is not None) == (model.global_pool == "avg")
    assert tower.additive_masks and not tower.watched({}) and not tower.checkpointed
    model.set_grad_checkpointing()
    assert tower.checkpointed


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)), 1),
        (lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=8)), 1),
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)), 0),
    ],
)
def test_encoders(make, prefix):
    tower = encoder_tower(make())
    assert (len(tower), tower.prefix, tower.has_cls, tower.heads) == (3, prefix, bool(prefix), 4)
    assert tower.scale == pytest.approx(8**-0.5)
    assert tower.watched({"output_hidden_states": True}) and tower.watched({"output_hidden_states": 0})
    assert not tower.watched({"output_hidden_states": False}) and not tower.watched({"output_hidden_states": None})


def test_grids_need_not_be_square():
    tower = encoder_tower(SiglipVisionModel(SiglipVisionConfig(**SMALL)))
    assert tower.grid(32, 48, 24) == (4, 6)
    assert tower.grid(33, 50, 24) == (4, 6)  # a convolution drops what does not fill a patch
    assert tower.grid(31, 42, 24) == (4, 6)  # padded
    assert tower.grid(32, 48, 23) is None


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_other_timm_models_are_refused(name):
    model = timm.create_model(name, pretrained=False)
    assert is_timm_vit(model)
    with pytest.raises(ValueError, match="VisionTransformer") as caught:
        timm_tower(model)
    assert "\n" not in str(caught.value)


def test_other_blocks_are_refused():
    from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock

    for block in (ParallelThingsBlock, ResPostBlock):
        with pytest.raises(ValueError, match=rf"{block.__name__}.*plain blocks"):
            timm_tower(vit(block_fn=block))
    with pytest.raises(ValueError, match="Block with DiffAttention"):
        timm_tower(vit(attn_layer="diff", num_heads=4))


def test_other_encoders_are_refused():
    model = Siglip2VisionModel(
        Siglip2VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"siglip2_vision_model.*clip_vision_model, siglip_vision_model"):
        encoder_tower(model)
    with pytest.raises(ValueError, match="Linear"):
        encoder_tower(torch.nn.Linear(2, 2))
    assert not is_timm_vit(torch.nn.Linear(2, 2))
