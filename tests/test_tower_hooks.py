"""Token methods applied inside vision towers by hooks: against a naive forward, and against stock where nothing is to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmkv._vision.tower import TowerHooks
from mmkv.models.tower import encoder_tower, timm_tower
from mmkv.parts.matching import Grouping
from mmkv.tokens import DiffRate, ToMe
from mmkv.tokens.method import TokenMethod

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=8
)
KINDS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (48, 80)}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.5}),
}


def vit(kind: str = "vit", depth: int = 2, **options) -> tuple[torch.nn.Module, torch.Tensor]:
    """A random timm ViT whose tokens differ enough for matchings to be meant, and two images."""
    torch.manual_seed(0)
    name, special = KINDS[kind]
    model = timm.create_model(
        name,
        **{"img_size": 64, "num_classes": 5, "depth": depth, "num_heads": 4, "embed_dim": 32, **special, **options},
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    size = model.patch_embed.img_size
    return model, torch.randn(2, 3, *size)


def clip(kind=CLIPVisionModel, config=CLIPVisionConfig, **options):
    torch.manual_seed(0)
    model = kind(config(**SMALL, **options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, 48, 48)


def siglip(**options):
    return clip(SiglipVisionModel, SiglipVisionConfig, **options)


def naive_tome(model, image: torch.Tensor, r: int, prop_attn: bool) -> tuple[torch.Tensor, list[set[int]]]:
    """CLS logits of one image and the final groups; groups are Python sets, one token at a time."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    groups = [{i} for i in range(len(x))]
    for block in model.blocks:
        normed, attn = block.norm1(x), block.attn
        q, k, v = attn.qkv(normed).view(len(x), 3, attn.num_heads, -1).unbind(1)
        q, k = attn.q_norm(q), attn.k_norm(k)
        size = torch.tensor([float(len(g)) for g in groups])
        heads = []
        for h in range(attn.num_heads):
            logits = q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5
            weights = logits.exp() * (size if prop_attn else 1)
            heads.append(weights / weights.sum(1, keepdim=True) @ v[:, h])
        x = x + block.ls1(attn.proj(torch.cat(heads, 1)))
        key, prefix = k.mean(1), model.num_prefix_tokens
        even, odd = ([i for i in range(prefix, len(x)) if i % 2 == parity] for parity in (0, 1))
        edges = sorted(
            (max((float(F.cosine_similarity(key[a], key[b], 0)), a, b) for b in odd) for a in even), reverse=True
        )
        merged = {a: b for _, a, b in edges[: min(r, (len(x) - prefix) // 2)]}
        order = [*range(prefix), *(a for a in even if a not in merged), *odd]
        members = [[i] + [a for a, b in merged.items() if b == i] for i in order]
        x = torch.stack([sum(x[m] * size[m] for m in some) / sum(size[m] for m in some) for some in members])
        groups = [set().union(*(groups[m] for m in some)) for some in members]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)[None])[0], groups


@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "oblong", "qk_norm"])
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [1, 4, 6])
def test_tome_equals_a_naive_forward(kind, prop_attn, r):
    model, images = vit(kind)
    with TowerHooks(timm_tower(model), [ToMe(r, prop_attn=prop_attn)]) as hooks, torch.no_grad():
        logits = model(images)
    for row, image in enumerate(images):
        with torch.no_grad():
            expected, groups = naive_tome(model, image, r, prop_attn)
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        source = hooks.state.source[row]
        assert [set((source == place).nonzero()[:, 0].tolist()) for place in range(len(groups))] == groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", [ToMe(0), ToMe(0, prop_attn=False), DiffRate(), DiffRate((99, 99), (99, 99), scores="received")]
)
def test_keeping_everything_is_stock_to_the_bit(kind, method):
    model, images = vit(kind)
    stock, names = model(images), list(model.state_dict())
    with TowerHooks(timm_tower(model), [method]):
        assert torch.equal(model(images), stock)
        assert list(model.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [clip, siglip])
def test_keeping_everything_is_stock_in_encoders(make):
    model, images = make()
    stock = model(images, output_hidden_states=True)
    with TowerHooks(encoder_tower(model), [ToMe(0), DiffRate((99,) * 3, (99,) * 3, scores="received")]):
        out = model(images, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, stock.last_hidden_state)
    assert torch.equal(out.pooler_output, stock.pooler_output)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, stock.hidden_states))


@pytest.mark.parametrize("make", [clip, siglip])
@pytest.mark.parametrize(
    "method", [ToMe(5), DiffRate((30, 25, 20), (28, 20, 12), scores="received")], ids=["ToMe", "DiffRate"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whatever_leaves_an_encoder_is_whole(make, method, attention):
    model, images = make(attn_implementation=attention)
    n0 = 36 + (make is clip)
    with TowerHooks(encoder_tower(model), [method], trace=True) as hooks, torch.no_grad():
        for _ in range(2):  # hooks of transformers that capture hidden states come with the first such call
            seen = model(images, output_hidden_states=True)
            unseen = model(images)
        state = hooks.state
    assert state.tokens_per_block == ([n0 - 5, n0 - 10, n0 - 15] if isinstance(method, ToMe) else [28, 20, 12])
    assert state.grid == (6, 6)
    assert torch.equal(seen.last_hidden_state, unseen.last_hidden_state)
    assert torch.equal(seen.hidden_states[-1], seen.last_hidden_state) or make is siglip
    for hidden, source in zip(seen.hidden_states[1:], state.trace):
        assert hidden.shape == (2, n0, 32)
        assert bool((hidden[source < 0] == 0).all()) and bool((hidden[source >= 0] != 0).all())
        for row in range(2):
            for place in range(int(source.max()) + 1):
                members = hidden[row, source[row] == place]
                assert bool((members == members[:1]).all())
    assert isinstance(method, DiffRate) or bool((state.source >= 0).all())


def test_sizes_add_up_after_every_block():
    model, images = vit(depth=4)
    with TowerHooks(timm_tower(model), [ToMe(3)], trace=True) as hooks:
        model(images)
    for b, source in enumerate(hooks.state.trace):
        assert sorted(set(source[0].tolist())) == list(range(17 - 3 * (b + 1)))
    counts = torch.stack([torch.bincount(row) for row in hooks.state.source])
    assert torch.equal(hooks.state.size, counts.float())
    assert hooks.state.tokens_per_block == [14, 11, 8, 5]


def test_average_pooling_weights_by_size_and_forgets_the_pruned():
    for norm in (True, False):  # the last norm behind the pool, or in front of it
        model, images = vit("average", fc_norm=norm)
        with TowerHooks(timm_tower(model), [DiffRate((14, 12), (14, 9), scores="received")]) as hooks:
            features = model.forward_features(images)
            logits = model(images)
        source = hooks.state.source
        for row in range(2):
            left = features[row][source[row] >= 0].mean(0)
            torch.testing.assert_close(logits[row], model.head(model.fc_norm(left)), atol=1e-5, rtol=1e-5)
        assert bool((source < 0).any())


def test_intermediate_features_have_their_grid():
    model, images = vit("oblong", depth=3)
    with TowerHooks(timm_tower(model), [ToMe(3)]):
        logits = model(images)
        last, features = model.forward_intermediates(images)
        assert [f.shape for f in features] == [(2, 32, 3, 5)] * 3
        assert torch.equal(model.forward_head(last), logits)


def test_pruned_and_merged_by_diffrate_in_place_of_removing():
    """Attention that sees nothing of the pruned tokens and merged ones by their size: the same logits, with masks."""
    model, images = vit(depth=2)
    with TowerHooks(timm_tower(model), [DiffRate((12, 17), (9, 17))]) as hooks, torch.no_grad():
        logits = model(images)
        source, size = hooks.state.source, hooks.state.size
    block, second = model.blocks
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        x = x + block.attn(block.norm1(x))
        whole = source >= 0
        for row in range(2):
            for place in range(9):
                x[row, source[row] == place] = x[row, source[row] == place].mean(0)
        x = x + block.mlp(block.norm2(x))
        counts = torch.stack([torch.bincount(row[row >= 0], minlength=9) for row in source])
        share = (size / counts).gather(1, source.clamp(min=0))
        bias = share.log().masked_fill(~whole, -torch.inf)[:, None, None]
        x = x + second.attn(second.norm1(x), attn_mask=bias)
        x = x + second.mlp(second.norm2(x))
        torch.testing.assert_close(logits, model.forward_head(model.norm(x)), atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Ragged(TokenMethod):
    """Keeps the first 9 tokens of the first image and all of the second."""

    prop_attn: bool = True

    def tower_blocks(self, depth):
        return (0,)

    def in_tower(self, view):
        keep = torch.ones(view.hidden.shape[:2], dtype=torch.bool)
        keep[0, 9:] = False
        view.notes["first"] = view.of_patches(view.size)
        return Grouping.keeping(keep)


@pytest.mark.parametrize("prop_attn", [True, False])
def test_images_of_a_batch_may_keep_different_numbers(prop_attn):
    model, images = vit()
    stock = model(images)
    with TowerHooks(timm_tower(model), [Ragged(prop_attn)]) as hooks:
        both, alone = model(images), model(images[:1])
        assert hooks.state.notes["first"].shape == (1, 16)
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(both[1:], stock[1:])
    assert not torch.allclose(both[:1], stock[:1], atol=1e-3)


def test_two_methods_in_one_block():
    model, images = vit()
    with TowerHooks(timm_tower(model), [Ragged(), ToMe(3)]) as hooks:
        assert model(images[1:]).isfinite().all()
        assert hooks.state.tokens_per_block == [6, 4]  # alone, it is the first of its batch; 5 patches have 2 pairs
        assert model(images).isfinite().all()
    assert hooks.state.size.sum(1).tolist() == [9, 17]


def test_training_sends_gradients_through_the_averages():
    model, images = vit()
    model.train()
    with TowerHooks(timm_tower(model), [ToMe(4)]):
        model(images).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool((model.pos_embed.grad.abs().sum(-1) > 0).all())
    model.set_grad_checkpointing()
    with TowerHooks(timm_tower(model), [ToMe(4)]), pytest.raises(ValueError, match="switch it off"):
        model(images)


def test_a_forward_that_fails_leaves_nothing_behind():
    model, images = vit()
    with TowerHooks(timm_tower(model), [ToMe(4)]):
        logits = model(images)
        with pytest.raises(ValueError, match="attn_mask was given"):
            model(images, attn_mask=torch.zeros(17, 17))
        assert torch.equal(model(images), logits)


def test_half_precision():
    model, images = vit()
    with TowerHooks(timm_tower(model), [ToMe(4)]) as hooks:
        assert model.bfloat16()(images.bfloat16()).isfinite().all()
    assert hooks.state.size.dtype == torch.float32


def test_masks_that_attention_would_not_add_are_refused():
    model, images = clip()
    layers = encoder_tower(model).taps
    with TowerHooks(encoder_tower(model), [ToMe(4)]):
        layers[0].block.register_forward_hook(
            lambda *_: setattr(model.config, "_attn_implementation", "flash_attention_2")
        )
        with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
            model(images)


def test_facts():
    facts = TowerHooks(timm_tower(vit("registers")[0]), []).facts()
    assert (facts.depth, facts.prefix, facts.has_cls, facts.merges) == (2, 5, True, True)
