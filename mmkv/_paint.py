"""What `mmkv paint` does: a prompt in, an image and the bytes of its KV cache out, compressed beside dense."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkv._inputs import TINY, UserError, place_and_dtype

if TYPE_CHECKING:
    from PIL import Image

    from mmkv._report import Report
    from mmkv.cache import CacheMethod

GAP = 4  # px between images that lie side by side
LABEL = 14  # px of the line below an image


@dataclass(frozen=True)
class Picture:
    """One image, and what its cache was.

    Args:
        method: name of what stored it, "dense" for everything as it is.
        image: RGB.
        report: numbers of the cache before the last scale, which is not kept.
    """

    method: str
    image: Image.Image
    report: Report


def load_painter(
    name: str,
    settings: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Any:
    """An Infinity, ready to paint.

    Args:
        name: "tiny" for the bundled one, a folder made by `save_pretrained`, or an official checkpoint (file or folder).
        settings: of an official checkpoint: "2b", "8b", "8b-512", "125m".
        vae: file of its autoencoder.
        text_encoder: hub name or folder of the T5 encoder; flan-t5-xl where None.
        device: as torch names it; a GPU where there is one.
        dtype: of the decoder's layers, as torch names it; as stored where None.

    Raises:
        UserError: something of it is missing.
    """
    import torch

    from mmkv.models.infinity.text import CHECKPOINT, T5Prompts

    place, kind = place_and_dtype(device, dtype)
    model = _weights(name, settings, vae, text_encoder, kind).to(place).eval()
    if model.text_encoder is None:
        encoder = text_encoder or CHECKPOINT
        try:
            model.text_encoder = T5Prompts.load(encoder, place, torch.float16 if place.type == "cuda" else None)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the text encoder {encoder!r}: {_first_line(error)}") from error
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _weights(name: str, settings: str | None, vae: str | None, text_encoder: str | None, dtype: Any) -> Any:
    from mmkv.models.infinity import InfinityForImageGeneration

    if name == TINY:
        given = dict(settings=settings, vae=vae, text_encoder=text_encoder)
        if wrong := [option for option, value in given.items() if value is not None]:
            raise UserError(
                f"--{wrong[0].replace('_', '-')} {given[wrong[0]]}: is for official checkpoints, the bundled model has its own"
            )
        from mmkv.models import tiny_infinity

        return tiny_infinity.load()
    if (Path(name) / "config.json").is_file() and settings is None:
        try:
            return InfinityForImageGeneration.from_pretrained(name, dtype=dtype or "auto")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    if settings is None:
        raise UserError(
            f"{name} is no folder made by save_pretrained; for an official checkpoint say which: --settings 2b, 8b, 8b-512, 125m"
        )
    from mmkv.models.infinity.loading import load_official
    from mmkv.models.infinity.vae_loading import load_vae

    model = load_official(name, settings, dtype)
    if vae is not None:
        model.vae = load_vae(vae, model.config.vae_config)
    return model


def method_of(name: str, keep: float | None) -> CacheMethod | None:
    """The method of this name, told to keep a share of the tokens; None for "dense".

    Args:
        name: a preset or a method of the cache, as in "hack", "scalekv", "snapkv".
        keep: share of the tokens, above 0 to 1; the method's own where None.

    Raises:
        ValueError: there is none of that name, or it cannot be told what to keep.
    """
    from mmkv._presets import PRESETS, preset
    from mmkv.cache import HACK, ScaleKV
    from mmkv.cache.eviction import Eviction
    from mmkv.parts.registry import METHODS

    if name == "dense":
        if keep is not None:
            raise ValueError(f"--keep {keep} with dense, which keeps all tokens; leave it out, or choose a method")
        return None
    entry = METHODS.get(name.lower())
    if name not in PRESETS and entry is not None and entry.kind == "cache":
        method = entry.method()
    elif name in PRESETS or get_close_matches(name, PRESETS):
        method = preset(name).cache[0]
    else:
        methods = sorted(entry.name.lower() for entry in METHODS.values() if entry.kind == "cache")
        raise ValueError(f"--method {name}: possible are dense, {', '.join([*PRESETS, *methods])}")
    if keep is None:
        return method
    if not 0 < keep <= 1:
        raise ValueError(f"--keep {keep}: possible are numbers above 0 to 1, the share of the tokens that stays")
    if isinstance(method, HACK):
        return replace(method, compression=1 - keep, contextual_share=min(method.contextual_share, keep))
    if isinstance(method, ScaleKV):
        return replace(method, share=keep)
    if isinstance(method, Eviction):
        return replace(method, budget=float(keep))
    raise ValueError(f"--keep with {name}, which keeps all tokens and stores them smaller; leave it out")


def paint(model: Any, prompt: str, name: str, method: CacheMethod | None, **options: Any) -> Picture:
    """One image of a prompt, its cache stored by a method; the model is left as it was found.

    Args:
        model: as `load_painter` gives it.
        prompt: what to paint.
        name: of the method.
        method: None for dense.
        options: as `generate_image` takes them.
    """
    import mmkv

    with mmkv.wrapped(model, cache=() if method is None else [method]):
        image = model.generate_image(prompt, **options)
        return Picture(name, image, mmkv.report(model))


def check_out(path: str) -> Path:
    """The file to write, before anything is painted.

    Raises:
        ValueError: no folder for it, or no image format.
    """
    target = Path(path)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {path}: possible are .png, .jpg and .webp")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"--out {path}: no such folder; make it first")
    return target


def side_by_side(pictures: list[Picture]) -> Image.Image:
    """The images in a row, each with a line below: its method and the bytes of its cache; one alone as it is."""
    from PIL import Image, ImageDraw

    from mmkv._report import size

    if len(pictures) == 1:
        return pictures[0].image
    labels = [f"{picture.method}: {size(picture.report.kv_bytes)}" for picture in pictures]
    widths = [max(picture.image.width, 6 * len(label) + GAP) for picture, label in zip(pictures, labels)]
    height = max(picture.image.height for picture in pictures)
    page = Image.new("RGB", (sum(widths) + GAP * (len(pictures) - 1), height + LABEL), "white")
    draw, left = ImageDraw.Draw(page), 0
    for picture, label, width in zip(pictures, labels, widths):
        page.paste(picture.image, (left, 0))
        draw.text((left + 1, height + 1), label, fill="black")
        left += width + GAP
    return page


def difference(pictures: list[Picture]) -> float | None:
    """PSNR in dB of the second image against the first; None for one image, infinite for equal ones."""
    import numpy as np

    if len(pictures) < 2:
        return None
    first, second = (np.asarray(picture.image, np.float64) for picture in pictures[:2])
    error = float(((first - second) ** 2).mean())
    return float("inf") if not error else float(10 * np.log10(255**2 / error))
