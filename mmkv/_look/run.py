"""Methods at work on one video or image, and the picture, film or page of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkv._inputs import TINY, UserError, check_words, prepare, prepare_image
from mmkv._look.film import panels, write_film
from mmkv._look.page import page
from mmkv._look.stages import Stage, decoder_stages, tower_stage
from mmkv._look.strip import Scene, strip
from mmkv._vision.tower import TowerHooks
from mmkv.parts.registry import METHODS, nearest
from mmkv.tokens.at_ratio import BY_THRESHOLD, RATED, at_ratio
from mmkv.tokens.method import TokenMethod

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES = (".png", ".mp4", ".html")
KEEP = 0.25
QUESTIONS = {TINY: "which colour appears first?"}
QUESTION = "Describe what is shown."


def methods_of(names: str, keep: float | None) -> list[TokenMethod]:
    """The token methods of a list with commas, set to keep that share (None: a quarter, where a method has such a setting).

    Raises:
        UserError: there is none of a name, or it is for other models.
        ValueError: the share is out of range, or was asked of a method without such a setting.
    """
    out = []
    known = {
        key: entry for key, entry in METHODS.items() if entry.kind == "tokens" and issubclass(entry.method, TokenMethod)
    }
    for name in names.split(","):
        key = name.strip().lower()
        if key in METHODS and key not in known:
            raise UserError(
                f"{METHODS[key].name} drops no vision tokens of a language model; possible are {', '.join(known)}"
            )
        if key not in known:
            raise UserError(f"no token method {name.strip()!r}{nearest(key, known)}; possible are {', '.join(known)}")
        if keep is None and key not in RATED:
            out.append(known[key].method())
        else:
            out.append(at_ratio(key, KEEP if keep is None else keep))
    return out


def check_out(out: str | None, path: str, names: str) -> Path:
    """Where the result goes: `out`, or a PNG in this folder, named after the file and the methods.

    Raises:
        UserError: another kind of file, or no such folder.
    """
    target = Path(out or f"{Path(path).stem}-{names.replace(' ', '').replace(',', '-').lower()}.png")
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {target}: possible are files that end in {', '.join(SUFFIXES)}")
    if target.suffix.lower() == ".mp4" and is_image(path):
        raise UserError(f"--out {target}: {Path(path).name} is a single image; write .png or .html")
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    return target


def is_image(path: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return Path(path).suffix.lower() in IMAGES


def open_image(path: str) -> np.ndarray:
    """uint8 `[1, H, W, 3]`, upright.

    Raises:
        UserError: no such file, or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except FileNotFoundError as error:
        raise UserError(f"no such image file: {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image") from error


class Look:
    """One video or image before one model.

    Args:
        model, processor: as `mmkv ask` loads them.
        pictures: uint8 `[T, H, W, 3]`.
        fps: of a video's pictures; None for an image.
        question: in the prompt behind it.
    """

    def __init__(self, model: Any, processor: Any, pictures: np.ndarray, fps: float | None, question: str):
        self.model, self.pictures, self.fps = model, pictures, fps
        if fps is None:
            self.inputs = prepare_image(model, processor, pictures[0], question)
        else:
            self.inputs = prepare(model, processor, pictures, fps, question)
        self._pixels = _centre(processor, pictures, fps is None)
        self.frames = 0  # the decoder's, known after the first method

    def stages(self, method: TokenMethod) -> list[Stage]:
        """What a method did with the prompt's vision tokens, place by place."""
        import torch

        import mmkv
        from mmkv._wrap import session

        name = type(method).__name__
        with mmkv.wrapped(self.model, tokens=[method]) as model, torch.no_grad():
            model(**self.inputs, logits_to_keep=1)
            seen = session(model)
            trace = seen.dropping.trace
            if trace is None:
                raise UserError("this prompt showed the model no image or video; nothing can be drawn")
            out = decoder_stages(trace, name)
            self.frames = len(out[0].group)
            hooks = seen.looking.hooks
            if isinstance(hooks, TowerHooks) and hooks.state is not None:
                tower = tower_stage(hooks.state, hooks.tower.prefix, name, self.frames)
                return out if tower is None else [tower, *out]
        return out

    def scene(self, title: str, caption: str) -> Scene:
        """What the decoder's frames show: the first of the pictures that share one."""
        step = math.ceil(len(self.pictures) / self.frames)
        first = [min(f * step, len(self.pictures) - 1) for f in range(self.frames)]
        if self.fps is None:
            labels = ["whole image", *["its tiles"] * (self.frames - 1)]
        else:
            labels = [f"{t / self.fps:.1f} s" for t in first]
        return Scene(title, caption, [self._pixels[t] for t in first], labels)

    def write(self, target: Path, scene: Scene, stages: Sequence[Stage], columns: int) -> None:
        """Write the picture, film or page, as the suffix says."""
        if target.suffix.lower() == ".html":
            target.write_text(page(scene, stages), encoding="utf-8")
        elif target.suffix.lower() == ".mp4" and self.fps is not None:
            write_film(target, panels(scene, stages, self._pixels), self.fps)
        else:
            strip(scene, stages, columns).save(target, optimize=True)


def question_for(model: str, processor: Any, question: str | None) -> str:
    """The question as given, or a fitting one.

    Raises:
        UserError: an empty one, or words that the bundled model does not know.
    """
    if question is None:
        return QUESTIONS.get(model, QUESTION)
    if not question.strip():
        raise UserError("an empty question; ask something in words")
    if model == TINY:
        check_words(processor, question)
    return question


def remark(method: TokenMethod, stages: Sequence[Stage], image: bool) -> str | None:
    """What a person should know about a method's stages beside the counts."""
    name = type(method).__name__
    if name.lower() in BY_THRESHOLD:
        return f"{name} has thresholds and no keep ratio: its official setting nearest to the ratio"
    if all(stage.kept == stage.total for stage in stages):
        return f"{name} left every token in its place{', as it does with images' if image else ''}"
    return None


def _centre(processor: Any, pictures: np.ndarray, image: bool) -> np.ndarray:
    """The part of pictures `[T, H, W, 3]` that the model sees: the central square for towers that crop to it."""
    loader = getattr(processor, "image_processor" if image else "video_processor", None)
    if not getattr(loader, "do_center_crop", None):
        return pictures
    height, width = pictures.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]
