"""What an Infinity transformer is made of, and the settings of the released ones."""

from __future__ import annotations

from transformers import PretrainedConfig

from mmkv.models.infinity.quantizer import PATCH
from mmkv.models.infinity.schedules import PIXELS
from mmkv.models.infinity.vae_configuration import InfinityVAEConfig

WIDE = 4096  # hidden channels from which on the text's pooling has narrower heads
MLP_MULTIPLE = 256  # channels of the feed-forward part are rounded to it


class InfinityConfig(PretrainedConfig):
    """Configuration of the Infinity transformer; the defaults are those of the 2B model (`infinity_2b_reg.pth`).

    Args:
        num_hidden_layers: decoder layers.
        hidden_size: channels.
        num_attention_heads: heads of self- and cross-attention, each `hidden_size / num_attention_heads` wide (a multiple of 4).
        bits_per_token: what each token says, 32 (2B), 56 (8B) or 16 (125M); with `patchify` those of 4 positions.
        patchify: whether a token is 2 x 2 positions of the autoencoder's latent (8B).
        pixels: size of the images it was trained on: "0.06M", "0.25M", "0.60M" or "1M".
        block_chunks: groups that official checkpoints keep the layers in; plays no other role.
        text_channels: of the text features (flan-t5-xl: 2048).
        text_max_length: tokens of a prompt at most, which are also rows of the unconditional text.
        pool_heads: heads of the text's pooling; None for `text_channels / 128` (`/ 64` in models wider than 4096).
        mlp_ratio: channels of the feed-forward part over `hidden_size`, rounded to a multiple of 256.
        max_scales: rows of the level embedding.
        norm_eps: of all normalisations.
        vae_config: of the autoencoder, as a configuration or a dict; None where the model comes without.
        use_cache: keep keys and values from scale to scale.
        initializer_range: standard deviation of new weights; None for `sqrt(1 / hidden_size / 3)`.
    """

    model_type = "infinity"
    sub_configs = {"vae_config": InfinityVAEConfig}  # noqa: RUF012  (transformers' own convention)
    pad_token_id = None  # its tokens are no words

    def __init__(
        self,
        num_hidden_layers: int = 32,
        hidden_size: int = 2048,
        num_attention_heads: int = 16,
        bits_per_token: int = 32,
        patchify: bool = False,
        pixels: str = "1M",
        block_chunks: int = 8,
        text_channels: int = 2048,
        text_max_length: int = 512,
        pool_heads: int | None = None,
        mlp_ratio: float = 4.0,
        max_scales: int = 15,
        norm_eps: float = 1e-6,
        vae_config: InfinityVAEConfig | dict | None = None,
        use_cache: bool = True,
        initializer_range: float | None = None,
        **kwargs,
    ):
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.bits_per_token = bits_per_token
        self.patchify = patchify
        self.pixels = pixels
        self.block_chunks = block_chunks
        self.text_channels = text_channels
        self.text_max_length = text_max_length
        self.pool_heads = pool_heads or max(1, text_channels // (64 if hidden_size > WIDE else 128))
        self.mlp_ratio = mlp_ratio
        self.max_scales = max_scales
        self.norm_eps = norm_eps
        self.vae_config = InfinityVAEConfig(**vae_config) if isinstance(vae_config, dict) else vae_config
        self.use_cache = use_cache
        self.initializer_range = initializer_range or (1 / hidden_size / 3) ** 0.5
        self._check()
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of a head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Channels of the feed-forward part."""
        return max(round(self.hidden_size * self.mlp_ratio / MLP_MULTIPLE), 1) * MLP_MULTIPLE

    @property
    def latent_channels(self) -> int:
        """Channels that the autoencoder's latent has."""
        return self.bits_per_token // PATCH**2 if self.patchify else self.bits_per_token

    def _check(self) -> None:
        numbers = (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "bits_per_token", "block_chunks", "text_channels",
            "text_max_length", "pool_heads", "max_scales",
        )  # fmt: skip
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}: possible are whole numbers from 1")
        for count in ("num_attention_heads", "pool_heads"):
            if self.hidden_size % getattr(self, count):
                raise ValueError(f"{count} {getattr(self, count)} does not divide hidden_size {self.hidden_size}")
        if self.head_dim % 4:
            raise ValueError(
                f"heads of {self.head_dim} channels: a multiple of 4 is needed (pairs for rows and columns)"
            )
        if self.num_hidden_layers % self.block_chunks:
            raise ValueError(f"block_chunks {self.block_chunks} does not divide the {self.num_hidden_layers} layers")
        if self.patchify and self.bits_per_token % PATCH**2:
            raise ValueError(f"bits_per_token {self.bits_per_token} with patchify: a multiple of {PATCH**2} is needed")
        if self.pixels not in PIXELS:
            raise ValueError(f"pixels {self.pixels!r}: possible are {', '.join(map(repr, PIXELS))}")
        vae = self.vae_config
        if vae is not None and vae.latent_channels != self.latent_channels:
            raise ValueError(
                f"an autoencoder of {vae.latent_channels} channels for a model of {self.latent_channels} bits per position: it "
                "is another model's"
            )


_SMALL = dict(block_chunks=4, bits_per_token=32)  # widths that the paper scales over; no weights were released
_VAE_8B = dict(latent_channels=14, patch_size=8, channel_multipliers=(1, 2, 4, 4))

NAMED: dict[str, dict] = {
    "2b": dict(vae_config=dict(latent_channels=32)),
    "8b": dict(
        num_hidden_layers=40, hidden_size=3584, num_attention_heads=28, bits_per_token=56, patchify=True, vae_config=_VAE_8B
    ),
    "125m": dict(
        num_hidden_layers=12, hidden_size=768, num_attention_heads=8, block_chunks=4, bits_per_token=16, pixels="0.06M",
        vae_config=dict(latent_channels=16),
    ),
    "layer16": dict(num_hidden_layers=16, hidden_size=1152, num_attention_heads=12, **_SMALL),
    "layer24": dict(num_hidden_layers=24, hidden_size=1536, num_attention_heads=16, **_SMALL),
    "layer32": dict(num_hidden_layers=32, hidden_size=2080, num_attention_heads=20, **_SMALL),
    "layer40": dict(num_hidden_layers=40, hidden_size=2688, num_attention_heads=24, **_SMALL),
    "layer48": dict(num_hidden_layers=48, hidden_size=3360, num_attention_heads=28, **_SMALL),
}  # fmt: skip
NAMED["8b-512"] = {**NAMED["8b"], "pixels": "0.25M"}


def named_config(name: str, **changes) -> InfinityConfig:
    """The settings of a model of the paper.

    Args:
        name: "2b", "8b", "8b-512", "125m", or "layer16" ... "layer48".
        changes: arguments of `InfinityConfig` that differ.

    Raises:
        ValueError: another name.
    """
    if name not in NAMED:
        raise ValueError(f"model {name!r}: possible are {', '.join(map(repr, sorted(NAMED)))}")
    return InfinityConfig(**{**NAMED[name], **changes})
