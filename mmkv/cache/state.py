"""What the layers of one cache share: the layout, the plan, and the marks of tokens that are stored differently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mmkv.cache.method import DENSE, CacheMethod
from mmkv.layout import TokenLayout

if TYPE_CHECKING:
    from mmkv.cache.static.stretch import Stretch

NEW_MEDIA = 256  # vision tokens that justify a segment of their own, with its own channel order
PROMPT = 256  # new tokens that are a prompt whatever they are; drafts of assisted decoding are far fewer


@dataclass
class CacheState:
    """Shared by all `KVLayer`s of a cache.

    Args:
        method: how tokens are stored, None to keep everything dense.
        window: the smallest sliding window of any layer, None where none slides.
        layout: of all tokens seen so far, padding included.
        marks: int8 `[B, T]`, format of each token; None where all go to the main format.
        fresh: bool list, batch elements to which the last forward brought a new image or video worth a segment.
        prompted: bool list, those to which it brought a prompt: the first tokens, new media, or a long text.
        chunk_of: where a prompt is fed in chunks, the layout of the whole of it; None elsewhere.
        chunk_base: logical position where that prompt begins.
        more: whether further chunks of the prompt follow this forward.
        max_bytes: what all layers together may hold after a forward, None for no limit.
        held: bytes of each layer when last counted; peak: the most of their sum.
        layers: how many layers the cache has.
        sliding: indices of those with a sliding window, which decide nothing.
        norms: fp32 `[B, T]` by layer, norms of the hidden states of this forward, where the method reads them.
        scratch: what several layers of one forward need alike (masks); emptied when the forward ends.
        watched: layers whose attention is looked at when it has run, for token methods.
        deferred: layers that store nothing before the forward ends, since tokens may still be taken from them.
        looked: by those layers, each batch element's `Fill` over all its dense tokens; emptied by who reads it.
        record_past: keep what a sliding window would drop, so that it can be cropped back.
        scales: tokens of each scale of the image that is made, where the model makes it scale by scale; () elsewhere.
        last: nobody will attend to the tokens of this forward again (the last scale's), so they are not kept.
        steps: forwards of one token each since anything else happened.
        stretch: the run of decode steps that is going on in static buffers, None where there is none.
    """

    method: CacheMethod | None = None
    window: int | None = None
    layers: int = 1
    sliding: tuple[int, ...] = ()
    layout: TokenLayout | None = None
    marks: torch.Tensor | None = None
    fresh: list[bool] = field(default_factory=list)
    prompted: list[bool] = field(default_factory=list)
    chunk_of: TokenLayout | None = None
    chunk_base: int = 0
    more: bool = False
    max_bytes: int | None = None
    held: dict = field(default_factory=dict)
    peak: int = 0
    norms: dict = field(default_factory=dict)
    watched: frozenset = frozenset()
    deferred: frozenset = frozenset()
    looked: dict = field(default_factory=dict)
    record_past: bool = False
    scales: tuple[int, ...] = ()
    last: bool = False
    steps: int = 0
    stretch: Stretch | None = None
    scratch: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forms = () if self.method is None else self.method.formats()

    leader = 0  # the layer that moves this state

    @property
    def recalls(self) -> bool:
        """Whether decisions are about all that is held: where the method says so, and after each scale of an image, which is
        no prompt of its own; what is packed stays as it is.
        """
        method = self.method
        return method is not None and (method.recalls or (bool(self.scales) and method.evicts and not self.forms))

    @property
    def root(self) -> CacheState:
        """The state of the whole sequence; another one where layers see a part of it (`Stage`)."""
        return self

    def places(self) -> torch.Tensor:
        """int64 `[B, T]`: where in the whole sequence each token stands, -1 for padding that a stage put in."""
        return torch.arange(self.seen).expand(self.layout.batch, -1)

    def kept_before(self, length: int) -> int:
        """How many of the first `length` tokens of the whole sequence there are here."""
        return length

    @property
    def seen(self) -> int:
        """Logical length: tokens ever seen, padding included."""
        return 0 if self.layout is None else len(self.layout)

    def extend(self, chunk: TokenLayout, embeds: torch.Tensor | None) -> None:
        """Enter the new tokens of a forward, before its first layer."""
        before = self.layout
        self.steps = self.steps + 1 if len(chunk) == 1 and before is not None else 0
        self.scratch = {}
        self.norms = {}
        self.fresh = self._fresh(chunk)
        self.prompted = self._prompted(chunk)
        marks = self._marks(chunk, embeds)
        if marks is not None or self.marks is not None:
            old = self.marks
            if old is None:
                old = torch.zeros(chunk.batch, 0 if before is None else len(before), dtype=torch.int8)
            new = torch.zeros(chunk.batch, len(chunk), dtype=torch.int8) if marks is None else marks
            self.marks = torch.cat([old, new], dim=1)
        self.layout = chunk if before is None else before.cat(chunk)

    def _marks(self, chunk: TokenLayout, embeds: torch.Tensor | None) -> torch.Tensor | None:
        """int8 `[B, T]`: where each new token will be stored, None where all go to the main format."""
        if self.method is None:
            return None
        marks = self.method.mark(embeds, chunk) if self.method.reads_embeddings and embeds is not None else None
        if not self.method.dense_sinks:
            return marks
        before = 0 if self.layout is None else self.layout.valid.sum(1, keepdim=True)
        sinks = chunk.valid & (chunk.valid.cumsum(1) + before <= self.method.dense_sinks)
        if not bool(sinks.any()):
            return marks
        marks = torch.zeros(sinks.shape, dtype=torch.int8) if marks is None else marks.cpu()
        return marks.masked_fill(sinks, DENSE)

    def _fresh(self, chunk: TokenLayout) -> list[bool]:
        if self.layout is None:
            return [True] * chunk.batch
        if not bool(chunk.visual.any()):
            return [False] * chunk.batch
        seen = self.layout.medium.amax(1, keepdim=True)
        return ((chunk.medium > seen) & chunk.visual).sum(1).ge(NEW_MEDIA).tolist()

    def _prompted(self, chunk: TokenLayout) -> list[bool]:
        if self.layout is None or self.chunk_of is not None:
            return [True] * chunk.batch
        seen = self.layout.medium.amax(1, keepdim=True)
        media = ((chunk.medium > seen) & chunk.visual).any(1)
        return (media | (chunk.valid.sum(1) >= PROMPT)).tolist()

    def count(self, index: int, size: int) -> None:
        """Enter what a layer holds now."""
        self.held[index] = size
        self.peak = max(self.peak, sum(self.held.values()))

    def end_stretch(self) -> None:
        """Back from static buffers, before anything but a decode step happens."""
        if self.stretch is not None:
            self.stretch.close()

    def crop(self, length: int) -> None:
        self.steps = 0
        if self.layout is None:
            return
        self.layout = self.layout.crop(length)
        if self.marks is not None:
            self.marks = self.marks[:, :length]

    def rows(self, index: torch.Tensor) -> None:
        self.steps = 0
        if self.layout is None:
            return
        index = index.cpu()
        self.layout = self.layout.rows(index)
        self.fresh = [self.fresh[i] for i in index.tolist()]
        self.prompted = [self.prompted[i] for i in index.tolist()]
        if self.marks is not None:
            self.marks = self.marks[index]

    def reset(self) -> None:
        self.layout = self.marks = None
        self.fresh, self.prompted, self.norms = [], [], {}
        self.held, self.peak = {}, 0
        self.scales, self.last, self.steps = (), False, 0
