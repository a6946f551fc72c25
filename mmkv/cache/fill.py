"""`Fill` and `Plan`: what a method knows when a layer's tokens are to be stored, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from mmkv.kernels import Mass, probe
from mmkv.layout import TokenLayout


@dataclass(frozen=True)
class Asked:
    """The attention call that has just run: its queries, and how it scored.

    Args:
        query: `[B, Hq, T, D]`, rotated, of the new tokens.
        scale: factor on q.k.
        softcap: of the scores, None without.
        causal: whether a new token sees those before it alone.
    """

    query: torch.Tensor
    scale: float
    softcap: float | None = None
    causal: bool = True


@dataclass(eq=False)
class Fill:
    """Tokens of one batch element of one layer: all that are dense now, of which the first `old` are decided upon.

    Args:
        layer, layers: index of the layer, and how many there are.
        columns: int64 `[n]` on the CPU, logical positions of the real tokens, ascending; padding is not among them.
            Int64 `[Hkv, n]` where heads hold different ones (a decode-time choice among stored tokens).
        old: how many have left the residual window; those behind them stay whatever is decided, and count as kept.
        fresh: index of the first token that this forward brought.
        keys, values: `[Hkv, n, D]`.
        query: `[Hq, n - fresh, D]` of the fresh tokens, None where no attention ran.
        scale, softcap, causal: of the attention.
        layout: of the n tokens, a batch of one.
        protected: bool `[old]`, tokens that no method may drop (attention sinks).
        bytes_per_token: of one token over all layers, KV heads and batch elements as it will be stored.
        norms: fp32 `[n]`, norm of each token's hidden state as `CacheMethod.reads_hidden` asked; NaN for older tokens.
        scores: fp32 `[Hkv, n]`, attention mass accumulated so far where the method `accumulates`.
        share: how much of its prompt this is: below 1 where the prompt comes in chunks.
        decoding: whether decoded tokens have left the window, in place of a prompt that came.
    """

    layer: int
    layers: int
    columns: torch.Tensor
    old: int
    fresh: int
    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor | None
    layout: TokenLayout
    protected: torch.Tensor
    scale: float = 1.0
    softcap: float | None = None
    causal: bool = True
    bytes_per_token: float = 1.0
    norms: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    share: float = 1.0
    decoding: bool = False

    @property
    def length(self) -> int:
        """n, tokens that are dense now."""
        return self.columns.shape[-1]

    @property
    def heads(self) -> int:
        """Hkv."""
        return self.keys.shape[0]

    @cached_property
    def modality(self) -> torch.Tensor:
        """int8 `[n]`."""
        return self.layout.modality[0]

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """`[Hq, P, D]` of the tokens at indices `rows` int64 `[P]`, all of them fresh."""
        return self.query[:, (rows - self.fresh).to(self.query.device)]

    def mass(self, rows: torch.Tensor) -> Mass:
        """Attention of probe rows over the n dense tokens: `sum` and `max` `[Hq, n]`, `count` int32 `[n]` of rows that see each.

        Args:
            rows: int64 `[P]`, indices of fresh tokens.
        """
        device = self.keys.device
        mask = None
        if self.causal:
            mask = torch.arange(self.length, device=device) <= rows.to(device)[:, None]
        found = probe(
            self.queries(rows)[None], self.keys[None], scale=self.scale, softcap=self.softcap,
            mask=None if mask is None else mask[None, None],
        )  # fmt: skip
        count = found.count[0, 0].expand(self.length)
        return Mass(found.sum[0], found.max[0], count)


@dataclass(eq=False)
class Plan:
    """What will be stored of a fill's old tokens. Methods change it one after the other.

    Args:
        keep: bool `[Hkv, old]`, on the keys' device.
        form: int8 `[Hkv, old]`, index of the storing method's format, or `DENSE`.
        keys, values: `[Hkv, old, D]`; a merging method puts merged ones in their place.
        summaries: (key `[Hkv, D]`, value `[Hkv, Dv]`, count `[Hkv]`) each: one token that stands for `count` dropped ones.
    """

    keep: torch.Tensor
    form: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    summaries: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    split_formats: bool = False  # a method has chosen formats by itself

    @classmethod
    def everything(cls, fill: Fill, form: torch.Tensor) -> Plan:
        """Keep all, in the formats int8 `[old]` that the marks say."""
        device, old = fill.keys.device, fill.old
        return cls(
            keep=torch.ones(fill.heads, old, dtype=torch.bool, device=device),
            form=form.to(device).expand(fill.heads, old).clone(),
            keys=fill.keys[:, :old],
            values=fill.values[:, :old],
            summaries=[],
        )

    def drop(self, stay: torch.Tensor, fill: Fill) -> None:
        """Drop the old tokens that are not in `stay` bool `[Hkv, old]`; those already dropped stay so, protected ones never go."""
        self.keep = self.keep & (stay | fill.protected.to(stay.device))

    def present(self, fill: Fill) -> torch.Tensor:
        """fp32 `[n]` on the CPU: share of the heads that still hold each token; the newest are held by all."""
        return torch.nn.functional.pad(self.keep.float().mean(0).cpu(), (0, fill.length - fill.old), value=1.0)

    def available(self, score: torch.Tensor, fill: Fill) -> torch.Tensor:
        """Scores `[Hkv, old]` in which dropped tokens are -inf and protected ones +inf, ready to choose the best from."""
        score = score.masked_fill(fill.protected.to(score.device), torch.inf)
        return score.masked_fill(~self.keep, -torch.inf)

    @property
    def changed(self) -> bool:
        """Whether heads or formats differ from storing everything as the marks say."""
        return self.split_formats or bool(self.summaries) or not bool(self.keep.all())
