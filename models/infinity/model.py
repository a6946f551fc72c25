"""`InfinityForImageGeneration`: the decoder, the head that says the bits, and the autoencoder that paints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mmkv.models.infinity.autoencoder import InfinityVAE
from mmkv.models.infinity.conditioning import Conditioning, Text, linear_fp32
from mmkv.models.infinity.configuration import InfinityConfig
from mmkv.models.infinity.generation import Painted, paint_scales
from mmkv.models.infinity.sampling import Sampling
from mmkv.models.infinity.schedules import Schedule, scale_schedule
from mmkv.models.infinity.transformer import InfinityModel, InfinityPreTrainedModel, modulated


@dataclass
class InfinityOutput(ModelOutput):
    """What a forward gives.

    Args:
        logits: fp32 `[B, T, d, 2]`, for each bit of each token how much speaks for 0 and for 1.
        past_key_values: the cache.
        last_hidden_state: fp32 `[B, T, C]`.
    """

    logits: Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: Tensor | None = None


class InfinityHead(nn.Module):
    """Two logits for each bit, from hidden states modulated by the text; fp32."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, 2 * config.bits_per_token)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """`[B, T, d, 2]` of hidden states `[B, T, C]` and the pooled text `[B, C]`."""
        scale, shift = linear_fp32(self.modulation, F.silu(condition)).unflatten(-1, (1, 2, -1)).unbind(2)
        return linear_fp32(self.proj, modulated(hidden.float(), scale, shift, self.eps)).unflatten(-1, (-1, 2))


class InfinityForImageGeneration(InfinityPreTrainedModel):
    """Infinity (arXiv 2412.04431): paints an image from text, scale by scale, each token a string of bits.

    Args:
        config: of the model; with `vae_config` there is an autoencoder (`vae`), else images stay latents.

    `text_encoder` is what `generate_image` asks for the features of prompts: a callable from a list of strings to a list of
    `[n, text_channels]`, such as `T5Prompts`. It is no part of the weights.
    """

    text_encoder: Callable[[list[str]], list[Tensor]] | None = None

    def __init__(self, config: InfinityConfig):
        super().__init__(config)
        self.model = InfinityModel(config)
        self.bits_embed = nn.Linear(config.bits_per_token, config.hidden_size)
        self.head = InfinityHead(config)
        self.vae = None if config.vae_config is None else InfinityVAE(config.vae_config)
        self.post_init()

    def forward(
        self,
        inputs: Tensor | None,
        text: Text | Conditioning,
        schedule: Schedule,
        scale: int | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        last: bool = False,
        guidance: tuple[float, tuple[int, ...]] | None = None,
    ) -> InfinityOutput:
        """Logits of one scale (generation) or of all scales at once (training, teacher forced).

        Args:
            inputs: `[B, T, d]`, the running sum of codes at the size of the scale; None for the first scale. Where `scale` is
                None, those of all scales but the first, one after the other.
            text: features of the prompts, or what `model.condition` made of them.
            schedule: of the image.
            scale: index of the scale; None for all.
            past_key_values, use_cache, last, guidance: as `InfinityModel` takes them.
        """
        if isinstance(text, Text):
            text = self.model.conditioner(text)
        embeds = None if inputs is None else self.bits_embed(inputs.to(self.bits_embed.weight.dtype))
        if embeds is None:
            embeds = text.start
        elif scale is None:
            embeds = torch.cat([text.start.to(embeds.dtype), embeds], 1)
        out = self.model(
            inputs_embeds=embeds, text=text, schedule=schedule, scale=scale, past_key_values=past_key_values,
            use_cache=use_cache, last=last, guidance=guidance,
        )  # fmt: skip
        logits = self.head(out.last_hidden_state, text.condition)
        return InfinityOutput(logits, out.past_key_values, out.last_hidden_state)

    def generate(
        self,
        text: Text | Sequence[Tensor],
        ratio: float = 1.0,
        pixels: str | None = None,
        schedule: Schedule | None = None,
        negative: Text | Sequence[Tensor] | None = None,
        past_key_values=None,
        on_scale: Callable[[int], None] | None = None,
        **sampling,
    ) -> Painted:
        """Bits and latents of an image for each prompt.

        Args:
            text: features `[n, text_channels]` of each prompt.
            ratio: height over width, one of `schedules.SCALES`.
            pixels: size, "0.06M" to "1M"; the one the model was trained on where None.
            schedule: scales of one's own, in place of `ratio` and `pixels`.
            negative: features of what guidance leads away from; the model's own where None.
            past_key_values: an empty cache; made where None.
            on_scale: called with the index of each scale that is done.
            sampling: as `Sampling` takes them: guidance, temperature, top_p, greedy, seed, guidance_at.

        Raises:
            ValueError: a ratio that is not in the table, a prompt that is too long, features of another encoder.
        """
        schedule = self.schedule(ratio, pixels) if schedule is None else schedule
        text, negative = (None if some is None else self._text(some) for some in (text, negative))
        return paint_scales(self, text, schedule, Sampling(**sampling), negative, past_key_values, on_scale)

    def schedule(self, ratio: float = 1.0, pixels: str | None = None) -> Schedule:
        """The scales of an image; of the size the model was trained on where `pixels` is None."""
        return scale_schedule(ratio, self.config.pixels if pixels is None else pixels)

    def generate_image(
        self, prompt: str | Sequence[str], negative: str | Sequence[str] | None = None, **options
    ) -> Image.Image | list[Image.Image]:
        """The image of a prompt, RGB; a list of them for a list of prompts.

        Args:
            prompt: what to paint; one string or several, for as many images at once.
            negative: what to lead away from, of the same kind.
            options: as `generate` takes them: ratio, pixels, guidance, temperature, seed and more.

        Raises:
            ValueError: there is no text encoder or no autoencoder; or as `generate`.
        """
        if self.text_encoder is None:
            raise ValueError("this model has no text encoder: set model.text_encoder, for example to T5Prompts.load()")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        leading = [negative] if isinstance(negative, str) else negative
        given = None if leading is None else self.text_encoder(list(leading))
        painted = self.generate(self.text_encoder(prompts), negative=given, **options)
        images = self.images(painted)
        return images[0] if isinstance(prompt, str) else images

    @torch.no_grad()
    def images(self, painted: Painted) -> list[Image.Image]:
        """RGB images of what `generate` gave.

        Raises:
            ValueError: there is no autoencoder, or another model's.
        """
        if self.vae is None:
            raise ValueError("this model has no autoencoder, so there is a latent but no image: set model.vae")
        channels = self.vae.config.latent_channels
        if channels != self.config.latent_channels:
            raise ValueError(
                f"an autoencoder of {channels} channels for a model of {self.config.latent_channels} bits per position: it is "
                "another model's"
            )
        pixels = self.vae.decode(painted.latent.to(next(self.vae.parameters()).dtype)).float()
        whole = ((pixels.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
        return [Image.fromarray(image, "RGB") for image in whole]

    def _text(self, text: Text | Sequence[Tensor]) -> Text:
        """Features on the model's device, of the size it takes."""
        text = text if isinstance(text, Text) else Text.of(list(text))
        channels, most = self.config.text_channels, self.config.text_max_length
        if text.features.ndim != 3 or text.features.shape[-1] != channels:
            raise ValueError(
                f"text features of shape {tuple(text.features.shape)}: this model takes [prompts, tokens, {channels}]"
            )
        if text.features.shape[1] > most:
            raise ValueError(
                f"a prompt of {text.features.shape[1]} tokens: this model takes {most} at most; shorten it"
            )
        return text.to(self.device)
