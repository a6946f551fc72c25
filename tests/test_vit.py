"""`mmkv.wrap` on a timm vision transformer."""

from __future__ import annotations

import pytest
import timm
import torch

import mmkv
from mmkv.tokens import DiffRate, FastV, ToMe


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_wrapped_and_back(vit, images):
    with torch.no_grad():
        want = vit(images)
        assert mmkv.wrap(vit, tokens=[ToMe(r=2)]) is vit
        got = vit(images)
        assert "17 tokens in; MLPs saw 15, 13, 11, 9" in str(mmkv.report(vit))
        assert not torch.equal(got, want)
        mmkv.unwrap(vit)
        assert torch.equal(vit(images), want)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


@pytest.mark.parametrize("method", [ToMe(r=2), DiffRate(prune=(15, 13, 11, 9), merge=(14, 12, 10, 8))])
def test_keeping_everything_is_stock(vit, images, method):
    with torch.no_grad():
        want = vit(images)
        with mmkv.wrapped(vit, tokens=[method.keeping_everything()]):
            assert torch.equal(vit(images), want)


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        (("vidkv",), {}, "no decoder"),
        ((), dict(cache=[mmkv.cache.KIVI()], tokens=[ToMe(r=2)]), "no decoder"),
        ((), {}, "nothing to do"),
        ((), dict(tokens=[FastV()]), "behind the vision tower"),
    ],
)
def test_refused(vit, args, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        mmkv.wrap(vit, *args, **options)
    assert "\n" not in str(caught.value)


def test_more_than_half_of_the_tokens_cannot_merge(vit, images):
    with mmkv.wrapped(vit, tokens=[ToMe(r=100)]), pytest.raises(ValueError, match="r=100") as caught:
        vit(images)
    assert "\n" not in str(caught.value)


def test_a_backbone_method_says_where_it_belongs(vit):
    with pytest.raises(TypeError, match="toc3d"):
        mmkv.wrap(vit, tokens=[mmkv.tokens.ToC3D()])


def test_a_model_whose_tokens_cannot_merge_is_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(swin, tokens=[ToMe(r=8)])
    assert "\n" not in str(caught.value)
