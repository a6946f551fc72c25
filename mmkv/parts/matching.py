"""Which tokens become one: `Grouping`, a decision that applies itself, and the matchings that make one.

A grouping may be ragged: a row of the batch with fewer groups than another has empty ones at its end. Their vectors and
sizes are 0, and log(0) masks them in attention proportional to size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from mmkv.kernels import Members, group_mean, group_members, group_total, most_similar


@dataclass(eq=False)
class Grouping:
    """Where each of N tokens goes: to one of `count` new places, alone or with others, or nowhere.

    Args:
        index: int64 `[B, N]`, new place 0 ... count-1 of each token, -1 where it is pruned.
        count: N', places afterwards.
        size_weighted: whether merged features are a mean weighted by the tokens' sizes (ToMe), or a plain mean (DiffRate).
        size_share: fp32 `[B, N]`, the part of its size that each token brings to its group; None for all of it.
        ragged: whether rows of the batch have different numbers of groups.
    """

    index: torch.Tensor
    count: int
    size_weighted: bool = True
    size_share: torch.Tensor | None = None
    ragged: bool = False

    def __post_init__(self):
        if self.index.dim() != 2 or self.index.dtype != torch.int64:
            raise ValueError(f"index is {self.index.dtype} {tuple(self.index.shape)}; it has to be int64 [B, N]")
        if self.count < 1:
            raise ValueError(f"count={self.count}; at least one token has to stay")
        if self.size_share is not None and self.size_share.shape != self.index.shape:
            raise ValueError(f"size_share is {tuple(self.size_share.shape)}; it has to be {tuple(self.index.shape)}")

    @classmethod
    def into(cls, target: torch.Tensor, count: int | None = None, **options) -> Grouping:
        """Tokens merged into other tokens, all of which stay in their order.

        Args:
            target: int64 `[B, N]`, for each token the token that it becomes part of: itself where it stays, -1 where it is
                pruned. A target has to stay itself.
            count: how many stay in every row, if known; it spares a GPU one synchronization. None counts them; rows may
                then differ.
            options: `size_weighted`, `size_share`.
        """
        stays = target == torch.arange(target.shape[1], device=target.device)
        place = stays.cumsum(1) - 1
        if count is None:
            fewest, count = torch.stack(stays.sum(1).aminmax()).tolist()
            options["ragged"] = fewest < count
        return cls(place.gather(1, target.clamp(min=0)).masked_fill(target < 0, -1), count, **options)

    @classmethod
    def keeping(cls, keep: torch.Tensor, count: int | None = None) -> Grouping:
        """Tokens pruned, none merged: those of the bool mask `keep` `[B, N]` stay, in their order."""
        here = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        return cls.into(here.masked_fill(~keep, -1), count)

    def merge(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N', C]` of `[B, N, C]`: mean of each group's members, weighted by `[B, N]`; None for the plain mean.

        Summed in fp32 at least. The only member of a group stays as it is, to the bit.
        """
        return group_mean(x, self.index, self.count, weight, self._members)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """`[B, N']` of `[B, N]`: the sum over each group's members."""
        return group_total(values, self.index, self.count, self._members)

    def merge_sizes(self, size: torch.Tensor) -> torch.Tensor:
        """Sizes fp32 `[B, N']` of the groups, of sizes `[B, N]` of their members (each by its `size_share`)."""
        return self.total(size if self.size_share is None else size * self.size_share)

    def apply(self, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[B, N', C]` and sizes fp32 `[B, N']` after this grouping, as the method that made it merges."""
        return self.merge(x, size if self.size_weighted else None), self.merge_sizes(size)

    def compose(self, source: torch.Tensor) -> torch.Tensor:
        """A source map int64 `[B, N0]` (the token that each original token is part of, -1 where pruned) after this grouping."""
        return self.index.gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` of `[B, N', C]`: each token gets the vector of its group, a pruned one zeros."""
        return unmerge(y, self.index)

    @cached_property
    def _members(self) -> Members | None:
        """What a GPU sorts, once for all that is merged by this grouping."""
        return group_members(self.index, self.count) if self.index.is_cuda else None


def unmerge(y: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`[B, N0, C]` of `[B, N', C]`: each of the tokens of a source map int64 `[B, N0]` gets its group's vector, -1 zeros."""
    taken = y.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, y.shape[2]))
    return taken.masked_fill(source[..., None] < 0, 0)


@torch.no_grad()
def bipartite_soft_matching(metric: torch.Tensor, r: int, prefix: int = 0) -> Grouping:
    """ToMe's matching (arXiv 2210.09461, section 3): tokens at even places are offered to those at odd places.

    Each even token's most similar odd token (cosine) is its only edge; the r strongest edges are merged, several of which
    may end in one token. Order afterwards: the prefix, then the even tokens that are left, then the odd ones, each
    ascending. (The official code does so too, but leaves even tokens sorted by similarity where there is no CLS token.)

    Args:
        metric: `[B, N, D]`, what is compared, for instance keys averaged over heads.
        r: tokens to remove, clamped to half of those behind the prefix.
        prefix: tokens in front (CLS, distillation, registers) that take no part.

    Raises:
        ValueError: r is negative.
    """
    if r < 0:
        raise ValueError(f"r={r}; the number of tokens to merge is at least 0")
    batch, n, _ = metric.shape
    r = min(r, max(n - prefix, 0) // 2)
    place = torch.arange(n, device=metric.device)
    evens, odds = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    even, odd = place[evens], place[odds]
    order = torch.full((batch, n), -1, dtype=torch.int64, device=metric.device)
    order[:, :prefix] = place[:prefix]
    if not r:  # also where there is no odd token to look at
        order[:, torch.cat([even, odd])] = place[prefix:]
        return Grouping(order, n)
    score, best = most_similar(metric[:, evens], metric[:, odds])
    strongest = score.argsort(dim=1, descending=True, stable=True)[:, :r]
    merged = torch.zeros_like(score, dtype=torch.bool).scatter_(1, strongest, True)
    first_odd = n - r - len(odd)
    target = torch.where(merged, first_odd + best, prefix + (~merged).cumsum(1) - 1)
    order[:, even] = target
    order[:, odd] = torch.arange(first_odd, n - r, device=metric.device)
    return Grouping(order, n - r)


@torch.no_grad()
def nearest_important(
    metric: torch.Tensor, important: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DiffRate's matching (arXiv 2305.17997): every unimportant token goes to the most similar important one.

    Args:
        metric: `[B, N, D]`, what is compared by cosine.
        important: int64 `[B, K]`, tokens that others may be merged into (leave out CLS and the like).
        rest: int64 `[B, S]`, tokens to be merged.

    Returns:
        The important token of each, int64 `[B, S]`, an index into the N tokens; and their cosine, `[B, S]`.

    Raises:
        ValueError: there is no important token.
    """
    if not important.shape[1]:
        raise ValueError("no important token that others could be merged into; keep at least one behind the prefix")
    rows = torch.arange(len(metric), device=metric.device)[:, None]
    score, best = most_similar(metric[rows, rest], metric[rows, important])
    return important.gather(1, best), score
