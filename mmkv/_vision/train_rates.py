"""`train_rates`: DiffRate's rates learned for a model, its images and a number of GFLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from mmkv._vision.rate_hooks import RateHooks
from mmkv.models.tower import Tower, timm_tower
from mmkv.parts.flops import vit_macs
from mmkv.tokens.diffrate import DiffRate
from mmkv.tokens.rates import Rates

LOSSES = ("labels", "distillation")


def gflops(model: torch.nn.Module, tokens: int, behind: list) -> float:
    """GFLOPs (multiply-adds, as papers count) of an image in a timm ViT with these tokens behind its blocks."""
    block = model.blocks[0]
    ratio = block.mlp.fc1.out_features / model.embed_dim
    channels = model.patch_embed.proj.in_channels
    return (
        vit_macs(tokens, behind, model.embed_dim, model.patch_embed.patch_size, model.num_classes, ratio, channels)
        / 1e9
    )


def costs(model: torch.nn.Module, rates: DiffRate) -> tuple[float, float]:
    """GFLOPs of an image in a timm ViT with these rates, and with all tokens."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    behind = [merged for _, merged in rates.kept(tokens)] or [tokens] * len(model.blocks)
    return gflops(model, tokens, behind), gflops(model, tokens, [tokens] * len(model.blocks))


def train_rates(
    model: torch.nn.Module,
    loader: Iterable,
    target_gflops: float,
    epochs: int = 3,
    lr: float = 0.01,
    weight: float = 100.0,
    granularity: int = 4,
    loss: str = "distillation",
    scores: str | None = None,
    progress: Callable[[dict], None] | None = None,
) -> DiffRate:
    """Learn how many tokens each block prunes and merges, the model's weights untouched (DiffRate, arXiv 2305.17997).

    Args:
        model: a timm `VisionTransformer`, trained.
        loader: gives batches (images `[B, 3, h, w]`, labels `[B]`) again and again, one pass an epoch; has a length.
        target_gflops: what an image may cost, multiply-adds counted as papers do (`mmkv.parts.flops`).
        epochs: passes over the loader.
        lr: of AdamW on the rates, falling to a tenth by a cosine.
        weight: of the squared distance to the target, as a share of what the whole model costs, in the loss.
        granularity: step between candidate numbers of tokens.
        loss: "labels", cross-entropy with smoothing 0.1 as in the paper; or "distillation", divergence from the same
            model's answers with all tokens, for images whose labels are not the model's classes.
        scores: importance of tokens, "cls" or "received"; None for "cls" where the model has a CLS token.
        progress: called after each step with step, steps, loss, gflops.

    Where we differ: the distance to the target is relative, so that one weight fits models of every size (the official 5
    times the square of GFLOPs is 106 times the square of the share for DeiT-S). The model is in eval mode, so without
    stochastic depth; mixup and augmentation are the loader's. Block 0 never drops anything, nor does the last one before
    average pooling.

    Raises:
        ValueError: a target that is not below the whole model's cost or below what the smallest rates cost, another model.
    """
    tower = timm_tower(model)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}; possible are {', '.join(map(repr, LOSSES))}")
    rates = _rates(model, tower, granularity)
    whole, least = _range(model, rates)
    if not least <= target_gflops < whole:
        raise ValueError(
            f"target of {target_gflops:.4g} GFLOPs; the whole model costs {whole:.4g}, rates can bring it down to {least:.4g}"
        )
    scores = scores or ("cls" if tower.has_cls else "received")
    was_training = model.training
    was_learning = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        _learn(
            model,
            RateHooks(tower, rates, scores=scores),
            loader,
            target_gflops,
            whole,
            epochs,
            lr,
            weight,
            loss,
            progress,
        )
    finally:
        model.train(was_training)
        for parameter, learns in was_learning:
            parameter.requires_grad_(learns)
    return rates.method(scores)


def _rates(model: torch.nn.Module, tower: Tower, granularity: int) -> Rates:
    tokens = model.patch_embed.num_patches + tower.prefix
    frozen = (0,) if tower.pooled is None else (0, len(tower) - 1)
    return Rates(len(tower), tokens, tower.prefix, granularity, frozen).to(next(model.parameters()).device)


def _range(model: torch.nn.Module, rates: Rates) -> tuple[float, float]:
    """GFLOPs with all tokens, and with the fewest that the candidates have."""
    fewest, behind = rates.tokens, []
    for rate in rates.prune:
        fewest = min(fewest, int(rate.candidates[-1]) + rates.prefix)
        behind.append(fewest)
    return gflops(model, rates.tokens, [rates.tokens] * len(rates)), gflops(model, rates.tokens, behind)


def _learn(model, hooks: RateHooks, loader, target, whole, epochs, lr, weight, loss, progress) -> None:
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(hooks.rates.parameters(), lr=lr, weight_decay=0)
    device = next(model.parameters()).device
    step = 0
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                teacher = model(images).float() if loss == "distillation" else None
            with hooks:
                logits = model(images).float()
            if teacher is None:
                task = F.cross_entropy(logits, labels, label_smoothing=0.1)
            else:
                task = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
            cost = gflops(model, hooks.rates.tokens, hooks.behind)
            total = task + weight * ((cost - target) / whole) ** 2
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            step += 1
            if progress is not None:
                progress(dict(step=step, steps=steps, loss=float(task.detach()), gflops=float(cost.detach())))
