"""mmkv as a model of lmms-eval (0.7): our loading, frames, caches and measuring below its tasks, prompts and metrics.

```
python -m lmms_eval --model mmkv --tasks videomme --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=vidkv,frames=64
```

The uncompressed baseline for a comparison is the same class with `method=dense`: lmms-eval's own models have other prompts and
frame counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from mmkv._inputs import load
from mmkv.eval.asker import Asker
from mmkv.eval.engines import ranks
from mmkv.eval.lmms_chat import Request, cut, greedy, media_of, prompt_of, same_media
from mmkv.eval.media import Media
from mmkv.eval.methods import method_of
from mmkv.eval.sampling import Sampling, read_clip


class MMKVChat(lmms):
    """The chat model `mmkv` of lmms-eval: any model that mmkv loads, with one method.

    Args:
        pretrained: hub name, folder, "tiny" or "tiny-agent".
        method: as in `mmkv eval --method`, one: "dense", a preset, or `SnapKV(budget=0.25)`; in --model_args one that holds
            commas stands in quotes.
        frames: of a video, evenly spaced; 32 where neither is given.
        fps: frames a second instead.
        sampler: "linspace" or "vlmeval".
        max_pixels: larger frames are shrunk to this area, px.
        share_prefill: read a video once for consecutive requests about it, where the method needs no question.
        device, dtype: as `mmkv ask` takes them.
        batch_size, max_batch_size: 1, the only possible value.
        loaded: (model, processor) where they are there already.

    Raises:
        ValueError: another batch size, or an unknown option.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "dense",
        frames: int | None = None,
        fps: float | None = None,
        sampler: str = "linspace",
        max_pixels: int | None = None,
        share_prefill: bool = True,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        loaded: tuple[Any, Any] | None = None,
        **unknown: Any,
    ):
        if unknown:
            known = "pretrained, method, frames, fps, sampler, max_pixels, share_prefill, device, dtype"
            raise ValueError(f"model_args {', '.join(unknown)}; possible are {known}")
        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise ValueError(f"batch_size={batch_size}, max_batch_size={max_batch_size}; possible is 1")
        super().__init__()
        self._rank, self._world_size = ranks.rank_of()
        self.method = method_of(method.strip("'\""))
        self.sampling = Sampling(32 if frames is None and fps is None else frames, fps, sampler, max_pixels)
        self.share_prefill = share_prefill
        self._model, self.processor = loaded or load(pretrained, ranks.local_device(device), dtype)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self._model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests; consecutive documents that show the same share what was read of it.

        Raises:
            ValueError: a request of another shape, or one that asks for sampling or beams.
            RuntimeError: lmms-eval's `clean()` has taken the model.
        """
        if not hasattr(self, "_model"):
            raise RuntimeError("lmms-eval's clean() has taken the model; make a new MMKVChat for another evaluation")
        asked = [Request.of(request.args) for request in requests]
        order = sorted(range(len(asked)), key=lambda i: (asked[i].task, asked[i].split, asked[i].doc_id))
        out: list[Any] = [None] * len(asked)
        rows: list[dict[str, Any]] = []
        begun = time.perf_counter()
        with ExitStack() as stack:
            asker = stack.enter_context(Asker(self._model, self.processor, self.method, self.share_prefill))
            shown = _Shown(asker, self.sampling)
            for i in tqdm(order, disable=self.rank != 0, desc="Model Responding"):
                text, row = self._answer(asker, shown, asked[i])
                rows.append(row)
                self.cache_hook.add_partial("generate_until", (asked[i].context, asked[i].options), text)
                out[i] = GenerationResult(text, TokenCounts(row["prompt_tokens"], row["new_tokens"]))
        if rows:
            _log(rows, time.perf_counter() - begun, self.rank)
        return out

    def _answer(self, asker: Asker, shown: _Shown, request: Request) -> tuple[str, dict[str, Any]]:
        longest, ends = greedy(request.options)
        doc = self.task_dict[request.task][request.split][request.doc_id]
        prompt, parts = prompt_of(ChatMessages(messages=request.messages(doc)).messages)
        row = asker.answer(prompt, shown.of(parts), False, longest)
        return cut(row["response"], ends), row

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval gives chat models tasks that generate."""
        raise NotImplementedError(
            "mmkv is a chat model of lmms-eval and answers generate_until; choose a task that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: a method that compresses once cannot be compared over rounds of different prompts."""
        raise NotImplementedError("mmkv answers one round; choose a task of output_type generate_until")


class _Shown:
    """The media of the last request, decoded once for consecutive requests that show the same."""

    def __init__(self, asker: Asker, sampling: Sampling):
        self.asker = asker
        self.read = partial(media_of, sampling=sampling, read=read_clip)
        self.key: Any = None
        self.media = Media()

    def of(self, parts: Sequence[Any]) -> Media:
        key = same_media(parts)
        if key is None or key != self.key:
            self.asker.forget()  # equal prompts about other media are not the same
            self.key, self.media = key, self.read(parts)
        return self.media


def _log(rows: list[dict[str, Any]], seconds: float, rank: int) -> None:
    """Tell lmms-eval what it cost: true bytes and seconds, means over the answers."""
    tokens = sum(row["new_tokens"] for row in rows)
    means = ("kv_bytes", "kv_bytes_dense", "tokens_held", "prompt_tokens", "vision_tokens_held", "prefill_seconds",
             "decode_seconds")  # fmt: skip
    extra = {
        name: sum(row[name] for row in rows) / len(rows) for name in means if all(row[name] is not None for row in rows)
    }
    log_metrics(
        total_gen_tokens=tokens,
        total_elapsed_time=seconds,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics=dict(rank=rank, **extra),
    )
