"""The forward in which DiffRate's rates are learned: nothing is removed, masks stand for what would be.

A masked token is seen by no other token, its rank in importance decides about the mask, and the mask's gradient is the
probability that the rate keeps this rank. So the task's loss reaches the rates (arXiv 2305.17997, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmkv.models.tower import Tower
from mmkv.parts.matching import Grouping, nearest_important
from mmkv.tokens.rates import Rates


class RateHooks:
    """Hooks on a timm tower; `behind` then holds the tokens behind each block, with gradients.

    Args:
        tower: of a timm model (its attention has to show its softmax).
        rates: to be learned.
        eps: added to the masked softmax, as in the official code; 0 makes the forward equal to that with removed tokens.
        clamp_sizes: whether a merged token adds at least 1 to the size, as in the official code; it does not at inference.
        scores: "cls" or "received", as in `DiffRate`.

    Where we differ: `eps` is added to softmax weights, not to exponentials relative to the row's largest.
    """

    def __init__(self, tower: Tower, rates: Rates, eps: float = 1e-6, clamp_sizes: bool = False, scores: str = "cls"):
        if not all(hasattr(tap.attention, "attn_drop") and hasattr(tap.attention, "fused_attn") for tap in tower.taps):
            raise ValueError("rates are learned on timm models; this tower's attention does not show its weights")
        self.tower, self.rates = tower, rates
        self.eps, self.clamp_sizes, self.scores = eps, clamp_sizes, scores
        self.behind: list[torch.Tensor] = []
        self._handles: list = []
        self._fused: list[bool] = []
        self._now = 0  # tokens that are left
        self._merged: torch.Tensor | None = None  # hidden states of the block, where it merges

    def __enter__(self) -> RateHooks:
        add = self._handles.append
        for b, tap in enumerate(self.tower.taps):
            self._fused.append(tap.attention.fused_attn)
            tap.attention.fused_attn = False  # the fused attention has no weights to mask
            if b == 0:
                add(tap.block.register_forward_pre_hook(self._start))
            add(tap.attention.register_forward_pre_hook(self._bias, with_kwargs=True))
            add(tap.attention.attn_drop.register_forward_hook(self._masked))
            add(tap.norm.register_forward_pre_hook(self._shorten(b)))
            add(tap.branch.register_forward_hook(self._put_aside))
            add(tap.block.register_forward_hook(self._sum, prepend=True))
        if self.tower.pooled is not None:
            add(self.tower.pooled.register_forward_hook(self._average))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        for tap, fused in zip(self.tower.taps, self._fused):
            tap.attention.fused_attn = fused
        self._handles.clear()
        self._fused.clear()

    def _start(self, module, args):
        batch, n, _ = args[0].shape
        if n != self.rates.tokens:
            raise ValueError(f"the rates are for {self.rates.tokens} tokens, {n} came; all images need one size")
        self._mask = self._size = self._count = torch.ones(batch, n, device=args[0].device)
        self._now = n
        self._merged = None
        self.behind = []

    def _bias(self, module, args, kwargs):
        if self._now == self.rates.tokens:
            return None
        return args, {**kwargs, "attn_mask": self._size.log()[:, None, None].to(args[0].dtype)}

    def _masked(self, module, args, output):
        weights = args[0]
        if self._now < self.rates.tokens:
            n = weights.shape[-1]
            own = torch.eye(n, device=weights.device)
            policy = self._mask[:, None, None] * (1 - own) + own
            weights = weights.float() * policy
            weights = ((weights + self.eps / n) / (weights.sum(-1, keepdim=True) + self.eps)).to(output.dtype)
        paid = weights.detach().float().mean(1)
        if self.scores == "cls":
            self._score = paid[:, 0]
        else:
            left = (self._mask.detach() > 0).to(paid.dtype)
            self._score = (paid * left[..., None]).sum(1)
        return F.dropout(weights, module.p, module.training)

    def _shorten(self, b: int):
        prune, merge = self.rates.prune[b], self.rates.merge[b]

        def shorten(module, args):
            hidden, tokens = args[0], self.rates.tokens
            kept = prune.kept(), merge.kept()
            pruned = min(self._now, round(float(kept[0].detach())))
            merged = min(pruned, round(float(kept[1].detach())))
            if merged < self._now:
                order = self._order()
                rank = order.argsort(1)
                if pruned < self._now:
                    self._mask = self._mask * prune.mask(tokens)[rank]
                if merged < pruned:
                    self._mask = self._mask * merge.mask(tokens)[rank]
                    hidden = self._merge(hidden, order[:, self.rates.prefix : merged], order[:, merged:pruned])
                    self._merged = hidden
                self._now = merged
            # the official gradient of the minimum: in full to both numbers, none to what came in
            self.behind.append(merged + sum(k - k.detach() for k in kept))
            return (hidden,)

        return shorten

    def _put_aside(self, module, args, output):
        self._branch = output

    def _sum(self, module, args, output):
        if self._merged is None:
            return None
        output, self._merged = self._merged + self._branch, None
        return output

    def _order(self) -> torch.Tensor:
        """int64 `[B, N]`: tokens by falling importance, the prefix in front and masked tokens at the end."""
        score = self._score.masked_fill(self._mask.detach() <= 0, -1.0)
        score[:, : self.rates.prefix] = torch.inf
        return score.argsort(dim=1, descending=True, stable=True)

    def _merge(self, hidden: torch.Tensor, important: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Hidden states in which important tokens are means with what is merged into them; the merged stay as they were."""
        with torch.no_grad():
            nearest, cosine = nearest_important(hidden, important, rest)
            target = (
                torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1).scatter(1, rest, nearest)
            )
            grouping = Grouping.into(target, hidden.shape[1] - rest.shape[1], size_weighted=False)
            brought = self._size.gather(1, rest) * cosine.clamp(min=0).float()
            brought = brought.clamp(min=1) if self.clamp_sizes else brought
            gone = torch.zeros_like(target, dtype=torch.bool).scatter(1, rest, True)
            self._size = self._size.scatter_add(1, nearest, brought)
            self._count = self._count.scatter_add(1, nearest, self._count.gather(1, rest))
        return torch.where(gone[..., None], hidden, grouping.unmerge(grouping.merge(hidden)))

    def _average(self, module, args, output):
        """Every patch becomes the average of what is left, by the patches that each token stands for."""
        prefix = self.rates.prefix
        weight = (self._mask * self._count)[:, prefix:, None].to(output.dtype)
        mean = (output[:, prefix:] * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return torch.cat([output[:, :prefix], mean.expand(-1, output.shape[1] - prefix, -1)], 1)
