"""Train the tiny Infinity: `python -m mmkv.models.tiny_infinity.train --work DIR`, after `train_vae`; again to resume.

Every step paints new captions, encodes the pictures with the trained autoencoder, and quantizes them with random errors in the
bits (bitwise self-correction, arXiv 2412.04431 section 3.3). One caption in ten is left out, for classifier-free guidance.
Progress is CPU time of this process.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models.infinity import Text
from mmkv.models.infinity.quantizer import SelfCorrection, quantize
from mmkv.models.tiny.train import Muon
from mmkv.models.tiny_infinity import world
from mmkv.models.tiny_infinity.model import SCHEDULE, TinyInfinity, transformer_config
from mmkv.models.tiny_infinity.training import Clock, image_batch, learning_rate, log, save

BATCH = 32
FIRST = 2 * 10**6  # seed of the first picture
NO_MATRICES = ("embed", "place", "unconditional", "head.proj")  # tables, and what reads out
LEFT_OUT = 0.1  # share of captions
HELD_OUT = range(10**6, 10**6 + 64)
CORRECTION = SelfCorrection(strength=0.2, scales=len(SCHEDULE) - 1)


def bit_losses(model: TinyInfinity, pictures: list[world.Picture], text: Text, flip=None) -> torch.Tensor:
    """fp32 `[scales]`: mean cross-entropy of the bits of each scale, teacher forced."""
    with torch.no_grad():
        features = model.vae.encode(image_batch(picture.image for picture in pictures))
        found = quantize(features, SCHEDULE.sizes, flip)
    inputs = torch.cat([x.flatten(2).mT for x in found.inputs], 1)
    labels = torch.cat([bits.flatten(1, 2) for bits in found.bits], 1).long()
    logits = model(inputs, text, SCHEDULE, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    return torch.stack([part.mean() for part in losses.split(list(SCHEDULE.tokens), 1)])


def captions(model: TinyInfinity, pictures: list[world.Picture], rng: np.random.Generator) -> Text:
    """Features of the captions, of which some are replaced by those of none."""
    features = model.words([picture.caption for picture in pictures])
    left_out = rng.random(len(features)) < LEFT_OUT
    none = model.model.conditioner.unconditional
    return Text.of([none[: len(f)] if gone else f for f, gone in zip(features, left_out, strict=True)])


def shares() -> torch.Tensor:
    """How much each scale's loss counts: half by its tokens, half alike, so that the few early ones are learned too."""
    tokens = torch.tensor(SCHEDULE.tokens, dtype=torch.float32)
    return tokens / tokens.sum() / 2 + 1 / (2 * len(tokens))


def make_optimizer(model: TinyInfinity, lr: float) -> Muon:
    """Muon for the matrices of the layers, AdamW for all else that is trained."""
    trained = [(name, p) for name, p in model.named_parameters() if not name.startswith("vae.")]
    named = [(name if is_matrix(name, p) else f"embed_tokens {name}", p) for name, p in trained]
    return Muon(named, lr, lr / 10)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter maps hidden states to hidden states."""
    return parameter.ndim == 2 and not any(table in name for table in NO_MATRICES)


def train(options: argparse.Namespace) -> None:
    """All steps that are left of the budget."""
    torch.manual_seed(0)
    model = TinyInfinity(transformer_config()).train()
    model.vae.requires_grad_(False).eval()
    optimizer, weights = make_optimizer(model, options.lr), shares()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    put_autoencoder(model, average, options.work)
    path, clock, step = options.work / "transformer.pt", Clock(60 * options.minutes), 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load(state["optimizer"])
        average, step, clock.before = state["average"], state["step"], state["seconds"]
        put_autoencoder(model, average, options.work)
    else:
        count = sum(p.numel() for p in model.parameters())
        log(options.work, f"tiny Infinity: {count} parameters, autoencoder and words included")
    held, recent = [world.make_picture(seed) for seed in HELD_OUT], []
    saved = told = time.monotonic()
    while not clock.done:
        rng = np.random.default_rng([step, 5])
        optimizer.scale = learning_rate(clock.progress)
        pictures = [world.make_picture(FIRST + step * BATCH + i) for i in range(BATCH)]
        losses = bit_losses(model, pictures, captions(model, pictures, rng), CORRECTION)
        optimizer.zero()
        (losses * weights).sum().backward()
        optimizer.step()
        step += 1
        recent.append(losses.detach())
        decay = min(0.99, (step + 1) / (step + 20))
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        if time.monotonic() - told > 30 or clock.done:
            told = time.monotonic()
            parts = " ".join(f"{x:.3f}" for x in torch.stack(recent).mean(0))
            log(options.work, f"step {step} {clock.minutes:.2f} min, bits wrong and right: loss by scale {parts}")
            recent.clear()
        if time.monotonic() - saved > 60 or clock.done:
            saved = time.monotonic()
            save(
                path,
                model=model.state_dict(),
                optimizer=optimizer.state(),
                average=average,
                step=step,
                seconds=clock.seconds,
            )
            export(average, options.work / "checkpoint")
    log(options.work, f"held out, without errors: {held_out(average, held)}")


def put_autoencoder(model: TinyInfinity, average: dict[str, torch.Tensor], work: pathlib.Path) -> None:
    """Set the trained autoencoder, also the one that was trained on after the transformer had begun."""
    model.vae.load_state_dict(torch.load(work / "vae.pt")["vae"])
    average |= {f"vae.{name}": p.detach().clone() for name, p in model.vae.named_parameters()}


@torch.no_grad()
def held_out(average: dict[str, torch.Tensor], pictures: list[world.Picture]) -> str:
    """Loss by scale of pictures that were never trained on."""
    model = averaged(average)
    text = Text.of(model.words([picture.caption for picture in pictures]))
    return " ".join(f"{x:.3f}" for x in bit_losses(model, pictures, text))


def averaged(average: dict[str, torch.Tensor]) -> TinyInfinity:
    """The model of averaged weights."""
    model = TinyInfinity(transformer_config()).eval()
    model.load_state_dict(average)
    return model


def export(average: dict[str, torch.Tensor], folder: pathlib.Path) -> None:
    """Write float16 weights where `from_pretrained` finds them."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    averaged(average).half().save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--minutes", type=float, default=16, help="of CPU time")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices; of all else a tenth")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
