"""Official autoencoder checkpoints (`infinity_vae_d32reg.pth`, `infinity_vae_d56_f8_14_patchify.pth` ...).

Spec: key layout of FoundationVision/Infinity. Files hold a dict with the weights under "vae"; layers may be spelt with or without
an inner ".conv" or ".norm".
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmkv.models.infinity.autoencoder import InfinityVAE
from mmkv.models.infinity.vae_configuration import InfinityVAEConfig
from mmkv.models.shards import check_keys

NESTED = "vae"
MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # powers of 2 of the bits; one module by two names, no weights
PIXELS_PER_TOKEN = 16  # of all released transformers, in each direction


def load_vae(
    path: str | Path, config: InfinityVAEConfig | None = None, dtype: torch.dtype = torch.float32
) -> InfinityVAE:
    """The autoencoder of an official checkpoint, in eval mode.

    Args:
        path: a .pth file (the weights under "vae", or bare) or a .safetensors file.
        config: of the autoencoder; read off the shapes where None.
        dtype: of the weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no autoencoder, or keys that are missing, extra or misshapen: all of them in one message.
    """
    found = {plain_key(key): tensor for key, tensor in _read(Path(path)).items() if key not in MASKS}
    config = config or config_of(found, str(path))
    with torch.device("meta"):
        vae = InfinityVAE(config)
    own = vae.state_dict()
    check_keys({key: tuple(own[key].shape) for key in own}, {key: tuple(found[key].shape) for key in found}, str(path))
    vae.load_state_dict({key: tensor.to(dtype) for key, tensor in found.items()}, assign=True)
    return vae.eval()


def plain_key(key: str) -> str:
    """A key without the inner ".conv" or ".norm" that the official classes add to every layer."""
    found = re.fullmatch(r"(.*\.(?:conv\w*|nin_shortcut|norm\w*))\.(?:conv|norm)\.(weight|bias)", key)
    return f"{found[1]}.{found[2]}" if found else key


def config_of(weights: dict[str, Tensor], source: str = "the checkpoint") -> InfinityVAEConfig:
    """Read the configuration off an encoder's shapes; keys as `plain_key` makes them.

    Raises:
        ValueError: the keys that say it are missing.
    """
    widths = []
    while (key := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[key].shape[0])
    ends = [weights.get(f"encoder.{name}.weight") for name in ("conv_in", "conv_out")]
    if not widths or any(end is None or end.ndim != 4 for end in ends):
        raise ValueError(
            f"{source} is no Infinity autoencoder: encoder.conv_in, encoder.down.0.block.0.conv1 or encoder.conv_out is missing"
        )
    base = ends[0].shape[0]
    blocks = sum(f"encoder.down.0.block.{i}.conv1.weight" in weights for i in range(16))
    halvings = sum(f"encoder.down.{i}.downsample.conv.weight" in weights for i in range(len(widths)))
    return InfinityVAEConfig(
        latent_channels=ends[1].shape[0], patch_size=2**halvings, base_channels=base,
        channel_multipliers=tuple(width // base for width in widths), residual_blocks=blocks,
        image_channels=ends[0].shape[1],
    )  # fmt: skip


def check_vae(vae: InfinityVAEConfig, bits_per_token: int, patchify: bool = False) -> None:
    """Refuse an autoencoder that belongs to another transformer.

    Args:
        vae: its configuration.
        bits_per_token: that the transformer says of each token.
        patchify: whether its tokens are 2 x 2 positions of the latent.

    Raises:
        ValueError: another number of bits, or tokens of another size in pixels.
    """
    positions, side = (4, 2) if patchify else (1, 1)
    if vae.latent_channels * positions != bits_per_token:
        raise ValueError(
            f"an autoencoder of {vae.latent_channels} bits per position for a transformer of {bits_per_token} bits per token "
            f"(of {positions} positions): use the one of {bits_per_token // positions} bits"
        )
    if vae.patch_size * side != PIXELS_PER_TOKEN:
        raise ValueError(
            f"an autoencoder of {vae.patch_size} px per position for a transformer whose tokens are {side} x {side} positions: "
            f"use the one of {PIXELS_PER_TOKEN // side} px"
        )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no autoencoder at {path}: a .pth or .safetensors file is needed")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a torn file the unpickler raises whatever it meets (struct.error, IndexError ...)
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged, or no file of tensors"
        ) from error
    found = found.get(NESTED, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds no state dict (names and tensors, also inside {NESTED!r})")
    return found
