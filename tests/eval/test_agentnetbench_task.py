"""AgentNetBench as a task: prompts, both kinds of history, metrics by hand, broken steps, and a run through the runner."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from agentnetbench_files import SIZE, action, record, step, write_folder

from mmkv.agents import AgentFormat, Parsed, get_format
from mmkv.agents.formats import image, text
from mmkv.eval import worker
from mmkv.eval.agentnetbench.task import AgentNetBench
from mmkv.eval.agentnetbench.told import ui_tars_calls
from mmkv.eval.methods import methods_of
from mmkv.eval.runner import Plan, run
from mmkv.eval.worker import Job, Work, Worker


class Telling(AgentFormat):
    """A format for tests: tells past steps by their response."""

    name = "telling"

    def messages(self, instruction, steps, screenshot):
        past = [
            part for step in steps for part in (step.screenshot and image(step.screenshot), text(f"[{step.response}]"))
        ]
        return [{"role": "user", "content": [text(instruction), *filter(None, past), image(screenshot)]}]

    def parse(self, text, size):
        return Parsed(text)


def texts(messages):
    return [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]


def test_prompts_of_opencua(tmp_path):
    """Roles and pictures at the first, third and last step; history in the annotator's words."""
    task = AgentNetBench(write_folder(tmp_path), agent="opencua")
    samples = task.samples()
    roles = [[turn["role"] for turn in task.prompt(s, task.media(s)).messages] for s in samples]
    assert roles[0] == ["system", "user"]
    assert roles[3] == ["system", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert [len(task.media(s).images) for s in samples] == [1, 2, 3, 3, 3]
    # pictures stand in the order of the turns: steps 2 and 3 of the past, then the current one
    assert [int(picture[0, 0, 0]) for picture in task.media(samples[4]).images] == [80, 120, 160]
    told = texts(task.prompt(samples[3], task.media(samples[3])).messages)
    assert told[1] == "# Step 1:\n## Thought:\nt1\n\n## Action:\nl1\n"
    assert told[-1].startswith("\n# Task Instruction:\ndo it\n")


def test_screenshots_and_format_options(tmp_path):
    agent = get_format("opencua", level="l1", history="action", max_history=1)
    task = AgentNetBench(write_folder(tmp_path), agent=agent, screenshots=1)
    last = task.samples()[-1]
    assert len(task.media(last).images) == 1
    told = texts(task.prompt(last, task.media(last)).messages)
    assert told[1:-1] == ["# Step 4:\n## Action:\nl5\n"]


def test_own_history_is_told_instead(tmp_path):
    task = AgentNetBench(write_folder(tmp_path), scorer="gui_kv", agent=Telling())
    assert task.follows and task.screenshots == 5
    third = task.samples()[2]
    past = {"a/0": "mine"}
    told = texts(task.prompt(replace(third, data={**third.data, "past": past}), task.media(third)).messages)
    assert told == ["do it", "[mine]", "[Thought: t2\nAction: hotkey(key='ctrl c')]"]  # step 1 has no answer of its own
    assert not AgentNetBench(tmp_path, agent=Telling()).follows


def test_annotated_steps_in_ui_tars_words(tmp_path):
    task = AgentNetBench(write_folder(tmp_path), agent="ui_tars")
    calls = [ui_tars_calls(s.targets, SIZE, task.agent.resize) for s in task.trajectories[0].steps]
    assert calls == [
        "drag(start_point='<point>28 28</point>', end_point='<point>140 84</point>')",
        "hotkey(key='ctrl c')",
        "click(point='<point>70 70</point>')",
        "type(content='ok\\n')",
        "finished(content='success')",
    ]
    # what it says there is read back as the right actions
    for sample, call in zip(task.samples(), calls):
        assert task.score(sample, f"Thought: x\nAction: {call}")["score"] == 1


def test_scores_by_hand(tmp_path):
    task = AgentNetBench(write_folder(tmp_path), agent="opencua", scorer="official")
    samples = task.samples()
    half = task.score(samples[0], "pyautogui.moveTo(x=28, y=28)")
    assert half["score"] == 0.5 and half["by_type"] == {"moveto": 1.0, "dragto": 0.0} and not half["correct"]
    other = task.score(samples[2], "pyautogui.hotkey('cmd', 't')")
    assert other["score"] == 1 and other["alternative"] == 0
    assert task.score(samples[1], "I press keys.")["answer"] == []
    assert task.score(samples[1], "pyautogui.click(x=1.2.3, y=5)")["score"] == 0
    assert json.dumps([half, other])


def test_summary_by_hand(tmp_path):
    other = dict(record(), task_id="b", steps=[step(1, "", action("write", text="x"), milestone=True)])
    task = AgentNetBench(write_folder(tmp_path, record(), other), agent="opencua", scorer="official")
    responses = ["pyautogui.moveTo(x=28, y=28)", "no", "pyautogui.click(x=70, y=70)", "pyautogui.write('ok')",
                 "computer.terminate(status='failure')", "pyautogui.write('x')"]  # fmt: skip
    rows = [dict(facts=s.facts, **task.score(s, r)) for s, r in zip(task.samples(), responses)]
    found = task.summary(rows)
    assert [row["score"] for row in rows] == [0.5, 0, 1, 1, 0, 1]
    assert found["average_score"] == pytest.approx(3.5 / 6)
    assert found["average_trajectory_score"] == pytest.approx((2.5 / 5 + 1) / 2)
    assert found["milestone_score"] == 0.5 and found["milestone_steps"] == 2
    assert found["total_steps"] == 6 and found["total_trajectories"] == 2
    # a step without a predicted action books no type
    assert found["action_type_scores"] == {"moveto": 1, "dragto": 0, "click": 1, "write": 1, "terminate": 0}
    assert found["group_scores"] == {"coordinate": 0.75, "content": 1.0, "function": 0.0}
    assert found["no_action"] == 1 and found["alternative_matches"] == 0
    assert found["headline"]["step score"] == pytest.approx(100 * 3.5 / 6)
    assert found["by"]["group"]["coordinate"] == {"n": 2, "score": 0.75}


def test_broken_things_are_rows_with_a_reason(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "b.json").write_text("{broken")
    (tmp_path / "images" / "a_2.png").unlink()
    task = AgentNetBench(tmp_path, agent="opencua")
    samples = task.samples()
    assert [bool(s.skipped) for s in samples] == [False, True, False, False, False, True]
    assert "image missing: 'a_2.png'" in samples[1].skipped and "b.json" in samples[5].skipped
    # later steps are asked all the same: the step without its picture is told as text
    assert [len(task.media(s).images) for s in samples[2:5]] == [2, 2, 3]
    assert samples[2].facts["history_images_missing"] == 1 and samples[4].facts["history_images_missing"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scorer="best"), "scorer 'best'; possible are corrected, official, official-2026, gui_kv"),
        (dict(history="none"), "history 'none'; possible are truth, own"),
        (dict(screenshots=0), "screenshots=0"),
        (dict(screenshots=True), "screenshots=True"),
        (dict(agent="nobody"), "format 'nobody'"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AgentNetBench(write_folder(tmp_path), **options)


class Echo:
    """Stands for `Asker`: answers with the number of past answers in the prompt, and its method."""

    def __init__(self, model, processor, method, share):
        self.method = method

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer(self, prompt, media, likely, max_new_tokens):
        return dict(response=f"{self.method.name} {' '.join(texts(prompt.messages)[1:])}")


def test_own_history_runs_in_order_and_by_method(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "Asker", Echo)
    task = AgentNetBench(write_folder(tmp_path), scorer="gui_kv", agent=Telling())
    monkeypatch.setattr(task, "begin", lambda model, processor: None)
    samples, methods = tuple(task.samples()), methods_of("kivi-2")
    work = Worker(Work(task, methods, "none"), loaded=(None, None))
    names = [m.name for m in methods]
    rows = list(work.rows(Job("a", samples, {n: tuple(s.id for s in samples) for n in names})))
    assert [(r["method"], r["id"]) for r in rows] == [(n, s.id) for n in names for s in samples]
    mine = {n: [r["response"] for r in rows if r["method"] == n] for n in names}
    assert mine["dense"][:3] == ["dense ", "dense [dense ]", "dense [dense ] [dense [dense ]]"]
    assert mine["kivi-2"][1] == "kivi-2 [kivi-2 ]"
    # resumed in the middle: the same answers, and no second rows
    left = list(work.rows(Job("a", samples, {"dense": ("a/3", "a/4")})))
    assert [(r["id"], r["response"]) for r in left] == [("a/3", mine["dense"][3]), ("a/4", mine["dense"][4])]


def test_a_run_with_a_random_model(tmp_path):
    """Through the runner: rows of both methods, true bytes, the skipped step named."""
    import torch

    from mmkv.models.tiny_agent import build

    torch.manual_seed(0)
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "images" / "a_4.png").unlink()
    task = AgentNetBench(tmp_path / "data", agent=Telling(), max_new_tokens=2)
    out = run(
        task, methods_of("kivi-2"), "none", Plan(tmp_path / "out"), loaded=(build.make_model(), build.make_processor())
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and sum("skipped" in row for row in rows) == 2
    assert out.summary["skipped"] == {"samples": 1, "reasons": {"image missing: 'a_4.png'": 1}}
    answered = [row for row in rows if "skipped" not in row]
    assert all(row["kv_bytes"] > 0 and row["prefill_seconds"] > 0 for row in answered)
    assert out.summary["methods"]["dense"]["total_steps"] == 4
    by_id = {(row["method"], row["id"]): row for row in answered}
    assert by_id["kivi-2", "a/4"]["kv_bytes"] < by_id["dense", "a/4"]["kv_bytes"]


def test_settings_tell_data_and_scoring_apart(tmp_path):
    def settings(folder, **options):
        return AgentNetBench(folder, **options).settings()

    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert settings(first) == settings(second)  # wherever it lies
    assert settings(first) != settings(first, scorer="official") != settings(first, scorer="official", history="own")
    assert settings(first) != settings(first, screenshots=1) != settings(first, agent="ui_tars")
    changed = record()
    changed["steps"][2]["ground_truth_actions"][0]["params"]["position"]["x"] = 0.26
    assert settings(write_folder(tmp_path / "c", changed)) != settings(first)
    (second / "images" / "a_1.png").unlink()
    assert settings(second) != settings(first)
