"""`Writing`: frames go through the decoder with a sliding window; every layer's keys and values come out for the store."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmkv.kernels import attend_dense, merge
from mmkv.streaming.positions import Positions
from mmkv.streaming.rotary import Rotary


class Writing:
    """The window of a stream: per layer the newest `window` tokens and the initial prompt, unrotated (ReKV, arXiv 2503.00540).

    A frame's queries see the newest `window` tokens at their true distances, and from the frame on with which more came
    than that, the initial prompt at one distance, the window's end. Both are one softmax.

    Where we differ: positions count from the window's first token, so that hours of frames lose no precision. With three
    axes only time is bounded by the window; height and width, which never grow, keep their ids, and the prompt its own.

    Args:
        rotary: of the model.
        layers: decoder layers.
        window: tokens.
        positions: of prompt and frames; set with the first frame.
    """

    def __init__(self, rotary: Rotary, layers: int, window: int):
        self.rotary, self.window = rotary, window
        self.positions: Positions | None = None
        self.seen = 0  # tokens, of the prompt and of frames
        self.init: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self.held: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self.written: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers  # by the forward in progress

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        held = self.held[layer]
        keys = k if held is None else torch.cat([held[0], k], 2)
        values = v if held is None else torch.cat([held[1], v], 2)
        old, new = keys.shape[2] - k.shape[2], k.shape[2]
        ids = self._ids(old, new)
        rotated, queries = self.rotary.rotate(keys, ids), self.rotary.rotate(q, ids[:, old:])
        block = new if self.init[layer] is None else self.positions.per_frame
        far = None if self.init[layer] is None else self._far(q, new)
        parts = []
        for first in range(0, new, block):
            last = min(first + block, new)
            begin = max(old + first - self.window + 1, 0)
            at = torch.arange(old + first, old + last, device=q.device)
            here = attend_dense(
                queries[:, :, first:last], rotated[:, :, begin : old + last], values[:, :, begin : old + last],
                scale=scale, q_positions=at, k_start=begin, causal=True, window=self.window,
            )  # fmt: skip
            beyond = self.seen + last - self.window
            if far is not None and beyond > 0:
                init_keys, init_values = (x[:, :, :beyond] for x in self._init(layer))
                here = merge([here, attend_dense(far[:, :, first:last], init_keys, init_values, scale=scale)])
            parts.append(here[0])
        if self.init[layer] is None:
            self.init[layer] = k, v
        else:
            self.written[layer] = k[0], v[0]
        keep = slice(max(keys.shape[2] - self.window, 0), None)
        # clones, or a window would keep the tokens before it alive
        self.held[layer] = keys[:, :, keep].clone(), values[:, :, keep].clone()
        return torch.cat(parts, 2)

    def newest_frames(self) -> range:
        """Frames of which the window holds any token."""
        n = self.positions.per_frame
        frames = (self.seen - self.positions.init) // n
        return range(max(frames - -(-self.window // n), 0), frames)

    def refill(self, newest: range, fetch: Callable) -> None:
        """Make the window what it was when those were the newest frames.

        Args:
            newest: as `newest_frames` says.
            fetch: `fetch(layer, frames)` gives keys and values `[Hkv, F * n, D]`.
        """
        for layer, (init_keys, init_values) in enumerate(self.init):
            keys, values = (x[None].to(init_keys.dtype) for x in fetch(layer, newest))
            keys, values = torch.cat([init_keys, keys], 2), torch.cat([init_values, values], 2)
            # the prompt stands before the first frame: it is in the window only where all frames are
            first = 0 if newest.start == 0 else init_keys.shape[2]
            keep = slice(max(keys.shape[2] - self.window, first), None)
            self.held[layer] = keys[:, :, keep].clone(), values[:, :, keep].clone()

    def _init(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's keys as the far part sees them: with one axis all at position 0, unrotated."""
        keys, values = self.init[layer]
        if self.rotary.axes > 1:
            keys = self.rotary.rotate(keys, self.positions.prompt())
        return keys, values

    def _far(self, q: torch.Tensor, new: int) -> torch.Tensor:
        """The new queries at the window's end."""
        if self.rotary.axes == 1:
            return self.rotary.rotate(q, torch.full((1, new), self.window - 1))
        frames = new // self.positions.per_frame
        ids = self.positions.frames(1).repeat(1, frames)
        ids[0] += int(self.window // self.positions.per_frame * self.positions.step)
        return self.rotary.rotate(q, ids)

    def _ids(self, old: int, new: int) -> torch.Tensor:
        """Positions `[A, old + new]` of what the window holds and what comes, from the first of them on."""
        if self.positions is None or self.rotary.axes == 1:
            return torch.arange(old + new).expand(self.rotary.axes, -1)
        total, init, n = self.seen + new, self.positions.init, self.positions.per_frame
        first = total - old - new  # place of the window's first token in the stream
        begin = max(first - init, 0) // n  # its frame
        frames = -(-(total - init) // n) - begin
        ids = self.positions.frames(frames)
        if first < init:
            return torch.cat([self.positions.prompt(), ids], 1)[:, first : first + old + new]
        skip = first - init - begin * n
        return ids[:, skip : skip + old + new]
