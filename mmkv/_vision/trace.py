"""`Trace`: what became of the tokens of a prompt; `Run`: one forward of the decoder that loses some of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mmkv.layout import TokenLayout
from mmkv.tokens.method import Choice


@dataclass(eq=False)
class Run:
    """One forward of the decoder.

    Args:
        cache: whose layers it fills.
        chunk: layout of its T tokens.
        first: index of the first of them in the prompt that `Media` knows.
        embeds: `[B, T, C]`, None where the decoder embeds ids itself.
        keep: bool `[B, T]`, tokens that enter the first layer, None for all.
        columns: int64 `[B, T']`, the tokens that enter the next layer, -1 for padding; None for all.
        deep: DeepStack features by layer, each `[n, C]` of the n visual tokens, and which of them each token is `[B, T]`.
    """

    cache: object
    chunk: TokenLayout
    first: int
    embeds: torch.Tensor | None
    keep: torch.Tensor | None
    columns: torch.Tensor | None = None
    deep: tuple[list[torch.Tensor], torch.Tensor] | None = None

    @property
    def new(self) -> int:
        """Tokens that enter the next layer."""
        return len(self.chunk) if self.columns is None else self.columns.shape[1]

    def here(self) -> torch.Tensor:
        """int64 `[B, T']`: the tokens that enter the next layer."""
        if self.columns is not None:
            return self.columns
        return torch.arange(len(self.chunk)).expand(self.chunk.batch, -1)

    def narrow(self, columns: torch.Tensor) -> None:
        """Let `columns` int64 `[B, T'']` of the present tokens go on."""
        here = self.here().gather(1, columns.clamp(min=0))
        self.columns = here.masked_fill(columns < 0, -1)


@dataclass(eq=False)
class Trace:
    """What became of the tokens of the last prompt, for reports and pictures.

    Args:
        layout: of the tokens that came.
        kept: by index of the first decoder layer that it holds for, int64 `[B, T']`: the tokens that entered it, -1 for padding.
        into: by the same index, int64 `[B, T]`: the token that each was merged into there, itself where it was not, -1 where it
            was dropped (there or before).
        layers: decoder layers.
    """

    layout: TokenLayout
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    into: dict[int, torch.Tensor] = field(default_factory=dict)
    layers: int = 0

    def computed(self) -> list[int]:
        """Tokens that each decoder layer computed, padding left out, summed over the batch."""
        now, out = int(self.layout.valid.sum()), []
        for layer in range(self.layers):
            if layer in self.kept:
                now = int((self.kept[layer] >= 0).sum())
            out.append(now)
        return out

    def went(self, index: int, run: Run, row: int, origin: torch.Tensor, choice: Choice, keep: torch.Tensor) -> None:
        """Enter what a method did, before layer `index`, with the tokens `origin` int64 `[n]` of a prompt.

        Args:
            keep: bool `[n]`, those that stay.
        """
        into = self.into.get(index)
        if into is None:
            into = torch.full_like(self.layout.modality, -1, dtype=torch.int64)
            for other, here in enumerate(run.here()):
                now = here[here >= 0] + run.first
                into[other, now] = now
            self.into[index] = into
        origin = origin + run.first
        into[row, origin] = torch.where(keep, origin, choice.went(origin))

    def entered(self, index: int, run: Run) -> None:
        """Enter which tokens go on into layer `index`."""
        columns = torch.where(run.columns >= 0, run.columns + run.first, -1)
        before = self.kept.get(index)
        self.kept[index] = columns if before is None or run.first == 0 else torch.cat([before, columns], 1)
