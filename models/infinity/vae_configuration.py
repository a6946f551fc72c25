"""What Infinity's bitwise autoencoder is made of."""

from __future__ import annotations

import math

from transformers import PretrainedConfig


class InfinityVAEConfig(PretrainedConfig):
    """Configuration of `InfinityVAE`; the defaults are those of the 2B model's (`infinity_vae_d32reg.pth`).

    Args:
        latent_channels: channels of the latent, which are the bits of a position: 32 (2B), 14 (8B), 16 (125M).
        patch_size: pixels of a latent position in each direction, a power of 2: 16 (2B, 125M) or 8 (8B).
        base_channels: channels at full resolution.
        channel_multipliers: channels of each level, in units of `base_channels`; at least one level per halving.
        residual_blocks: of each level in the encoder; the decoder has one more.
        image_channels: 3 for colour.
        norm_groups: of the group normalisations; 24 where it is 32 and does not divide a level's channels.
    """

    model_type = "infinity_vae"

    def __init__(
        self,
        latent_channels: int = 32,
        patch_size: int = 16,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4),
        residual_blocks: int = 2,
        image_channels: int = 3,
        norm_groups: int = 32,
        **kwargs,
    ):
        self.latent_channels = latent_channels
        self.patch_size = patch_size
        self.base_channels = base_channels
        self.channel_multipliers = list(channel_multipliers)
        self.residual_blocks = residual_blocks
        self.image_channels = image_channels
        self.norm_groups = norm_groups
        self._check()
        super().__init__(**kwargs)

    @property
    def halvings(self) -> int:
        """How many levels halve the resolution."""
        return int(math.log2(self.patch_size))

    def groups_for(self, channels: int) -> int:
        """Groups of a normalisation over `channels`.

        Raises:
            ValueError: they cannot be divided evenly.
        """
        for groups in (self.norm_groups, 24) if self.norm_groups == 32 else (self.norm_groups,):
            if channels % groups == 0:
                return groups
        raise ValueError(f"{channels} channels cannot be normalised in {self.norm_groups} groups of the same size")

    def _check(self) -> None:
        levels = len(self.channel_multipliers)
        numbers = ("latent_channels", "patch_size", "base_channels", "residual_blocks", "image_channels", "norm_groups")
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}: possible are whole numbers from 1")
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size {self.patch_size}: possible are powers of 2")
        if self.halvings >= levels:
            raise ValueError(
                f"patch_size {self.patch_size} halves {self.halvings} times, which needs more than {self.halvings} levels, "
                f"not {levels} (channel_multipliers)"
            )
        for multiplier in self.channel_multipliers:
            self.groups_for(self.base_channels * multiplier)
