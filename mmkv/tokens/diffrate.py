"""DiffRate: learned numbers of tokens to prune and to merge in each block of a vision tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkv.parts.matching import Grouping, nearest_important
from mmkv.parts.registry import register
from mmkv.tokens.diffrate_rates import RELEASED
from mmkv.tokens.method import TokenMethod, TowerFacts, TowerView


@register("tokens", "DiffRate, ICCV 2023, arXiv 2305.17997")
@dataclass(frozen=True)
class DiffRate(TokenMethod):
    """Prunes the least important tokens of each block and merges the next ones, by rates learned for a FLOPs target.

    Paper: DiffRate: Differentiable Compression Rate for Efficient Vision Transformers (arXiv 2305.17997).

    `DiffRate.released("deit-s", 2.9)` has the authors' rates, `mmkv train-rates` learns others, `DiffRate.load(path)` reads them.

    Args:
        prune: tokens kept behind pruning in each block, prefix tokens (CLS) included; the running minimum over the blocks and
            over `merge` counts. Empty for all tokens.
        merge: tokens kept behind merging, as `prune`, with as many numbers.
        tokens: tokens that enter the tower, for which the rates were learned; a tower with others refuses. None for any.
        scores: importance of a token: "cls" (attention of the CLS token) or "received" (attention received from all tokens,
            for towers without a CLS token).

    Where we differ: tokens stay in their order (the official code sorts them by importance in every block; only the last bits
    of sums change). A token merged into an unlike one (negative cosine) adds nothing to its size, where the official code
    subtracts and can reach log of a negative number. All prefix tokens are kept and nothing is merged into them. Average
    pooling behind the tower counts original patches, not similarity-discounted sizes.
    """

    prune: tuple[int, ...] = ()
    merge: tuple[int, ...] = ()
    tokens: int | None = None
    scores: str = "cls"

    prop_attn = True  # attention in proportion to sizes belongs to the method

    def __post_init__(self):
        for name in ("prune", "merge"):
            counts = getattr(self, name)
            if not isinstance(counts, list | tuple):
                raise ValueError(f"{name}={counts!r}; tokens to keep are one whole number for each block")
            object.__setattr__(self, name, tuple(counts))
            for count in counts:
                if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                    raise ValueError(
                        f"{name}={tuple(counts)!r}; tokens to keep are whole numbers from 1 on (CLS counts)"
                    )
        if len(self.prune) != len(self.merge):
            raise ValueError(
                f"prune has {len(self.prune)} numbers and merge {len(self.merge)}; give one each for each block"
            )
        if self.tokens is not None and (
            not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 2
        ):
            raise ValueError(f"tokens={self.tokens!r}; possible are None and whole numbers from 2 on")
        if self.scores not in ("cls", "received"):
            raise ValueError(f"scores={self.scores!r}; possible are 'cls', 'received'")

    @classmethod
    def released(cls, model: str, gflops: float) -> DiffRate:
        """The authors' rates for ImageNet weights of a model at a number of GFLOPs.

        Raises:
            ValueError: none for this model and number; the message has the list.
        """
        if (model, gflops) not in RELEASED:
            known = ", ".join(f"({name!r}, {number})" for name, number in RELEASED)
            raise ValueError(f"no released rates for ({model!r}, {gflops!r}); possible are {known}")
        prune, merge = RELEASED[model, gflops]
        return cls(prune, merge, tokens=max(prune))

    @classmethod
    def load(cls, path: str | Path) -> DiffRate:
        """Rates from a JSON file that `save` or `mmkv train-rates` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            held = json.loads(Path(path).read_text())
            if held["method"] != "DiffRate" or held["depth"] != len(held["prune"]):
                raise KeyError("method")
            return cls(held["prune"], held["merge"], held["tokens"], held["scores"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no DiffRate rates; `mmkv train-rates` and DiffRate.save write them"
            ) from error

    def save(self, path: str | Path, **facts) -> None:
        """Write the rates as JSON, with the depth and tokens of the tower they are for and any `facts` beside them."""
        held = dict(
            method="DiffRate",
            depth=len(self.prune),
            tokens=self.tokens,
            prune=self.prune,
            merge=self.merge,
            scores=self.scores,
        )
        Path(path).write_text(json.dumps({**held, **facts}, indent=1) + "\n")

    def kept(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Tokens behind pruning and behind merging in each block of a tower that `tokens` enter: the running minimum."""
        out = []
        for pruned, merged in zip(self.prune, self.merge):
            pruned = min(tokens, pruned)
            tokens = min(pruned, merged)
            out.append((pruned, tokens))
        return tuple(out)

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(min(len(self.prune), depth)))

    def in_tower(self, view: TowerView) -> Grouping | None:
        entered = view.source.shape[1]
        if self.tokens not in (None, entered):
            raise ValueError(f"these rates are for {self.tokens} tokens, this tower has {entered}; learn rates for it")
        n = view.hidden.shape[1]
        pruned, merged = min(n, self.prune[view.block]), min(n, self.prune[view.block], self.merge[view.block])
        if merged >= n:
            return None
        score = view.cls_attention() if self.scores == "cls" else view.received_attention()
        order = score[:, view.prefix :].argsort(dim=1, descending=True, stable=True) + view.prefix
        important, rest = order[:, : merged - view.prefix], order[:, merged - view.prefix : pruned - view.prefix]
        return _grouping(view.hidden, important, rest, view.prefix)

    def check(self, adapter_facts: TowerFacts) -> None:
        depth, prefix = adapter_facts.depth, adapter_facts.prefix
        if not adapter_facts.merges or not depth:
            raise ValueError(
                "DiffRate merges inside a vision tower with absolute positions (CLIP, SigLIP, timm ViT); this model has none"
            )
        if self.prune and len(self.prune) != depth:
            raise ValueError(f"these rates are for {len(self.prune)} blocks, the tower has {depth}; learn rates for it")
        if self.scores == "cls" and not adapter_facts.has_cls:
            raise ValueError("scores='cls', but this vision tower has no CLS token; choose scores='received'")
        if self.prune and min(self.prune + self.merge) <= prefix:
            raise ValueError(
                f"these rates keep {min(self.prune + self.merge)} tokens, but the {prefix} tokens in front are no patches;"
                f" keep at least {prefix + 1}"
            )

    def keeping_everything(self) -> DiffRate:
        return DiffRate(scores=self.scores)


@torch.no_grad()
def _grouping(hidden: torch.Tensor, important: torch.Tensor, rest: torch.Tensor, prefix: int) -> Grouping:
    """The prefix and `important` `[B, K]` stay, `rest` `[B, S]` goes to the nearest of them, all others are pruned."""
    batch, n, _ = hidden.shape
    target = torch.full((batch, n), -1, dtype=torch.int64, device=hidden.device)
    target[:, :prefix] = torch.arange(prefix, device=hidden.device)
    target.scatter_(1, important, important)
    share = torch.ones(batch, n, dtype=torch.float32, device=hidden.device)
    if rest.shape[1]:
        nearest, cosine = nearest_important(hidden, important, rest)
        target.scatter_(1, rest, nearest)
        share.scatter_(1, rest, cosine.clamp(min=0).to(share.dtype))
    return Grouping.into(target, prefix + important.shape[1], size_weighted=False, size_share=share)
