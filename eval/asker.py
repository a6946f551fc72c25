"""One wrapped model that answers prompts about media, and measures what each answer cost.

Whatever the method, no word of an answer comes from the dense prefill. Question unknown: the prompt up to the end of its media
is prefilled and compressed once for all questions that share it; the question is read over the compressed cache. Question
known: everything but the prompt's last token is prefilled and compressed; that token is read over the compressed cache. Short
answers would otherwise be the dense model's: the first token of a plain `generate` is made before anything is compressed.
"""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch

import mmkv
from mmkv.eval import memory
from mmkv.eval.held import vision_tokens_held
from mmkv.eval.inputs import inputs_of, rendered
from mmkv.eval.likelihood import most_likely
from mmkv.eval.media import Media
from mmkv.eval.methods import Method
from mmkv.eval.task import Prompt, SkipSample
from mmkv.models import adapter_for

# Text behind a video continues where the models were trained to have it; the stock rule of newer transformers gives a token other
# positions when a prompt is read in two parts.
POSITIONS = "trained"


@dataclass
class _Encoded:
    """Media that are prefilled: the ids up to there, their cache, and the seconds it took."""

    ids: torch.Tensor
    cache: mmkv.Cache
    seconds: float


class Asker:
    """A model wrapped by one method, for the length of a `with` block.

    Args:
        model, processor: as `mmkv ask` loads them.
        method: how the cache is kept.
        share: prefill media once for consecutive prompts that begin with the same tokens; ignored where the method needs the
            question.
    """

    def __init__(self, model: Any, processor: Any, method: Method, share: bool):
        self.model, self.processor, self.method = model, processor, method
        self.share = share and not method.reads_question
        self.encoded: _Encoded | None = None
        image, video = adapter_for(model).placeholder_ids()
        self.placeholders = [i for i in (image, video) if i is not None]

    def __enter__(self) -> Asker:
        mmkv.wrap(self.model, tokens=self.method.tokens, cache=self.method.cache, positions=POSITIONS)
        return self

    def __exit__(self, *_: object) -> None:
        self.encoded = None
        mmkv.unwrap(self.model)

    @torch.no_grad()
    def answer(self, prompt: Prompt, media: Media, likely: bool, max_new_tokens: int) -> dict[str, Any]:
        """The response and its numbers: the measured part of a row.

        Args:
            prompt, media: as the task gives them.
            likely: by likelihood of the prompt's choices, else by greedy text of at most `max_new_tokens`.

        Raises:
            SkipSample: the processor does not take these media.
        """
        memory.reset_peak(self.model.device)
        try:
            inputs = inputs_of(self.model, self.processor, prompt, media)
        except ValueError as error:
            raise SkipSample(str(error)) from error
        ids = inputs["input_ids"]
        visual = torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))
        cache, seconds, shared = self._prefilled(inputs, visual)
        rest = {name: value for name, value in inputs.items() if "pixel" not in name}
        begun = self._clock()
        if likely:
            response, extra = most_likely(self.model, self.processor, rest, cache, dict(prompt.choices or {}))
        else:
            response, extra = self._written(rest, cache, max_new_tokens)
        decoded = self._clock() - begun
        numbers = mmkv.report(self.model)  # of the cache as it is when the answer is there
        return dict(
            response=response,
            **extra,
            prompt_tokens=ids.shape[1],
            vision_tokens=int(visual.sum()),
            vision_tokens_held=round(vision_tokens_held(cache), 2),
            tokens_held=round(numbers.tokens_held, 2),
            kv_bytes=numbers.kv_bytes,
            kv_bytes_dense=numbers.kv_bytes_dense,
            kv_bytes_peak=numbers.kv_bytes_peak,
            prefill_seconds=seconds,
            shared_prefill=shared,
            decode_seconds=decoded,
            peak_memory=memory.peak(self.model.device),
            prompt_hash=hashlib.sha256(rendered(self.processor, prompt).encode()).hexdigest()[:12],
        )

    def _prefilled(self, inputs: dict, visual: torch.Tensor) -> tuple[mmkv.Cache, float, bool]:
        """A compressed cache of the prompt's beginning, seconds that made it, and whether it was made for an earlier prompt."""
        ids, found = inputs["input_ids"], visual[0].nonzero()
        length = ids.shape[1]
        cut = int(found[-1]) + 1 if self.share and len(found) else length - 1
        held = self.encoded
        if held is not None and held.ids.shape[1] == cut and torch.equal(held.ids, ids[:, :cut]):
            return copy.deepcopy(held.cache), held.seconds, True
        self.encoded = None  # frees it before the next one is made
        begun = self._clock()
        cache = mmkv.Cache(self.model)
        part = {name: value[:, :cut] if value.shape == ids.shape else value for name, value in inputs.items()}
        self.model(**part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = self._clock() - begun
        if self.share and len(found):
            self.encoded = _Encoded(ids[:, :cut], cache, seconds)
            cache = copy.deepcopy(cache)
        return cache, seconds, False

    def forget(self) -> None:
        """Drop the media that are prefilled; called when the media change."""
        self.encoded = None

    def _written(self, inputs: dict, cache: mmkv.Cache, max_new_tokens: int) -> tuple[str, dict]:
        out = self.model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens)
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(), dict(new_tokens=len(new))

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
