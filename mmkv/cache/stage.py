"""`Stage`: what the layers behind a drop of tokens share, for whom the dropped ones never came."""

from __future__ import annotations

import torch

from mmkv.cache.state import CacheState


class Stage(CacheState):
    """The state of the layers that see a part of the tokens.

    Rows that keep fewer tokens than others are padded on the left of what a forward brought, so that the newest tokens stand
    in one column. Places count within the stage; `origin` says where in the whole sequence each one is.

    Args:
        parent: state of the layers before, or of the whole sequence.
        leader: index of the first layer that has this state; it moves it when the cache is cropped or reordered.
        before: tokens of the parent that came before the forward in progress.
    """

    def __init__(self, parent: CacheState, leader: int, before: int):
        super().__init__(
            parent.method,
            window=parent.window,
            layers=parent.layers,
            sliding=parent.sliding,
            max_bytes=parent.max_bytes,
            record_past=parent.record_past,
        )
        self._root, self.leader = parent.root, leader
        self.origin = torch.zeros(0, 0, dtype=torch.int64)
        if before:
            self.layout = parent.layout.crop(before)
            self.origin = parent.places()[:, :before]
            self.marks = None if parent.marks is None else parent.marks[:, :before]

    @property
    def root(self) -> CacheState:
        return self._root

    def places(self) -> torch.Tensor:
        return self.origin

    def follow(self, parent: CacheState, new: int, columns: torch.Tensor) -> None:
        """Enter what came of the `new` last tokens of the parent.

        Args:
            columns: int64 `[B, T']`, which of them each batch element keeps, ascending; -1 for padding.
        """
        there, at = columns >= 0, columns.clamp(min=0)
        before = len(parent.layout) - new
        chunk = parent.layout.take(slice(before, None)).gather(at)
        chunk.valid = chunk.valid & there
        origin = parent.places()[:, before:].gather(1, at).masked_fill(~there, -1)
        self.scratch, self.norms = {}, {}
        self.fresh, self.prompted = list(parent.fresh), list(parent.prompted)
        self.more, self.max_bytes = parent.more, parent.max_bytes
        self.chunk_of, self.chunk_base = parent.chunk_of, parent.chunk_base
        if parent.marks is not None:
            marks = parent.marks[:, before:].gather(1, at)
            self.marks = marks if self.marks is None else torch.cat([self.marks, marks], 1)
        self.origin = origin if self.layout is None else torch.cat([self.origin, origin], 1)
        self.layout = chunk if self.layout is None else self.layout.cat(chunk)

    def kept_before(self, length: int) -> int:
        """Tokens of this stage among the first `length` of the whole sequence.

        Raises:
            RuntimeError: the rows of the batch differ in what they kept behind it.
        """
        behind = (self.origin >= length).sum(1)
        if len(behind) and bool((behind != behind[0]).any()):
            raise RuntimeError(
                f"cannot crop to {length} tokens: the rows of this batch kept different numbers of tokens behind it; crop no "
                "deeper than the text behind the last image or video"
            )
        return len(self.layout) - int(behind[0]) if len(behind) else 0

    def count(self, index: int, size: int) -> None:
        self.root.count(index, size)

    def crop(self, length: int) -> None:
        super().crop(length)
        self.origin = self.origin[:, :length]

    def rows(self, index: torch.Tensor) -> None:
        super().rows(index)
        self.origin = self.origin[index.cpu()]
