"""How bits are drawn from logits: classifier-free guidance, temperature, top-p, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkv.models.infinity.transformer import guided

ON_LOGITS, ON_PROBABILITIES = 0, 1  # entries of `guidance_at`; negative ones are layers


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation, for all scales; the defaults are those of the released 2B scripts.

    Args:
        guidance: strength of classifier-free guidance, one number or one for each scale; 1 is none. Where all are 1, the
            unconditional half is not computed.
        temperature: logits are divided by it, one number or one for each scale. The released scripts: 0.5 or 1.
        top_p: a bit's less likely value is not drawn if it has at most `1 - top_p`; 0 or 1 to allow all.
        greedy: take each bit's likelier value.
        seed: of randomness, for the whole batch or one for each prompt; None for torch's own. Devices draw differently.
        guidance_at: where guidance acts: 0 on the logits, 1 on the probabilities, -1 on the hidden states behind the last
            layer, -2 behind the one before and so on; both halves go on alike from there. The released scripts: (0,).

    In the released code the entry 1 switches guidance off; here it mixes the probabilities, cut to 0 ... 1.
    """

    guidance: float | Sequence[float] = 3.0
    temperature: float | Sequence[float] = 0.5
    top_p: float = 0.97
    greedy: bool = False
    seed: int | Sequence[int] | None = None
    guidance_at: tuple[int, ...] = (ON_LOGITS,)

    def __post_init__(self):
        at = (self.guidance_at,) if isinstance(self.guidance_at, int) else tuple(self.guidance_at)
        object.__setattr__(self, "guidance_at", at)
        for name, least in (("guidance", 0.0), ("temperature", 1e-6)):
            value = getattr(self, name)
            for number in value if isinstance(value, list | tuple) else (value,):
                real = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
                if not real or number < least:
                    raise ValueError(f"{name} {number!r}: possible are numbers {'from' if not least else 'above'} 0")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p!r}: possible are 0 to 1")
        for seed in self.seed if isinstance(self.seed, list | tuple) else (self.seed,):
            if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
                raise ValueError(f"seed {seed!r}: possible are None and whole numbers from 0, below 2^63")
        if ON_LOGITS in self.guidance_at and ON_PROBABILITIES in self.guidance_at:
            raise ValueError(
                "guidance_at 0 and 1: guidance acts on the logits or on the probabilities, give one of them"
            )

    def each(self, name: str, scales: int) -> list[float]:
        """`guidance` or `temperature` of each scale.

        Raises:
            ValueError: a list for fewer scales.
        """
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            return [value] * scales
        if len(value) < scales:
            raise ValueError(f"{name} of {len(value)} scales, the image has {scales}: give one number, or one for each")
        return list(value[:scales])

    def layers(self, count: int) -> tuple[int, ...]:
        """Indices of the layers behind which guidance acts, of `count`.

        Raises:
            ValueError: an entry that is none of the kinds.
        """
        for entry in self.guidance_at:
            if isinstance(entry, bool) or not isinstance(entry, int) or not -count < entry <= ON_PROBABILITIES:
                raise ValueError(
                    f"guidance_at {entry!r}: possible are 0 (logits), 1 (probabilities), -1 to {1 - count} (layers from the end)"
                )
        return tuple(count + entry for entry in self.guidance_at if entry < 0)

    def generators(self, batch: int, device) -> list[torch.Generator | None]:
        """One for the whole batch, or one for each prompt.

        Raises:
            ValueError: seeds of another number of prompts.
        """
        if not isinstance(self.seed, list | tuple):
            return [None if self.seed is None else torch.Generator(device).manual_seed(self.seed)]
        if len(self.seed) != batch:
            raise ValueError(f"{len(self.seed)} seeds for {batch} prompts: give one number, or one for each")
        return [torch.Generator(device).manual_seed(seed) for seed in self.seed]

    def bits(self, logits: Tensor, strength: float, temperature: float, generators, both: bool) -> Tensor:
        """uint8 `[B, T, d]`: the bits of a scale.

        Args:
            logits: fp32 `[B, T, d, 2]`; `[2 * B, ...]` where `both`.
            strength, temperature: of this scale.
            generators: as `generators` gave them.
            both: the batch is the conditional rows, followed by the unconditional ones.
        """
        logits = logits / temperature
        if both and strength != 1 and ON_LOGITS in self.guidance_at:
            logits = guided(logits, strength)
        elif both and strength != 1 and ON_PROBABILITIES in self.guidance_at:
            logits = guided(logits.softmax(-1), strength).clamp(0, 1).log()
        elif both:
            logits = logits.chunk(2)[0]
        if self.greedy:
            return logits.argmax(-1).to(torch.uint8)
        probabilities = self._allowed(logits).softmax(-1)
        parts = zip(probabilities.chunk(len(generators)), generators)
        drawn = [torch.multinomial(p.flatten(0, -2), 1, True, generator=g).view(p.shape[:-1]) for p, g in parts]
        return torch.cat(drawn).to(torch.uint8)

    def _allowed(self, logits: Tensor) -> Tensor:
        if not 0 < self.top_p < 1:
            return logits
        probability, which = logits.softmax(-1).min(-1, keepdim=True)
        return logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, which, probability <= 1 - self.top_p), -torch.inf
        )
