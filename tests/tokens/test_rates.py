"""DiffRate's learned rates: the parametrisation against loops, the training forward against removing tokens, a search."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from mmkv._vision.rate_hooks import RateHooks
from mmkv._vision.tower import TowerHooks
from mmkv._vision.train_rates import gflops, train_rates
from mmkv.models.tower import encoder_tower, timm_tower
from mmkv.parts.flops import vit_macs
from mmkv.tokens import DiffRate
from mmkv.tokens.rates import Rate, Rates


def vit(depth: int = 4, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 64, "num_classes": 5, "depth": depth, "num_heads": 4, "embed_dim": 32, **options}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def set_to(rates: Rates, counts: list[tuple[int, int]]) -> None:
    """Rates that are (nearly) certain of these numbers."""
    for b, pair in enumerate(counts):
        for rate, count in zip((rates.prune[b], rates.merge[b]), pair):
            rate.logits.data = torch.where(rate.candidates + rate.prefix == count, 50.0, 0.0)


@pytest.mark.parametrize(("patches", "granularity", "prefix"), [(196, 4, 1), (16, 3, 0), (17, 1, 2), (9, 9, 1)])
def test_rate_by_loops(patches, granularity, prefix):
    torch.manual_seed(patches)
    rate = Rate(patches, prefix, granularity)
    rate.logits.data.normal_()
    candidates = list(range(patches, 0, -granularity))
    assert rate.candidates.tolist() == candidates
    tokens = patches + prefix
    logits = rate.logits.detach().double().requires_grad_()
    total = logits.exp().sum()
    kept = sum(c * logits[i].exp() / total for i, c in enumerate(candidates))
    alive = torch.stack(
        [
            sum((logits[i].exp() / total for i, c in enumerate(candidates) if c + prefix > t), logits.sum() * 0)
            for t in range(tokens)
        ]
    )
    assert float(rate.kept().detach()) == math.ceil(float(kept.detach()) - 1e-4) + prefix
    torch.testing.assert_close(rate.survival(tokens).double(), alive, atol=1e-6, rtol=0)
    assert rate.mask(tokens).detach().round().tolist() == [
        float(t < float(rate.kept().detach())) for t in range(tokens)
    ]
    weights = torch.randn(tokens)
    (rate.mask(tokens) @ weights + 3 * rate.kept()).backward()
    (alive @ weights.double() + 3 * kept).backward()
    torch.testing.assert_close(rate.logits.grad.double(), logits.grad, atol=1e-3, rtol=1e-4)


def test_a_new_rate_keeps_half():
    rates = Rates(12, 197)
    method = rates.method()
    assert method.prune == method.merge == (197,) + (101,) * 11
    assert method.tokens == 197


@pytest.mark.parametrize(("granularity", "frozen"), [(0, (0,)), (99, (0,)), (4, (12,)), (4, tuple(range(12)))])
def test_refused_rates(granularity, frozen):
    with pytest.raises(ValueError) as caught:
        Rates(12, 197, 1, granularity, frozen)
    assert "\n" not in str(caught.value)


COUNTS = [(17, 17), (14, 11), (13, 9), (6, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "init_values": 0.5},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
    ids=["cls", "qk_norm", "registers", "average", "average_normed"],
)
def test_training_forward_equals_inference(options):
    """With eps 0 and no clamp, tokens that nobody sees are as good as removed; the FLOPs are the same number."""
    model = vit(**options)
    tower, images = timm_tower(model), torch.randn(3, 3, 64, 64)
    counts = [(p - 1 + tower.prefix, m - 1 + tower.prefix) for p, m in COUNTS]
    tokens, scores = 16 + tower.prefix, "cls" if tower.has_cls else "received"
    rates = Rates(4, tokens, tower.prefix, granularity=1)
    set_to(rates, counts)
    with torch.no_grad():
        with RateHooks(tower, rates, eps=0.0, scores=scores) as hooks:
            masked = model(images)
        with TowerHooks(tower, [rates.method(scores)]) as applied:
            removed = model(images)
        stock = model(images)
    torch.testing.assert_close(masked, removed, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(masked, stock, atol=1e-3)
    assert [float(n) for n in hooks.behind] == applied.state.tokens_per_block == [m for _, m in counts]
    assert float(gflops(model, tokens, hooks.behind)) == pytest.approx(gflops(model, tokens, [m for _, m in counts]))
    with torch.no_grad(), RateHooks(tower, rates, eps=1e-2, clamp_sizes=True, scores=scores):
        assert not torch.allclose(
            model(images), removed, atol=1e-4
        )  # what the official code trains with is not the same


def test_all_kept_is_the_model_itself():
    model, images = vit(), torch.randn(2, 3, 64, 64)
    rates = Rates(4, 17, granularity=1)
    set_to(rates, [(17, 17)] * 4)
    fused = [block.attn.fused_attn for block in model.blocks]
    with RateHooks(timm_tower(model), rates):
        masked = model(images)
    torch.testing.assert_close(masked, model(images))
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_reach_every_rate_but_the_frozen():
    model, rates = vit(), Rates(4, 17, granularity=2)
    set_to(rates, [(17, 17), (13, 9), (9, 7), (5, 5)])
    for parameter in rates.parameters():
        parameter.data *= 0.05
    with RateHooks(timm_tower(model), rates) as hooks:
        logits = model(torch.randn(4, 3, 64, 64))
    logits.square().sum().backward(retain_graph=True)
    reached = [float(rate.logits.grad.abs().sum()) if rate.logits.grad is not None else 0.0 for rate in rates.prune]
    assert reached[0] == 0 and reached[1] > 0
    assert reached[3] == 0  # masks act on the next attention: the last block learns from FLOPs alone
    rates.zero_grad()
    sum(hooks.behind).backward()
    assert all(
        float(rate.logits.grad.abs().sum()) > 0 for rates_ in (rates.prune, rates.merge) for rate in list(rates_)[1:]
    )


def test_search_meets_the_target():
    """A 3-block ViT, of which one is frozen, at 4/5 of its FLOPs."""
    model = vit(depth=3)
    images = torch.randn(8, 3, 64, 64)
    loader = [(images, torch.zeros(8, dtype=torch.int64))] * 50
    whole = gflops(model, 17, [17] * 3)
    by_hand = vit_macs(17, [17] * 3, 32, 16, classes=5) / 1e9
    assert whole == pytest.approx(by_hand)
    target, seen = 0.8 * whole, []
    names, weights = list(model.state_dict()), [p.clone() for p in model.parameters()]
    rates = train_rates(model, loader, target, epochs=3, lr=0.05, granularity=1, progress=seen.append)
    assert isinstance(rates, DiffRate) and rates.tokens == 17 and rates.prune[0] == rates.merge[0] == 17
    found = gflops(model, 17, [merged for _, merged in rates.kept(17)])
    assert ((found - target) / whole) ** 2 < 1e-3
    assert seen[-1]["step"] == seen[-1]["steps"] == 150 and seen[-1]["gflops"] == pytest.approx(found, rel=0.05)
    assert list(model.state_dict()) == names and all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    model_again = vit(depth=3)
    assert train_rates(model_again, loader[:2], target, epochs=1, granularity=1, loss="labels").tokens == 17


@pytest.mark.parametrize(
    ("target", "options"), [(9.0, {}), (1e-9, {}), (None, {"loss": "l2"}), (None, {"granularity": 0})]
)
def test_refused_searches(target, options):
    model = vit(depth=2)
    target = 0.8 * gflops(model, 17, [17] * 2) if target is None else target
    with pytest.raises(ValueError) as caught:
        train_rates(model, [], target, **options)
    assert "\n" not in str(caught.value)


def test_other_towers_are_refused():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="timm models"):
        RateHooks(encoder_tower(model), Rates(2, 50))
    rates = Rates(2, 50)
    small = vit(depth=2)
    with pytest.raises(ValueError, match="for 50 tokens, 17 came"), RateHooks(timm_tower(small), rates):
        small(torch.randn(1, 3, 64, 64))
