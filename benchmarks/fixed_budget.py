"""`FixedBudget`: a long video read in chunks by a wrapped model, whose cache method keeps the memory from growing.

The same prompt, frames and positions as a stream has (`mmkv.streaming`); pictures are encoded as they come, and the decoder
reads them `chunk` tokens at a time, with the cache compressed in between.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable

import numpy as np
import torch

import mmkv
from mmkv.models import adapter_for
from mmkv.parts.storage import storage_bytes
from mmkv.streaming.positions import Positions


class FixedBudget:
    """One video in the cache of a wrapped model.

    Args:
        model, processor: a Qwen model and its processor.
        methods: cache methods, for example `[InfiniPotV(budget={"video": 512})]`.
        fps: pictures a second.
        chunk: tokens that the decoder reads at a time.
    """

    def __init__(self, model, processor, methods: list, *, fps: float, chunk: int = 256):
        self.model, self.processor = model, processor
        self.methods, self.chunk = methods, chunk
        self.adapter = adapter_for(model)
        self.reader = self.adapter.frames_reader(processor)
        self.fps = fps
        self.cache = None
        self.frames = 0
        self.seconds = 0.0

    @torch.no_grad()
    def watch(self, pieces: Iterable[np.ndarray], tick=lambda n: None) -> None:
        """Read a whole video, uint8 `[T, H, W, 3]` at a time."""
        features, grid = [], (0, 0)
        for pictures in pieces:
            begun = time.perf_counter()
            found, grid = self.reader.encode(torch.from_numpy(pictures))
            features.append(found.flatten(0, 1))
            self.seconds += time.perf_counter() - begun
            tick(len(found))
        begun = time.perf_counter()
        init = self.reader.prompt("?")[0]
        video = torch.cat(features)
        self.frames = len(video) // (grid[0] * grid[1])
        self.positions = Positions(
            self.adapter.axes, len(init), grid, self.reader.step(self.reader.pictures / self.fps)
        )
        merge = self.model.config.vision_config.spatial_merge_size
        types = torch.zeros(1, len(init) + len(video), dtype=torch.int64)
        types[:, len(init) :] = 2
        with mmkv.wrapped(self.model, cache=self.methods, prefill_chunk=self.chunk):
            self.cache = mmkv.Cache(self.model)
            self.model(
                inputs_embeds=torch.cat([self._embeds(init), video])[None],
                position_ids=torch.cat([self.positions.prompt(), self.positions.frames(self.frames)], 1)[:, None],
                mm_token_type_ids=types,
                video_grid_thw=torch.tensor([[self.frames, grid[0] * merge, grid[1] * merge]]),
                past_key_values=self.cache,
                logits_to_keep=1,
            )
            self.report = mmkv.report(self.model)
        self.seconds += time.perf_counter() - begun

    @torch.no_grad()
    def answer(self, question: str, most: int) -> tuple[str, float]:
        """A greedy answer of at most so many tokens, and seconds to its first; the cache stays as it is."""
        begun, first = time.perf_counter(), 0.0
        cache, new = copy.deepcopy(self.cache), self.reader.prompt(question)[1]
        said: list[int] = []
        before = 0
        with mmkv.wrapped(self.model, cache=self.methods):
            while True:
                ids = self.positions.text(self.frames, len(new), before)[:, None]
                embeds = self._embeds(new)[None]
                out = self.model(inputs_embeds=embeds, position_ids=ids, past_key_values=cache, logits_to_keep=1)
                first = first or time.perf_counter() - begun
                said.append(int(out.logits[0, -1].argmax()))
                if len(said) == most or said[-1] == self.model.generation_config.eos_token_id:
                    break
                before, new = before + len(new), torch.tensor(said[-1:])
        return self.processor.tokenizer.decode(said, skip_special_tokens=True).strip(), first

    def bytes(self) -> int:
        """What the cache holds."""
        return storage_bytes(t for layer in self.cache.layers for t in layer.tensors())

    def kept(self, frames: set[int]) -> float:
        """Share of the tokens of some frames that the cache still holds, mean over layers and heads."""
        n = self.positions.per_frame
        wanted = {self.positions.init + f * n + i for f in frames for i in range(n)}
        shares = []
        for layer in self.cache.layers:
            stored = layer.dense_segment(make=False)
            tail = len(wanted & set(range(max(layer.packed_to[0], layer.start), layer.seen)))
            for head in range(layer.keys.shape[1]):
                held = 0
                if stored is not None:
                    at = stored.positions[stored.offsets[head] : stored.offsets[head + 1]]
                    held = len(wanted & set(at.tolist()))
                shares.append((held + tail) / len(wanted))
        return sum(shares) / len(shares)

    def _embeds(self, ids: torch.Tensor) -> torch.Tensor:
        return self.adapter.text_model.get_input_embeddings()(ids.to(self.model.device))
