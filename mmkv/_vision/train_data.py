"""What `mmkv train-rates` learns on: a timm model, and a folder of images or scikit-learn's digits on canvases."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import torch

from mmkv.parts.registry import nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEST_DIGITS = 397  # of 1797, the last ones


def digit_canvases(count: int, side: int, seed: int = 0, train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """One handwritten digit on each canvas, scaled and shifted at random, and smaller fragments of others around it.

    Args:
        count: canvases.
        side: their height and width in pixels; the digit takes about half of it.
        seed: of the random numbers.
        train: whether digits are taken from the first 1400 of scikit-learn's 1797, or from the others.

    Returns:
        Images fp32 `[count, 3, side, side]` of about unit variance, and labels int64 `[count]`, 0 ... 9.

    Raises:
        ValueError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits are scikit-learn's: pip install scikit-learn") from error
    held = load_digits()
    part = slice(None, -TEST_DIGITS) if train else slice(-TEST_DIGITS, None)
    digits = torch.tensor(held.images[part], dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(held.target[part], dtype=torch.int64)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits), (count,), generator=random)
    canvas = _placed(digits[chosen], side, 0.5, 0.6, 0.4, random)
    for _ in range(2):
        fragments = digits[torch.randint(len(digits), (count,), generator=random)]
        row, col = torch.randint(0, 5, (2, count, 1), generator=random)
        inside = torch.arange(8)
        shown = ((inside >= row) & (inside < row + 4))[:, :, None] & ((inside >= col) & (inside < col + 4))[:, None]
        canvas = torch.maximum(canvas, 0.6 * _placed(fragments * shown[:, None], side, 0.3, 0.4, 1.0, random))
    canvas = canvas + 0.05 * torch.randn(canvas.shape, generator=random)
    return (canvas.expand(-1, 3, -1, -1) - 0.1) / 0.25, labels[chosen]


def _placed(
    digits: torch.Tensor, side: int, least: float, most: float, spread: float, random: torch.Generator
) -> torch.Tensor:
    """Digits `[n, 1, 8, 8]` on canvases `[n, 1, side, side]`: `least` to `most` of the side large, and wholly inside.

    `spread` of the room that is left is used for shifting them.
    """
    n = len(digits)
    draw = lambda low, high: low + (high - low) * torch.rand(n, generator=random)  # noqa: E731
    size = draw(least, most)
    x, y = draw(-spread, spread) * (1 - size), draw(-spread, spread) * (1 - size)
    none = torch.zeros(n)
    affine = torch.stack([1 / size, none, -x / size, none, 1 / size, -y / size], 1).view(n, 2, 3)
    grid = torch.nn.functional.affine_grid(affine, [n, 1, side, side], align_corners=False)
    return torch.nn.functional.grid_sample(digits, grid, align_corners=False)


def load_model(name: str, checkpoint: str | None = None, settings: Sequence[str] = ()) -> torch.nn.Module:
    """A timm model by name, with weights from a file, or with timm's own.

    Args:
        name: in timm.
        checkpoint: a file that `torch.save` or safetensors wrote; None downloads timm's weights.
        settings: "key=value" for the model's constructor, for instance "img_size=64".

    Raises:
        ValueError: no such model or file, or weights that do not fit.
    """
    import timm

    options = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not key or not found:
            raise ValueError(f"setting {setting!r}; write KEY=VALUE, for instance img_size=64")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"no file {checkpoint}")
    try:
        return timm.create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint or "", **options)
    except (RuntimeError, OSError, TypeError) as error:
        raise ValueError(f"{name} could not be made: {str(error).splitlines()[0]}") from error


def loader(images: str, model: torch.nn.Module, batch: int):
    """Batches for a timm model, of a folder or of "digits" (10,000 canvases, a pass)."""
    if images != "digits":
        return folder_loader(images, model, batch)
    height, width = model.patch_embed.img_size
    if height != width:
        raise ValueError(f"digits are painted on squares, the model takes {height} x {width}; give a folder of images")
    return Batches(*digit_canvases(10000, height), batch)


class Batches:
    """Images and labels held in memory, shuffled anew each pass.

    Args:
        images, labels: tensors with as many rows.
        size: rows of a batch; an incomplete batch at the end is left out unless it is the only one.
        seed: of the order.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, size: int, seed: int = 0):
        self.images, self.labels, self.size = images, labels, min(size, len(images))
        self._random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=self._random)
        for part in order.split(self.size)[: len(self)]:
            yield self.images[part], self.labels[part]


def folder_loader(path: str, model: torch.nn.Module, batch: int, workers: int = 2):
    """Batches of the images below a folder, prepared as the timm model wants them; folders inside are the labels.

    Raises:
        ValueError: no folder there, or no images in it.
    """
    import timm.data
    from torch.utils.data import DataLoader

    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{path} is no folder; give a folder of images, or the word digits")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"no images in {path}; possible are {', '.join(SUFFIXES)}")
    config = timm.data.resolve_model_data_config(model)
    config["input_size"] = (3, *model.patch_embed.img_size)  # timm goes by the name, not by this model
    prepare = timm.data.create_transform(**config)
    data = _Files(files, root, prepare)
    return DataLoader(data, batch_size=min(batch, len(data)), shuffle=True, drop_last=True, num_workers=workers)


class _Files(torch.utils.data.Dataset):
    def __init__(self, files: list[Path], root: Path, prepare):
        self.files, self.prepare = files, prepare
        names = sorted({file.relative_to(root).parts[0] for file in files if file.parent != root})
        self.labels = [names.index(f.relative_to(root).parts[0]) if f.parent != root else 0 for f in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        with Image.open(self.files[index]) as picture:
            return self.prepare(picture.convert("RGB")), self.labels[index]
