"""Decoding from packed codes makes no floating-point copy of the cache, by the allocator's own figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

import mmkv
from mmkv._presets import PRESETS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from allocations import allocated

HEADS, DIM = 8, 64  # KV heads, and their size
SHORT, LONG = 4096, 16384
COPY = 2 * LONG * HEADS * DIM * 2  # bytes of a bf16 copy of one layer's keys and values
# 8,192 tokens of a head are decoded to fp32 at a time, keys and values. Their codes and scores, and what the model itself
# allocates, take no more than that again.
BOUND = 2 * (2 * 8192 * DIM * 4)
PACKING = [name for name, preset in PRESETS.items() if preset.cache[0].formats() and name != "auto"]


@pytest.fixture(scope="module")
def model():
    """One whose attention over dense tokens is left out, since only what decoding allocates is looked at."""
    AttentionInterface.register("left_out", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    AttentionMaskInterface.register("left_out", lambda *_, **__: None)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=2 * LONG, attn_implementation="left_out",
    )  # fmt: skip
    torch.manual_seed(0)
    yield LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for functions in (AttentionInterface, AttentionMaskInterface):
        functions._global_mapping.pop("left_out")


def step_bytes(model, preset: str | None, length: int) -> int:
    """The most that one decode step allocates at a time after a prompt of so many tokens."""
    with mmkv.wrapped(model, preset), torch.no_grad():
        cache = model(torch.randint(64, (1, length)), use_cache=True, logits_to_keep=1).past_key_values
        token = torch.zeros(1, 1, dtype=torch.int64)
        model(token, past_key_values=cache)  # tables that are made once
        return allocated("cpu", lambda: model(token, past_key_values=cache)).peak


@pytest.mark.parametrize("preset", PACKING)
def test_a_decode_step_allocates_about_the_same_at_any_length(model, preset):
    short, long = (step_bytes(model, preset, length) for length in (SHORT, LONG))
    assert long < BOUND <= COPY / 4
    assert long - short < 0.04 * COPY * (1 - SHORT / LONG)  # tables of blocks grow; a copy would by 25 times as much


def test_a_copy_of_the_cache_would_be_seen(model):
    """The stock cache grows by concatenation, so a step allocates its keys anew while it holds the old ones."""
    assert step_bytes(model, None, LONG) > COPY / 2
