"""A summary segment: tokens that stand for many dropped ones, each weighted by how many it stands for."""

from __future__ import annotations

import torch

from mmkv.kernels import attend_dense


class SummarySegment:
    """One mean key and value per dropped set and KV head (RazorAttention's compensation tokens, arXiv 2407.15891 eq. 5).

    Such a token's softmax weight is `count * exp(q.k)`: as a part of its own, its logsumexp is the score plus log count,
    and its output the mean value, so it merges with the other segments exactly.
    """

    def __init__(self, batch: int):
        self.keys: torch.Tensor | None = None  # [B, Hkv, m, D]
        self.values: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None  # fp32 [B, Hkv, m]; 0: an empty place
        self.used = [0] * batch

    def append(self, row: int, key: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> None:
        """Add a token of batch element `row`: key `[Hkv, D]`, value `[Hkv, Dv]`, count `[Hkv]` of tokens it stands for."""
        batch, heads = len(self.used), key.shape[0]
        if self.keys is None:
            self.keys, self.values = (
                key.new_zeros(batch, heads, 0, key.shape[-1]),
                value.new_zeros(batch, heads, 0, value.shape[-1]),
            )
            self.counts = torch.zeros(batch, heads, 0, device=key.device)
        at = self.used[row]
        if at == self.keys.shape[2]:
            pad = torch.nn.functional.pad
            self.keys, self.values = pad(self.keys, (0, 0, 0, 1)), pad(self.values, (0, 0, 0, 1))
            self.counts = pad(self.counts, (0, 1))
        self.keys[row, :, at], self.values[row, :, at], self.counts[row, :, at] = key, value, count.float()
        self.used[row] += 1

    @property
    def tokens(self) -> list[int]:
        """Tokens that each batch element holds here: none, these stand for dropped ones."""
        return [0] * len(self.used)

    def attend(
        self, q, *, scale, softcap=None, q_positions=None, window=None, merged=True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PackedSegment.attend`; a sliding window never meets a summary, its layers drop nothing."""
        return attend_dense(
            q, self.keys, self.values, scale=scale, softcap=softcap, weight=self.counts, merged=merged
        )  # fmt: skip

    def crop(self, length: int) -> None:
        """Nothing: a crop that deep is refused by the layer."""

    def drop_before(self, position: int) -> None:
        """Nothing: layers with a sliding window hold no summaries."""

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements."""
        self.used = [self.used[i] for i in index.tolist()]
        at = index.to(self.keys.device)
        self.keys, self.values, self.counts = (t.index_select(0, at) for t in (self.keys, self.values, self.counts))

    @property
    def empty(self) -> bool:
        return not any(self.used)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this segment holds."""
        return [] if self.keys is None else [self.keys, self.values, self.counts]
