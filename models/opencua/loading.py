"""OpenCUA from a folder or the hub (`xlangai/OpenCUA-7B`), by the key layouts that there are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig

from mmkv.models.opencua.configuration import OpenCUAConfig
from mmkv.models.opencua.modeling import OpenCUA
from mmkv.models.opencua.processing import OpenCUAProcessor
from mmkv.models.shards import check_keys, files_of_keys, read_keys, shapes_of_keys

# first match wins; published: vision_tower.*, language_model.model.*, language_model.lm_head.*
_RENAMED = (
    ("vision_tower.", "model.visual."),
    ("model.vision_tower.", "model.visual."),
    ("visual.", "model.visual."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
)
_COMPUTED = ".inv_freq"  # of rotary tables, which are made anew


def load(name: str, *, dtype=None, device="cpu", tokenizer=None):
    """(model, processor) of an OpenCUA checkpoint; none of its remote code runs.

    Args:
        name: a folder with config.json, safetensors files and a tokenizer; or a hub name.
        dtype: of the weights; None as stored.
        device: where the model goes.
        tokenizer: in place of the folder's.

    Raises:
        ValueError: another model's config.json, or keys that are missing, extra or misshapen: all of them in one message.
        FileNotFoundError: no config.json, no weights, or a shard is missing.
    """
    folder = _folder(name)
    config = read_config(folder)
    files = files_of_keys(folder)
    shapes = shapes_of_keys(files)
    names = our_names(shapes, str(folder))
    wanted = model_shapes(config)
    check_keys(wanted, {mine: shapes[theirs] for mine, theirs in names.items()}, str(folder))
    found = read_keys(files, names.values())
    weights = {mine: found[theirs] for mine, theirs in names.items()}
    kind = dtype or weights["model.language_model.norm.weight"].dtype
    model = OpenCUA.from_pretrained(None, config=config, state_dict=weights, dtype=kind)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    processor = OpenCUAProcessor.from_pretrained(folder, tokenizer=tokenizer)
    model.generation_config.eos_token_id = ends(model.generation_config.eos_token_id, processor.tokenizer)
    return model.to(device).eval(), processor


def read_config(folder: Path) -> OpenCUAConfig:
    """The checkpoint's config.json; its remote code is not looked at.

    Raises:
        FileNotFoundError: there is none.
        ValueError: of another model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an OpenCUA checkpoint has one")
    given = json.loads(path.read_text())
    if given.get("model_type") != "opencua" or not {"vision_config", "text_config"} <= set(given):
        raise ValueError(
            f"{path}: model_type {given.get('model_type')!r}; possible is 'opencua', with both configs in it"
        )
    given.pop("auto_map", None)
    return OpenCUAConfig(**given)


def model_shapes(config: OpenCUAConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of the model, which is not built for it."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in OpenCUA(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def ends(given, tokenizer) -> list[int]:
    """Ids that end an answer: those of generation_config.json, the tokenizer's, and that of the end of a turn."""
    found = [given] if isinstance(given, int) else list(given or [])
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    more = [i for i in (tokenizer.eos_token_id, turn) if i is not None and i != tokenizer.unk_token_id]
    return list(dict.fromkeys([*found, *more]))


def our_name(theirs: str) -> str:
    """Our name of a checkpoint's key; keys that are ours, and keys nobody knows, stay."""
    if theirs.startswith(("model.visual.", "model.language_model.", "lm_head.")):
        return theirs
    for start, mine in _RENAMED:
        if theirs.startswith(start):
            return mine + theirs.removeprefix(start)
    return theirs


def our_names(keys, what: str) -> dict[str, str]:
    """The checkpoint's key of each of our names.

    Raises:
        ValueError: two keys of one name, as where two layouts are mixed.
    """
    names: dict[str, str] = {}
    twice = []
    for theirs in keys:
        if theirs.endswith(_COMPUTED):
            continue
        mine = our_name(theirs)
        twice += [f"{names[mine]} and {theirs}"] if mine in names else []
        names[mine] = theirs
    if twice:
        raise ValueError(f"{what}: keys that stand for the same weights: {', '.join(twice)}")
    return names


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
