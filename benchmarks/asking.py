"""Videos of the synthetic world, questions about them, and the bundled model's answers over whatever cache it keeps.

Two protocols. Question unknown: the video is prefilled and compressed, then asked about. Question known: the question
stands in the prompt when the cache is compressed, as in most papers. There everything but the prompt's last token is
prefilled; that one runs over the compressed cache, so that no word of the answer comes from the dense prefill.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import mmkv
from mmkv.cache import CacheMethod
from mmkv.cache.view import View
from mmkv.models.tiny import answer, world
from mmkv.models.tiny.questions import all_questions

SEED = 2**42  # training seeds are below 2**40, the model's own evaluation uses 2**41
NEW_TOKENS = 4  # the longest answer has two words


def questions_of(split: str, frames: int, index: int, count: int) -> list:
    """At most `count` questions about held-out video `index`, always the same ones."""
    known = all_questions(world.make_scene(SEED + index, frames, split))
    order = np.random.default_rng(SEED + index).permutation(len(known))[:count]
    return [known[i] for i in order]


def frames_of(split: str, frames: int, index: int) -> np.ndarray:
    """Frames of held-out video `index`, written as .mp4 and decoded."""
    with tempfile.TemporaryDirectory() as folder:
        world.write_mp4(world.make_video(SEED + index, frames, split).frames, Path(folder) / "video.mp4")
        return world.read_mp4(Path(folder) / "video.mp4")


@dataclass(frozen=True)
class Prompt:
    """Questions about one video, one in each row.

    Args:
        ids, mask: int64 `[Q, L]`; padding lies between video and question, or in front where the question is known.
        types: which ids are video, None where the processor gives none.
        video: pixels, grid and times of one video.
        cut: tokens that are prefilled before the cache is compressed.
        known: whether the questions are among them.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor | None
    video: dict[str, torch.Tensor]
    cut: int
    known: bool

    def inputs(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Model inputs, without pixels, for the first rows and tokens."""
        out = dict(input_ids=self.ids[:rows, :length], attention_mask=self.mask[:rows, :length])
        if self.types is not None:
            out["mm_token_type_ids"] = self.types[:rows, :length]
        return out | {k: v.repeat(rows, *[1] * (v.dim() - 1)) for k, v in self.video.items() if "pixel" not in k}


def prompt(model, processor, frames: np.ndarray, questions: list[str], known: bool = False) -> Prompt:
    """All questions about one video."""
    inputs = answer.prepare(processor, frames, "", world.FPS)
    ids, kind = inputs["input_ids"], model.config.video_token_id
    end = int((ids[0] == model.config.vision_end_token_id).nonzero()[-1]) + 1
    texts = [_after_video(processor, question) for question in questions]
    longest = max(t.shape[1] for t in texts)
    rows, masks = [], []
    for text in texts:
        pad = ids.new_full((1, longest - text.shape[1]), processor.tokenizer.pad_token_id)
        parts = [pad, ids[:, :end], text] if known else [ids[:, :end], pad, text]
        rows.append(torch.cat(parts, 1))
        masks.append(torch.cat([torch.full_like(p, int(p is not pad)) for p in parts], 1))
    row = torch.cat(rows)
    types = (row == kind).to(row) * 2 if "mm_token_type_ids" in inputs else None
    video = {k: v for k, v in inputs.items() if v.shape != ids.shape}
    return Prompt(row, torch.cat(masks), types, video, row.shape[1] - 1 if known else end, known)


def _after_video(processor, question: str) -> torch.Tensor:
    """Ids of what follows the video in the chat template."""
    parts = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    after = text.split("<|vision_end|>")[1]
    return processor.tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]


@torch.no_grad()
def prefill(model, asked: Prompt) -> mmkv.Cache:
    """Read a prompt up to its cut with a wrapped model."""
    rows = len(asked.ids) if asked.known else 1
    pixels = {k: v.repeat(rows, *[1] * (v.dim() - 1)) for k, v in asked.video.items() if "pixel" in k}
    cache = mmkv.Cache(model)
    model(**asked.inputs(rows, asked.cut), **pixels, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def answers(model, processor, asked: Prompt, cache: mmkv.Cache) -> list[str]:
    """Greedy answers, all questions as one batch; the video itself is not given again. Uses up the cache."""
    rows = len(asked.ids)
    if not asked.known:
        cache.batch_repeat_interleave(rows)
    inputs = asked.inputs(rows, asked.ids.shape[1])
    out = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS)
    words = processor.tokenizer.batch_decode(out[:, asked.ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in words]


def score(given: list[str], dense: list[str], truth: list[str]) -> dict:
    """Accuracy, its loss against dense in points with the standard error of the paired difference, and agreement."""
    right = np.array([a == t for a, t in zip(given, truth)])
    before = np.array([a == t for a, t in zip(dense, truth)])
    lost, won = int((before & ~right).sum()), int((~before & right).sum())
    return dict(
        accuracy=float(right.mean()),
        loss_points=100 * float(before.mean() - right.mean()),
        loss_error=100 * math.sqrt(lost + won) / len(truth),
        agreement=float(np.mean([a == b for a, b in zip(given, dense)])),
    )


class Replay:
    """A prompt's dense prefill, run once; under a method only what the cache does with its keys and values is run again.

    The first fill attends densely whatever the method, so queries, keys, values and hidden states of a prompt are the same
    under each of them (not so with sparse prefill: `allowed`). The wrapped model's forward runs, hooks, layout, cache
    layers and report included, and its vision tower and decoder layers hand out what they gave the first time.
    """

    def __init__(self, model):
        self.model = model
        self.tower, self.layers = model.model.visual, model.model.language_model.layers
        self.features = None
        self.calls: dict[int, tuple] = {}  # by layer: query, keys, values, keywords of the attention
        self.outputs: dict[int, torch.Tensor] = {}

    @staticmethod
    def allowed(methods: tuple[CacheMethod, ...]) -> bool:
        """Whether no method attends sparsely in the prefill."""
        return all(type(method).attends is CacheMethod.attends for method in methods)

    def record(self, asked: Prompt) -> None:
        """Run the prefill as it is, and keep what passes."""
        attend = View.attend

        def kept(view, stock, stock_name, module, query, mask, **options):
            layer = view.layer
            self.calls[layer.index] = (query, layer.keys, layer.values, options)
            return attend(view, stock, stock_name, module, query, mask, **options)

        hooks = [self.tower.register_forward_hook(lambda _, args, out: setattr(self, "features", copy.copy(out)))]
        for i, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_hook(lambda _, args, out, i=i: self.outputs.__setitem__(i, out)))
        try:
            with mmkv.wrapped(self.model, positions="trained"), mock.patch.object(View, "attend", kept):
                prefill(self.model, asked)
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Within the block the tower and the decoder layers answer from the record."""
        modules = [self.tower, *self.layers]
        self.tower.forward = lambda *args, **kwargs: copy.copy(self.features)
        for i, layer in enumerate(self.layers):
            layer.forward = lambda hidden, i=i, **kwargs: self._layer(i, kwargs["past_key_values"])
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own again

    def _layer(self, i: int, cache) -> torch.Tensor:
        query, keys, values, options = self.calls[i]
        view, _ = cache.update(keys, values, i)
        view.attend(lambda *args, **kwargs: (None, None), "recorded", self.layers[i].self_attn, query, None, **options)
        return self.outputs[i]
