"""`TokenLayout`: what each position of a sequence is.

A cache keeps one layout for all its layers. An adapter makes a chunk of it for the new tokens of each forward; it then
travels with the tokens through crops, beam reorders and batch selections. It is the only thing a method knows about a
model. It lives on the CPU: decisions are made by the host, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

TEXT, IMAGE, VIDEO = 0, 1, 2
MODALITIES = ("text", "image", "video")


@dataclass
class TokenLayout:
    """Per-token facts, each `[B, T]` unless said otherwise; -1 where a token has none.

    Args:
        modality: int8, TEXT, IMAGE or VIDEO.
        medium: int32, index of the image or video within its row of the batch.
        frame: int32, temporal index within the medium: temporal patch (Qwen), frame (LLaVA) or tile group.
        row, col: int16, place of the token in its frame's grid.
        valid: bool, False for padding.
        positions: int32 `[A, B, T]`, original position ids; A = 1 for plain rotary, 3 (time, height, width) for mrope.
    """

    modality: torch.Tensor
    medium: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def text(cls, batch: int, length: int, axes: int = 1, start: int = 0) -> TokenLayout:
        """A layout of `length` valid text tokens at positions `start ...`, to be filled in by an adapter."""
        none = lambda dtype: torch.full((batch, length), -1, dtype=dtype)  # noqa: E731
        return cls(
            modality=torch.zeros(batch, length, dtype=torch.int8),
            medium=none(torch.int32),
            frame=none(torch.int32),
            row=none(torch.int16),
            col=none(torch.int16),
            valid=torch.ones(batch, length, dtype=torch.bool),
            positions=torch.arange(start, start + length, dtype=torch.int32).expand(axes, batch, -1).clone(),
        )

    def __len__(self) -> int:
        return self.modality.shape[1]

    @property
    def batch(self) -> int:
        return self.modality.shape[0]

    @property
    def visual(self) -> torch.Tensor:
        """bool `[B, T]`: image or video tokens."""
        return self.modality > TEXT

    def cat(self, other: TokenLayout) -> TokenLayout:
        """This layout followed by `other` along tokens."""
        return self._map(other, lambda a, b: torch.cat([a, b.expand(*a.shape[:-1], -1)], dim=-1))

    def crop(self, length: int) -> TokenLayout:
        """The first `length` tokens."""
        return self._map(None, lambda a, _: a[..., :length])

    def take(self, columns: torch.Tensor | slice) -> TokenLayout:
        """The tokens at the given columns."""
        return self._map(None, lambda a, _: a[..., columns])

    def gather(self, columns: torch.Tensor) -> TokenLayout:
        """For each batch element its own columns, int64 `[B, n]`."""
        return self._map(None, lambda a, _: a.gather(-1, columns.expand(*a.shape[:-1], -1)))

    def rows(self, index: torch.Tensor) -> TokenLayout:
        """The batch elements `index` (beam reorder, repeat, select)."""
        return self._map(None, lambda a, _: a[..., index, :])

    def counts(self) -> dict[str, int]:
        """Valid tokens per modality, summed over the batch."""
        return {name: int(((self.modality == i) & self.valid).sum()) for i, name in enumerate(MODALITIES)}

    def _map(self, other, do) -> TokenLayout:
        values = {f.name: do(getattr(self, f.name), other and getattr(other, f.name)) for f in fields(self)}
        return TokenLayout(**values)
