"""The report: a snapshot of measured numbers, printed as a table."""

from __future__ import annotations

import dataclasses

import pytest
import random_models as rm
import torch
from cache_reference import METHODS

import mmkv


def run(model, method=None, prompts=None, new=5, **more):
    given = rm.inputs(model, prompts or [rm.default_prompt(model, 160), rm.second_prompt(model)])
    with mmkv.wrapped(model, cache=[] if method is None else [method]):
        rm.generate(model, given, new=new, **more)
        return given, mmkv.report(model)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2", "llava_onevision"])
def test_dense_numbers(family):
    model = rm.make(family)
    prompts = [rm.default_prompt(model), rm.second_prompt(model)]
    given, report = run(model, prompts=prompts)
    valid = int(given["attention_mask"].sum()) + 2 * 4  # the last token was not fed
    columns = given["input_ids"].shape[1] + 4
    per_token = 3 * 2 * 2 * 16  # layers, keys and values, heads, channels
    assert report.tokens_seen == valid
    assert report.tokens_held == valid
    assert report.kv_bytes_dense == valid * per_token * 4
    assert report.kv_bytes == 2 * columns * per_token * 4  # padding is stored as well where all is dense
    assert report.kv_bits == pytest.approx(8 * report.kv_bytes / (valid * per_token))
    assert report.tail_bytes == report.kv_bytes
    assert report.packed_bits is None
    ids = given["input_ids"]
    image, video = int((ids == rm.IMAGE).sum()), int((ids == rm.VIDEO).sum())
    assert report.tokens["image"] == image
    assert report.tokens["video"] == video
    assert sum(report.tokens.values()) == valid
    assert report.ratio == pytest.approx(report.kv_bytes_dense / report.kv_bytes)


@pytest.mark.parametrize("name", METHODS)
def test_packed_numbers(name):
    model = rm.make("qwen2", head_dim=64)
    _given, report = run(model, METHODS[name], [rm.words(600)])
    per_token = 3 * 2 * 2 * 64
    assert report.tokens_seen == report.tokens_held == 604
    assert report.kv_bytes_dense == 604 * per_token * 4
    sinks = METHODS[name].dense_sinks
    # in every layer: where sinks lie, 8 bytes each, and where each head's begin and how many they are
    places = 3 * (8 * sinks + 2 * 2 * 8) if sinks else 0
    assert (report.tail_bytes - places) % (per_token * 4) == 0
    assert report.kv_bits == pytest.approx(8 * report.kv_bytes / (604 * per_token))
    dense = report.tail_bytes // (per_token * 4)
    assert 32 <= dense - sinks < 32 + 32 + 1
    assert report.packed_bits == pytest.approx(8 * (report.kv_bytes - report.tail_bytes) / ((604 - dense) * per_token))
    assert report.ratio > 3.5


def test_padding_is_not_stored_in_packed_segments():
    model = rm.make("qwen2")
    _, report = run(model, METHODS["kivi-2"], [rm.words(300), rm.words(100, 1)], new=1)
    assert report.tokens_seen == report.tokens_held == 400


def test_timings():
    model = rm.make("qwen2")
    _, report = run(model, prompts=[rm.words(50)], new=1)
    assert report.prefill_seconds > 0
    assert report.decode_tokens_per_second is None
    _, report = run(model, prompts=[rm.words(50)], new=6)
    assert report.decode_tokens_per_second > 0


def test_a_snapshot_is_frozen():
    model = rm.make("qwen2")
    _, report = run(model, prompts=[rm.words(50)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.kv_bytes = 1


def test_it_is_of_the_last_forward():
    model = rm.make("qwen2")
    with mmkv.wrapped(model):
        rm.generate(model, rm.inputs(model, [rm.words(50)]), new=2)
        first = mmkv.report(model)
        rm.generate(model, rm.inputs(model, [rm.words(100)]), new=2)
        second = mmkv.report(model)
    assert first.tokens_seen == 51
    assert second.tokens_seen == 101
    assert second.kv_bytes > first.kv_bytes


def test_before_any_forward():
    model = rm.make("qwen2")
    with mmkv.wrapped(model, "vidkv"):
        report = mmkv.report(model)
        assert report.kv_bytes == report.tokens_seen == 0
        assert report.prefill_seconds is None
        assert "mmkv report" in str(report)


def test_windows_hold_fewer_tokens_than_were_seen():
    model = rm.make("gemma3_text")
    _, report = run(model, prompts=[rm.words(100)], new=3)
    assert report.tokens_seen == 102
    assert report.tokens_held == pytest.approx((23 + 23 + 102) / 3)


def test_prints_as_a_table():
    from rich.console import Console

    model = rm.make("qwen2_5_vl")
    _, report = run(model, METHODS["vidkv"])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    for word in ("mmkv report", "bits per element", "video", "tokens held", "decode", "dense tail"):
        assert word in text
        assert word in str(report)


def test_after_a_decode_on_a_reused_cache():
    """Prefill and decode are told apart on a second turn, too."""
    model = rm.make("qwen2")
    with mmkv.wrapped(model), torch.no_grad():
        cache = mmkv.Cache(model)
        model(**rm.inputs(model, [rm.words(60)]), past_key_values=cache)
        model(input_ids=torch.tensor([rm.words(80, 2)]), past_key_values=cache)
        report = mmkv.report(model)
    assert report.tokens_seen == 140
    assert report.decode_tokens_per_second is None
