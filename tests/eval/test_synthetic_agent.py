"""The bundled set in AgentNetBench's form: the layout, the same bytes for the same seed, and that right answers score 1."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmkv.agents import Resize, get_format
from mmkv.eval import synthetic_agent
from mmkv.eval.agentnetbench.data import read_folder
from mmkv.eval.agentnetbench.rules import NAMED
from mmkv.eval.agentnetbench.task import AgentNetBench
from mmkv.models.tiny_agent.screens import SIZES
from mmkv.models.tiny_agent.sessions import HELD_OUT, make_session

SESSIONS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_agent.write_set(tmp_path_factory.mktemp("set"), SESSIONS)


def sessions():
    return [make_session(HELD_OUT + synthetic_agent.OFFSET + i, synthetic_agent.STEPS) for i in range(SESSIONS)]


def agent():
    areas = [width * height for width, height in SIZES]
    return get_format("tiny", resize=Resize(min(areas), max(areas), 16))  # as the tiny agent's processor


def test_layout_and_pictures(folder):
    found = read_folder(folder)
    assert len(found) == SESSIONS and all(len(t.steps) == synthetic_agent.STEPS for t in found)
    assert not any(t.problem or step.problem for t in found for step in t.steps)
    for trajectory, session in zip(found, sessions()):
        assert trajectory.instruction == session.instruction
        for step, drawn in zip(trajectory.steps, session.steps):
            assert np.array_equal(np.array(Image.open(step.image)), drawn.image)
            for target in step.targets:
                assert all(
                    0 <= edge <= 1 for box in target.boxes for edge in (*box[:2], box[0] + box[2], box[1] + box[3])
                )
                if target.boxes:  # the point lies in its own box
                    left, top, wide, high = target.boxes[0]
                    assert left <= target.value[0] <= left + wide and top <= target.value[1] <= top + high


def test_a_seed_gives_the_same_files(folder, tmp_path):
    def digest(place):
        return {p.relative_to(place): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(place.rglob("*.*"))}

    assert digest(synthetic_agent.write_set(tmp_path, SESSIONS)) == digest(folder)


@pytest.mark.parametrize("scorer", NAMED)
def test_right_answers_score_one(folder, scorer):
    """What the sessions say is right, in the agent's grammar; and the files' own pyautogui code, as OpenCUA writes it."""
    task = AgentNetBench(folder, scorer=scorer, agent=agent())
    right = [step.task.response for session in sessions() for step in session.steps]
    assert [task.score(s, r)["score"] for s, r in zip(task.samples(), right)] == [1.0] * len(right)
    code = AgentNetBench(folder, scorer=scorer, agent="opencua")
    samples = code.samples()
    own = [s.data["trajectory"].steps[s.data["index"]].action for s in samples]
    assert [code.score(s, text)["score"] for s, text in zip(samples, own)] == [1.0] * len(own)


def test_guikv_scores_first_actions(folder):
    task = AgentNetBench(folder, scorer="gui_kv", agent=agent())
    rows = [
        (step.task.kind, task.score(sample, step.task.response)["score"])
        for sample, step in zip(task.samples(), [step for session in sessions() for step in session.steps])
    ]
    # UI-TARS scrolls at a place, the truth moves there first: GUI-KV compares the scroll with the moving
    assert all(score == (kind != "scroll") for kind, score in rows)


def test_history_reads_as_the_agent_was_taught(folder):
    """Each earlier step is told in the very words of the right answer."""
    task = AgentNetBench(folder, screenshots=synthetic_agent.STEPS, agent=agent())
    last = [sample for sample in task.samples() if sample.data["index"] == synthetic_agent.STEPS - 1]
    for sample, session in zip(last, sessions()):
        turns = task.prompt(sample, task.media(sample)).messages
        told = [turn["content"][0]["text"] for turn in turns if turn["role"] == "assistant"]
        right = [step.task.response for step in session.steps[:-1]]
        for said, wanted in zip(told, right):
            # left and right are one amount's sign in AgentNetBench, so they come back as down and up
            ways = dict(left="down", right="up")
            for way, other in ways.items():
                wanted = wanted.replace(f"direction='{way}'", f"direction='{other}'")
            assert said == wanted
        clauses = [turn["content"][-1]["text"] for turn in turns if turn["role"] == "user"]
        assert clauses == [step.task.clause for step in session.steps]


def test_refusals(tmp_path):
    for sessions_, steps in [(0, 5), (True, 5), (2, 1), (2, 2.0)]:
        with pytest.raises(ValueError, match="possible are whole numbers"):
            synthetic_agent.write_set(tmp_path, sessions_, steps)


def test_made_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        synthetic_agent, "write_set", lambda place, n: calls.append(n) or (place / "x.json").write_text("{}")
    )
    first, again = synthetic_agent.bundled(tmp_path, 3), synthetic_agent.bundled(tmp_path, 3)
    assert first == again and calls == [3] and [p.name for p in read_names(first)] == ["x.json"]

    def broken(place, n):
        (place / "half.json").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_agent, "write_set", broken)
    with pytest.raises(KeyboardInterrupt):
        synthetic_agent.bundled(tmp_path, 4)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".") and p != first]


def read_names(folder):
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def test_the_command(tmp_path, monkeypatch):
    """`mmkv eval agentnetbench` end to end with the bundled agent on one session."""
    from mmkv.cli import app
    from mmkv.eval import command

    monkeypatch.setattr(command, "CACHE", tmp_path / "cache")
    where = tmp_path / "out"
    words = ["eval", "agentnetbench", "--sessions", "1", "--method", "kivi-2", "--out", str(where), "--threads", "1"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "kivi-2" in done.output, done.output
    rows = [json.loads(line) for line in (where / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * synthetic_agent.STEPS and not any(row.get("skipped") for row in rows)
    config = json.loads((where / "config.json").read_text())
    assert config["settings"]["screenshots"] == 5 and config["scorer"] == "agentnetbench-corrected-1"
    wrong = CliRunner().invoke(app, ["eval", "agentnetbench", "--scorer", "best"])
    assert wrong.exit_code == 2


def test_what_scores_without_looking(tmp_path):
    """Always finished: the last step of each session. A click in the middle: 5 % of the whole set."""
    task = AgentNetBench(synthetic_agent.write_set(tmp_path), agent="opencua")
    samples = task.samples()

    def mean(response):
        return np.mean([task.score(sample, response)["score"] for sample in samples])

    assert len(samples) == synthetic_agent.SESSIONS * synthetic_agent.STEPS
    assert mean("computer.terminate(status='success')") == 1 / synthetic_agent.STEPS
    assert mean("pyautogui.click(x=0.5, y=0.5)") < 0.1


@pytest.mark.slow
def test_the_bundled_agent_scores_above_what_not_looking_gives(folder):
    """Six sessions, dense, greedy; 20 % need no look."""
    from mmkv.eval.methods import methods_of
    from mmkv.eval.runner import Plan, run
    from mmkv.models import tiny_agent

    task = AgentNetBench(folder, screenshots=synthetic_agent.STEPS, max_new_tokens=64)
    out = run(task, methods_of("dense"), "tiny-agent", Plan(folder.parent / "out"), loaded=tiny_agent.load())
    assert out.summary["methods"]["dense"]["average_score"] > 0.4
