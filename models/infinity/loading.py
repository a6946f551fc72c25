"""Official checkpoints of Infinity: their keys are ours by another name.

Spec: state dict of FoundationVision/Infinity (`infinity_2b_reg.pth`, the folder `infinity_8b_weights`,
`infinity_125M_256x256.pth`, and training checkpoints that nest it in "trainer" and "gpt_fsdp").
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmkv.models.infinity.configuration import InfinityConfig, named_config
from mmkv.models.infinity.model import InfinityForImageGeneration
from mmkv.models.shards import check_keys, files_of_keys, read_keys

NESTED = ("trainer", "gpt_fsdp")  # where training keeps the weights
UNCONDITIONAL = "cfg_uncond"
LAYERS = "model.layers."
ZERO_BIAS = "zero_k_bias"  # keys have no bias; official checkpoints keep the zeros

# their names and ours; .* stands for a weight and a bias, None for zeros that we do not keep
_TOP = {
    UNCONDITIONAL: "model.conditioner.unconditional",
    "pos_start": "model.conditioner.start",
    "text_norm.weight": "model.conditioner.norm",
    "text_proj_for_sos.ca.mat_q": "model.conditioner.pool.query",
    "text_proj_for_sos.ca.v_bias": "model.conditioner.pool.v_bias",
    f"text_proj_for_sos.ca.{ZERO_BIAS}": None,
    "text_proj_for_sos.ca.mat_kv.weight": "model.conditioner.pool.kv_proj.weight",
    "text_proj_for_sos.ca.proj.*": "model.conditioner.pool.proj.*",
    "text_proj_for_ca.0.*": "model.conditioner.memory_in.*",
    "text_proj_for_ca.2.*": "model.conditioner.memory_out.*",
    "lvl_embed.weight": "model.level_embed.weight",
    "word_embed.*": "bits_embed.*",
    "shared_ada_lin.1.*": "model.conditioner.modulation.*",
    "head_nm.ada_lin.1.*": "head.modulation.*",
    "head.*": "head.proj.*",
}
_LAYER = {
    "ada_gss": "modulation",
    "sa.scale_mul_1H11": "self_attn.log_scale",
    "sa.q_bias": "self_attn.q_bias",
    "sa.v_bias": "self_attn.v_bias",
    f"sa.{ZERO_BIAS}": None,
    "sa.mat_qkv.weight": "self_attn.qkv_proj.weight",
    "sa.proj.*": "self_attn.o_proj.*",
    "ca.v_bias": "cross_attn.v_bias",
    f"ca.{ZERO_BIAS}": None,
    "ca.mat_q.*": "cross_attn.q_proj.*",
    "ca.mat_kv.weight": "cross_attn.kv_proj.weight",
    "ca.proj.*": "cross_attn.o_proj.*",
    "ffn.fc1.*": "mlp.fc1.*",
    "ffn.fc2.*": "mlp.fc2.*",
    "ca_norm.*": "cross_norm.*",
}


def official_names(config: InfinityConfig) -> dict[str, str | None]:
    """The keys of an official checkpoint, and what each is called here; None for zeros that we do not keep."""
    names = dict(_both(_TOP, "", ""))
    per_chunk = config.num_hidden_layers // config.block_chunks
    for layer in range(config.num_hidden_layers):
        theirs = f"block_chunks.{layer // per_chunk}.module.{layer % per_chunk}."
        names |= dict(_both(_LAYER, theirs, f"{LAYERS}{layer}."))
    return names


def _both(names: dict[str, str | None], theirs: str, ours: str) -> Iterator[tuple[str, str | None]]:
    """Pairs of keys, the .* spelt out."""
    for name, mine in names.items():
        for suffix in ("weight", "bias") if name.endswith(".*") else ("",):
            yield (
                theirs + name.removesuffix("*") + suffix,
                None if mine is None else ours + mine.removesuffix("*") + suffix,
            )


def official_shapes(model: InfinityForImageGeneration) -> dict[str, tuple[int, ...]]:
    """The shape that each key of an official checkpoint has for a model of this configuration."""
    own, channels = model.state_dict(), model.config.hidden_size
    names = official_names(model.config).items()
    return {theirs: (channels,) if ours is None else tuple(own[ours].shape) for theirs, ours in names}


def load_official(
    path: str | Path,
    config: InfinityConfig | str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> InfinityForImageGeneration:
    """A model with the weights of an official checkpoint; the autoencoder, where the config has one, is left to be set.

    Args:
        path: a .pth file, a .safetensors file, or a folder of safetensors shards with their index.
        config: of the model, or its name ("2b", "8b", "8b-512", "125m").
        dtype: of the decoder layers (official inference: bfloat16); the rest stays fp32. None for fp32.
        device: where it goes.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: keys that are missing, extra or misshapen, all in one message.
    """
    config = named_config(config) if isinstance(config, str) else config
    bare = InfinityConfig(**{**config.to_dict(), "vae_config": None})
    with torch.device("meta"):
        model = InfinityForImageGeneration(bare)
    weights = read_weights(path)
    fill(model, weights, str(path), dtype)
    model.config.vae_config = config.vae_config
    model.name_or_path = str(path if Path(path).is_dir() else Path(path).parent)
    return model.to(device).eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or folder, taken out of what training wraps around them.

    Raises:
        FileNotFoundError: there is none, or a shard of it is missing.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: a .pth or .safetensors file, or a folder of shards, is needed"
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, struct.error) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged, or no file of tensors"
        ) from error
    for name in NESTED:
        found = found[name] if isinstance(found, dict) and name in found else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds no state dict (names and tensors, also inside 'trainer' and 'gpt_fsdp')")
    return found


def _in_folder(folder: Path) -> dict[str, Tensor]:
    files = files_of_keys(folder)
    return read_keys(files, files)


def fill(
    model: InfinityForImageGeneration,
    weights: dict[str, Tensor],
    source: str = "the checkpoint",
    dtype: torch.dtype | None = None,
) -> None:
    """Put official weights into a model, of meta tensors or not.

    The unconditional text is cut, or filled up with zeros, to the prompt length that the model takes.

    Args:
        model: whose weights they become.
        weights: by official key.
        source: where they are from, for errors.
        dtype: of the decoder layers; the rest is fp32, and so are they where None.

    Raises:
        ValueError: keys that are missing, extra or misshapen, all in one message.
    """
    names, shapes = official_names(model.config), official_shapes(model)
    weights = dict(weights)
    if UNCONDITIONAL in weights and weights[UNCONDITIONAL].ndim == 2:
        weights[UNCONDITIONAL] = _rows(weights[UNCONDITIONAL], model.config.text_max_length)
    check_keys(shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    biased = [name for name, ours in names.items() if ours is None and bool(weights[name].any())]
    if biased:
        raise ValueError(f"{source} has biases of keys that are not zero: {', '.join(biased)}")
    ours = {}
    for theirs, mine in names.items():
        if mine is not None:
            kind = dtype if dtype is not None and mine.startswith(LAYERS) else torch.float32
            ours[mine] = weights[theirs].to(kind)
    model.load_state_dict(ours, strict=True, assign=True)


def _rows(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows; zeros where there are fewer."""
    return torch.cat([rows[:count], rows.new_zeros(max(count - len(rows), 0), rows.shape[1])])
