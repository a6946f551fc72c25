"""AgentNetBench with OpenCUA's port through the runner: pictures expanded, the Kimi template, plain `generate`'s words."""

from __future__ import annotations

import agent_models
import pytest
from agentnetbench_files import write_folder

from mmkv.eval.agentnetbench.task import AgentNetBench
from mmkv.eval.inputs import inputs_of
from mmkv.eval.methods import methods_of
from mmkv.eval.runner import Plan, run
from mmkv.eval.screenspot.task import ScreenSpotV2, _grounding


@pytest.fixture(scope="module")
def opencua():
    return agent_models.make("opencua")


def test_answers_are_those_of_plain_generate(tmp_path, opencua):
    model, processor = opencua
    task = AgentNetBench(write_folder(tmp_path / "data"), scorer="official", max_new_tokens=5)
    out = run(task, methods_of("kivi-2"), "none", Plan(tmp_path / "out", limit=3), loaded=opencua)
    rows = {(row["method"], row["id"]): row for row in out.rows}
    assert len(rows) == 6 and task.agent.name == "opencua" and task.agent.resize.factor == 8
    for sample in task.samples()[:3]:
        media = task.media(sample)
        prompt = task.prompt(sample, media)
        text = processor.apply_chat_template(prompt.messages, add_generation_prompt=True)
        assert text.startswith("<|im_system|>system<|im_middle|>You are a GUI agent.")
        given = processor(text=text, images=list(media.images))
        ids = model.generate(**given, max_new_tokens=5, do_sample=False)[0, given["input_ids"].shape[1] :]
        row = rows["dense", sample.id]
        assert row["response"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        tokens = int((given["image_grid_thw"].prod(-1) // 4).sum())
        assert row["vision_tokens"] == tokens > 0
        assert row["prompt_tokens"] == given["input_ids"].shape[1] - len(media.images) + tokens
        assert inputs_of(model, processor, prompt, media)["input_ids"].shape[1] == row["prompt_tokens"]
        assert rows["kivi-2", sample.id]["kv_bytes"] < 0.5 * row["kv_bytes"]


def test_grounding_prompts_come_with_the_models_format(opencua):
    from mmkv.agents import get_format

    assert _grounding(get_format("opencua")).level == "grounding"
    assert _grounding(get_format("ui_tars")).prompt == "grounding"
    assert _grounding(get_format("tiny")) == get_format("tiny")
    task = ScreenSpotV2.__new__(ScreenSpotV2)
    task.given = task.agent = None
    task.begin(*opencua)
    assert task.agent.level == "grounding" and task.agent.resize.factor == 8
