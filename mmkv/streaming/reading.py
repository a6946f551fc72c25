"""`Retrieving` and `Answering`: a question brings frames back, layer by layer, and is answered from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mmkv.kernels import attend_dense
from mmkv.streaming.positions import Positions
from mmkv.streaming.rotary import Rotary

Context = tuple[torch.Tensor, torch.Tensor]  # keys and values [1, Hkv, T, D] of prompt and frames, keys rotated


class Retrieving:
    """A pass of the question's text alone, in which each layer chooses its frames (ReKV's internal retrieval).

    A layer's output comes from [prompt, its frames, question], so that deeper layers choose by what the question has become.
    The question's own keys are forgotten.

    Args:
        rotary: of the model.
        positions: of prompt, frames and text.
        bring: `bring(layer, q)` with the question's unrotated queries `[Hq, T, D]` gives frames, ascending, and their keys and
            values `[Hkv, F * n, D]`, unrotated.
        init: by layer the prompt's keys and values `[1, Hkv, T, D]`, unrotated.
    """

    def __init__(self, rotary: Rotary, positions: Positions, bring: Callable, init: Sequence):
        self.rotary, self.positions, self.bring, self.init = rotary, positions, bring, init
        self.contexts: list[Context] = []
        self.frames: list[list[int]] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        frames, keys, values = self.bring(layer, q[0])
        init_keys, init_values = self.init[layer]
        keys = torch.cat([init_keys, keys[None].to(init_keys.dtype)], 2)
        values = torch.cat([init_values, values[None].to(init_values.dtype)], 2)
        ids = torch.cat([self.positions.prompt(), self.positions.frames(len(frames))], 1)
        self.contexts.append((self.rotary.rotate(keys, ids), values))
        self.frames.append(list(frames))
        reading = Answering(self.rotary, self.positions, self.contexts, [len(f) for f in self.frames])
        return reading.attend(layer, q, k, v, scale)


class Answering:
    """A pass of a prompt, and of the answer, over prompt and frames that were brought back.

    Args:
        rotary, positions: as for `Retrieving`.
        contexts: of each layer.
        frames: how many frames each layer has.
    """

    def __init__(self, rotary: Rotary, positions: Positions, contexts: list[Context], frames: list[int]):
        self.rotary, self.positions, self.contexts, self.frames = rotary, positions, contexts, frames
        self.own: dict[int, Context] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        keys, values = self.contexts[layer]
        before = self.own[layer][0].shape[2] if layer in self.own else 0
        new = k.shape[2]
        ids = self.positions.text(self.frames[layer], new, before)
        k = self.rotary.rotate(k, ids)
        if before:
            k, v = torch.cat([self.own[layer][0], k], 2), torch.cat([self.own[layer][1], v], 2)
        self.own[layer] = k, v
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        length = keys.shape[2]
        at = torch.arange(length - new, length, device=q.device)
        return attend_dense(self.rotary.rotate(q, ids), keys, values, scale=scale, q_positions=at, causal=True)[0]
