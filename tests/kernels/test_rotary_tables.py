"""`rotary_tables` and `rotate` against transformers' own modules."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from mmkv import compat
from mmkv.kernels import rotary_tables, rotate
from mmkv.models import adapter_for


@pytest.mark.parametrize(
    ("family", "interleaved"),
    [("qwen2_vl", False), ("qwen2_5_vl", False), ("qwen3_vl", True), ("llava_onevision", False)],
)
def test_tables_are_transformers_own(family, interleaved):
    adapter = adapter_for(rm.make(family))
    module, sections = adapter.text_model.rotary_emb, compat.mrope_sections(adapter.text_config)
    ids = torch.randint(0, 9999, (adapter.axes, 50))
    want = [compat.merged_axes(t, sections) for t in module(torch.zeros(1), ids[:, None] if adapter.axes > 1 else ids)]
    axes = {"sections": sections, "interleaved": interleaved} if adapter.axes > 1 else {}
    have = rotary_tables(ids if adapter.axes > 1 else ids[0], module.inv_freq, scale=module.attention_scaling, **axes)
    for mine, theirs in zip(have, want, strict=True):
        assert torch.equal(torch.cat([mine, mine], -1), theirs)


def test_turns_are_transformers_own():
    x, angle = torch.randn(1, 2, 5, 16), torch.randn(5, 8)
    cos, sin = angle.cos(), angle.sin()
    whole = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    assert torch.equal(rotate(x, cos, sin), llama_rotary(x, x, *whole)[0])
    # GPT-J has tokens before heads and puts sines first
    theirs = gptj_rotary(x.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    assert torch.equal(rotate(x, cos, sin, interleaved=True), theirs)
