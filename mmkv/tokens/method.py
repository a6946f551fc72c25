"""`TokenMethod`: what a method that drops or merges vision tokens is asked, and what it is told each time.

A method answers at up to three places: in the blocks of the vision tower, between the projector and the decoder, and
between two decoder layers. It never sees a model; it decides, and the decision is applied by others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mmkv.layout import TokenLayout
from mmkv.parts.matching import Grouping
from mmkv.parts.tower_attention import cls_attention, received_attention


@dataclass(eq=False)
class TowerView:
    """One block of a vision tower, right after its attention and before its MLP.

    Args:
        block, depth: index of the block, and how many there are.
        hidden: `[B, N, C]`, the attention's output added; B images (frames, tiles, crops) of N tokens each.
        queries, keys: `[B, H, N, D]` of this block's attention.
        scale: factor on q.k.
        size: fp32 `[B, N]`, patches that each token stands for.
        source: int64 `[B, N0]`, the token that each original token is now part of, -1 where it was pruned.
        prefix: tokens in front that are no patches (CLS, distillation, registers); never merged, never pruned.
        has_cls: whether the first of them is a CLS token.
        grid: rows and columns of the original patches, None where they form no rectangle.
        spans: int64 `[k + 1]`, bounds of the k sequences that share one row where a tower packs images of different sizes
            (B is 1); None where each batch element is one image.
        notes: per-token facts fp32 `[B, N0 - prefix]` by name, for `before_decoder` and `in_decoder`: a method writes them here.
    """

    block: int
    depth: int
    hidden: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    scale: float
    size: torch.Tensor
    source: torch.Tensor
    prefix: int
    has_cls: bool
    grid: tuple[int, int] | None = None
    spans: torch.Tensor | None = None
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def cls_attention(self) -> torch.Tensor:
        """fp32 `[B, N]`: attention that the CLS token pays to each token, mean over heads; sums to 1.

        Raises:
            ValueError: the tower has no CLS token.
        """
        if not self.has_cls:
            raise ValueError("this vision tower has no CLS token; score by the attention received (scores='received')")
        return cls_attention(self.queries, self.keys, self.scale, self.size)

    def received_attention(self) -> torch.Tensor:
        """fp32 `[B, N]`: attention that each token receives, mean over heads and over the queries of its sequence."""
        return received_attention(self.queries, self.keys, self.scale, self.size, self.spans)

    def of_patches(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[B, N]` of the tokens as they are now, for each original patch: `[B, N0 - prefix]`, 0 where pruned."""
        place = self.source[:, self.prefix :]
        return values.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)


@dataclass(eq=False)
class Vision:
    """One image or video of one prompt, behind the projector and before the decoder.

    Args:
        features: `[n, C]`, embeddings that the decoder would read.
        layout: of the n tokens, a batch of one; row and col are -1 for newline tokens, frame counts frames.
        text: `[t, C]`, embeddings of the prompt's text tokens of this forward.
        notes: fp32 `[n]` by name: what was noted in the tower, brought to the decoder's tokens.
    """

    features: torch.Tensor
    layout: TokenLayout
    text: torch.Tensor
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def structural(self) -> torch.Tensor:
        """bool `[n]`: tokens on no grid (newlines), which methods keep."""
        return self.layout.row[0] < 0


@dataclass(eq=False)
class Choice:
    """What becomes of n tokens.

    Args:
        keep: bool `[n]`.
        into: int64 `[n]`, for each token the index of the kept token that it was merged into, itself where it is kept and -1
            where it was dropped; None where nothing was merged. For pictures and source maps.
        features: `[n, C]`, what the kept tokens are now (rows of others do not matter); None leaves them as they are.
        notes: fp32 `[n]` by name, for later stages; added to those that are there.
    """

    keep: torch.Tensor
    into: torch.Tensor | None = None
    features: torch.Tensor | None = None
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def went(self, names: torch.Tensor) -> torch.Tensor:
        """int64 `[n]` on the CPU: the name of the token that each is part of now, -1 where it was dropped.

        Args:
            names: int64 `[n]` on the CPU, by what the caller calls the tokens.
        """
        if self.into is None:
            return names.masked_fill(~self.keep.cpu(), -1)
        into = self.into.cpu()
        return torch.where(into >= 0, names[into.clamp(min=0)], -1)


@dataclass(eq=False)
class DecoderView:
    """One prompt between two decoder layers: the tokens that this forward brought and that are still there.

    Args:
        layer, layers: index of the layer that has just run, and how many there are.
        hidden: `[m, C]`, its output.
        embeds: `[m, C]`, what entered the first layer.
        layout: of the m tokens, a batch of one, padding left out.
        mass: `mass(rows)` with int64 `[P]` of the m tokens: attention that these rows pay in that layer, `sum` and `max`
            over the rows, each fp32 `[Hq, m]` (softmax over all tokens there are, those of earlier forwards included).
        head_mean: `head_mean(rows)`: the same rows' attention itself, mean over heads, fp32 `[P, m]`.
        notes: fp32 `[m]` by name, from earlier stages.
    """

    layer: int
    layers: int
    hidden: torch.Tensor
    embeds: torch.Tensor
    layout: TokenLayout
    mass: Callable
    head_mean: Callable[[torch.Tensor], torch.Tensor]
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def visual(self) -> torch.Tensor:
        """bool `[m]` on the CPU: tokens of images and videos; all others have to stay."""
        return self.layout.visual[0]


class TokenMethod:
    """Base of the methods. The defaults do nothing; a method overrides the places where it acts.

    Subclasses are frozen dataclasses, registered once with `@register("tokens", paper)`.
    """

    position_ids = "original"  # or "renumbered": kept tokens count 0, 1, 2 ... in each layer
    trims_cache = False  # layers before a drop let go of what the last drop did not keep
    whole_prompt = False  # decides by the prompt's text, so that a prompt cannot come in chunks

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks of a tower of `depth` in which it is asked."""
        return ()

    def in_tower(self, view: TowerView) -> Grouping | None:
        """Which tokens go on from this block, merged how; None for all as they are."""
        return None

    def before_decoder(self, vision: Vision) -> Choice | None:
        """What becomes of an image's or a video's tokens; None for all as they are."""
        return None

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of a decoder behind which it is asked, none of them the last."""
        return ()

    def in_decoder(self, view: DecoderView) -> Choice | None:
        """Which tokens enter the next layer; None for all. Text always stays."""
        return None

    def check(self, adapter_facts: TowerFacts) -> None:
        """Raise ValueError where a model lacks what the method needs."""

    def keeping_everything(self) -> TokenMethod:
        """The setting that keeps everything, which must be stock to the bit."""
        raise NotImplementedError


def overrides(method: TokenMethod, name: str) -> bool:
    """Whether a method acts at a place: "in_tower", "before_decoder" or "in_decoder"."""
    return getattr(type(method), name) is not getattr(TokenMethod, name)


@dataclass(frozen=True)
class TowerFacts:
    """What `TokenMethod.check` is told about a model.

    Args:
        depth: blocks of the tower, 0 without one.
        has_cls: whether it has a CLS token.
        prefix: tokens that are no patches.
        merges: whether tokens may be merged inside it (one image a batch element, absolute positions, no windows).
        layers: decoder layers, 0 without a decoder.
        axes: rows of the decoder's position ids.
    """

    depth: int = 0
    has_cls: bool = False
    prefix: int = 0
    merges: bool = False
    layers: int = 0
    axes: int = 1
