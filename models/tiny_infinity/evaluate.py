"""How good the tiny Infinity is: `python -m mmkv.models.tiny_infinity.evaluate`, on captions it was not trained on.

Caption match is judged by `detect`, a classical detector of colours, shapes and places. Beside the model's numbers stand the
detector's on real pictures and on pictures after the autoencoder (what is possible), and on pictures of other captions (chance).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict

import numpy as np
import torch

from mmkv.models.tiny_infinity import load, world
from mmkv.models.tiny_infinity.detect import agreement
from mmkv.models.tiny_infinity.model import SCHEDULE, TinyInfinity
from mmkv.models.tiny_infinity.training import image_batch
from mmkv.models.tiny_infinity.words import KINDS, Facts

FIRST = 3 * 10**6  # seed of the first caption
BATCH = 16
SAMPLING = dict(guidance=2.0, temperature=0.7)  # of the numbers in the README and of the benchmark


def paint(model: TinyInfinity, prompts: list[str], seed: int = 0, **sampling) -> np.ndarray:
    """Images uint8 `[N, 64, 64, 3]`, a batch at a time; prompt i is drawn with seed `seed + i`."""
    options, images = SAMPLING | sampling, []
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        images += model.generate_image(part, seed=[seed + i + j for j in range(len(part))], **options)
    return np.stack([np.asarray(image) for image in images])


def match(facts: list[Facts], images: np.ndarray) -> dict[str, float]:
    """Share of pictures of which a caption is true, as a whole and by fact; and by kind of caption, as a whole."""
    found = defaultdict(list)
    for fact, image in zip(facts, images, strict=True):
        true = agreement(fact, image)
        for name, value in true.items():
            found[name].append(value)
        found[fact.kind].append(true["all"])
    return {name: float(np.mean(found[name])) for name in [*agreement(facts[0], images[0]), *KINDS] if name in found}


@torch.no_grad()
def reconstructed(model: TinyInfinity, images: np.ndarray) -> np.ndarray:
    """Pictures uint8 `[N, H, W, 3]` after the autoencoder and its bits."""
    from mmkv.models.infinity.quantizer import quantize

    latent = quantize(model.vae.encode(image_batch(images)), SCHEDULE.sizes).summed
    return ((model.vae.decode(latent) + 1) / 2 * 255).byte().movedim(1, -1).numpy()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over pictures uint8 `[N, H, W, 3]`, dB."""
    error = ((one.astype(np.float64) - other) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def measure(model: TinyInfinity, count: int, **sampling) -> dict:
    """All numbers, on `count` captions."""
    pictures = [world.make_picture(FIRST + i) for i in range(count)]
    facts, real = [picture.facts for picture in pictures], np.stack([picture.image for picture in pictures])
    after = reconstructed(model, real)
    painted = paint(model, [picture.caption for picture in pictures], **sampling)
    return {
        "captions": count,
        "sampling": SAMPLING | sampling,
        "autoencoder_psnr_db": psnr(real, after),
        "match_of_real_pictures": match(facts, real),
        "match_after_the_autoencoder": match(facts, after),
        "match_of_painted_pictures": match(facts, painted),
        "match_of_other_captions_pictures": match(facts, np.roll(painted, 1, axis=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder; the bundled one where left out")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; printed in any case")
    options = parser.parse_args()
    result = measure(load(options.checkpoint), options.captions)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
