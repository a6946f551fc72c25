"""How many tokens to keep, as a number that gradients reach (DiffRate, arXiv 2305.17997, section 3)."""

from __future__ import annotations

import torch

from mmkv.tokens.diffrate import DiffRate


class Rate(torch.nn.Module):
    """A learned number of tokens to keep: the expectation over candidates, rounded up.

    Args:
        patches: tokens that may be dropped, n.
        prefix: tokens that always stay and are counted in.
        granularity: step between candidates n, n - g, n - 2g, ... > 0; `patches` or more leaves one candidate, all of them.
    """

    def __init__(self, patches: int, prefix: int, granularity: int):
        super().__init__()
        self.prefix = prefix
        self.register_buffer("candidates", torch.arange(patches, 0, -granularity, dtype=torch.float32))
        self.logits = torch.nn.Parameter(torch.zeros(len(self.candidates)))

    def kept(self) -> torch.Tensor:
        """Tokens kept, prefix included: a whole number in fp32, whose gradient is that of the expectation."""
        mean = (self.candidates * self.logits.softmax(0)).sum()
        whole = (mean.detach() - 1e-4).ceil()  # the sum of a whole number may come out a bit above it
        return mean + (whole - mean.detach()) + self.prefix

    def survival(self, tokens: int) -> torch.Tensor:
        """`[tokens]`: probability that the token of each rank is kept: the candidates that reach so far, summed."""
        rank = torch.arange(tokens, device=self.candidates.device)
        reaches = self.candidates + self.prefix > rank[:, None]
        return reaches.to(self.logits.dtype) @ self.logits.softmax(0)

    def mask(self, tokens: int) -> torch.Tensor:
        """`[tokens]`: 1 for the ranks that are kept, 0 for others; the gradient is that of `survival`."""
        alive = self.survival(tokens)
        rank = torch.arange(tokens, device=alive.device)
        return (rank < self.kept().detach()).to(alive.dtype) + (alive - alive.detach())


class Rates(torch.nn.Module):
    """Two rates for each block, one for pruning and one for merging.

    Args:
        depth: blocks.
        tokens: tokens that enter the first, prefix included.
        prefix: tokens that are no patches.
        granularity: step between the candidates.
        frozen: blocks that keep everything. DiffRate freezes block 0, and the last where patches are averaged behind it.

    Raises:
        ValueError: a granularity that is not between 1 and half of the patches; a frozen block that is not there; no block left.
    """

    def __init__(self, depth: int, tokens: int, prefix: int = 1, granularity: int = 4, frozen: tuple[int, ...] = (0,)):
        super().__init__()
        patches = tokens - prefix
        if not 1 <= granularity <= patches // 2:
            raise ValueError(f"granularity={granularity}; possible are 1 ... {patches // 2}, half of the patches")
        if not set(frozen) < set(range(depth)):
            raise ValueError(f"frozen={frozen}; possible are blocks 0 ... {depth - 1}, and not all of them")
        self.tokens, self.prefix = tokens, prefix
        steps = [patches if b in frozen else granularity for b in range(depth)]
        self.prune = torch.nn.ModuleList(Rate(patches, prefix, step) for step in steps)
        self.merge = torch.nn.ModuleList(Rate(patches, prefix, step) for step in steps)

    def __len__(self) -> int:
        return len(self.prune)

    def method(self, scores: str = "cls") -> DiffRate:
        """`DiffRate` with the numbers as they are now."""
        prune, merge = ([round(float(rate.kept().detach())) for rate in rates] for rates in (self.prune, self.merge))
        return DiffRate(tuple(prune), tuple(merge), self.tokens, scores)
