"""`Fill` and `Plan`: what a method knows when a layer's tokens are to be stored, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        fills: what was worked out before the attention, by batch element.
    """

    query: torch.Tensor
    scale: float
    softcap: float | None = None
    causal: bool = True
    fills: dict[int, Fill] = field(default_factory=dict)


@dataclass(eq=False)
class Fill:
    """Tokens of one batch element of one layer: all that are dense now, of which the first `old` are decided upon.

    Args:
        layer, layers: index of the layer, and how many there are.
        place, places: the same among the layers that decide, those without a sliding window.
        columns: int64 `[n]` on the CPU, logical positions of the real tokens, ascending; padding is not among them.
            Where the method `recalls`, `[Hkv, n]`: first what each head holds already, -1 in places without a token.
        old: how many have left the residual window; those behind them stay whatever is decided, and count as kept.
        fresh: index of the first token that this forward brought.
        keys, values: `[Hkv, n, D]`.
        query: `[Hq, n - fresh, D]` of the fresh tokens, None where no attention ran.
        scale, softcap, causal: of the attention.
        layout: of the n tokens, a batch of one.
        protected: bool `[old]` or `[Hkv, old]`, tokens that no method may drop (attention sinks).
        present: bool `[Hkv, old]` on the keys' device, places that hold a token; None where all do.
        recalled: how many of the old places are for tokens that the heads hold already.
        boundary: logical position of the first token that stays in the tail.
        seen: real tokens that this decision is about: all that ever came while none of them is packed, else n.
        bytes_per_token: of one token over all layers, KV heads and batch elements as it will be stored.
        bytes_beyond: what the newest tokens, which stay dense, take beyond that.
        norms: fp32 `[n]` on the CPU, norm of each token's hidden state as `CacheMethod.reads_hidden` asked; NaN for older tokens.
        scores: fp32 `[Hkv, n]`, attention mass accumulated so far where the method `accumulates`.
        prompt: int8 `[L]`, modality of the real tokens of the whole prompt where it comes in chunks, None elsewhere; the newest
            tokens of this chunk are then decided upon with the next one.
        prompt_before: how many of those came before the first token here.
        decoding: whether decoded tokens have left the window, in place of a prompt that came.
        scales: tokens of each scale of the image that is made, where all that is held is decided upon after each; () elsewhere.
        notes: what a method found out before the attention (`attends`), for `decide`.
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
    place: int = 0
    places: int = 1
    present: torch.Tensor | None = None
    recalled: int = 0
    boundary: int = 0
    seen: int = 0
    bytes_per_token: float = 1.0
    bytes_beyond: float = 0.0
    norms: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    prompt_before: int = 0
    decoding: bool = False
    scales: tuple[int, ...] = ()
    notes: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """n, tokens that are dense now."""
        return self.columns.shape[-1]

    @property
    def whole(self) -> int:
        """Tokens that a ratio is of: those seen, or of an image made scale by scale all that come before its last scale."""
        return sum(self.scales[:-1]) if self.scales else self.seen

    @property
    def heads(self) -> int:
        """Hkv."""
        return self.keys.shape[0]

    @cached_property
    def modality(self) -> torch.Tensor:
        """int8 `[n]`, `[Hkv, n]` where tokens are recalled."""
        return self.layout.modality if self.recalled else self.layout.modality[0]

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """`[Hq, P, D]` of the tokens at indices `rows` int64 `[P]`, all of them fresh."""
        return self.query[:, (rows - self.fresh).to(self.query.device)]

    def mass(self, rows: torch.Tensor) -> Mass:
        """Attention of probe rows over the n dense tokens: `sum` and `max` `[Hq, n]`, `count` int32 of rows that see each,
        `[n]`, or `[Hq, n]` where tokens are recalled.

        Args:
            rows: int64 `[P]`, indices of fresh tokens.
        """
        positions = rows.to(self.keys.device)  # keys are told by their index, not by their logical position
        held = self._held()
        found = probe(
            self.queries(rows)[None], self.keys[None], scale=self.scale, softcap=self.softcap,
            mask=None if held is None else held[None], positions=positions, causal=self.causal,
        )  # fmt: skip
        count = found.count[0].expand(-1, self.length)
        return Mass(found.sum[0], found.max[0], count[0] if len(count) == 1 else count)

    def head_mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention of probe rows itself, mean over query heads: fp32 `[P, n]`. For a few rows; no tokens recalled.

        Args:
            rows: int64 `[P]`, indices of fresh tokens.
        """
        queries, mask = self.queries(rows), None
        if self.causal:
            mask = torch.arange(self.length, device=self.keys.device) <= rows.to(self.keys.device)[:, None]
        total = torch.zeros(len(rows), self.length, device=self.keys.device)
        for head, keys in enumerate(self.keys):
            mine = queries[head * len(queries) // self.heads : (head + 1) * len(queries) // self.heads].float()
            scores = mine @ keys.float().T * self.scale
            if self.softcap is not None:
                scores = self.softcap * (scores / self.softcap).tanh()
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            total += scores.softmax(-1).sum(0)
        return total / len(queries)

    def _held(self) -> torch.Tensor | None:
        """bool `[Hq, 1, n]`: the places that hold a token; None where all do."""
        if self.present is None:
            return None
        held = torch.nn.functional.pad(self.present, (0, self.length - self.old), value=True)[:, None]
        return held.repeat_interleave(len(self.query) // self.heads, 0)


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
        every = torch.ones(fill.heads, old, dtype=torch.bool, device=device)
        return cls(
            keep=every if fill.present is None else fill.present.clone(),
            form=form.to(device).expand(fill.heads, old).clone(),
            keys=fill.keys[:, :old],
            values=fill.values[:, :old],
            summaries=[],
        )

    def drop(self, stay: torch.Tensor, fill: Fill) -> None:
        """Drop the old tokens that are not in `stay` bool `[Hkv, old]`; what is dropped stays so, protected ones never go."""
        self.keep = self.keep & (stay | fill.protected.to(stay.device))

    def present(self, fill: Fill) -> torch.Tensor:
        """fp32 `[n]` on the CPU: share of the heads that still hold each token; the newest are held by all. Fp32 `[Hkv, n]`
        where tokens are recalled.
        """
        held = self.keep.float().cpu()
        return torch.nn.functional.pad(held if fill.recalled else held.mean(0), (0, fill.length - fill.old), value=1.0)

    def available(self, score: torch.Tensor, fill: Fill) -> torch.Tensor:
        """Scores `[Hkv, old]` in which dropped tokens are -inf and protected ones +inf, ready to choose the best from."""
        score = score.masked_fill(fill.protected.to(score.device), torch.inf)
        return score.masked_fill(~self.keep, -torch.inf)
