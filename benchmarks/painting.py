"""HACK, ScaleKV, H2O and SnapKV on the bundled tiny Infinity: bytes held, change against the full cache, caption match.

    python benchmarks/painting.py

Writes benchmarks/results/painting.json and the pictures painting.png beside it (a row for each caption and seed, a column for
each method). Every picture is drawn with the seed of its full-cache twin. Bytes are those of `mmkv.report`: storages that are
held before the last scale, whose keys and values nobody reads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import environment, save
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmkv
from mmkv.cache import H2O, HACK, CacheMethod, ScaleKV, ScaleStatistics, SnapKV
from mmkv.models import tiny_infinity
from mmkv.models.tiny_infinity import world
from mmkv.models.tiny_infinity.evaluate import BATCH, SAMPLING, match
from mmkv.models.tiny_infinity.model import SCHEDULE, TinyInfinity
from mmkv.models.tiny_infinity.training import image_batch
from mmkv.parts.calibration import HeadClasses, Identity, LayerRoles

RESULTS = Path(__file__).parent / "results"
COMPRESSIONS = (0.5, 0.7, 0.9)
FIRST = 4 * 10**6  # seed of the first caption that is measured; those of evaluate.py and of training are others
CALIBRATION = 5 * 10**6  # of the captions that heads and layers are measured on
SAMPLES = (1, 10, 50)
CONTEXTUAL = 0.5  # share of the heads
DRAFTERS = 4  # (layer, scale) pairs, of 6 layers and the 4 scales before which something is dropped
FIRST_CUT = 3  # the first scale before which something is dropped at 70 %
ROWS = 8  # of the picture
GAP, LABEL = 4, 14  # px between pictures, and of the line above them


@dataclass(frozen=True)
class Painted:
    """What one method painted.

    Args:
        images: uint8 `[N, H, W, 3]`.
        held, dense: bytes of all caches before the last scale, and of the same uncompressed.
    """

    images: np.ndarray
    held: int
    dense: int


def paint(model: TinyInfinity, prompts: list[str], *methods: CacheMethod) -> Painted:
    """Paint the prompts, prompt i with seed i, a batch at a time."""
    images, held, dense = [], 0, 0
    with mmkv.wrapped(model, cache=list(methods)):
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            images += model.generate_image(part, seed=[start + i for i in range(len(part))], **SAMPLING)
            report = mmkv.report(model)
            held, dense = held + report.kv_bytes, dense + report.kv_bytes_dense
    return Painted(np.stack([np.asarray(image) for image in images]), held, dense)


def psnr(one: np.ndarray, other: np.ndarray) -> list[float | None]:
    """Of each picture, dB; None where two are the same."""
    error = ((one.astype(np.float64) - other) ** 2).mean((1, 2, 3))
    return [float(10 * np.log10(255**2 / e)) if e else None for e in error]


@torch.no_grad()
def features(model: TinyInfinity, images: np.ndarray) -> list[torch.Tensor]:
    """`[N, C, h, w]` of each level of the bundled autoencoder's encoder, of unit length along C."""
    out: list[torch.Tensor] = []
    x = model.vae.encoder.conv_in(image_batch(images))
    for level in model.vae.encoder.down:
        x = level(x)
        out.append(torch.nn.functional.normalize(x, dim=1))
    return out


def perceptual(model: TinyInfinity, one: np.ndarray, other: np.ndarray) -> float:
    """LPIPS-style distance (arXiv 1801.03924) without its trained network or weights: squared difference of `features`.

    Summed over channels, averaged over places, levels and pictures.
    """
    pairs = zip(features(model, one), features(model, other), strict=True)
    return float(np.mean([float((a - b).square().sum(1).mean()) for a, b in pairs]))


def calibrated(model: TinyInfinity, samples: int, first: int = CALIBRATION) -> tuple[HeadClasses, LayerRoles]:
    """Head classes and layer roles from so many captions of their own, one picture at a time."""
    statistics, identity = ScaleStatistics(), Identity.of(model.config)
    with mmkv.wrapped(model, cache=[statistics]):
        for i in range(samples):
            model.generate_image(world.make_picture(first + i).caption, seed=i, **SAMPLING)
    return statistics.head_classes(CONTEXTUAL, identity), statistics.layer_roles(DRAFTERS, identity, first=FIRST_CUT)


def shared(one: tuple[tuple[int, ...], ...], other: tuple[tuple[int, ...], ...], of: int) -> float:
    """Share of `of` members that are in the same class in both groupings."""
    return 1 - sum(len(set(a) ^ set(b)) for a, b in zip(one, other, strict=True)) / of


def stability(model: TinyInfinity, samples: tuple[int, ...]) -> tuple[list[dict], HeadClasses, LayerRoles]:
    """How well few samples agree with the most, which are other captions; and what the most give."""
    heads, roles = calibrated(model, max(samples))
    count, rows = heads.model.layers * heads.model.heads, []
    pairs = heads.model.layers * (len(SCHEDULE) - FIRST_CUT)
    for number in samples:
        some, parts = calibrated(model, number, CALIBRATION + 10**5)
        rows.append(
            {
                "samples": number,
                "heads_of_the_same_class": shared(some.structural, heads.structural, count),
                "layers_of_the_same_role": shared(parts.drafters, roles.drafters, pairs),
            }
        )
    return rows, heads, roles


def methods(heads: HeadClasses, roles: LayerRoles, compression: float) -> dict[str, CacheMethod]:
    """Each method, told to drop the same share of the tokens."""
    keep = round(1 - compression, 6)
    hack = HACK(heads, compression=compression)
    swapped = tuple(tuple(h for h in range(heads.model.heads) if h not in row) for row in heads.structural)
    return {
        "HACK": hack,
        "HACK, classes swapped": replace(hack, structural=swapped),
        "ScaleKV": ScaleKV(roles=roles, share=keep),
        "H2O": H2O(budget=keep),
        "SnapKV": SnapKV(budget=keep),
    }


def measured(model: TinyInfinity, count: int, heads: HeadClasses, roles: LayerRoles) -> tuple[list[dict], dict]:
    """A row for each method and compression, and the first pictures of each for the grid."""
    pictures = [world.make_picture(FIRST + i) for i in range(count)]
    facts, prompts = [picture.facts for picture in pictures], [picture.caption for picture in pictures]
    full = paint(model, prompts)
    settings = [(c, name, method) for c in COMPRESSIONS for name, method in methods(heads, roles, c).items()]
    found = {(0.0, "full cache"): full}
    for compression, name, method in track(settings, "painting"):
        found[compression, name] = paint(model, prompts, method)
    rows = []
    for (compression, name), painted in found.items():
        change = [value for value in psnr(full.images, painted.images) if value is not None]
        rows.append(
            {
                "method": name,
                "compression": compression,
                "kv_bytes_per_picture": painted.held / count,
                "share_of_dense": painted.held / painted.dense,
                "same_pictures": (count - len(change)) / count,
                "psnr_db": float(np.mean(change)) if change else None,
                "perceptual": perceptual(model, full.images, painted.images),
                "caption_match": match(facts, painted.images),
            }
        )
    return rows, {key: painted.images[:ROWS] for key, painted in found.items()} | {"prompts": prompts[:ROWS]}


def grid(pictures: dict, path: Path) -> None:
    """Captions and seeds in rows, methods in columns."""
    prompts = pictures.pop("prompts")
    side, height = world.SIDE + GAP, world.SIDE + GAP + LABEL
    page = Image.new("RGB", (len(pictures) * side + GAP, LABEL * 2 + len(prompts) * height), "white")
    draw = ImageDraw.Draw(page)
    for column, ((compression, name), images) in enumerate(pictures.items()):
        left = GAP + column * side
        draw.text((left, 1), name.replace("HACK, classes swapped", "H. swapped")[:10], fill="black")
        draw.text((left, LABEL), f"-{compression:.0%}" if compression else "", fill="black")
        for row, image in enumerate(images):
            page.paste(Image.fromarray(image), (left, 2 * LABEL + row * height + LABEL))
    for row, prompt in enumerate(prompts):
        draw.text((GAP, 2 * LABEL + row * height), prompt, fill="black")
    page.save(path)
    print(f"written to {path}")


def table(rows: list[dict], count: int) -> Table:
    """What the terminal shows."""
    out = Table(title=f"Tiny Infinity, {count} captions, the same seeds everywhere")
    for name in ("dropped", "method", "KV bytes / picture", "of dense", "PSNR dB", "distance", "caption match"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        change = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        out.add_row(
            f"{row['compression']:.0%}", row["method"], f"{row['kv_bytes_per_picture']:,.0f}",
            f"{row['share_of_dense']:.1%}", change, f"{row['perceptual']:.3f}", f"{row['caption_match']['all']:.1%}",
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path, help="folder; the bundled one where left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "painting.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_infinity.load(options.checkpoint)
    agreement, heads, roles = stability(model, SAMPLES)
    rows, pictures = measured(model, options.captions, heads, roles)
    Console().print(table(rows, options.captions))
    for row in agreement:
        print(
            f"{row['samples']} samples: {row['heads_of_the_same_class']:.1%} of the heads in the same class, "
            f"{row['layers_of_the_same_role']:.1%} of the layers in the same role as from {max(SAMPLES)} other captions"
        )
    result = {
        "environment": environment(),
        "captions": options.captions,
        "sampling": SAMPLING,
        "scales": [list(size) for size in SCHEDULE.sizes],
        "distance": "squared difference of unit-length features after each encoder level of the bundled autoencoder",
        "calibration": agreement,
        "structural": heads.structural,
        "drafters": roles.drafters,
        "rows": rows,
    }
    save(str(options.out), result)
    grid(pictures, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
