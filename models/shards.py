"""Weights in safetensors files: where each key is, its shape, and whether all of them fit a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

Shape = tuple[int, ...]


def files_of_keys(folder: Path) -> dict[str, Path]:
    """The file that holds each key of a checkpoint, sharded or in one file.

    Raises:
        FileNotFoundError: no safetensors file, or a shard of the index is missing: all of them in one message.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        found = {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
        if lacking := sorted({file.name for file in found.values() if not file.is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(lacking)}: download the whole folder")
        return found
    if not single.is_file():
        raise FileNotFoundError(f"{folder}: no model.safetensors and no {index.name}")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def shapes_of_keys(files: dict[str, Path]) -> dict[str, Shape]:
    """Shape of each key, from the files' headers. A key that its file lacks has none."""
    out = {}
    for path in dict.fromkeys(files.values()):
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            out |= {key: tuple(file.get_slice(key).get_shape()) for key in files if files[key] == path and key in held}
    return out


def read_keys(files: dict[str, Path], keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of keys, file by file."""
    out, wanted = {}, set(keys)
    for path in dict.fromkeys(files[key] for key in wanted):
        with safe_open(path, "pt") as file:
            out |= {key: file.get_tensor(key) for key in wanted if files[key] == path}
    return out


def check_keys(wanted: dict[str, Shape], found: dict[str, Shape], what: str) -> None:
    """Compare the keys that a model has with those of a checkpoint.

    Args:
        wanted: shape by key, of the model.
        found: shape by key, of the checkpoint, in the model's names.
        what: the checkpoint, for the message.

    Raises:
        ValueError: keys that are missing, extra or misshapen; one line names all of them.
    """
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    bent = [
        f"{k} {list(found[k])} for {list(wanted[k])}" for k in sorted(wanted) if found.get(k, wanted[k]) != wanted[k]
    ]
    problems = {"missing": missing, "extra": extra, "misshapen": bent}
    if any(problems.values()):
        said = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{what}: its keys do not fit the model; {said}")
