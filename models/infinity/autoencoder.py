"""Infinity's autoencoder: images to the feature map whose signs are the bits, and back.

Spec: key layout and arithmetic of the repository FoundationVision/Infinity (infinity/models/bsq_vae); paper arXiv 2412.04431.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkv.models.infinity.vae_configuration import InfinityVAEConfig

EPS = 1e-6  # of the group normalisations


def _norm(config: InfinityVAEConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups_for(channels), channels, eps=EPS)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut."""

    def __init__(self, config: InfinityVAEConfig, channels: int, out: int):
        super().__init__()
        self.norm1 = _norm(config, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(config, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by copies, and smooths them with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next, if any."""

    def __init__(self, config: InfinityVAEConfig, channels: int, out: int, blocks: int, step: dict[str, nn.Module]):
        super().__init__()
        sizes = [channels] + [out] * blocks
        self.block = nn.ModuleList(ResidualBlock(config, a, b) for a, b in zip(sizes, sizes[1:]))
        for name, module in step.items():  # downsample or upsample, as checkpoints call it
            self.add_module(name, module)
        self.step = next(iter(step), None)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.step is None else self.get_submodule(self.step)(x)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, config: InfinityVAEConfig, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(config, channels, channels)
        self.block_2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Image `[B, 3, H, W]` to features `[B, d, H / patch, W / patch]`."""

    def __init__(self, config: InfinityVAEConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.base_channels, *widths], widths)):
            step = {"downsample": Downsample(width)} if i < config.halvings else {}
            self.down.append(Level(config, before, width, config.residual_blocks, step))
        self.mid = Middle(config, widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent `[B, d, h, w]` to image `[B, 3, h * patch, w * patch]`, not clamped."""

    def __init__(self, config: InfinityVAEConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList()  # by level, so the last is used first
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            step = {"upsample": Upsample(width)} if 1 <= i <= config.halvings else {}
            self.up.append(Level(config, before, width, config.residual_blocks + 1, step))
        self.norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class InfinityVAE(PreTrainedModel):
    """The autoencoder of Infinity's bitwise tokens; the bits themselves are made by `quantizer.quantize`.

    Args:
        config: `InfinityVAEConfig`.
    """

    config_class = InfinityVAEConfig
    base_model_prefix = "vae"
    main_input_name = "images"

    def __init__(self, config: InfinityVAEConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, with which the modules were made."""

    def encode(self, images: Tensor) -> Tensor:
        """Features `[B, d, H / patch_size, W / patch_size]` of images `[B, 3, H, W]` in -1..1.

        Raises:
            ValueError: another shape, or a size that is no multiple of the patch.
        """
        patch, channels = self.config.patch_size, self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images of shape {tuple(images.shape)}: needed are [batch, {channels}, height, width]")
        if images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} px: needed are multiples of {patch} px")
        return self.encoder(images)

    def decode(self, latent: Tensor) -> Tensor:
        """Images `[B, 3, h * patch_size, w * patch_size]` in -1..1 of latents `[B, d, h, w]` (the sum of all codes).

        Raises:
            ValueError: another shape or number of channels.
        """
        bits = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != bits:
            raise ValueError(f"a latent of shape {tuple(latent.shape)}: needed are [batch, {bits}, height, width]")
        return self.decoder(latent).clamp(-1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(images)
