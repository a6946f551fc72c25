"""Train the tiny autoencoder: `python -m mmkv.models.tiny_infinity.train_vae --work DIR`, again to resume.

Its bits are trained with it: gradients pass straight through the multi-scale quantizer. Progress is CPU time of this process,
so a machine that others use gives the same model, later.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models.infinity import InfinityVAE
from mmkv.models.infinity.autoencoder import Downsample, ResidualBlock, Upsample
from mmkv.models.infinity.quantizer import quantize
from mmkv.models.tiny_infinity import world
from mmkv.models.tiny_infinity.model import SCHEDULE, vae_config
from mmkv.models.tiny_infinity.training import Clock, image_batch, learning_rate, log, save

BATCH = 8
HELD_OUT = range(10**6, 10**6 + 64)  # seeds that are never trained on


@torch.no_grad()
def start_linear(vae: InfinityVAE) -> None:
    """Make a new autoencoder nearly linear: residual blocks pass on, sampling averages and copies; it learns faster so."""
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if isinstance(module.nin_shortcut, torch.nn.Conv2d):
                torch.nn.init.orthogonal_(module.nin_shortcut.weight)
        elif isinstance(module, Downsample):
            module.conv.weight.zero_()
            index = torch.arange(len(module.conv.weight))
            module.conv.weight[index, index, :2, :2] = 0.25
        elif isinstance(module, Upsample):
            torch.nn.init.dirac_(module.conv.weight)


def step_loss(vae: InfinityVAE, images: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error of what the decoder makes of the bits, and how far features are from them.

    Gradients pass straight from the sum of codes to the features. Objects count five times as much as the background.
    """
    features = vae.encoder(images)
    with torch.no_grad():
        summed = quantize(features, SCHEDULE.sizes).summed
        objects = (images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.25  # a corner shows the background
    error = vae.decoder(features + (summed - features).detach()) - images
    return ((1 + 4 * objects) * (error.abs() + error.square())).mean() + 0.25 * F.mse_loss(features, summed)


@torch.no_grad()
def psnr(vae: InfinityVAE, images: torch.Tensor) -> float:
    """Of reconstructions from the bits, dB, mean over `images` fp32 `[B, 3, H, W]` in -1..1."""
    again = vae.decode(quantize(vae.encode(images), SCHEDULE.sizes).summed)
    return float((10 * torch.log10(4 / (again - images).square().mean((1, 2, 3)))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for state and log")
    parser.add_argument("--minutes", type=float, default=4, help="of CPU time")
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = InfinityVAE(vae_config()).train()
    start_linear(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=options.lr, betas=(0.9, 0.97))
    path, clock, step = options.work / "vae.pt", Clock(60 * options.minutes), 0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock.before = state["step"], state["seconds"]
    else:
        log(options.work, f"vae: {sum(p.numel() for p in vae.parameters())} parameters, torch {torch.__version__}")
    held = image_batch(world.make_picture(seed).image for seed in HELD_OUT)
    saved = told = time.monotonic()
    while not clock.done:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate(clock.progress)
        seeds = np.arange(step * BATCH, (step + 1) * BATCH)
        loss = step_loss(vae, image_batch(world.make_picture(int(seed)).image for seed in seeds))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - told > 20 or clock.done:
            told = time.monotonic()
            log(
                options.work,
                f"vae step {step} {clock.minutes:.2f} min loss {loss.item():.4f} psnr {psnr(vae, held):.2f} dB",
            )
        if time.monotonic() - saved > 30 or clock.done:
            saved = time.monotonic()
            save(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step, seconds=clock.seconds)


if __name__ == "__main__":
    main()
