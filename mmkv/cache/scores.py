"""`Scores`: attention mass that tokens have gathered so far, of those that are still held."""

from __future__ import annotations

import torch


class Scores:
    """fp32 `[B, Hkv, m]` beside the logical positions int32 `[m]` they belong to, ascending, on the CPU.

    A position stays as long as any head of any batch element holds its token; `keep` frees the others.
    """

    def __init__(self, batch: int, heads: int, device):
        self.positions = torch.zeros(0, dtype=torch.int32)
        self.mass = torch.zeros(batch, heads, 0, device=device)

    def extend(self, length: int, new: int) -> None:
        """Make room for the `new` newest of `length` tokens."""
        last = int(self.positions[-1]) + 1 if len(self.positions) else 0
        fresh = torch.arange(max(length - new, last), length, dtype=torch.int32)
        self.positions = torch.cat([self.positions, fresh])
        self.mass = torch.nn.functional.pad(self.mass, (0, len(fresh)))

    def add(self, row: int, columns: torch.Tensor, mass: torch.Tensor) -> None:
        """Add mass `[Hkv, n]` of batch element `row` to the tokens at positions `[n]` or `[Hkv, n]`; -1 is no token."""
        at, known = self._find(columns)
        at, known = (t.expand(len(mass), -1).to(mass.device) for t in (at, known))
        self.mass[row].scatter_add_(1, at, mass.masked_fill(~known, 0.0))

    def of(self, row: int, columns: torch.Tensor) -> torch.Tensor:
        """Mass fp32 `[Hkv, n]` of the tokens at positions `[n]` or `[Hkv, n]`; 0 where nothing is known."""
        at, known = self._find(columns)
        if not len(self.positions):
            return self.mass.new_zeros(self.mass.shape[1], columns.shape[-1])
        at, known = (t.expand(self.mass.shape[1], -1).to(self.mass.device) for t in (at, known))
        return self.mass[row].gather(1, at).masked_fill(~known, 0.0)

    def _find(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of positions, and whether they are there."""
        if not len(self.positions):
            return torch.zeros_like(columns), torch.zeros_like(columns, dtype=torch.bool)
        columns = columns.to(torch.int32)
        at = torch.searchsorted(self.positions, columns.contiguous()).clamp(max=len(self.positions) - 1)
        return at, self.positions[at] == columns

    def keep(self, positions: torch.Tensor) -> None:
        """Free all but the positions `[n]`."""
        self._index(torch.isin(self.positions, positions.to(torch.int32)).nonzero()[:, 0])

    def crop(self, length: int) -> None:
        """Drop the tokens at logical positions >= length."""
        self._index((self.positions < length).nonzero()[:, 0])

    def _index(self, at: torch.Tensor) -> None:
        self.positions, self.mass = self.positions[at], self.mass.index_select(2, at.to(self.mass.device))

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements."""
        self.mass = self.mass.index_select(0, index.to(self.mass.device))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.positions, self.mass]
