"""Stock transformers under a CUDA graph: the forward of one token, captured once and replayed.

Two caches. "static" is transformers' own StaticCache: its attention takes a mask over all places, which torch's flash kernel does
not, so it runs on a slower one. "last place" writes each token over the newest one, so its length never changes and flash
attention needs no mask: no stock cache does that and its answers mean nothing, but no stock model decodes faster.
There is no `generate` around the steps, which favours them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

WARM = 3


class LastPlace(DynamicLayer):
    """Keys and values `[B, Hkv, T, D]`, the newest of which each new token overwrites."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


class StockGraph:
    """Greedy decoding of a model that is not wrapped. On a CPU the steps run without a graph.

    Args:
        model: a Qwen2.5-VL.
        inputs: of the prompt.
        room: tokens to decode.
        kind: "static" or "last place".
    """

    def __init__(self, model, inputs: dict, room: int, kind: str):
        self.model, self.inputs, self.room, self.kind = model, inputs, room + WARM, kind
        self.run: Callable | None = None

    @torch.no_grad()
    def prefill(self) -> None:
        """Reads the prompt as the stock model does."""
        self.run, self.cache = None, DynamicCache(config=self.model.config.get_text_config())
        out = self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        batch, length = self.inputs["input_ids"].shape
        device = out.logits.device
        self.token = out.logits[:, -1:].argmax(-1)
        self.at = torch.tensor([length], device=device)
        self.positions = (length + self.model.model.rope_deltas.to(device)).view(1, -1, 1).expand(3, batch, 1).clone()

    def fix(self) -> None:
        """Puts what the prompt left into a cache of fixed size."""
        (batch, length), layers, self.mask = self.inputs["input_ids"].shape, self.cache.layers, None
        if self.kind == "static":
            self.cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=length + self.room)
            self.mask = torch.zeros(batch, 1, 1, length + self.room, dtype=torch.bool, device=self.at.device)
            self.mask[..., :length] = True
        for i, layer in enumerate(layers):
            if self.kind == "static":
                self.cache.layers[i].update(layer.keys, layer.values)
            else:
                keys, values = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (layer.keys, layer.values))
                self.cache.layers[i] = LastPlace(keys, values)
            layer.keys = layer.values = None  # so that no more than one layer exists twice

    @torch.no_grad()
    def step(self) -> None:
        """One token; waits for no device."""
        if self.mask is not None:
            self.mask.index_fill_(3, self.at, True)
        out = self.model(
            input_ids=self.token, position_ids=self.positions, attention_mask=self.mask, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.at.add_(1)
        self.positions.add_(1)

    def decode(self, tokens: int) -> None:
        """So many tokens; the first call captures the step, after a few more tokens."""
        if self.run is None:
            self.fix()
            self.run = self._captured() if self.token.is_cuda else self.step
        for _ in range(tokens):
            self.run()

    def _captured(self) -> Callable:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def tensors(self) -> list[torch.Tensor]:
        """What the cache holds."""
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
