"""GUI-KV: spatial saliency and temporal redundancy of screenshots beside the votes of the last queries."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch

from mmkv.cache.eviction import Eviction
from mmkv.cache.fill import Fill
from mmkv.cache.method import check_numbers
from mmkv.layout import TEXT, VIDEO
from mmkv.parts.probe_rows import check_window, recent
from mmkv.parts.registry import register
from mmkv.parts.saliency import check_pooling, per_kv_head, pooled

NORMS = ("residual", "post")


@register("cache", "GUI-KV, arXiv 2510.00536")
@dataclass(frozen=True)
class GUIKV(Eviction):
    """Keeps what the last queries look at, the salient places of the newest screenshot, and of earlier ones what it lacks.

    Paper: GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness (arXiv 2510.00536). Votes are SnapKV's
    (a sum over `window` queries). Tokens of the newest screenshot get a bonus by the norm of their hidden state. Tokens of
    earlier screenshots whose keys lie closest to a subspace of the newest one's keys lose their votes, as many as the
    budget drops of them. In a video each frame is a screenshot.

    Args:
        budget, sinks, residual: as in `Eviction`; the paper finds 0.1 to 0.2 enough on several benchmarks.
        window: queries that vote, the newest of the prompt.
        kernel: tokens over which votes are averaged, odd; 1 for none.
        alpha: weight of the bonus, which sums to `alpha` over the newest screenshot (votes sum to at most `window`); 0 for
            none.
        temperature: of the softmax over the standardized norms.
        rank: dimensions of the subspace, spanned by the first tokens of the newest screenshot.
        norm: whose norm: of what enters the decoder layer ("residual", the paper's text), or of what its attention is given
            ("post" the layer norm, the released code, where norms differ through the norm's learned gain alone).

    Where we differ: votes are averaged over the query heads of a KV head and one choice is made for it (the released code
    stores every query head, or drops the choices of all but the first of a group). At least 32 newest tokens stay and count.
    A spread of norms below a thousandth of their mean is rounding and gives no bonus. Screenshots of earlier turns are
    stored already and stay as they are. Without any screenshot the votes decide alone, with one warning.
    """

    budget: float | int | str | dict = 0.2
    window: int = 8
    kernel: int = 5
    alpha: float = 2.0
    temperature: float = 3.5
    rank: int = 32
    norm: str = "residual"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        check_pooling(self.kernel, "avg")
        check_numbers(alpha=self.alpha, temperature=self.temperature)
        if not 0 <= self.alpha < torch.inf:
            raise ValueError(f"alpha {self.alpha}: possible are finite numbers from 0")
        if not 0 < self.temperature < torch.inf:
            raise ValueError(f"temperature {self.temperature}: possible are finite numbers above 0")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank {self.rank!r}: possible are whole numbers of dimensions from 1")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r}: possible are {', '.join(map(repr, NORMS))}")

    @property
    def reads_hidden(self) -> str | None:
        return self.norm if self.alpha else None

    def score(self, fill: Fill) -> torch.Tensor:
        mass = fill.mass(recent(fill.length, self.window, fill.fresh)).sum
        score = pooled(per_kv_head(mass, fill.heads)[:, : fill.old], self.kernel)
        newest, earlier = screenshots(fill)
        if not bool(newest.any()):
            whole = fill.modality if fill.prompt is None else fill.prompt  # other chunks of the prompt may hold some
            if not bool((whole > TEXT).any()):
                _say_that_votes_decide_alone()
            return score
        score = score + self.bonus(fill, newest)[: fill.old].to(score.device)
        return score.masked_fill(self.redundant(fill, newest, earlier), 0.0)

    def bonus(self, fill: Fill, newest: torch.Tensor) -> torch.Tensor:
        """fp32 `[n]` on the CPU: `alpha` spread over the tokens of the newest screenshot whose norms are known."""
        out = torch.zeros(fill.length)
        if fill.norms is None:
            return out
        mine = newest.any(0) & ~fill.norms.isnan()
        norms = fill.norms[mine]
        if norms.numel():
            spread = norms.std(correction=min(1, norms.numel() - 1)).clamp(min=1e-3 * norms.mean()) + 1e-8
            out[mine] = self.alpha * ((norms - norms.mean()) / spread / self.temperature).softmax(0)
        return out

    def redundant(self, fill: Fill, newest: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        """bool `[Hkv, old]`: tokens of earlier screenshots whose keys are nearest to the newest one's subspace."""
        device = fill.keys.device
        earlier = earlier[:, : fill.old]
        out = torch.zeros(fill.heads, fill.old, dtype=torch.bool, device=device)
        if not bool(earlier.any()):
            return out
        distance = distance_to_subspace(fill.keys, newest.to(device), fill.old, self.rank)
        for mine, share in self.shares(fill):
            mine = mine[..., : fill.old] & earlier
            lose = ((1 - share) * mine.sum(-1, keepdim=True).double()).long()
            ranked = distance.masked_fill(~mine.to(device), torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
            out |= ranked < lose.to(device)
        return out

    def shares(self, fill: Fill) -> list[tuple[torch.Tensor, float]]:
        """For tokens that compete, bool `[n]` (`[Hkv, n]`), the share of them that the budget keeps of the whole prompt."""
        held = (fill.columns >= 0).float().expand(fill.modality.shape)
        every = fill.whole if fill.scales else None
        here = whole = self.budget.pools(fill.modality, held, fill.bytes_per_token, whole=every)
        if fill.prompt is not None:
            held = torch.ones(len(fill.prompt))
            whole = self.budget.pools(fill.prompt, held, fill.bytes_per_token)
        rows = held.shape[0] if held.dim() > 1 else 1
        sizes = [float((mine * held).sum()) / rows for mine, _ in whole]
        return [(mine, count / max(size, 1)) for (mine, _), (_, count), size in zip(here, whole, sizes)]


def screenshots(fill: Fill) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[1, n]` (`[Hkv, n]` where tokens are recalled) on the CPU: tokens of the newest screenshot, and of earlier ones."""
    layout = fill.layout
    visual = layout.visual & (fill.columns >= 0)
    last = (visual * torch.arange(fill.length)).argmax(-1, keepdim=True)
    frame = layout.frame.masked_fill(layout.modality != VIDEO, 0)
    same = (layout.medium == layout.medium.gather(-1, last)) & (frame == frame.gather(-1, last))
    return visual & same, visual & ~same


def distance_to_subspace(keys: torch.Tensor, spanning: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """How far keys lie from the subspace that a few of them span.

    Args:
        keys: `[Hkv, n, D]`.
        spanning: bool `[1 or Hkv, n]`; the first `rank` (at most D) of these tokens span the subspace of each head.
        count: how many tokens, from the first, are asked about.
        rank: its dimensions at most.

    Returns:
        fp32 `[Hkv, count]`, Euclidean norms of the residuals.
    """
    dims = min(rank, keys.shape[-1], int(spanning.sum(-1).min()))
    first = (~spanning).to(torch.int8).argsort(dim=-1, stable=True)[:, :dims]
    at = first[..., None].expand(keys.shape[0], -1, keys.shape[-1])
    basis = torch.linalg.qr(keys.gather(1, at).float().mT).Q  # [Hkv, D, dims]
    keys = keys[:, :count].float()
    return torch.linalg.vector_norm(keys - keys @ basis @ basis.mT, dim=-1)


@cache  # once per process: every layer of every prompt would say the same
def _say_that_votes_decide_alone() -> None:
    warnings.warn("GUIKV: a prompt without images or video; its tokens are scored as SnapKV would", stacklevel=2)
