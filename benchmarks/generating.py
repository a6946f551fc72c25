"""One way after the other to run a whole model: a prefill, and apart from it greedy decoding."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import shapes
import torch
from allocations import allocated
from stock_graph import StockGraph
from transformers import DynamicCache

import mmkv
from mmkv._presets import PRESETS
from mmkv.parts.storage import storage_bytes

FIRST = 4  # tokens decoded before time is taken: the first of them may capture a graph
TRACED = 4  # decode steps in a trace
STOCK = "stock"


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        preset: of mmkv; None for the stock model.
        graph: "" for none; "graphs" for `wrap(graphs=True)`; "static" or "last place" for a stock model under a graph.
    """

    preset: str | None = None
    graph: str = ""

    @property
    def name(self) -> str:
        if self.preset is None:
            return f"{STOCK}, graph ({self.graph})" if self.graph else STOCK
        return f"{self.preset}, graphs" if self.graph else self.preset


class Generating:
    """A prompt read by the model and greedy decoding by `generate`, on a cache that is looked at in between.

    Args:
        model: wrapped or not.
        inputs: of the prompt.
    """

    def __init__(self, model, inputs: dict):
        self.model, self.inputs = model, inputs

    @torch.no_grad()
    def prefill(self) -> None:
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        out = self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids = torch.cat([self.inputs["input_ids"], out.logits[:, -1:].argmax(-1)], 1)

    def decode(self, tokens: int) -> None:
        self.ids = self.model.generate(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache,
            max_new_tokens=tokens, do_sample=False,
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        if hasattr(self.cache.layers[0], "tensors"):
            return [t for layer in self.cache.layers for t in layer.tensors()]
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]


def variants(presets: list[str], graphs: bool) -> list[Variant]:
    """The stock model first."""
    found = [Variant(), *(Variant(preset=name) for name in presets)]
    if graphs:
        found += [Variant(graph="static"), Variant(graph="last place")]
        found += [Variant(preset=name, graph="graphs") for name in presets]
    return found


def fitting() -> list[str]:
    """Presets for models that write text; of those that stand for the same methods, one."""
    found = {}
    for name, preset in PRESETS.items():
        if not preset.next_scale:
            found.setdefault(preset.cache, name)
    return list(found.values())


class Setting:
    """One model, length and batch: rounds over the variants.

    Args:
        model: not wrapped.
        inputs: of the prompt.
        tokens: to decode while time is taken.
        device: "cpu" or "cuda".
    """

    def __init__(self, model, inputs: dict, tokens: int, device: str):
        self.model, self.inputs, self.tokens, self.device = model, inputs, tokens, device
        self.refused: dict[str, str] = {}  # name of a variant -> why it does not run

    def run(self, variant: Variant, measure: Callable) -> dict | None:
        """What `measure` finds of a variant; None where it does not run, for a reason that is kept."""
        if variant.name in self.refused:
            return None
        try:
            with ExitStack() as stack:
                if variant.preset is not None:
                    options = dict(graphs=True) if variant.graph else {}
                    stack.enter_context(mmkv.wrapped(self.model, variant.preset, **options))
                    runner = Generating(self.model, self.inputs)
                elif variant.graph:
                    runner = StockGraph(self.model, self.inputs, FIRST + self.tokens, variant.graph)
                else:
                    runner = Generating(self.model, self.inputs)
                return measure(runner)
        except (RuntimeError, ValueError) as reason:  # out of memory, refused, not to be captured: the others go on
            self.refused[variant.name] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
            return None
        finally:
            runner = None  # its cache goes before the next one comes
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def times(self, runner) -> dict:
        """Seconds of the prefill, the tower's left out, and of a decoded token."""
        tower, clock = shapes.tower_of(self.model), []
        note = lambda *_: clock.append(self._now())  # noqa: E731
        hooks = [tower.register_forward_pre_hook(note), tower.register_forward_hook(note)]
        prefill = self._seconds(runner.prefill) - (clock[1] - clock[0])
        for hook in hooks:
            hook.remove()
        runner.decode(FIRST)
        return dict(prefill=prefill, step=self._seconds(lambda: runner.decode(self.tokens)) / self.tokens)

    def bytes(self, runner) -> dict:
        """Bytes held after the prompt, and the most that was allocated above the weights."""
        prefill = allocated(self.device, runner.prefill)
        held = storage_bytes(runner.tensors())
        decode = allocated(self.device, lambda: runner.decode(FIRST))
        return dict(kv_bytes=held, prefill_peak_bytes=prefill.peak, decode_peak_bytes=prefill.left + decode.peak)

    def trace(self, runner, stem: str, folder: Path) -> dict:
        """Chrome traces of the prefill and of some decode steps."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        for part, call in (("prefill", runner.prefill), ("decode", lambda: runner.decode(TRACED))):
            if part == "decode":
                runner.decode(FIRST)
            with torch.profiler.profile(activities=kinds) as profile:
                call()
                self._now()
            profile.export_chrome_trace(str(folder / f"{stem}-{part}.json"))
        return {}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _seconds(self, call: Callable) -> float:
        begun = self._now()
        call()
        return self._now() - begun
