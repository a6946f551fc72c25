"""`TinyInfinity`: the Infinity port in miniature, with a text encoder of its own in place of T5."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkv.models.infinity import InfinityConfig, InfinityForImageGeneration, InfinityVAEConfig, Schedule
from mmkv.models.tiny_infinity.words import LONGEST, facts_of, vocabulary

SCHEDULE = Schedule(sizes=tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8)), extent=(64, 64))
BITS = 16  # per position of the latent
CHANNELS = 96  # of the transformer and of text features


def vae_config() -> InfinityVAEConfig:
    """64 x 64 px to 8 x 8 positions."""
    return InfinityVAEConfig(
        latent_channels=BITS, patch_size=8, base_channels=8, channel_multipliers=(1, 2, 4, 8), residual_blocks=1,
        norm_groups=1,
    )  # fmt: skip


def transformer_config() -> InfinityConfig:
    """6 layers of 6 heads, 16 channels each."""
    return InfinityConfig(
        num_hidden_layers=6, hidden_size=CHANNELS, num_attention_heads=6, bits_per_token=BITS, pixels="0.06M",
        block_chunks=6, text_channels=CHANNELS, text_max_length=LONGEST, pool_heads=4, max_scales=len(SCHEDULE),
        mlp_ratio=256 / CHANNELS,
        vae_config=vae_config(),
    )  # fmt: skip


class WordEncoder(nn.Module):
    """A caption's words to features: learned embeddings and places, mixed by two small attention layers.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.ids = {word: i for i, word in enumerate(vocabulary())}
        self.embed = nn.Embedding(len(self.ids), channels)
        self.place = nn.Embedding(LONGEST, channels)
        layer = dict(nhead=4, dim_feedforward=2 * channels, dropout=0.0, batch_first=True, norm_first=True)
        self.mix = nn.ModuleList(nn.TransformerEncoderLayer(channels, **layer) for _ in range(2))

    def forward(self, prompts: list[str]) -> list[Tensor]:
        """Features `[words, channels]` of each prompt.

        Raises:
            ValueError: no sentence of the world it was trained on.
        """
        for prompt in prompts:
            facts_of(prompt)
        split = [[self.ids[word] for word in prompt.lower().split()] for prompt in prompts]
        return list(self.encoded([torch.tensor(ids, device=self.embed.weight.device) for ids in split]))

    def encoded(self, ids: list[Tensor]) -> list[Tensor]:
        """Features of the words `ids`, int64 `[words]` of each prompt."""
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        nobody = padded == 0
        x = self.embed(padded) + self.place.weight[: padded.shape[1]]
        for layer in self.mix:
            x = layer(x, src_key_padding_mask=nobody if bool(nobody.any()) else None)
        return [row[: len(words)] for row, words in zip(x, ids)]


class TinyInfinity(InfinityForImageGeneration):
    """The bundled Infinity of pictures of coloured shapes, 64 x 64 px in seven scales.

    Args:
        config: as `transformer_config` makes it.
    """

    def __init__(self, config: InfinityConfig):
        super().__init__(config)
        self.words = WordEncoder(config.text_channels)

    @property
    def text_encoder(self) -> WordEncoder:
        """A part of the weights, unlike the large models'."""
        return self.words

    def schedule(self, ratio: float = 1.0, pixels: str | None = None) -> Schedule:
        """The one that it was trained on.

        Raises:
            ValueError: another shape or size is asked for.
        """
        if ratio != 1.0 or pixels is not None:
            raise ValueError(
                f"ratio {ratio}, pixels {pixels!r}: the tiny model paints squares of one size; leave them out"
            )
        return SCHEDULE
